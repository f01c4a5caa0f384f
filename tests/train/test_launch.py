"""Phases on Ray's workers: replaced when killed, refused when there is no room, errors as they were raised."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from phases import final, lines, logged, phase_job, same_bytes
from safetensors.torch import load_file

from raydistill.config.schema import TrainResources
from raydistill.errors import ConfigError, TrainingDiverged
from raydistill.train import launch
from raydistill.train.checkpoint import Progressed
from raydistill.train.launch import PhaseJob, require_room, train_phase


def with_nodes(monkeypatch: pytest.MonkeyPatch, *cpus: float) -> None:
    """A cluster of nodes with so many CPUs."""
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": n}} for n in cpus])


def test_more_workers_than_the_nodes_hold_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nodes(monkeypatch, 3.0, 3.0)
    require_room(TrainResources(workers=2, cpus=2))
    with pytest.raises(ConfigError, match=r"train: wanted 3 workers with 2 CPU .*workers: 0 trains in the"):
        require_room(TrainResources(workers=3, cpus=2))


def test_an_elastic_range_needs_room_for_its_fewest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nodes(monkeypatch, 4.0)
    require_room(TrainResources(workers=(2, 99)))


@pytest.mark.fault("a node is lost and too little is left", "one message instead of waiting for ever")
def test_a_phase_whose_node_is_lost_for_good_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray
    from ray.train import WorkerGroupError

    def lose_a_node(trainer: object) -> None:
        with_nodes(monkeypatch, 1.0)
        raise WorkerGroupError("lost", {0: RuntimeError("its node is gone")})

    with_nodes(monkeypatch, 1.0, 1.0)
    monkeypatch.setattr(launch, "_fit", lose_a_node)
    try:
        with pytest.raises(ConfigError, match=r"wanted 2 workers .* found room for 1 on 1 node"):
            train_phase(on_workers(tmp_path, "lost"))
    finally:
        ray.shutdown()  # the actor that collects progress has started it


def test_lost_workers_are_counted_from_the_last_new_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray
    from ray.train import WorkerGroupError

    job = on_workers(tmp_path, "lossy", max_failures=1)
    attempts: list[int] = []

    def lose_a_worker(trainer: object) -> None:
        attempts.append(len(attempts) + 1)
        if attempts[-1] <= 3:
            saved = Progressed(step=attempts[-1], num_ranks=2)
            (job.store / "checkpoints").publish(f"step-{saved.step:08}.json", saved.model_dump_json())
        raise WorkerGroupError("lost", {0: RuntimeError("its node is gone")})

    with_nodes(monkeypatch, 2.0)
    monkeypatch.setattr(launch, "_fit", lose_a_worker)
    try:
        with pytest.raises(WorkerGroupError):
            train_phase(job)
    finally:
        ray.shutdown()
    assert attempts == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


def on_workers(folder: Path, name: str, workers: object = 2, *, max_failures: int = 3, **settings: object) -> PhaseJob:
    phase = {"steps": 60, "checkpoint": {"every_steps": 10}, **settings.pop("phase", {})}  # type: ignore[dict-item]
    resources = {"workers": workers, "max_failures": max_failures}
    return phase_job(folder, name=name, phase=phase, resources={"train": resources}, **settings)  # type: ignore[arg-type]


def train_worker_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in " ".join(p.cmdline()[:1])]


def kill_a_worker_after(job: PhaseJob, step: int) -> threading.Thread:
    """kill -9 of one training worker once the checkpoint of `step` is there."""
    marker = Path(job.run, job.folder, f"checkpoints/step-{step:08}.json")

    def watch() -> None:
        while not marker.exists():
            time.sleep(0.005)
        os.kill(train_worker_processes()[-1].pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.fault("a training worker is killed (fp32, bf16)", "replaced; same weights to the bit")
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same_to_the_bit(folder: Path, precision: str) -> None:
    settings = {"zero": {"stage": 2}, "precision": precision}
    whole = on_workers(folder, f"whole-{precision}", phase=settings)
    train_phase(whole)
    job = on_workers(folder, f"killed-{precision}", phase=settings)
    thread = kill_a_worker_after(job, 20)
    result = train_phase(job)
    assert not thread.is_alive()
    assert result.steps == 60
    assert same_bytes(whole, job)
    assert logged(job) == logged(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("precision", "of_loss", "of_way"), [("fp32", 1e-4, 1e-3), ("bf16", 0.05, 0.1)])
def test_a_phase_continues_on_another_number_of_workers(
    folder: Path, precision: str, of_loss: float, of_way: float
) -> None:
    """The tolerances are what docs/concepts.md states: of each loss, and of the way that the weights have gone."""
    from ray.train import WorkerGroupError

    settings = {"zero": {"stage": 3}, "precision": precision}
    job = on_workers(folder, f"fewer-{precision}", phase=settings, max_failures=0)
    kill_a_worker_after(job, 10)
    with pytest.raises(WorkerGroupError):
        train_phase(job)
    alone = on_workers(folder, f"fewer-{precision}", workers=0, phase=settings)
    train_phase(alone)
    whole = on_workers(folder, f"one-go-{precision}", workers=0, phase=settings)
    train_phase(whole)
    assert [s for s, _, _ in logged(alone)] == list(range(1, 61))
    assert [x for _, x, _ in logged(alone)] == pytest.approx([x for _, x, _ in logged(whole)], rel=of_loss)
    first, a, b = load_file(folder / "init/model.safetensors"), final(alone), final(whole)
    apart, gone = (sum(float((x[n] - b[n]).square().sum()) for n in b) for x in (a, first))
    assert apart**0.5 < of_way * gone**0.5


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.fault("a worker raises an error that the user has to mend", "arrives as itself, and is not retried")
def test_an_error_of_a_worker_arrives_as_itself_and_is_not_retried(folder: Path) -> None:
    optimizer = {"student": {"lr": 10.0, "warmup_steps": 60, "clip_norm": None}}
    job = on_workers(folder, "diverged", phase={"explode_factor": 1.2, "optimizer": optimizer})
    with pytest.raises(TrainingDiverged, match="exploded to"):
        train_phase(job)
    assert len(list(Path(job.run, job.folder, "ray_train").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_weights_are_evaluated_beside_the_training_and_the_best_are_kept(folder: Path) -> None:
    settings = {"every_steps": 20, "best_metric": "loss", "best_mode": "min"}
    evaluate = {"every_steps": 20, "asynchronous": True}
    job = on_workers(folder, "beside", workers=(1, 2), phase={"checkpoint": settings}, evaluate=evaluate)
    train_phase(job)
    inside = on_workers(folder, "inside", workers=0, phase={"checkpoint": settings}, evaluate={"every_steps": 20})
    train_phase(inside)
    measured = {x["step"]: x["evaluation"]["loss"] for x in lines(job) if "evaluation" in x}
    expected = {x["step"]: x["evaluation"]["loss"] for x in lines(inside) if "evaluation" in x}
    assert measured == pytest.approx(expected, rel=1e-4)
    a, b = final(job), final(inside)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-4
    assert not any(Path(job.run, job.folder, "candidates").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.fault("Ctrl-C while Ray Train runs workers", "arrives as an interrupt")
def test_ctrl_c_arrives_as_such(folder: Path) -> None:
    job = on_workers(folder, "stopped", phase={"steps": 100_000})
    marker = Path(job.run, job.folder, "checkpoints/step-00000010.json")

    def stop() -> None:
        while not marker.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train_phase(job)
