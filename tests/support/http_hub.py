"""A smart-HTTP Git server on the loopback: ``git http-backend`` behind Python's HTTP server.

Real Git on both sides; in between, faults as a bad network or a bad server would make them.
"""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 16


@dataclass
class Faults:
    """What goes wrong; may be changed while the server runs.

    Attributes:
        on: Only requests whose address contains this are hit.
        status: Answer with this HTTP status and nothing else.
        cut_after: Close the connection after so many bytes of the answer's body.
        garbage: Answer with these bytes in place of Git's.
        flood: Send these bytes again and again, without end.
        stall: Send nothing until it is set.
        seen: The requests that came, as ``METHOD address``.
        logins: The Authorization headers that came with them.
    """

    on: str = ""
    status: int | None = None
    cut_after: int | None = None
    garbage: bytes | None = None
    flood: bytes | None = None
    stall: threading.Event | None = None
    seen: list[str] = field(default_factory=list)
    logins: set[str] = field(default_factory=set)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, login: str | None, private: bool, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.login, self.private, self.faults = root, login, private, faults
        self.closing = threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is many small writes
    server: _Server

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        faults = self.server.faults
        faults.seen.append(f"{self.command} {self.path}")
        faults.logins |= set(self.headers.get_all("Authorization", []))
        hit = faults.on in self.path
        if not self._may():
            return self._refuse(401)
        if hit and faults.stall is not None:
            while not (faults.stall.wait(0.05) or self.server.closing.is_set()):
                pass
        if hit and faults.status is not None:
            return self._refuse(faults.status)
        if hit and faults.garbage is not None:
            return self._garbage(faults.garbage)
        if hit and faults.flood is not None:
            return self._flood(faults.flood)
        return self._git(faults.cut_after if hit else None)

    def _may(self) -> bool:
        writes = "git-receive-pack" in self.path
        if self.server.login is None or not (writes or self.server.private):
            return True
        return self.headers.get("Authorization") == f"Basic {self.server.login}"

    def _refuse(self, status: int) -> None:
        for _ in self._body():
            pass
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="hub"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _git_type(self) -> str:
        if self.command == "GET":
            return f"application/x-{self.path.rpartition('service=')[2]}-advertisement"
        return f"application/x-{self.path.rpartition('/')[2]}-result"

    def _garbage(self, garbage: bytes) -> None:
        for _ in self._body():
            pass
        self.send_response(200)
        self.send_header("Content-Type", self._git_type())
        self.send_header("Content-Length", str(len(garbage)))
        self.end_headers()
        self.wfile.write(garbage)

    def _flood(self, drops: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", self._git_type())
        self.send_header("Connection", "close")
        self.end_headers()
        while not self.server.closing.is_set():
            self.wfile.write(drops)

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (data := self.rfile.read(min(left, CHUNK))):
            left -= len(data)
            yield data

    def _git(self, cut_after: int | None) -> None:
        backend = subprocess.Popen(
            ["git", "http-backend"],
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        feeder = threading.Thread(target=self._feed, args=(backend.stdin,), daemon=True)
        feeder.start()
        try:
            self._relay(backend.stdout, cut_after)
        finally:
            backend.stdout.close()
            backend.wait()
            if not self.close_connection:
                feeder.join()

    def _environment(self) -> dict[str, str]:
        path, _, query = self.path.partition("?")
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REMOTE_ADDR": "127.0.0.1",
            # Whoever may not push has been refused already.
            "REMOTE_USER": "pusher",
        }
        for variable, header in {
            "CONTENT_TYPE": "Content-Type",
            "CONTENT_LENGTH": "Content-Length",
            "HTTP_CONTENT_ENCODING": "Content-Encoding",
            "HTTP_GIT_PROTOCOL": "Git-Protocol",
        }.items():
            if value := self.headers.get(header):
                env[variable] = value
        return env

    def _feed(self, stdin) -> None:
        # The whole body must be read, even if Git has given up, or no client sees the answer.
        broken = False
        with contextlib.suppress(OSError, ValueError):
            for data in self._body():
                try:
                    broken or stdin.write(data)
                except OSError:
                    broken = True
        with contextlib.suppress(OSError):
            stdin.close()

    def _relay(self, stdout, cut_after: int | None) -> None:
        headers = {}
        while line := stdout.readline().strip().decode():
            name, _, value = line.partition(":")
            headers[name.title()] = value.strip()
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunked, sent = "Content-Length" not in headers, 0
        while data := stdout.read1(CHUNK):
            if cut_after is not None and sent + len(data) > cut_after:
                self._write(data[: cut_after - sent], chunked)
                self.close_connection = True
                return
            self._write(data, chunked)
            sent += len(data)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, data: bytes, chunked: bool) -> None:
        if data:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)


@contextlib.contextmanager
def serve(
    root: Path,
    *,
    user: str | None = None,
    password: str = "",
    private: bool = False,
    faults: Faults | None = None,
) -> Iterator[str]:
    """Serve the bare repositories below ``root``; gives the base address.

    With a ``user``, pushing needs the login, and with ``private`` reading does as well.
    """
    login = base64.b64encode(f"{user}:{password}".encode()).decode() if user else None
    server = _Server(root, login, private, faults or Faults())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
