"""Pretraining from a hostfile, on two hosts, through launchers/pretrain.sh: real sshd, agents, DeepSpeed, trainer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import hosts
import pytest

OVERRIDES = (
    "data.shards=shards",
    "data.vocab=vocab",
    "data.workers=0",
    "batch.micro_rows=12",
    "batch.global_rows=24",
    "optim.warmup_steps=1",  # a rate that moves the weights, so that later losses see the first steps' gradients
    "train.num_steps=4",
    "train.log_every=1",
)
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("two_hosts")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, two_hosts: hosts.Cluster) -> Path:
    """A working directory with shards of scenes, a vocabulary and a hostfile."""
    path = tmp_path_factory.mktemp("multihost")
    tsv = path / "tsv"
    sources = [f"--{name}={tsv}/{name.replace('-', '_')}_examples.tsv" for name in ("vision-language", "text", "image")]
    sources += [f"--detection={tsv}/detection_examples.tsv", f"--negatives={tsv}/negative_sample", "--workers=1"]
    for arguments in (
        ["scenes", "--out", "tsv", "--rows", "48", "--seed", "3"],
        ["shards", "build", "--out", "shards", *sources],
        ["vocab", "train", "--shards", "shards", "--size", "320", "--codes", "128", "--bins", "1000", "--out", "vocab"],
    ):
        subprocess.run([sys.executable, "-m", "ofa_ds.cli", *arguments], cwd=path, env=hosts.run_env(), check=True)
    (path / "hosts").write_text("# two hosts, one rank each\nroot@10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    return path


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: value for name, value in row.items() if name.startswith("loss")} for row in rows}


def test_two_hosts_give_the_losses_of_one_process(desk: Path, two_hosts: hosts.Cluster) -> None:
    script = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh")]
    command = [*script, "hosts", "pretrain-nano", "run_dir=two", *OVERRIDES]
    result = two_hosts.run(command, timeout=300, cwd=desk, env=hosts.launch_env(two_hosts))
    assert result.returncode == 0, result.stdout
    assert "ofa-ds launch: attempt 1 done" in result.stdout.splitlines()

    alone = [sys.executable, "-m", "ofa_ds.pretrain", "pretrain-nano", "run_dir=one", *OVERRIDES]
    subprocess.run(alone, cwd=desk, env=hosts.run_env(), check=True, timeout=300)

    for host in ("10.77.0.1", "10.77.0.2"):
        name = f"environment-{'root@' * (host == '10.77.0.1')}{host}.log"
        logged = (desk / "two" / "launch" / "logs" / "attempt-001" / name).read_text().splitlines()
        assert {"MASTER_ADDR=10.77.0.1", "GLOO_SOCKET_IFNAME=eth0", "NCCL_IB_DISABLE=1"} <= set(logged)
        assert not [line for line in logged if "ATTEMPT" in line]

    two, one = losses(desk / "two"), losses(desk / "one")
    assert sorted(two) == sorted(one) == [1, 2, 3, 4]
    for step, expected in one.items():
        assert len(expected) == 9 and expected.keys() == two[step].keys()
        for name, value in expected.items():
            assert math.isclose(two[step][name], value, rel_tol=1e-5), (step, name, two[step][name], value)
    assert one[4]["loss"] < one[1]["loss"]  # it trained: equal numbers of a model that stands still would say little
    parts = sorted((desk / "two").glob("step_*/*.safetensors"))
    assert len(parts) == 2, parts  # ZeRO-3: each rank saved its own half


def test_a_failure_on_one_host_fails_the_command(desk: Path, two_hosts: hosts.Cluster) -> None:
    script = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh")]
    overrides = [override for override in OVERRIDES if not override.startswith("data.vocab=")]
    command = [*script, "hosts", "pretrain-nano", "run_dir=no", *overrides, "data.vocab=nowhere"]
    result = two_hosts.run(command, timeout=120, cwd=desk, env=hosts.launch_env(two_hosts))
    assert result.returncode in (1, 2), result.stdout
    assert "nowhere" in result.stdout
    assert f"ofa-ds launch: ended with exit code {result.returncode}: " in result.stdout
