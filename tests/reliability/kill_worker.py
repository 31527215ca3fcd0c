"""Saves that are killed: `python kill_worker.py FOLDER`. Prints one JSON line; any wrong state is listed in it.

One engine is built; each attempt is a forked child of it that dies by SIGKILL, so an attempt costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import torch
from toy import Toy, toy_batch

from ofa_ds import checkpoint
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed
from ofa_ds.storage import direct_file

TIMED_KILLS = 100
BACKGROUND_KILLS = 120
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int, folder: Path) -> None:
    """SIGKILL this process as it is about to do its `number`-th operation on a file below `folder`."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == number:
            die()

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(str(folder)):
            count()

    def counted(call: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            count()
            return call(*arguments)

        return wrapped

    direct_file._STAGE_BYTES = direct_file.BLOCK_BYTES  # as many writes as there can be
    os.fsync, os.pwrite, os.ftruncate = (counted(call) for call in (os.fsync, os.pwrite, os.ftruncate))
    sys.addaudithook(hook)


def in_child(action: Callable[[], None]) -> tuple[int, int]:
    """(pid of a child that runs `action`, read end of a pipe that closes when it ends)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        return child, read_end
    try:
        action()
        os._exit(0)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
        os._exit(3)


def state(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model_weights(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(engine: Engine, step: int) -> None:
    batch = toy_batch(step, 0)
    engine.backward(engine(batch).sum() / batch.count)
    engine.step()


def judge(run_dir: Path, allowed: dict[int, dict[str, torch.Tensor]], what: str) -> tuple[int, list[str]]:
    """The step of the newest checkpoint, and what is wrong with it."""
    newest = checkpoint.latest(run_dir)
    if newest is None:
        return 0, [f"{what}: no checkpoint is left"]
    step = checkpoint.describe(newest)["step"]
    wrong = [f"{what}: {problem}" for problem in checkpoint.verify(newest)]
    if step not in allowed or not same(state(newest), allowed[step]):
        wrong.append(f"{what}: step {step} does not hold what was saved")
    return step, wrong


def every_operation(engine: Engine, pristine: Path, run_dir: Path, allowed: dict, problems: list[str]) -> list[int]:
    """Kill the save of step 3 at its 1st, 2nd, ... file operation until one survives: step found after each."""

    def attempt(number: int) -> None:
        kill_at(number, run_dir)
        checkpoint.save(engine, run_dir, 3, extra={}, keep=1)

    found, killed = [], True
    while killed:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(pristine, run_dir)
        child, pipe = in_child(lambda: attempt(len(found) + 1))
        _, status = os.waitpid(child, 0)
        os.close(pipe)
        killed = os.WIFSIGNALED(status)
        if not killed and os.WEXITSTATUS(status):
            problems.append(f"operation {len(found) + 1}: the save failed")
        step, wrong = judge(run_dir, allowed, f"operation {len(found) + 1}")
        problems += wrong
        found.append(step)
    return found


def background_kills(engine: Engine, run_dir: Path, allowed: dict) -> list[str]:
    """SIGKILL the trainer at random moments while another process writes for it; what is wrong afterwards."""

    def save_again() -> None:
        saver = checkpoint.BackgroundSaver(engine, run_dir, keep=1)
        while True:
            for step in (4, 5):
                saver.start(step, {})
                saver.finish()
                if saver.failure:
                    raise RuntimeError(saver.failure)

    problems = []
    for n in range(BACKGROUND_KILLS):
        child, pipe = in_child(save_again)
        time.sleep(random.Random(n).uniform(0.05, 0.35))  # the writing process takes a tenth of a second to start
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(pipe)
        if not os.WIFSIGNALED(status):
            problems.append(f"background kill {n}: the save failed by itself")
        problems += judge(run_dir, allowed, f"background kill {n}")[1]
    return problems


def writer_killed(engine: Engine, run_dir: Path) -> dict[str, str | None]:
    """What is said where only the writing process dies, and whether the next save works."""
    saver = checkpoint.BackgroundSaver(engine, run_dir, keep=3)
    saver.start(11, {})
    saver.finish()
    saver._snapshot._process.send_signal(signal.SIGSTOP)  # so that it cannot be done before it is killed
    saver.start(12, {})
    saver._snapshot._process.kill()
    found = {"finished": str(saver.finish()), "failure": saver.failure, "newest": checkpoint.latest(run_dir).name}
    saver.start(13, {})
    found |= {"again": str(saver.finish().name), "failure again": saver.failure}
    saver.close()
    return found


def refusals(engine: Engine, run_dir: Path) -> dict[str, str]:
    """What is said where a save or a load cannot be done."""
    found: dict[str, str] = {}

    def told(name: str, action: Callable[[], object]) -> None:
        try:
            action()
            found[name] = "nothing was said"
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    for step in (7, 8):
        checkpoint.save(engine, run_dir, step, extra={}, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the disk takes no more
    told("full disk", lambda: checkpoint.save(engine, run_dir, 9, extra={}))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["after full disk"] = str(checkpoint.latest(run_dir).name)
    newest = checkpoint.latest(run_dir)
    kept = engine.module.blocks
    engine.module.blocks = kept[:2]
    told("another model", lambda: checkpoint.load(engine, newest))
    engine.module.blocks = kept
    damaged = newest / "rank_00000.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    told("damaged", lambda: checkpoint.load(engine, newest))
    manifest = checkpoint.resume(engine, run_dir)
    found["resumed step"] = str(manifest and manifest.step)
    return found


def main(folder: Path) -> None:
    ranks = init_distributed("cpu")
    batch, optim, steps = BatchConfig(global_rows=3, micro_rows=3), OptimConfig(eps=1e-6), TrainConfig(num_steps=9)
    config = load_deepspeed_config("zero3")
    engine = build(lambda: Toy(), deepspeed=config, optim=optim, batch=batch, train=steps, ranks=ranks)
    run_dir = folder / "run"
    allowed = {}
    for step in (1, 2):
        train(engine, step)
        allowed[step] = state(checkpoint.save(engine, run_dir, step, extra={}, keep=1))
    train(engine, 3)
    allowed[3] = state(checkpoint.save(engine, folder / "other", 3, extra={}))
    problems: list[str] = []

    operations = []
    for again in (False, True):  # a new step, and a step that is there already
        pristine = folder / f"pristine_{again}"
        shutil.copytree(run_dir, pristine)
        if again:
            checkpoint.save(engine, pristine, 3, extra={}, keep=2)
        operations.append(every_operation(engine, pristine, folder / f"attempt_{again}", allowed, problems))

    def save_again() -> None:
        while True:
            for step in (4, 5):
                checkpoint.save(engine, run_dir, step, extra={}, keep=1)

    allowed |= {4: allowed[3], 5: allowed[3]}
    for n in range(TIMED_KILLS):
        child, pipe = in_child(save_again)
        time.sleep(random.Random(n).uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        problems += judge(run_dir, allowed, f"timed kill {n}")[1]
    problems += background_kills(engine, run_dir, allowed)
    leftovers = sorted(path.name for path in run_dir.iterdir())
    checkpoint.save(engine, run_dir, 6, extra={}, keep=1)
    after = sorted(path.name for path in run_dir.iterdir())
    print(json.dumps({
        "refusals": refusals(engine, folder / "refusals"),
        "operations": operations, "timed": TIMED_KILLS + BACKGROUND_KILLS, "problems": problems,
        "writer": writer_killed(engine, folder / "writer"),
        "leftovers": leftovers, "after": after,
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
