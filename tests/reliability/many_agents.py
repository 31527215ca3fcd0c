"""As many agents as there are ranks, in one process: what Slurm starts on hundreds of hosts, as the parent sees it.

python many_agents.py NUM_RANKS       OFA_AGENT says where to
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys

from ofa_ds.cluster.link import PARENT, unpack


async def agent(rank: int, address: str, port: int, token: str) -> None:
    reader, writer = await asyncio.open_connection(address, port, limit=1 << 22)

    def send(**message: object) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    host = f"node{rank // 8}"
    send(kind="hello", token=token, name=str(rank), host=host, pid=1, port=29500, address="", rank=rank)
    job = json.loads(await reader.readline())
    assert job["kind"] == "beat" or job["kind"] == "job"
    stop = asyncio.Event()

    async def beats() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            row = {"rank": rank, "pid": 1, "phase": "step", "step": step, "age_s": 0.1, "state": "R"}
            send(kind="beat", engine="S", ranks=[row])
            send(kind="log", text=f"[{rank}] step {step}\n")
            await asyncio.sleep(1)

    beating = asyncio.create_task(beats())
    while line := await reader.readline():
        message = json.loads(line)
        if message["kind"] == "signal":
            stop.set()
            how = {"code": 130, "signal": 0, "tail": "", "error": None, "phase": "end", "step": 9}
            send(kind="exit", rank=rank, pid=1, at_s=1.0, **how)
            send(kind="engine", code=0)
        if message["kind"] == "kill":
            send(kind="gone", left=[], gave_up="")
            await writer.drain()
            break
    await beating if stop.is_set() else beating.cancel()
    writer.close()


async def garbage(address: str, port: int) -> None:
    """Whoever else finds the port: it is dropped, and costs nothing."""
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "hello", "token": "guess", "rank": 0}\n', b"x" * 100_000, b""):
        reader, writer = await asyncio.open_connection(address, port)
        try:
            writer.write(words)
            assert words == b"" or await reader.read() == b"", "somebody answered"
        except ConnectionError:
            pass


async def main(num_ranks: int) -> None:
    addresses, port, token = unpack(os.environ[PARENT])
    strangers = asyncio.create_task(garbage(addresses[0], port))
    await asyncio.gather(*(agent(rank, addresses[0], port, token) for rank in range(num_ranks)))
    strangers.cancel()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(int(sys.argv[1])))
