"""A record whose own bytes are damaged: told apart from everything else that may go wrong at a row.

Damage is the same for whoever reads the record, and whenever; a machine's failure, or a setting that does not fit the
data, is not.
"""

from __future__ import annotations


class CorruptRecord(RuntimeError):
    """What is stored cannot be what was written; the message says where and why, in one line."""
