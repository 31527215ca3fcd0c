"""Resident memory of a process at its largest, pages mapped from files included."""

from __future__ import annotations

import subprocess
import sys

_STARTER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=2)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_MiB(*arguments: str) -> float:
    """Of Python with these arguments. A small process starts it: what a child's starter held counts as the child's."""
    command = [sys.executable, "-c", _STARTER, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout) / 1024
