"""What `cluster/notices.py` does when a cloud gives notice: a stand-in for the metadata server and one for `ray`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/notices.py"
RAY = """#!/bin/sh
echo "$*" >> "$CALLS"
[ "$(wc -l < "$CALLS")" -eq 2 ]
"""
RAY_MODULE = """
import os
from types import SimpleNamespace

def init(address, **options):
    print("a line of Ray's own")
    with open(os.environ["CALLS"] + "-init", "a+") as calls:
        calls.write(".")
        calls.seek(0)
        assert calls.read() == "..", "fails at first"
    assert address == "10.0.0.1:6379"

def get_runtime_context():
    return SimpleNamespace(get_node_id=lambda: "abc")
"""


class Metadata(ThreadingHTTPServer):
    """Fails at first, then says that there is no notice, then gives it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self.answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60" else 400, "secret")

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        times = len(self.server.asked)
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "secret":
                self.answer(401, "")
            else:
                self.answer((503, 404, 200)[times - 1], '{"action": "terminate", "time": "2030-01-01T00:00:00Z"}')
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self.answer((503, 200, 200)[times - 1], ("", "FALSE", "TRUE")[times - 1])
        else:
            self.answer(403, "")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=20)


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 110), ("gcp", 25)])
def test_the_node_is_drained_at_the_notice_in_spite_of_trouble(
    metadata: Metadata, tmp_path: Path, cloud: str, seconds: int
) -> None:
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "ray.py").write_text(RAY_MODULE)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(tmp_path),
        "RAYDISTILL_METADATA": f"http://127.0.0.1:{metadata.server_port}", "RAYDISTILL_METADATA_SECONDS": "0.01",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), cloud, "10.0.0.1:6379"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    call = (
        "drain-node --address 10.0.0.1:6379 --node-id abc --reason DRAIN_NODE_REASON_PREEMPTION "
        f"--reason-message {cloud} takes its spot node --deadline-remaining-seconds "
    )
    first, second = (tmp_path / "calls").read_text().splitlines()  # the first one fails
    assert first == f"{call}{seconds}"
    assert seconds - 20 < int(second.removeprefix(call)) < seconds
    assert len(metadata.asked) == 3
    assert "503" in done.stdout
