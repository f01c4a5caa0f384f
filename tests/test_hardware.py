"""What is called on a node of the cluster, away from the driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from test_pipeline import tiny_config
from toys import save_model, tiny_llama

from raydistill import pipeline
from raydistill.cluster import on_train_hardware
from raydistill.progress import say

GPU_WORKER = {"train": {"workers": 1, "gpus": 1}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A node that says it has a GPU."""
    ray.init(address="local", num_cpus=2, num_gpus=1, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def there(line: str) -> int:
    say(line)
    return os.getpid()


@pytest.mark.usefixtures("cluster")
def test_what_is_said_on_a_gpu_node_is_heard_in_the_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_train_hardware(tiny_config(tmp_path, resources=GPU_WORKER), there, "evaluate: student") != os.getpid()
    assert "evaluate: student\n" in capsys.readouterr().out


@pytest.mark.usefixtures("cluster")
def test_a_student_is_made_on_a_gpu_node_as_it_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_llama(), tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("to be or not to be")
    places: list[object] = []

    def counted(*args: object) -> object:
        places.append(args[1])
        return on_train_hardware(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "on_train_hardware", counted)
    for name, resources in (("here", {}), ("there", GPU_WORKER)):
        pipeline.run(tiny_config(tmp_path, run_dir=str(tmp_path / name), resources=resources), ("init",))
    assert places == [pipeline._publish_student]
    for name in ("model.safetensors", "config.json", "student.json"):
        assert (tmp_path / "here/init" / name).read_bytes() == (tmp_path / "there/init" / name).read_bytes()
