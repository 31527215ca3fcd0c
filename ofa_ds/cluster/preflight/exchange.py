"""What a host does in one round of exchanges: a process a GPU (without GPUs one) joins a group, and takes the time.

Sent to the host with the probe. torch is imported once, by `probe.load`; a round's processes are forked from there, so
one that hangs is killed and the next round starts fresh.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import time
import traceback
from datetime import timedelta
from typing import Any

_PR_SET_PDEATHSIG = 1


def take_part(round_of: dict[str, Any]) -> dict[str, Any]:
    """{"seconds": [one a process, None where it did not finish], "error": the first failure's text}."""
    deadline = time.monotonic() + round_of["within_s"]
    children = {}
    for index in range(len(round_of["devices"])):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become_rank(round_of, index, writing)
        os.close(writing)
        children[reading] = (pid, index)
    answers = _collect(children, deadline)
    errors = [answer["error"] for answer in answers.values() if answer.get("error")]
    seconds = [answers.get(index, {}).get("seconds") for index in range(len(round_of["devices"]))]
    return {"seconds": seconds, "error": errors[0] if errors else ""}


def _collect(children: dict[int, tuple[int, int]], deadline: float) -> dict[int, dict[str, Any]]:
    """Index -> what that process said before the deadline. All have ended afterwards. Word from stdin ends it: while
    an answer is owed nothing is asked, so that is the end of the channel.
    """
    answers: dict[int, dict[str, Any]] = {}
    said = dict.fromkeys(children, b"")
    waiting = set(children)
    try:
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = select.select([0, *waiting], [], [], left)[0]
            if 0 in ready:
                break
            for pipe in ready:
                piece = os.read(pipe, 1 << 16)
                said[pipe] += piece
                if not piece:
                    waiting.remove(pipe)
    finally:
        for pipe, (pid, _) in children.items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pipe)
    for pipe, (_, index) in children.items():
        if said[pipe].endswith(b"\n"):
            answers[index] = json.loads(said[pipe])
    return answers


def _become_rank(round_of: dict[str, Any], index: int, writing: int) -> None:
    """Of the forked process: never returns."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(round_of["environment"])
        answer = {"seconds": _measured(round_of, index)}
    except BaseException as error:
        answer = {"error": " ".join(traceback.format_exception_only(type(error), error)[-1].split())[:300]}
    os.write(writing, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _measured(round_of: dict[str, Any], index: int) -> float:
    """Seconds of the fastest repetition."""
    import torch
    import torch.distributed as dist

    within = timedelta(seconds=round_of["within_s"])
    on_gpu = round_of["backend"] == "nccl"
    if on_gpu:
        torch.cuda.set_device(round_of["devices"][index])
    store = dist.TCPStore(round_of["address"], round_of["port"], is_master=False, timeout=within)
    rank, world_size = round_of["first_rank"] + index, round_of["world_size"]
    dist.init_process_group(
        round_of["backend"], store=dist.PrefixStore(round_of["prefix"], store), rank=rank, world_size=world_size,
        timeout=within,
    )  # fmt: skip
    step = len(round_of["devices"])
    device = "cuda" if on_gpu else "cpu"
    out = torch.ones(round_of["num_bytes"] // 4, device=device)
    into = torch.empty_like(out)
    fastest = float("inf")
    for repetition in range(round_of["repeats"] + 1):
        dist.barrier()
        started = time.monotonic()
        if round_of["how"] == "ring":
            sending = dist.P2POp(dist.isend, out, (rank + step) % world_size)
            receiving = dist.P2POp(dist.irecv, into, (rank - step) % world_size)
            works = dist.batch_isend_irecv([receiving, sending])
        else:
            works = [dist.all_reduce(out, async_op=True)]
        works[0].wait()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        for work in works[1:]:
            work.wait()
        if repetition:  # the first one makes connections
            fastest = min(fastest, seconds)
    return fastest
