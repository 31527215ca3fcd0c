"""What a runner leaves behind on the launching host is found by the attempt's own mark, and nothing else is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from ofa_ds.cluster import processes

ORPHAN = """
import subprocess
quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
print(subprocess.Popen(["sleep", "60"], start_new_session=True, **quiet).pid)
"""


def orphan(value: str) -> int:
    """A sleep in a session of its own, whose parent is gone, started with the mark in its environment."""
    environment = {**os.environ, "OFA_TEST_MARK": value}
    done = subprocess.run([sys.executable, "-c", ORPHAN], env=environment, capture_output=True, timeout=30)
    return int(done.stdout)


def gone(pid: int) -> bool:
    until = time.monotonic() + 10
    while processes.state(pid) != "X" and time.monotonic() < until:
        time.sleep(0.02)
    return processes.state(pid) == "X"


def test_an_orphan_in_a_session_of_its_own_is_ended_by_the_mark_and_another_attempts_is_not():
    mine, other = orphan("one"), orphan("one-more")
    try:
        assert processes.having("OFA_TEST_MARK", "one") == {mine}
        processes.kill_all_having("OFA_TEST_MARK", "one")
        assert gone(mine) and processes.state(other) != "X"
    finally:
        os.kill(other, signal.SIGKILL)
