"""`bench data`: every format gives back the rows it was given, and a format that does not is found out."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ofa_ds.bench import data_formats
from ofa_ds.bench.data_peers import FORMATS, OURS, TSV, Format, Opened, installed
from ofa_ds.bench.data_records import LISTS, Records, digest, flat, unflat
from ofa_ds.bench.photo_rows import photograph


def test_every_installed_format_is_written_read_and_compared() -> None:
    arguments = ["data", "--records", "40", "--repeats", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ofa_ds.bench", *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    names = [kind.name for kind in FORMATS if kind.name not in result["missing"]]
    assert {OURS, TSV, "Parquet"} <= set(names) and list(result["written"]) == names
    assert all(min(each) > 0 for found in result["read"].values() for each in found.values())
    assert f"{TSV}, at random" in result["ratios"] and "Parquet, in order" in result["ratios"]
    text = data_formats.table(result)
    assert "All gave back the rows" in text and all(name in text for name in result["missing"])


def test_lines_of_a_tsv_file_are_taken_in_place_of_drawn_ones(tmp_path: Path) -> None:
    columns = [
        "one",
        base64.b64encode(photograph(np.random.default_rng(0))).decode(),
        "a dog",
        "",
        "",
        "",
        "",
        "caption",
    ]
    (tmp_path / "rows.tsv").write_text("\t".join(columns) + "\n")
    records = Records(9, tmp_path / "rows.tsv")
    assert len(records) == 1 and records[0]["caption"] == "a dog"
    assert data_formats.bench_formats(9, 1, tmp_path / "rows.tsv")["rows"] == 1
    with pytest.raises(OSError, match="none.tsv"):
        Records(3, tmp_path / "none.tsv")


def test_a_format_that_changes_one_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = next(kind for kind in FORMATS if kind.name == OURS)

    def changed(folder: Path) -> Opened:
        opened = ours.open(folder)
        assert opened.row
        return Opened(lambda i: opened.row(i) | ({"question": "?"} if i == 7 else {}))  # type: ignore[misc]

    monkeypatch.setattr(data_formats, "FORMATS", (ours, Format("another", "ofa_ds", ours.write, changed)))
    with pytest.raises(RuntimeError, match=re.escape("another, at random: checksum ")):
        data_formats.bench_formats(12, 1, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lists_kept_as_json_come_back() -> None:
    row = Records(2)[1]
    assert digest(unflat(flat(row))) == digest(row) and not set(LISTS) & set(flat(row))


def test_what_is_not_installed_is_left_out() -> None:
    assert installed("pyarrow") and not installed("no_such_format")
