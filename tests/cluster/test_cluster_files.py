"""Every file of cluster/ against the schema of whoever reads it, and against what the project itself says."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from checked_names import (
    AWS_MACHINES,
    AWS_PARAMETERS,
    AWS_POLICIES,
    GCP_BOOT_DISKS,
    GCP_IMAGE_FAMILIES,
    GCP_MACHINES,
    OLDEST_DRIVER,
    RAY_TAGS,
    Machine,
)
from kuberay_schema import manifest_schema
from ray.autoscaler._private.util import fillout_defaults, validate_config
from ray.util.accelerators import accelerators

import raydistill

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ["aws.yaml", "gcp.yaml"]
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def launcher(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "kuberay" / name).read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_accepts_the_file(name: str) -> None:
    config = fillout_defaults(launcher(name))
    validate_config({"cluster_synced_files": [], **config})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_misspelt_key_of_a_launcher_file_would_be_seen(name: str) -> None:
    config = fillout_defaults({**launcher(name), "idle_timeout_minute": 5})
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config({"cluster_synced_files": [], **config})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launchers_workers_grow_from_nothing_and_its_head_takes_no_work(name: str) -> None:
    config = launcher(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert all(node["min_workers"] == 0 for node in workers(config).values())
    assert config["max_workers"] >= max(node["max_workers"] for node in workers(config).values())
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerators_have_rays_names(name: str) -> None:
    known = {value for key, value in vars(accelerators).items() if key.isupper() and isinstance(value, str)}
    for node in workers(launcher(name)).values():
        kinds = {key.removeprefix("accelerator_type:") for key in node["resources"] if ":" in key}
        assert kinds <= known
        assert bool(kinds) == ("GPU" in node["resources"])


def test_aws_node_types_are_requests_that_ec2_accepts() -> None:
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    model = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    shape = model.operation_model("RunInstances").input_shape
    names = set(model.shape_for("InstanceType").enum)
    for node in launcher("aws.yaml")["available_node_types"].values():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()
        assert node["node_config"]["InstanceType"] in names


@pytest.mark.parametrize("group", ["decode", "teachers"])
def test_aws_spot_groups_are_spot_and_students_are_not(group: str) -> None:
    nodes = launcher("aws.yaml")["available_node_types"]
    assert nodes[group]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in nodes["students"]["node_config"]


def aws_iam_commands() -> list[list[str]]:
    """The words of every `aws iam` command of the README."""
    text = (CLUSTER / "README.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return [shlex.split(c, comments=True) for c in re.findall(r"aws iam (?:'[^']*'|[^\n'])*", blocks)]


def test_the_commands_that_make_the_role_are_ones_that_iam_knows() -> None:
    from botocore import xform_name
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    model = ServiceModel(Loader().load_service_model("iam", "service-2"))
    operations = {xform_name(name, "-"): model.operation_model(name) for name in model.operation_names}
    commands = aws_iam_commands()
    assert len(commands) == 7
    for command in commands:
        shape = operations[command[2]].input_shape
        assert shape is not None
        known = {xform_name(name, "-") for name in shape.members} | {"query", "output"}
        given = {word.removeprefix("--") for word in command if word.startswith("--")}
        assert {xform_name(name, "-") for name in shape.required_members} <= given <= known


def test_the_role_of_the_readme_is_that_of_every_aws_node() -> None:
    text = (CLUSTER / "README.md").read_text()
    nodes = launcher("aws.yaml")["available_node_types"].values()
    assert {node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes} == {"raydistill"}
    assert "add-role-to-instance-profile --instance-profile-name raydistill --role-name raydistill" in text
    policies = re.search(r"for policy in (.*); do", text)
    assert policies is not None
    assert set(policies[1].split()) == AWS_POLICIES
    documents = [json.loads(word) for c in aws_iam_commands() for word in c if word.startswith("{")]
    assert [d["Statement"][0]["Action"] for d in documents] == ["sts:AssumeRole", "iam:PassRole"]


def check_resources(node: dict[str, Any], machine: Machine, *, head: bool) -> None:
    """That a node type claims what its machine has; a head claims nothing."""
    found = {key: value for key, value in node["resources"].items() if value}
    wanted: dict[str, int] = {} if head else {"CPU": machine.cpus}
    if machine.kind is not None:
        wanted |= {"GPU": machine.gpus, f"accelerator_type:{machine.kind}": 1}
    assert found == wanted


def test_aws_names_and_sizes_are_ones_that_were_looked_up() -> None:
    for name, node in launcher("aws.yaml")["available_node_types"].items():
        check_resources(node, AWS_MACHINES[node["node_config"]["InstanceType"]], head=name == "head")
        assert node["node_config"]["ImageId"].removeprefix("resolve:ssm:") in AWS_PARAMETERS


def test_gcp_names_and_sizes_are_ones_that_were_looked_up() -> None:
    config = launcher("gcp.yaml")
    for name, node in config["available_node_types"].items():
        machine = node["node_config"]["machineType"]
        check_resources(node, GCP_MACHINES[machine], head=name == "head")
        disk = node["node_config"]["disks"][0]["initializeParams"]
        zones, zone, types, kind = disk["diskType"].split("/")
        assert (zones, zone, types) == ("zones", config["provider"]["availability_zone"], "diskTypes")
        assert kind in GCP_BOOT_DISKS[machine.split("-")[0]]
        assert disk["sourceImage"].removeprefix("projects/") in GCP_IMAGE_FAMILIES
        driver = re.search(r"-nvidia-(\d+)$", disk["sourceImage"])
        assert driver is not None
        assert int(driver[1]) >= OLDEST_DRIVER


def test_gcp_workers_may_use_object_stores_and_have_a_driver() -> None:
    config = launcher("gcp.yaml")
    project = config["provider"]["project_id"]
    for node in workers(config).values():
        (account,) = node["node_config"]["serviceAccounts"]
        assert account["email"] == f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
        items = node["node_config"].get("metadata", {}).get("items", [])
        assert ("install-nvidia-driver" in {item["key"] for item in items}) == ("GPU" in node["resources"])


@pytest.mark.parametrize(("name", "cloud"), [("aws.yaml", "aws"), ("gcp.yaml", "gcp")])
def test_workers_wait_for_the_notice_of_their_cloud_once_ray_runs(name: str, cloud: str) -> None:
    config = launcher(name)
    *_, start, notices = config["worker_start_ray_commands"]
    assert start.startswith("ray start ")
    script = config["docker"]["run_options"][-2].split("=")[-1].replace(name, "notices.py")
    assert notices.startswith(f"nohup python {script} {cloud} $RAY_HEAD_IP:6379 ")
    assert notices.endswith("< /dev/null &")
    assert (CLUSTER / "notices.py").exists()


def gcp_schema() -> dict[str, Any]:
    text = (
        importlib.resources.files("googleapiclient").joinpath("discovery_cache/documents/compute.v1.json").read_text()
    )
    return dict(json.loads(text)["schemas"])


def unknown_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> Iterator[str]:
    """Places of `value` that the description of Google's interface does not have, or has with other values."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"]]
    match value:
        case dict() if "properties" in schema:
            for key, inner in value.items():
                if key in schema["properties"]:
                    yield from unknown_fields(inner, schema["properties"][key], schemas, f"{where}.{key}")
                else:
                    yield f"{where}.{key}"
        case list():
            for item in value:
                yield from unknown_fields(item, schema["items"], schemas, where)
        case str() if "enum" in schema and value not in schema["enum"]:
            yield f"{where}: {value}"


