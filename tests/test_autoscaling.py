"""A submitted job on a cluster that grows from its head alone, loses nodes, and shrinks again.

The nodes are real Ray nodes on this machine, started by Ray's autoscaler through its provider for one machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from test_reliability import ENVIRONMENT, ROOT, answers, content, finish, free_port, problem, trained, write_config

pytestmark = pytest.mark.slow
__all__ = ["problem"]
HEAD_NODE = "f" * 51 + "00000"
IDLE_MINUTES = 0.2


@dataclass
class Growing:
    """A head and whatever the autoscaler adds to it."""

    address: str
    """Of the job server."""
    gcs: str
    file: Path
    """The file that the cluster was made with."""

    def raylets(self) -> list[psutil.Process]:
        """The main process of every node but the head, oldest first."""
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            words = process.info["cmdline"] or []
            if words and Path(words[0]).name == "raylet" and any(self.gcs in word for word in words):
                found.append(process)
        return sorted(found, key=lambda p: p.info["create_time"])[1:]


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    port, dashboard = free_port(), free_port()
    import ray._private.services

    ip = ray._private.services.get_node_ip_address()
    config = {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ip}:{port}",
            "head_node_id": HEAD_NODE,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "workers": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config))
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=0",
    ]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"]
    command += [f"--autoscaling-config={file}", "--disable-usage-stats"]
    environment = ENVIRONMENT | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
    }
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    made = Growing(f"http://127.0.0.1:{dashboard}", f"{ip}:{port}", file)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{made.address}/api/version"):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield made
    finally:
        nodes = made.raylets()
        process.terminate()
        process.wait(timeout=60)
        for node in nodes:  # their provider is gone, so nobody else stops them
            with_children = [node, *node.children(recursive=True)] if node.is_running() else []
            for one in with_children:
                if one.is_running():
                    one.kill()


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


@pytest.mark.fault(
    "a job on a cluster that grows loses a node in the teacher stage and one in training",
    "same cache bytes, same fp32 weights to the bit; the cluster shrinks to its head",
)
def test_a_submitted_job_makes_the_cluster_grow_survives_two_lost_nodes_and_lets_it_shrink(
    problem: Path,
    tmp_path: Path,
    growing: Growing,
) -> None:
    calm = tmp_path / "calm"
    finish(write_config(problem, calm, workers=2, actors=(2, 2)))
    assert growing.raylets() == []
    config = write_config(problem, tmp_path / "rough", workers=2, actors=(2, 2))
    command = [sys.executable, str(ROOT / "cluster/submit.py"), "--address", growing.address, "--id", "rough", "--"]
    command += [sys.executable, "-m", "raydistill.run", config.name, f"resources.cluster={growing.file}"]
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=ENVIRONMENT, cwd=config.parent)
    points: list[tuple[str, Callable[[], bool]]] = [
        ("three shards", lambda: len(list(tmp_path.glob("rough/cache/toy-*/records/*.json"))) >= 3),
        ("ten steps", lambda: trained(tmp_path / "rough") >= 10),
    ]
    for what, reached in points:
        wait_until(reached, job, what)
        assert growing.raylets(), "nothing can run on the head"
        os.kill(growing.raylets()[0].pid, signal.SIGKILL)
    status = job.wait(timeout=500)
    assert status == 0, (tmp_path / "job.log").read_text()[-3000:]
    assert "perplexity" in (tmp_path / "job.log").read_text()
    assert content(tmp_path / "rough") == content(calm)
    deadline = time.monotonic() + 60 * IDLE_MINUTES + 120
    while growing.raylets():
        assert time.monotonic() < deadline, "the idle nodes were never removed"
        time.sleep(1)
