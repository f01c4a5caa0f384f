"""Kills, each followed by the same command, end in the same bytes as a run that nobody disturbed; jobs; twins."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from test_pipeline import WORDS, tiny_config
from toys import save_model, tiny_llama

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher and text that every run of this module reads."""
    folder = tmp_path_factory.mktemp("problem")
    save_model(tiny_llama(layers=4, hidden=64), folder / "teacher")
    lines = [" ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(300)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def write_config(
    problem: Path,
    folder: Path,
    *,
    workers: int = 0,
    actors: tuple[int, int] = (1, 1),
    precision: str = "fp32",
    cache: Path | None = None,
) -> Path:
    """The configuration of a run in `folder`. Two of one precision differ only in where the work is done."""
    phase = tiny_config(problem).phases[0].model_dump(mode="json")
    config = tiny_config(
        problem,
        run_dir=str(folder / "run"),
        cache={"dir": str(cache or folder / "cache")},
        phases=[
            phase
            | {
                "precision": precision,
                "steps": 200,
                "checkpoint": {"every_steps": 10, "keep": 2},
                "ema": {"decay": 0.9},
            }
        ],
        evaluate={"held_out": 0.1, "baseline": False, "sample_tokens": 2},
        resources={"teacher": {"actors": actors}, "train": {"workers": workers}},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def start(config: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raydistill.run", str(config)]
    log = (config.parent / "log.txt").open("a")
    return subprocess.Popen(
        command, stdout=log, stderr=log, text=True, env=ENVIRONMENT | environment, cwd=config.parent
    )


def finish(config: Path, **environment: str) -> None:
    status = start(config, **environment).wait(timeout=400)
    assert status == 0, (config.parent / "log.txt").read_text()[-3000:]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 400) -> None:
    """Until `condition` holds; fails when the run ends first, since then nothing would be disturbed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the run never came to the point where it was to be disturbed")
        time.sleep(0.02)


def trained(folder: Path) -> int:
    """The step of the newest checkpoint; 0 before the first. Older ones go away while one looks."""
    names = [path.stem for path in folder.glob("run/phases/distil/checkpoints/step-*.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def content(folder: Path) -> dict[str, str]:
    """Hashes of what must not depend on kills: all cache files but build.json, and the trained weights.

    What a killed writer was writing keeps its temporary name, under which nobody ever reads it.
    """
    files = [p for p in folder.joinpath("cache").rglob("*") if p.is_file() and not p.name.startswith(".tmp-")]
    caches = [p for p in files if p.name != "build.json"]
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in caches}
    assert any(name.endswith("manifest.json") for name in hashes)
    return hashes | weights(folder)


def weights(folder: Path) -> dict[str, str]:
    """Hashes of the trained weights and, where there is one, of their average."""
    files = folder.glob("run/phases/distil/final/*.safetensors")
    hashes = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert "model" in hashes
    return hashes


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(write_config(problem, folder))
    return folder


@pytest.mark.fault(
    "the driver is killed among the teacher's shards, and twice in training",
    "same cache bytes, same fp32 weights to the bit, same losses",
)
def test_driver_killed_among_shards_and_in_training(problem: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = write_config(problem, tmp_path)
    points: list[Callable[[], bool]] = [
        lambda: len(list(tmp_path.glob("cache/toy-*/records/*.json"))) >= 3,
        lambda: trained(tmp_path) >= 10,
        lambda: trained(tmp_path) >= 80,
    ]
    for point in points:
        process = start(config)
        wait_for(point, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(config)
    assert content(tmp_path) == content(undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.fault("the driver is killed twice in bf16 training", "same weights to the bit")
def test_driver_killed_in_bf16_training_ends_in_the_same_weights_to_the_bit(
    problem: Path, undisturbed: Path, tmp_path: Path
) -> None:
    calm, rough = (
        write_config(problem, tmp_path / name, precision="bf16", cache=undisturbed / "cache")
        for name in ("calm", "rough")
    )
    finish(calm)
    for step in (10, 80):
        process = start(rough)
        wait_for(lambda step=step: trained(tmp_path / "rough") >= step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(rough)
    assert weights(tmp_path / "rough") == weights(tmp_path / "calm")
    assert losses(tmp_path / "rough") == losses(tmp_path / "calm")
    assert weights(tmp_path / "calm") != weights(undisturbed), "trained in fp32, weights are others"


@pytest.mark.fault("Ctrl-C in training", "ends with a message that says how to go on; then the same bytes and weights")
def test_interrupt_ends_cleanly_and_says_how_to_go_on(problem: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = write_config(problem, tmp_path)
    process = start(config)
    wait_for(lambda: trained(tmp_path) >= 10, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "Go on with:" in log
    assert "Traceback" not in log
    finish(config)
    assert content(tmp_path) == content(undisturbed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.fault(
    "a node is killed in the teacher stage and another in training, on two workers",
    "same cache bytes, same fp32 weights to the bit",
)
def test_ray_node_killed_in_the_teacher_stage_and_in_training(problem: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    calm = tmp_path / "calm"
    finish(write_config(problem, calm, workers=2, actors=(2, 2)))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()}
    )
    try:
        config = write_config(problem, tmp_path / "rough", workers=2, actors=(2, 2))
        points: list[Callable[[], bool]] = [
            lambda: len(list(tmp_path.glob("rough/cache/toy-*/records/*.json"))) >= 3,
            lambda: trained(tmp_path / "rough") >= 10,
        ]
        for point in points:
            node = cluster.add_node(num_cpus=2)
            process = start(config, RAY_ADDRESS=cluster.address)
            wait_for(point, process)
            cluster.remove_node(node, allow_graceful=False)
            process.wait(timeout=400)
        finish(config, RAY_ADDRESS=cluster.address)
    finally:
        cluster.shutdown()
    assert content(tmp_path / "rough") == content(calm)


@pytest.mark.fault(
    "a spot node gets its notice in the teacher stage, then goes", "goes on without it; same cache bytes"
)
def test_a_node_that_is_told_to_go_in_the_teacher_stage_takes_nothing_with_it(
    problem: Path, undisturbed: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()}
    )
    try:
        node = cluster.add_node(num_cpus=1)
        process = start(write_config(problem, tmp_path, actors=(1, 3)), RAY_ADDRESS=cluster.address)
        wait_for(lambda: len(list(tmp_path.glob("cache/toy-*/records/*.json"))) >= 3, process)
        notice(cluster.address, node.node_id, seconds=5)
        time.sleep(5)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(timeout=400) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        cluster.shutdown()
    assert content(tmp_path) == content(undisturbed)


def notice(address: str, node: str, *, seconds: int) -> None:
    """Tell Ray what a cloud says of a spot node: that it will go."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def own_folder() -> dict[str, str]:
    """The environment of a head that gets its own jobs: Ray sends them to the cluster last started in its folder.

    Tests beside this one start others. The path is short, since Ray puts sockets below it.
    """
    return {"RAY_TMPDIR": tempfile.mkdtemp()}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A Ray head with a job server on ports of its own, as `ray start --head` makes it; its address."""
    port, dashboard = free_port(), free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # The agent that takes jobs would listen on one fixed port, where another Ray of this machine may listen already.
    command += ["--dashboard-agent-listen-port=0", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=ENVIRONMENT | own_folder(), start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while not answers(f"{address}/api/version"):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_job_submitted_to_a_running_cluster(problem: Path, undisturbed: Path, tmp_path: Path, head: str) -> None:
    config = write_config(problem, tmp_path / "job")
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", head, "--working-dir", str(config.parent), "--"]
    command += [sys.executable, "-m", "raydistill.run", config.name]
    for _ in range(20):  # the server answers before the agent that would take the job is up
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "perplexity" in done.stdout
    assert content(tmp_path / "job") == content(undisturbed)


@pytest.mark.parametrize("name", ["lm_topk", "lm_moe_two_stage"])
def test_twin_runs_shortened(name: str, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "source.max_rows=40", "source.seq_len=64", "evaluate.sample_tokens=4"]
    phases = yaml.safe_load((ROOT / f"configs/tiny/{name}.yaml").read_text())["phases"]
    for i in range(len(phases)):
        overrides += [f"phases.{i}.steps=2", f"phases.{i}.epochs=null"]
    command = [sys.executable, "-m", "raydistill.run", f"configs/tiny/{name}.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert (tmp_path / "run/export/config.json").exists()
