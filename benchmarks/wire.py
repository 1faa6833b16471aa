"""A loopback Git server over smart HTTP whose traffic is counted to the byte, headers included."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.http_hub import serve

CHUNK = 1 << 16


@dataclass
class Wire:
    """Bytes between the clients and the server since the last ``reset``.

    Attributes:
        url: Base address; repositories lie below it by their folder's name.
        sent: From clients to the server.
        received: From the server to clients.
    """

    url: str = ""
    sent: int = 0
    received: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Count from here."""
        with self.lock:
            self.sent = self.received = 0

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        """Count what is about to be passed on."""
        with self.lock:
            self.sent += sent
            self.received += received


class _Proxy(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, wire: Wire) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.port, self.wire = port, wire


class _Relay(socketserver.BaseRequestHandler):
    server: _Proxy

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            there = threading.Thread(target=self._pass, args=(self.request, upstream, "sent"))
            there.start()
            self._pass(upstream, self.request, "received")
            there.join()

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        # Either end may hang up first; what was passed on until then has been counted.
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self.server.wire.add(**{way: len(data)})
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def counted(root: Path) -> Iterator[Wire]:
    """Serve the bare repositories below ``root`` and count."""
    wire = Wire()
    with serve(root) as address, _Proxy(urlsplit(address).port or 80, wire) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        wire.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        try:
            yield wire
        finally:
            proxy.shutdown()
            thread.join()
