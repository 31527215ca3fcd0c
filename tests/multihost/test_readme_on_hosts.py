"""launchers/README.md from its hostfile to its checkpoint, as pasted, on two hosts and from the place of a newcomer."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hosts
import pytest
import scenes_shards

pytestmark = pytest.mark.long

PAGE = hosts.ROOT / "launchers/README.md"
IN_ORDER = (
    "cp launchers/hostfile",
    "ofa-ds launch --hostfile hosts --dry-run",
    "ofa-ds launch --hostfile hosts --retries 3",
    "ofa-ds runs watch runs/first --json",
)


@pytest.fixture
def checkout(tmp_path: Path, two_hosts: hosts.Cluster) -> Path:
    """What a newcomer has in the current directory: the launchers, and the data that the quick start makes."""
    scenes = scenes_shards.build(tmp_path / "data/scenes", 24)
    shutil.move(scenes / "shards", scenes / "train")
    shutil.copytree(hosts.ROOT / "launchers", tmp_path / "launchers")
    two_hosts.hostfile(tmp_path / "launchers/hostfile.example")
    return tmp_path


def test_the_page_leads_from_a_hostfile_to_a_checkpoint(checkout: Path, two_hosts: hosts.Cluster) -> None:
    blocks = PAGE.read_text(encoding="utf-8").split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.partition("```")[0].splitlines()]
    env = hosts.launch_env(two_hosts)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    said = {}
    for start in IN_ORDER:
        (command,) = [line for line in lines if line.startswith(start) and "pretrain-nano run_dir=runs/t" not in line]
        done = two_hosts.run(["bash", "-c", command], host=two_hosts.login, timeout=300, cwd=checkout, env=env)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        said[start] = done.stdout
    dry = said[IN_ORDER[1]]
    assert all(host.name in dry for host in two_hosts.hosts) and "train.num_steps=4" in dry
    assert list((checkout / "runs/first").glob("step_*4/manifest.json"))
    assert '"is_over": true' in said[IN_ORDER[3]]
    logs = sorted(place.name for place in (checkout / "runs/first/launch/logs/attempt-001").iterdir())
    assert logs == ["environment-h1.log", "environment-h2.log", "h1.log", "h2.log"]
    two_hosts.wait_until_nothing_is_left()
