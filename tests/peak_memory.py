"""Resident memory at its largest, mapped files included: of a process that is started, or of a part of this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


class PeakMemory:
    """`with PeakMemory() as peak: ...`; then `peak.bytes` is how far the process rose over where it began."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) << 10
