"""What the file of a growing cluster says about its nodes, and what fits on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raydistill.config.nodes import NodeType, node_types, require_places
from raydistill.errors import ConfigError

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.mark.parametrize(
    ("file", "accelerator"), [("aws.yaml", "L40S"), ("gcp.yaml", "L4"), ("kuberay/raycluster.yaml", "L40S")]
)
def test_the_groups_of_the_shipped_files(file: str, accelerator: str) -> None:
    found = {kind.name: kind for kind in node_types(str(CLUSTER / file))}
    assert {name: kind.most for name, kind in found.items()} == {"head": 1, "decode": 4, "teachers": 8, "students": 2}
    assert found["head"].resources["CPU"] == 0
    assert found["teachers"].holds(1, 1, accelerator) == 1
    assert found["students"].holds(8, 1, "H100") == 8
    assert found["students"].holds(8, 1, accelerator) == 0


def test_a_job_and_a_cluster_of_kuberay_say_the_same() -> None:
    assert node_types(str(CLUSTER / "kuberay/rayjob.yaml")) == node_types(str(CLUSTER / "kuberay/raycluster.yaml"))


def test_a_launchers_limits(tmp_path: Path) -> None:
    types = {"head": {"resources": {"CPU": 2}, "node_config": {}}, "more": {"resources": {"CPU": 4}, "node_config": {}}}
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 3, "head_node_type": "head", "available_node_types": types}))
    assert [(kind.name, kind.most) for kind in node_types(str(file))] == [("head", 1), ("more", 3)]


def test_requests_stand_for_missing_limits_and_thousandths_are_read(tmp_path: Path) -> None:
    def group(resources: object) -> dict[str, object]:
        return {"rayStartParams": {}, "template": {"spec": {"containers": [{"resources": resources}]}}}

    worker = {"groupName": "g", "maxReplicas": 5, **group({"requests": {"cpu": "1500m"}, "limits": {}})}
    spec = {"headGroupSpec": group({"limits": {"cpu": 2}}), "workerGroupSpecs": [worker]}
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"kind": "RayCluster", "spec": spec}))
    assert [kind.resources["CPU"] for kind in node_types(str(file))] == [2, 1.5]


@pytest.mark.parametrize("text", ["a: 1", "kind: RayCluster", "kind: RayJob\nspec: {}", "available_node_types: {a: 3}"])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"resources.cluster: .*other.yaml"):
        node_types(str(file))


def test_the_message_counts_nodes_of_one_kind_together() -> None:
    types = [NodeType("a", {"CPU": 4}, 2), NodeType("b", {"CPU": 4}, 3), NodeType("c", {"CPU": 9, "GPU": 1}, 1)]
    require_places(types, "k", 6, 4)
    with pytest.raises(ConfigError) as caught:
        require_places(types, "k", 8, 4, what="worker", remedy=" (or so)", file="f.yaml")
    assert str(caught.value) == (
        "k: wanted 8 workers with 4 CPU and 0 GPU each, found room for 7 on 5 nodes of 4 CPU and 0 GPU; 1 node of 9 "
        "CPU and 1 GPU at most (f.yaml). Ask for less (or so) or use a larger cluster."
    )
