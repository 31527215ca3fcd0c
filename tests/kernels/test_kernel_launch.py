"""The short way to a kernel's build ends in the launch that triton's own way ends in, for every kind of argument."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("launch_worker.py")


def test_a_kept_build_is_the_one_that_triton_chooses_and_no_size_of_a_batch_has_builds_of_its_own() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}  # which ours set themselves
    done = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "same launches" in done.stdout, done.stderr
