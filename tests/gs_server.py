"""A Google Cloud Storage server on loopback (gcp-storage-emulator's) that is busy on request.

    python tests/gs_server.py FOLDER

It is a process of its own, since some calls of pyarrow's client wait for their answer while they keep Python's lock.
FOLDER/port then holds its port, and as many requests are answered with 503 as FOLDER/busy says.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raydistill import storage
from raydistill.storage import Store

BUCKET = "bucket"


@dataclass(frozen=True)
class GsServer:
    """A running server; the environment of a process points to it (`gs`)."""

    folder: Path
    port: int

    def busy(self, number: int) -> None:
        """Answer the next `number` requests with 503."""
        (self.folder / "busy").write_text(str(number))

    @property
    def still_busy(self) -> int:
        """Requests that will yet be answered with 503."""
        return int((self.folder / "busy").read_text())


@pytest.fixture(scope="module")
def gs_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GsServer]:
    """One server for a module's tests, with credentials of a made-up user."""
    folder = tmp_path_factory.mktemp("gs")
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stderr=(folder / "log").open("w"))
    try:
        deadline = time.monotonic() + 60
        while not (folder / "port").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = int((folder / "port").read_text())
        user = {"client_id": "planted-id", "client_secret": "planted-secret", "refresh_token": "planted-token"}
        token = {"type": "authorized_user", "token_uri": f"http://127.0.0.1:{port}/token"}
        (folder / "credentials.json").write_text(json.dumps(user | token))
        yield GsServer(folder, port)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def gs(gs_running: GsServer, monkeypatch: pytest.MonkeyPatch) -> GsServer:
    """A server without trouble, which this process's clients speak to; stores are asked again at once."""
    gs_running.busy(0)
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{gs_running.port}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(gs_running.folder / "credentials.json"))
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.01, 0.01, 0.01, 0.01))
    return gs_running


@pytest.fixture
def gs_store(gs: GsServer, request: pytest.FixtureRequest) -> Store:
    """A folder of its own for a test."""
    return Store(f"gs://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}")


def serve(folder: Path) -> None:
    """Serve an empty bucket until the process is stopped."""
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    (folder / "busy").write_text("0")

    class Handler(RequestHandler):  # type: ignore[misc]
        def do_POST(self) -> None:
            if self.path == "/token":
                self.rfile.read(int(self.headers["Content-Length"]))
                token = {"access_token": "planted-access", "expires_in": 3600, "token_type": "Bearer"}
                self.answer(200, json.dumps(token).encode())
            elif not self.refused():
                super().do_POST()

        def do_GET(self) -> None:
            if not self.refused():
                super().do_GET()

        def do_PUT(self) -> None:
            if not self.refused():
                super().do_PUT()

        def refused(self) -> bool:
            left = int((folder / "busy").read_text())
            if left > 0:
                (folder / "busy").write_text(str(left - 1))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(503, b"busy")
            return left > 0

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    files = Storage(use_memory_fs=True)
    create_bucket(BUCKET, files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files))
    (folder / "port.part").write_text(str(server.server_port))
    (folder / "port.part").rename(folder / "port")
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
