"""Room on the cluster: counted node by node, and said at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import ray

from raydistill.cache.pool import require_both, require_cluster
from raydistill.config.schema import ResourcesConfig
from raydistill.errors import ConfigError

SMALL = {"CPU": 2.0}
L4 = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0}


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Mapping[str, float]) -> None:
    """A cluster of these nodes, and one that was lost."""
    lost = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.delenv("RAYDISTILL_AUTOSCALING", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: [*({"Alive": True, "Resources": dict(n)} for n in nodes), lost])


@pytest.mark.parametrize(("count", "cpus", "gpus"), [(8, 2, 0), (16, 0.5, 0.25), (4, 1, 1), (2, 4, 2)])
def test_exactly_as_many_actors_as_the_nodes_hold(
    monkeypatch: pytest.MonkeyPatch, count: int, cpus: float, gpus: float
) -> None:
    cluster(monkeypatch, L4, L4)
    require_cluster("resources.teacher", count, cpus, gpus)
    with pytest.raises(ConfigError, match=f"wanted {count + 1} actors .* found room for {count} on 2 nodes"):
        require_cluster("resources.teacher", count + 1, cpus, gpus)


def test_actors_that_want_nothing_fit_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, SMALL)
    require_cluster("resources.decode", 1000, 0)


def test_an_actor_that_is_larger_than_every_node_is_refused_though_the_total_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster(monkeypatch, SMALL, SMALL)
    with pytest.raises(ConfigError) as caught:
        require_cluster("resources.train", 1, 4, what="worker", remedy=" (or so)")
    assert str(caught.value).startswith(
        "resources.train: wanted 1 worker with 4 CPU and 0 GPU each, found room for 0 on 2 nodes of 2 CPU and 0 GPU. "
        "Ask for less (or so) or use a larger cluster"
    )


def test_shares_of_a_gpu_lie_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, L4)
    require_cluster("resources.teacher", 4, 1, 0.4)
    with pytest.raises(ConfigError, match="room for 4"):
        require_cluster("resources.teacher", 5, 1, 0.4)


def test_only_nodes_of_the_wanted_accelerator_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, L4, {"CPU": 64.0, "GPU": 8.0, "accelerator_type:L40S": 1.0})
    require_cluster("resources.train", 8, 1, 1, "L40S")
    with pytest.raises(
        ConfigError, match=r"of type L40S, found room for 8 on 1 node of 8 CPU and 2 GPU \(L4\); 1 node"
    ):
        require_cluster("resources.train", 9, 1, 1, "L40S")


def test_a_cluster_that_grows_is_asked_for_the_most_its_node_types_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, SMALL)
    file = str(Path(__file__).parents[2] / "cluster/aws.yaml")
    require_cluster("resources.teacher", 8, 8, 1, "L40S", file=file)
    with pytest.raises(ConfigError, match=r"9 actors .* of type L40S, found room for 8 .* at most .*aws.yaml"):
        require_cluster("resources.teacher", 9, 1, 1, "L40S", file=file)


def test_a_cluster_that_grows_and_does_not_say_how_far_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, SMALL)
    monkeypatch.setenv("RAYDISTILL_AUTOSCALING", "1")
    require_cluster("resources.teacher", 999, 1, 1)


def test_workers_need_room_beside_the_teachers_that_answer_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(
        monkeypatch, {"CPU": 16, "GPU": 8, "accelerator_type:H100": 1}, {"CPU": 8, "GPU": 1, "accelerator_type:L40S": 1}
    )

    def resources(workers: int, gpus: float = 1, **teacher: object) -> ResourcesConfig:
        train = {"workers": workers, "gpus": 1, "accelerator": "H100"}
        return ResourcesConfig.model_validate({"teacher": {"gpus": gpus, **teacher}, "train": train})

    require_both(resources(8), 1)  # the teacher goes to the node that no worker wants
    require_both(resources(4), 5)
    require_both(resources(7, gpus=0.5), 4)  # two on the L40S, two on one H100
    require_both(resources(8, gpus=0), 8)
    with pytest.raises(
        ConfigError, match=r"train, beside 8 actors of resources.teacher: wanted 8 workers .* room for 1"
    ):
        require_both(resources(8), 8)
    with pytest.raises(ConfigError, match=r"wanted 8 workers .* room for 7"):
        require_both(resources(8, accelerator="H100"), 1)


def test_teachers_are_thought_to_stand_where_they_cost_the_fewest_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 16, "GPU": 4}, {"CPU": 64, "GPU": 4})
    teacher = {"cpus": 1, "actors": [8, 8]}
    found = ResourcesConfig.model_validate({"teacher": teacher, "train": {"workers": 8, "gpus": 1, "cpus": 4}})
    require_both(found, 48)
    with pytest.raises(ConfigError, match="room for 7"):
        require_both(found, 49)
