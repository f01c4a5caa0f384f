"""An S3 server on loopback (moto's) that fails on request."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from pyarrow import fs

from raydistill import storage
from raydistill.storage import Store

BUCKET = "bucket"
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

Trouble = Callable[[str, str], str | None]
"""What happens to a request, by its method and path with query: None (nothing), `busy`, `slow` or `cut`."""


@dataclass
class Server:
    """`trouble` decides about each request; `requests` are those that came, `(method, path)`."""

    port: int = 0
    trouble: Trouble = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    slow_seconds: float = 30.0
    released: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str, part: str = "") -> int:
        """Requests of this method whose path holds `part`."""
        return sum(m == method and part in path for m, path in self.requests)

    def first(self, number: int, kind: str, *, method: str, part: str = "") -> None:
        """Let `kind` happen to the first `number` requests of this method whose path holds `part`."""
        left = [number]

        def trouble(found: str, path: str) -> str | None:
            if found == method and part in path and left[0] > 0:
                left[0] -= 1
                return kind
            return None

        self.trouble = trouble


@contextmanager
def s3_server() -> Iterator[Server]:
    """A running server with an empty bucket; the environment must point to it (`use_server`)."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:  # type: ignore[override]
            pass

    server = Server()
    application = DomainDispatcherApplication(create_backend_app)

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        server.requests.append((environ["REQUEST_METHOD"], path))
        match server.trouble(environ["REQUEST_METHOD"], path):
            case "busy":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Connection", "close")])
                return [BUSY]
            case "slow":
                server.released.wait(server.slow_seconds)
            case "cut":
                raise ConnectionResetError("cut in the middle of the request")
        return application(environ, start_response)  # type: ignore[no-any-return]

    http = make_server("127.0.0.1", 0, guarded, threaded=True, request_handler=Quiet)
    server.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        thread.join()


def use_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process's S3 clients to `server` and make the bucket."""
    for key, value in {
        "AWS_ACCESS_KEY_ID": "planted-key",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
    }.items():
        monkeypatch.setenv(key, value)
    client = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{server.port}", scheme="http", allow_bucket_creation=True, region="us-east-1"
    )
    client.create_dir(BUCKET)
    deadline = time.monotonic() + 5
    while client.get_file_info(BUCKET).type != fs.FileType.Directory:
        assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def s3_running() -> Iterator[Server]:
    """One server for a module's tests."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server without trouble, which this process's clients speak to; stores are asked again at once."""
    s3_running.trouble = lambda method, path: None
    use_server(s3_running, monkeypatch)
    s3_running.requests.clear()
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.01, 0.01, 0.01, 0.01))
    return s3_running


@pytest.fixture
def far_store(s3: Server, request: pytest.FixtureRequest) -> Store:
    """A folder of its own for a test."""
    return Store(f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}")