def test_gcp_node_types_are_instances_that_compute_engine_accepts() -> None:
    schemas = gcp_schema()
    for node in launcher("gcp.yaml")["available_node_types"].values():
        assert list(unknown_fields(node["node_config"], schemas["Instance"], schemas, "")) == []


def test_a_misspelt_field_of_a_gcp_node_type_would_be_seen() -> None:
    schemas = gcp_schema()
    node = copy.deepcopy(launcher("gcp.yaml")["available_node_types"]["teachers"]["node_config"])
    node["scheduling"]["provisioningModel"] = "CHEAP"
    node["disks"][0]["initializeParams"]["diskSizeGB"] = 3
    found = list(unknown_fields(node, schemas["Instance"], schemas, ""))
    assert found == [".scheduling.provisioningModel: CHEAP", ".disks.initializeParams.diskSizeGB"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_accepts_the_manifest(name: str) -> None:
    found = manifest(name)
    jsonschema.validate(found, manifest_schema(found["kind"]))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_key_of_a_manifest_would_be_seen(name: str) -> None:
    found = manifest(name)
    spec = found["spec"].get("rayClusterSpec", found["spec"])
    spec["workerGroupSpecs"][1]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(found, manifest_schema(found["kind"]))


def pods(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_the_pods(name: str) -> None:
    import kubernetes_validate

    for group, template in pods(cluster_spec(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, **template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_accepts_the_volume_claim_that_the_pods_name() -> None:
    import kubernetes_validate

    claim = manifest("storage.yaml")
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
    for _, template in pods(cluster_spec("raycluster.yaml")):
        claims = [v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"] if v["name"] == "runs"]
        assert claims == [claim["metadata"]["name"]]


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_autoscaler_reads_the_groups_of_a_manifest(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    found = {"metadata": {"name": "x", "namespace": "default"}, "spec": cluster_spec(name)}
    config = _derive_autoscaling_config_from_ray_cr(found)
    validate_config(config)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert {key: node["resources"].get("GPU", 0) for key, node in types.items()} == {
        "decode": 0,
        "teachers": 1,
        "students": 8,
    }
    assert types["teachers"]["resources"]["accelerator_type:L40S"] == 1
    assert types["students"]["resources"]["accelerator_type:H100"] == 1
    assert all(node["min_workers"] == 0 for node in types.values())


def test_a_job_gets_the_cluster_of_the_cluster_file() -> None:
    specs = [json.dumps(cluster_spec(name)).replace(name, "this file") for name in MANIFESTS]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_names_its_own_file_and_takes_the_secret(name: str) -> None:
    for _, template in pods(cluster_spec(name)):
        (container,) = template["spec"]["containers"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["RAYDISTILL_CLUSTER"] == f"/home/ray/raydistill/cluster/kuberay/{name}"
        assert container["envFrom"] == [{"secretRef": {"name": "raydistill-env", "optional": True}}]
    assert "kubectl create secret generic raydistill-env " in (CLUSTER / "kuberay/README.md").read_text()


def test_every_file_asks_for_a_token() -> None:
    for name in LAUNCHERS:
        config = launcher(name)
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
        assert all("--dashboard-host=127.0.0.1" in c for c in config["head_start_ray_commands"] if "--head" in c)
    for name in MANIFESTS:
        assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm/raydistill.sbatch").read_text()
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()


def test_images_have_the_versions_that_the_project_is_made_for() -> None:
    texts = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    ray_images = {image for text in texts.values() for image in re.findall(r"rayproject/ray:[\w.-]+", text)}
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert ray_images == {f"rayproject/ray:{ray.__version__}-py{python}-{kind}" for kind in ("cpu", "gpu")}
    assert {image.split("-", 1)[1] for image in ray_images} == RAY_TAGS
    ours = {image for text in texts.values() for image in re.findall(r"\braydistill:(\d[\w.]*)", text)}
    assert ours == {raydistill.__version__}
    for name in MANIFESTS:
        assert cluster_spec(name)["rayVersion"] == ray.__version__


def test_the_runtime_environment_is_one_and_installs_what_the_project_needs() -> None:
    from ray.runtime_env import RuntimeEnv

    found = launcher("runtime_env.yaml")
    RuntimeEnv(**{**found, "working_dir": None})
    assert found["pip"] == [need for need in PROJECT["dependencies"] if not need.startswith("ray[")]
    assert found["working_dir"] == "."


def test_what_a_job_submits_holds_the_project_and_leaves_out_what_is_large() -> None:
    excludes = launcher("runtime_env.yaml")["excludes"]
    assert {"/runs", "/.venv", "/.git"} <= set(excludes)
    assert not {"/raydistill", "/configs", "/tune"} & set(excludes)


def test_no_file_holds_a_secret() -> None:
    wrong = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret_?key|api_?key)\s*[:=]\s*\S")
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert not wrong.search(path.read_text()), path
