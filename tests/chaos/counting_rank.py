"""A rank that trains nothing: the protocol of one - lease, beats, checkpoints, exit codes - in a second, without torch.

Its "weights" are a hash that each step mixes from all ranks' contributions, so they depend on every step, the number of
ranks at it, and nothing else: `weights_after` says what they must be. Ranks meet at rank 0 over TCP, where one that is
gone is felt as in a collective: connections break, and where they do not, all wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

STEP_S = 0.3
SAVE_EVERY = 2
STOPPED = 130


def contribution(weights: str, step: int, rank: int, world_size: int) -> str:
    return hashlib.sha256(f"{weights} {step} {rank} {world_size}".encode()).hexdigest()


def mixed(weights: str, contributions: Iterable[str]) -> str:
    return hashlib.sha256(" ".join([weights, *contributions]).encode()).hexdigest()


def weights_after(world_sizes: dict[int, int], left_out: Iterable[int]) -> str:
    """world_sizes: of each step, from 1 on; left_out: steps from which nothing was learnt."""
    weights = "start"
    for step, world_size in sorted(world_sizes.items()):
        if step not in left_out:
            weights = mixed(weights, [contribution(weights, step, rank, world_size) for rank in range(world_size)])
    return weights


class Star:
    """One line of text of each rank to all, through rank 0."""

    def __init__(self, rank: int, world_size: int, address: str, port: int) -> None:
        self._rank = rank
        self._peers = []
        if rank == 0:
            with socket.create_server(("", port)) as server:
                accepted = [server.accept()[0].makefile("rw") for _ in range(world_size - 1)]
            self._peers = [peer for _, peer in sorted((int(peer.readline()), peer) for peer in accepted)]
            return
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = socket.create_connection((address, port), timeout=5)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        connection.settimeout(None)
        self._peers = [connection.makefile("rw")]
        self._send(self._peers[0], str(rank))

    def exchange(self, text: str) -> list[str]:
        """What every rank said, by rank. Raises ConnectionError where one is gone."""
        if self._rank == 0:
            said = [text, *map(self._receive, self._peers)]
            for peer in self._peers:
                self._send(peer, json.dumps(said))
            return said
        self._send(self._peers[0], text)
        return json.loads(self._receive(self._peers[0]))

    def _send(self, peer, text: str) -> None:
        peer.write(text + "\n")
        peer.flush()

    def _receive(self, peer) -> str:
        line = peer.readline()
        if not line:
            raise ConnectionError("Connection closed by peer")
        return line.rstrip("\n")


def newest(run_dir: Path) -> tuple[int, str]:
    for folder in sorted(run_dir.glob("step_*"), reverse=True):
        try:
            content = json.loads((folder / "manifest.json").read_text())
            return content["step"], content["weights"]
        except (OSError, ValueError, KeyError):
            continue
    return 0, "start"


def save(run_dir: Path, step: int, weights: str, *, is_last: bool) -> None:
    """Raises RuntimeError where the last one fails; another is tried again later."""
    draft = run_dir / f".draft_{step}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        (draft / "manifest.json").write_text(json.dumps({"step": step, "weights": weights}))
        target = run_dir / f"step_{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if is_last:
            raise RuntimeError(f"no checkpoint of step {step}: {error}") from error
        print(f"CHECKPOINT FAILED: {error}", file=sys.stderr, flush=True)


def train(options: dict[str, str], place: dict[str, str], orders) -> int:
    from ofa_ds.beat import Pulse
    from ofa_ds.storage.lease import take

    rank, world_size = int(place["RANK"]), int(place["WORLD_SIZE"])
    pulse = Pulse(rank)
    run_dir = Path(options["run_dir"])
    lease = take(run_dir) if rank == 0 else None
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        star = Star(
            rank, world_size, place["MASTER_ADDR"], int(place["MASTER_PORT"]) + 1
        )  # torchrun has that one itself
        return _steps(options, run_dir, star, orders, pulse, asked)
    finally:
        if lease is not None:
            lease.release()


def _steps(options: dict[str, str], run_dir: Path, star: Star, orders, pulse, asked: list[int]) -> int:
    num_steps, left_out = int(options["train.num_steps"]), json.loads(options.get("train.skip_steps", "[]"))
    step, weights = json.loads(star.exchange(json.dumps(newest(run_dir)))[0])
    rank, stopping = orders.rank, False
    pulse.beat("start", step)
    while step < num_steps and not stopping:
        time.sleep(STEP_S)
        orders.step = step + 1
        bad = orders.step in left_out
        if not bad:
            orders.raise_if_due()
        said = [json.loads(one) for one in star.exchange(json.dumps([not bad and orders.is_nan_due(), bool(asked)]))]
        bad |= any(is_nan for is_nan, _ in said)
        stopping = any(is_asked for _, is_asked in said)
        world_size = len(said)
        parts = star.exchange(contribution(weights, step + 1, rank, world_size))
        step += 1
        if not bad:
            weights = mixed(weights, parts)
        pulse.beat("step", step)
        is_last = stopping or step == num_steps
        if rank == 0 and (step % SAVE_EVERY == 0 or is_last):
            save(run_dir, step, weights, is_last=is_last)
    star.exchange("end")
    return STOPPED if step < num_steps else 0


def main(arguments: list[str]) -> int:
    from sitecustomize import Orders

    from ofa_ds.beat import write_error
    from ofa_ds.engine.rendezvous import rendezvous

    place = rendezvous(os.environ)
    options = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    try:
        return train(options, place, Orders(os.environ["OFA_CHAOS"], int(place["RANK"])))
    except Exception as error:
        write_error(int(place["RANK"]), error)
        raise


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.orig_argv)
    except Exception:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
