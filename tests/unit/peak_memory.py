"""How far a test makes this process rise in memory."""

from __future__ import annotations

from pathlib import Path


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
