"""Training on nodes that come and go: a notice, a loss, another number of workers, and the same losses in the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from test_pipeline import WORDS, tiny_config
from test_reliability import finish, free_port, losses, notice, start, trained, wait_for
from toys import save_model, tiny_llama

pytestmark = pytest.mark.slow
STEPS = 600
LONG = 1500
"""Of a training that goes on when Ray Train has looked for more workers."""


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problem")
    save_model(tiny_llama(layers=2, hidden=32), folder / "teacher")
    lines = [" ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def write_config(
    problem: Path, folder: Path, workers: object, *, every_steps: int, steps: int = STEPS, grow_seconds: float = 60
) -> Path:
    phase = tiny_config(problem).phases[0].model_dump(mode="json")
    phase |= {"precision": "fp32", "steps": steps, "log_every": 10, "checkpoint": {"every_steps": every_steps}}
    config = tiny_config(
        problem,
        run_dir=str(folder / "run"),
        cache={"dir": str(problem / "cache")},
        phases=[phase],
        evaluate={"held_out": 0.1, "baseline": False, "sample_tokens": 2},
        resources={"train": {"workers": workers, "cpus": 2, "grow_seconds": grow_seconds}},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def calm(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, in the driver."""
    folder = tmp_path_factory.mktemp("calm")
    finish(write_config(problem, folder, 0, every_steps=STEPS))
    return folder


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head that holds one worker."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()}
    )
    yield made
    made.shutdown()


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def same_losses(one: Path, other: Path) -> None:
    """The same steps, each logged once, with the same losses but for the order in which gradients are added."""
    a, b = losses(one), losses(other)
    assert [step for step, _ in a] == [step for step, _ in b]
    assert [loss for _, loss in a] == pytest.approx([loss for _, loss in b], rel=1e-5)


def samples(folder: Path) -> int:
    return int(json.loads((folder / "run/phases/distil/final/phase.json").read_text())["samples"])


@pytest.mark.fault(
    "a spot node gets its notice, then goes (2 workers, then 1)",
    "saves at once; every sample once; losses equal to 1e-5",
)
def test_a_node_that_is_told_to_go_leaves_a_checkpoint_and_the_rest_goes_on_without_it(
    problem: Path, calm: Path, tmp_path: Path, cluster: object
) -> None:
    node = cluster.add_node(num_cpus=2)  # type: ignore[attr-defined]
    config = write_config(problem, tmp_path, [1, 2], every_steps=STEPS)
    process = start(config, RAY_ADDRESS=cluster.address, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")  # type: ignore[attr-defined]
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path)) > 5, process)
    notice(cluster.address, node.node_id, seconds=20)  # type: ignore[attr-defined]
    wait_for(lambda: trained(tmp_path) > 0, process)
    saved = trained(tmp_path)
    assert 0 < saved < STEPS, "only the notice can have made this checkpoint"
    cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
    assert process.wait(timeout=400) == 0, log(tmp_path)[-3000:]
    assert f"continuing after step {saved}" in log(tmp_path)
    same_losses(tmp_path, calm)
    assert samples(tmp_path) == samples(calm), "no sample lost, none used twice"


@pytest.mark.fault(
    "a node goes without a word (2 workers, then 1)",
    "continues from the last checkpoint; every sample once; losses equal to 1e-5",
)
def test_a_node_that_is_lost_without_a_word_costs_the_steps_since_the_last_checkpoint(
    problem: Path, calm: Path, tmp_path: Path, cluster: object
) -> None:
    node = cluster.add_node(num_cpus=2)  # type: ignore[attr-defined]
    config = write_config(problem, tmp_path, [1, 2], every_steps=50)
    process = start(config, RAY_ADDRESS=cluster.address)  # type: ignore[attr-defined]
    point: Callable[[], bool] = lambda: trained(tmp_path) >= 50  # noqa: E731
    wait_for(point, process)
    cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
    assert process.wait(timeout=400) == 0, log(tmp_path)[-3000:]
    assert re.search(r"continuing after step \d+", log(tmp_path))
    same_losses(tmp_path, calm)
    assert samples(tmp_path) == samples(calm)


@pytest.mark.fault(
    "a node comes while an elastic training runs (1 worker, then 2)",
    "saves, then goes on with more workers; every sample once; losses equal to 1e-5",
)
def test_a_training_that_may_have_more_workers_saves_before_it_grows(
    problem: Path, tmp_path: Path, cluster: object
) -> None:
    steps = LONG
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    finish(write_config(problem, calm, 0, every_steps=steps, steps=steps))
    config = write_config(problem, rough, [1, 2], every_steps=steps, steps=steps, grow_seconds=10)
    process = start(config, RAY_ADDRESS=cluster.address)  # type: ignore[attr-defined]
    wait_for(lambda: (rough / "run/metrics.jsonl").exists() and len(losses(rough)) > 5, process)
    cluster.add_node(num_cpus=2)  # type: ignore[attr-defined]
    wait_for(lambda: trained(rough) > 0, process)
    saved = trained(rough)
    assert 0 < saved < steps, "only the new node can have made this checkpoint"
    assert process.wait(timeout=400) == 0, log(rough)[-3000:]
    assert "there may be room for more workers; saving now" in log(rough)
    assert f"continuing after step {saved}" in log(rough)
    same_losses(rough, calm)
    assert samples(rough) == samples(calm)
