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
from test_elastic import samples
from test_reliability import (
    ENVIRONMENT,
    ROOT,
    answers,
    content,
    finish,
    free_port,
    losses,
    own_folder,
    problem,
    trained,
    write_config,
)

pytestmark = pytest.mark.slow
__all__ = ["problem"]
HEAD_NODE = "f" * 51 + "00000"
IDLE_MINUTES = 0.2
Points = list[tuple[str, Callable[[], bool]]]
"""Where a node is killed: what has been reached by then."""


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
    environment = (
        ENVIRONMENT
        | own_folder()
        | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
        }
    )
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


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str], what: str, log: Path) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert job.poll() is None, f"the job ended before {what}: {log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"waited in vain for {what}: {log.read_text()[-5000:]}"
        time.sleep(0.05)


def run_disturbed(growing: Growing, words: list[str], log: Path, points: Points) -> None:
    """Submit a run and kill the oldest node at each point; then wait until all nodes are gone.

    The cluster has no node but its head when the job comes, and the head takes no work. No working folder is sent: the
    nodes, which here share one disk, would unpack it in one place, and each node that comes would first remove what is
    there, with others working in it.
    """
    assert growing.raylets() == []
    environment = growing.file.with_name("environment.yaml")
    environment.write_text("{}")
    command = [sys.executable, str(ROOT / "cluster/submit.py"), "--address", growing.address, "--id", "rough"]
    command += ["--runtime-env", str(environment), "--"]
    command += [sys.executable, "-m", "raydistill.run", *words, f"resources.cluster={growing.file}"]
    with log.open("w") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, text=True, env=ENVIRONMENT)
    for what, reached in points:
        wait_until(reached, job, what, log)
        assert growing.raylets(), "nothing can run on the head"
        os.kill(growing.raylets()[0].pid, signal.SIGKILL)
    status = job.wait(timeout=800)
    assert status == 0, log.read_text()[-3000:]
    assert "perplexity" in log.read_text()
    deadline = time.monotonic() + 60 * IDLE_MINUTES + 120
    while growing.raylets():
        assert time.monotonic() < deadline, "the idle nodes were never removed"
        time.sleep(1)


@pytest.mark.fault(
    "a job on a cluster that grows loses a node in the teacher stage and one in training",
    "same cache bytes, same fp32 weights to the bit; the cluster shrinks to its head",
)
def test_a_submitted_job_makes_the_cluster_grow_survives_two_lost_nodes_and_lets_it_shrink(
    problem: Path,
    tmp_path: Path,
    growing: Growing,
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    finish(write_config(problem, calm, workers=2, actors=(2, 2)))
    config = write_config(problem, rough, workers=2, actors=(2, 2))
    points: Points = [
        ("three shards", lambda: len(list(rough.glob("cache/toy-*/records/*.json"))) >= 3),
        ("ten steps", lambda: trained(rough) >= 10),
    ]
    run_disturbed(growing, [str(config)], tmp_path / "job.log", points)
    assert content(rough) == content(calm)


SHORTENED = (
    # The job has no working folder (see above), so data are named by their whole path.
    f"source.paths=[{ROOT}/configs/data/*.jsonl.gz]",
    # Eight shards of six shorter rows in place of eleven of 32, and no second training, that of the twin without a
    # teacher.
    "source.max_rows=48",
    "source.seq_len=128",
    "source.shard_rows=6",
    "teachers.0.batch_tokens=768",
    "evaluate.baseline=false",
    "evaluate.sample_tokens=4",
    # Four blocks in place of fourteen: a checkpoint of 0.5 GB in place of 0.9.
    "student.init.layers=[0, 1, 28, 29]",
    # What may be lost has to be spread over nodes: the quickstart itself has one actor and trains inside the driver.
    "resources.teacher.actors=[2, 2]",
    "resources.teacher.cpus=1",
    "resources.train.workers=2",
    "resources.train.cpus=1",
    "phases.0.batch.micro_size=2",
    # The promise is to the bit in fp32, and a checkpoint has to be there when the node goes.
    "phases.0.precision=fp32",
    "phases.0.checkpoint.every_steps=2",
)
"""How the test's quickstart differs from the shipped one."""


@pytest.mark.fault(
    "the quickstart, submitted to a cluster that grows, loses a node in the teacher stage and one in training",
    "same cache bytes, no sample lost or used twice, same fp32 weights to the bit; the cluster shrinks to its head",
)
def test_the_quickstart_as_a_job_on_a_growing_cluster_that_loses_two_nodes(tmp_path: Path, growing: Growing) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"

    def words(folder: Path) -> list[str]:
        return [str(ROOT / "configs/quickstart.yaml"), *SHORTENED, f"run_dir={folder}/run", f"cache.dir={folder}/cache"]

    reference = [sys.executable, "-m", "raydistill.run", *words(calm)]
    done = subprocess.run(reference, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    points: Points = [
        ("three shards", lambda: len(list(rough.glob("cache/smollm2-*/records/*.json"))) >= 3),
        ("two steps", lambda: trained(rough) >= 2),
    ]
    run_disturbed(growing, words(rough), tmp_path / "job.log", points)
    assert content(rough) == content(calm)
    assert losses(rough) == losses(calm)
    assert samples(rough) == samples(calm) > 0
