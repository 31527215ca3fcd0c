"""A pickle of plain values (OFA's lists of answers, RefCOCO's refs), read without running anything of it.

A pickle is a program for a stack machine, and some of its instructions import and call whatever they name. Here the
few that lists, tables, texts and numbers consist of are carried out; every other one is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

MAX_COPIED = 1_000_000
"""Values in lists and tables that a pickle may use a second time: some bytes can name themselves 10**30 times over."""

_MARK = object()


def loads(data: bytes) -> Any:
    """Lists, dicts, texts, numbers, None. Raises ValueError "byte N: reason" for anything else."""
    machine = _Machine()
    position = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                if position + 1 != len(data):
                    raise _Refused("something follows the pickle")
                (found,) = machine.stack
                return found
            if opcode.name not in _STEPS:
                raise _Refused(f"the instruction {opcode.name} has no place in plain values; nothing was run")
            _STEPS[opcode.name](machine, argument)
    except _Refused as error:
        raise ValueError(f"byte {position}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"after byte {position}: not a pickle, or a damaged one: {error!r:.120}") from error
    raise ValueError(f"byte {len(data)}: ends before its pickle does")


class _Refused(Exception):
    pass


class _Machine:
    """A stack, a memo, and the instructions of `_STEPS`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self._copy(self.memo[place]))

    def _copy(self, value: Any) -> Any:
        """Nothing is shared in what is read, so that its size is what it looks like."""
        if not isinstance(value, list | dict):
            return value
        self.copied += len(value) + 1
        if self.copied > MAX_COPIED:
            raise _Refused(f"uses more than {MAX_COPIED} values of lists and tables again")
        if isinstance(value, list):
            return [self._copy(each) for each in value]
        return {key: self._copy(each) for key, each in value.items()}

    def old_text(self, value: str) -> None:
        """Python 2's text is bytes, which `pickletools` gives as Latin-1."""
        self.stack.append(value.encode("latin-1").decode())

    def since_mark(self) -> list[Any]:
        at = next(k for k in range(len(self.stack) - 1, -2, -1) if k < 0 or self.stack[k] is _MARK)
        if at < 0:
            raise IndexError("no mark")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("no list to append to")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError("no table to add to")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):
                raise _Refused(f"want texts as keys, got the key {key!r:.60}")
            if key in target:
                raise _Refused(f"the key {key!r:.60} is there twice")
            target[key] = value

    def dictionary(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.old_text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.push(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push([]),
    "TUPLE": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE1": lambda machine, _: machine.push(machine.popped(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.popped(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.popped(3)),
    "DICT": lambda machine, _: machine.dictionary(machine.since_mark()),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.popped(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.popped(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
}  # fmt: skip
"""Tuples become lists."""
