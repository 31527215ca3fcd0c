"""Stands before an S3 service and answers some requests as services, networks and thieves of bytes do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Fault = Callable[[str, str], str | None]
"""From method and path of a request to what goes wrong with it; None for nothing."""

_XML = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} was asked for</Message></Error>'
_ANSWERS = {
    "500": "500 Internal Server Error InternalError", "503": "503 Service Unavailable ServiceUnavailable",
    "slow down": "503 Slow Down SlowDown", "expired": "400 Bad Request ExpiredToken",
    "forbidden": "403 Forbidden AccessDenied", "gone": "404 Not Found NoSuchKey",
}  # fmt: skip


class FaultyService:
    """`fault` may be changed at any time; `seen` is (method, path, what went wrong) of each request."""

    def __init__(self, target: str) -> None:
        self.fault: Fault = lambda method, path: None
        self.seen: list[tuple[str, str, str | None]] = []
        self.waiting = threading.Event()
        """Set where a request gets no answer."""
        self._target = target.rpartition("/")[2].split(":")
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = [self._socket]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(1 << 16)):
                    return
                head += data
            method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
            what = self.fault(method, path)
            self.seen.append((method, path, what))
            if what == "stall":
                self.waiting.set()
                return
            if what in _ANSWERS:
                self._answer(client, method, _ANSWERS[what])
            elif what == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self._forward(client, head, what)
            client.close()

    def _answer(self, client: socket.socket, method: str, answer: str) -> None:
        status, _, code = answer.rpartition(" ")
        body = "" if method == "HEAD" else _XML.format(code=code)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())

    def _forward(self, client: socket.socket, head: bytes, what: str | None) -> None:
        """cut: half of the body, and the end. flip: one byte of it is another."""
        with socket.create_connection(self._target) as service:
            service.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            answer = b""
            while data := service.recv(1 << 16):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        if what == "cut":
            body = body[: len(body) // 2]
        elif what == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        client.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n" + body)


@contextmanager
def faulty_service(target: str) -> Iterator[FaultyService]:
    """Before the service at `target`, http://HOST:PORT."""
    service = FaultyService(target)
    try:
        yield service
    finally:
        service.close()
