"""Encoding by real processes: killed and gone on with, by three or by one, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_vqgan import tiny_vqgan

from ofa_ds.data.scenes import write_scenes

ROWS = 240


def command(source: Path, out: Path, model: Path, workers: int) -> list[str]:
    words = ("-m", "ofa_ds.cli", "codes", "encode", source, "--model", model, "--out", out, "--workers", workers)
    return [sys.executable, *map(str, words)]


def lines_there(work: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in work.glob(".journal/items.codes-*.txt"))


def test_killed_with_three_workers_and_gone_on_with_three_gives_the_bytes_of_one_process(tmp_path: Path) -> None:
    model = tiny_vqgan(tmp_path / "vqgan")
    write_scenes(tmp_path, rows=8 * ROWS, seed=1)
    source, out, work = tmp_path / "image_examples.tsv", tmp_path / "new.tsv", tmp_path / ".building_new.tsv"
    subprocess.run(command(source, tmp_path / "whole.tsv", model, 1), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command(source, out, model, 3), start_new_session=True, stderr=subprocess.PIPE)
    try:
        while lines_there(work) < 5 and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)  # its workers go with it
        process.communicate(timeout=60)
        before = lines_there(work)
        assert process.returncode == -signal.SIGKILL and not out.exists() and 5 <= before < ROWS
    finally:
        if process.poll() is None:
            process.kill()
    subprocess.run(command(source, out, model, 3), check=True, capture_output=True, timeout=300)
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
