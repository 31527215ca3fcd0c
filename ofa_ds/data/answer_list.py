"""The list of candidate answers that shards of a downstream task carry: its order decides ties."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from ofa_ds.storage import strict_json
from ofa_ds.storage.atomic import new_file

FILE = "answers.json"


def read_answer_list(folder: Path, checksum: str) -> tuple[str, ...]:
    """The answers of a directory of shards; () where its manifest names none (checksum empty).

    Raises RuntimeError, with the file, where it is damaged or not the manifest's.
    """
    if not checksum:
        return ()
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RuntimeError(f"{path}: is missing; copy or build the shards again") from error
    if xxhash.xxh3_64_hexdigest(data) != checksum:
        raise RuntimeError(f"{path}: its checksum is not the manifest's; copy or build the shards again")
    return tuple(json.loads(data))


def write_answer_list(path: Path, answers: Sequence[str]) -> str:
    """A JSON list, an answer a line, so that its line numbers are theirs. -> its checksum.

    Raises ValueError where something is at `path`.
    """
    lines = ",\n".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
    data = f"[\n{lines}\n]\n".encode()
    with new_file(path) as partial:
        partial.write_bytes(data)
    return xxhash.xxh3_64_hexdigest(data)


@lru_cache(maxsize=1)
def listed(folder: Path, checksum: str) -> frozenset[str]:
    """The answers of `read_answer_list`, to look one up; read once for all rows of a process."""
    return frozenset(read_answer_list(folder, checksum))


def best_answer(answers: Sequence[tuple[str, float]]) -> str:
    """The answer that training aims at: the first of the highest confidence."""
    return max(answers, key=lambda answer: answer[1])[0]


def read_answers_file(path: Path) -> tuple[str, ...]:
    """A user's list: text, an answer a line; or JSON (*.json), a list or {answer: its place}, of any numbers.

    Raises ValueError "file:line: reason" (no line of {answer: its place}): an answer that is empty or there twice.
    """
    if path.suffix in (".pkl", ".pickle"):
        convert = f"ofa-ds shards answers {path} --out {path.with_suffix('.json').name}"
        raise ValueError(f"{path}: is a pickle, which may run any program when it is read; convert it with: {convert}")
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: {error.reason}") from error
    if path.suffix == ".json":
        return _json_answers(path, text)
    if "\r" in text:
        line = text[: text.index("\r")].count("\n") + 1
        raise ValueError(f"{path}:{line}: a carriage return is in the line; want LF line ends alone")
    return checked_answers(text.removesuffix("\n").split("\n"), f"{path}:")


def checked_answers(answers: Iterable[Any], place: str) -> tuple[str, ...]:
    """Raises ValueError "<place><number>: reason" for an answer that is empty, there twice, or no text.

    Also for one that begins or ends with a blank: what a model says is judged without, so that it could never be right.
    """
    seen: dict[str, int] = {}
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str) or not _is_utf8(answer):
            raise ValueError(f"{place}{number}: want text, got {answer!r:.60}")
        if not answer.strip():
            raise ValueError(f"{place}{number}: the answer is empty")
        if answer != answer.strip():
            raise ValueError(f"{place}{number}: the answer {answer[:60]!r} begins or ends with a blank; take it away")
        if (first := seen.setdefault(answer, number)) != number:
            raise ValueError(f"{place}{number}: the answer {answer[:60]!r} is there already, as number {first}")
    return tuple(seen)


def _is_utf8(text: str) -> bool:
    """No half of a surrogate pair, which JSON and pickles can write."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def in_order(places: dict[Any, Any], where: str) -> list[Any]:
    """The keys of {answer: its place}, by place. Raises ValueError where places are no different whole numbers."""
    for answer, place in places.items():
        if not isinstance(place, int) or isinstance(place, bool):
            raise ValueError(f"{where}: want {{answer: whole number}}, got {place!r:.60} for {answer!r:.60}")
    if len(set(places.values())) < len(places):
        seen: dict[int, Any] = {}
        twice = next(answer for answer, place in places.items() if seen.setdefault(place, answer) is not answer)
        raise ValueError(f"{where}: {seen[places[twice]]!r:.60} and {twice!r:.60} have one number, {places[twice]}")
    return sorted(places, key=places.__getitem__)


def _json_answers(path: Path, text: str) -> tuple[str, ...]:
    try:
        found = strict_json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: want JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: want JSON: {error}") from error
    if found in ([], {}):
        raise ValueError(f"{path}: the list has no answer")
    if isinstance(found, dict):
        return checked_answers(in_order(found, str(path)), f"{path}: answer ")
    if not isinstance(found, list):
        raise ValueError(f"{path}: want a list of answers or {{answer: its place}}")
    try:
        return checked_answers(found, "")
    except ValueError as error:
        number, _, reason = str(error).partition(": ")
        raise ValueError(f"{path}:{_line_of(text, int(number))}: {reason}") from error


def _line_of(text: str, number: int) -> int:
    """The line on which the `number`-th value of a JSON list ends."""
    decoder, end = json.JSONDecoder(), text.index("[")
    for _ in range(number):
        start = re.compile(r"[\s,]*").match(text, end + (text[end] in "[,")).end()
        _, end = decoder.raw_decode(text, start)
    return text.count("\n", 0, end) + 1
