"""The original's list of answers, a pickle (`trainval_ans2label.pkl`), read without running anything of it."""

from __future__ import annotations

from pathlib import Path

from ofa_ds.data import plain_pickle
from ofa_ds.data.answer_list import checked_answers, in_order

MAX_BYTES = 256 << 20


def read_answer_pickle(path: Path) -> tuple[str, ...]:
    """The answers by their number. Raises ValueError "file: reason": another content, or any other instruction."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path}: has {size} bytes; a list of answers has at most {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    try:
        found = plain_pickle.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; or give the answers as text, one a line") from error
    if not isinstance(found, dict | list):
        raise ValueError(f"{path}: holds {type(found).__name__}, want {{answer: number}} or a list of answers")
    if not found:
        raise ValueError(f"{path}: the list has no answer")
    return checked_answers(in_order(found, str(path)) if isinstance(found, dict) else found, f"{path}: answer ")
