"""A link to a service that takes its time: `python -m ofa_ds.bench.slow_link HOST:PORT MILLISECONDS MB_PER_S`.

Prints its own port. All connections together get MB_PER_S; each answer, and each connection, takes MILLISECONDS more.
"""

from __future__ import annotations

import asyncio
import sys

_PIECE_BYTES = 1 << 16


class Link:
    """One for all connections: what is sent down at a time."""

    def __init__(self, host: str, port: int, delay_s: float, bytes_per_s: float) -> None:
        self._to, self._delay_s, self._rate = (host, port), delay_s, bytes_per_s
        self._free_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.sleep(self._delay_s)  # the handshake
            down, up = await asyncio.open_connection(*self._to)
            await asyncio.gather(self._carry(reader, up, 0.0, capped=False),
                                 self._carry(down, writer, self._delay_s, capped=True))  # fmt: skip
        except OSError:
            pass
        finally:
            writer.close()

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, delay_s: float, *, capped: bool
    ) -> None:
        """Pieces travel one behind another: what is on its way does not keep the next from being sent."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._arrive(under_way, target))
        now = asyncio.get_running_loop().time
        try:
            while data := await source.read(_PIECE_BYTES):
                sent_at = now()
                if capped:
                    self._free_at = sent_at = max(self._free_at, sent_at) + len(data) / self._rate
                    await asyncio.sleep(sent_at - now())
                under_way.put_nowait((sent_at + delay_s, data))
        finally:
            under_way.put_nowait((now() + delay_s, b""))
            await arriving

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        while True:
            at, data = await under_way.get()
            await asyncio.sleep(at - now())
            if not data:
                target.close()
                return
            target.write(data)
            await target.drain()


async def main(target: str, delay_ms: str, mb_per_s: str) -> None:
    host, _, port = target.rpartition(":")
    link = Link(host, int(port), float(delay_ms) / 1e3, float(mb_per_s) * 1e6)
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
