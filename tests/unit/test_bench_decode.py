"""`bench decode`: all ways give the same picture, of a file as of drawn ones; a file without JPEGs is told."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ofa_ds.bench import decode
from ofa_ds.bench.__main__ import main
from ofa_ds.bench.photo_rows import photograph


def test_ours_are_pillows_pixels_and_the_scaled_ones_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SIZES", ((900, 961),))
    line = f"one\t{base64.b64encode(photograph(np.random.default_rng(0), (800, 800))).decode()}\ta dog\n"
    (tmp_path / "rows.tsv").write_text(line * 2)
    result = decode.bench_decode(tmp_path / "rows.tsv", 2, 1)
    assert [each["pictures"] for each in result.values()] == [1, 1, 2, 2]
    for name, each in result.items():
        assert min(each["ms"].values()) > 0 and each["apart"]["exact, Pillow"]["most"] <= 2
        scaled = each["apart"]["dct_scaled, exact"]
        assert (0 < scaled["mean"] < 1.6) if "whole" in name or "900" in name else scaled["most"] == 0
    assert all(name in decode.table(result) for name in result)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_prints_a_table_or_json(
    form: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "SIZES", ((40, 30),))
    monkeypatch.setattr(sys, "argv", ["bench", "decode", "--pictures", "1", "--repeats", "1", *form])
    main()
    text = capsys.readouterr().out
    assert len(json.loads(text)) == 2 if form else "40 x 30, whole as 384 x 384" in text


def test_a_file_without_jpegs_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("one\tYWJj\na\n")
    with pytest.raises(ValueError, match="rows.tsv: want JPEGs in base64 in the second column, found none"):
        decode.bench_decode(tmp_path / "rows.tsv", 2, 1)
