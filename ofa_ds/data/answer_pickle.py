"""The original's list of answers, a pickle (`trainval_ans2label.pkl`), read without running anything of it.

A pickle is a program for a stack machine, and some of its instructions import and call whatever they name. Here the
few that a plain {answer: number} or list of answers consists of are carried out; every other one is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa_ds.data.answer_list import checked_answers, in_order

MAX_BYTES = 256 << 20
_MARK = object()


def read_answer_pickle(path: Path) -> tuple[str, ...]:
    """The answers by their number. Raises ValueError "file: reason": another content, or any other instruction."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path}: has {size} bytes; a list of answers has at most {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    found = _Machine(path).run(data)
    if not isinstance(found, dict | list):
        raise ValueError(f"{path}: holds {type(found).__name__}, want {{answer: number}} or a list of answers")
    if not found:
        raise ValueError(f"{path}: the list has no answer")
    return checked_answers(in_order(found, str(path)) if isinstance(found, dict) else found, f"{path}: answer ")


class _Machine:
    """A stack, a memo, and the instructions of `_STEPS`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        position = 0
        try:
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self.end(data, position)
                if opcode.name not in _STEPS:
                    raise ValueError(
                        f"{self.path}: byte {position}: the instruction {opcode.name} has no place in a list of "
                        "answers; nothing was run; give the answers as text, one a line"
                    )
                _STEPS[opcode.name](self, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
            raise ValueError(f"{self.path}: byte {position}: a damaged pickle ({type(error).__name__})") from error
        except ValueError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}: not a pickle, or a damaged one: {error}") from error
        raise ValueError(f"{self.path}: ends before its pickle does")

    def end(self, data: bytes, position: int) -> Any:
        if position + 1 != len(data):
            raise ValueError(f"{self.path}: byte {position + 1}: something follows the pickle")
        (found,) = self.stack
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def old_text(self, value: str) -> None:
        """Python 2's text is bytes, which `pickletools` gives as Latin-1."""
        self.stack.append(value.encode("latin-1").decode())

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target += values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"{self.path}: want {{answer: number}}, got the key {key!r:.60}")
            if key in target:
                raise ValueError(f"{self.path}: the answer {key[:60]!r} is there twice")
            target[key] = value

    def dictionary(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def popped(self, count: int) -> list[Any]:
        if len(self.stack) <= count:
            raise IndexError
        found = self.stack[-count:]
        del self.stack[-count:]
        return found


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.old_text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "MARK": lambda machine, _: machine.push(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "DICT": lambda machine, _: machine.dictionary(machine.since_mark()),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.popped(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.popped(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
}  # fmt: skip
