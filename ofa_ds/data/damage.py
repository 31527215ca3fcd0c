"""A record whose own bytes are damaged: told apart from everything else that may go wrong at a row.

Damage is the same for whoever reads the record, and whenever; a machine's failure, or a setting that does not fit the
data, is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofa_ds.data.image import decode


class DamagedRecord(RuntimeError):
    """What is stored cannot be what was written; the message says where and why, in one line."""


def damage(row: Mapping[str, Any] | None, error: Exception) -> str:
    """Why a row that `error` came of is damaged by itself; empty where the fault is not the record's.

    row: as `Shards.row` gives it, None where it could not be read.
    """
    if row is None:
        return str(error) if isinstance(error, DamagedRecord) else ""
    if row.get("image"):  # of a downstream row without a picture it is empty
        try:
            decode(row["image"])
        except ValueError as problem:
            return str(problem)
    return ""
