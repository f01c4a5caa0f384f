"""Which nodes of a growing cluster each stage will stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pipeline import tiny_config
from toys import save_model, tiny_llama

from raydistill import pipeline
from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import PlanConfig, RunConfig
from raydistill.errors import ConfigError
from raydistill.pipeline import Run, summary
from raydistill.plan.placement import place, placement_table

ROOT = Path(__file__).parents[1]


def config(*overrides: str) -> RunConfig:
    file = f"resources.cluster={ROOT / 'cluster/aws.yaml'}"
    return resolve_paths(load_config([str(ROOT / "configs/lm_topk.yaml")], [file, *overrides]))


def test_stages_stand_where_their_accelerator_is() -> None:
    found = place(config("resources.teacher.accelerator=L40S", "resources.train.accelerator=H100"))
    assert [(stage.stage, stage.nodes) for stage in found] == [
        ("inputs", (("decode", 1, 1), ("teachers", 1, 1), ("students", 1, 1))),
        ("signals", (("teachers", 1, 8),)),
        ("train", (("students", 1, 1),)),
    ]


def test_what_encodes_images_stands_where_teachers_do() -> None:
    file = f"resources.cluster={ROOT / 'cluster/aws.yaml'}"
    images = load_config([str(ROOT / "configs/sdxl_multi_teacher.yaml")], [file, "resources.teacher.accelerator=L40S"])
    found = place(resolve_paths(images))
    assert [(stage.stage, [name for name, *_ in stage.nodes]) for stage in found[1:3]] == [
        ("inputs", ["teachers"]),
        ("signals", ["teachers"]),
    ]
    with pytest.raises(ConfigError, match=r"resources\.teacher: wanted"):
        place(
            images.model_copy(
                update={
                    "teachers": (),
                    "resources": images.resources.model_copy(
                        update={"teacher": images.resources.teacher.model_copy(update={"accelerator": "A100"})}
                    ),
                }
            )
        )


def test_teachers_that_answer_workers_stand_beside_them() -> None:
    def game(workers: int, *overrides: str) -> RunConfig:
        base = f"resources.cluster={ROOT / 'cluster/aws.yaml'}", f"resources.train={{workers: {workers}, gpus: 1}}"
        file = str(ROOT / "configs/gamecraft_world_model.yaml")
        return resolve_paths(load_config([file], [*base, "teachers.0.online=actors", *overrides]))

    teacher = "resources.teacher={gpus: 1, actors: [1, 8]}"
    found = place(game(8, teacher))  # 8 L40S and 16 H100
    assert [stage.stage for stage in found if stage.wanted.startswith("8 ×")] == ["train", "beside train"]
    with pytest.raises(ConfigError, match=r"train, beside 8 actors of .*: wanted 20 workers .* found room for 16 on"):
        place(game(20, teacher))
    with pytest.raises(ConfigError, match=r"wanted 12 workers .* found room for 8 on .* at most .*aws.yaml"):
        place(
            game(
                12, "resources.teacher={gpus: 1, actors: [8, 8], accelerator: H100}", "resources.train.accelerator=H100"
            )
        )
    assert len(place(game(24, teacher, "teachers.0.online=local"))) == 2


@pytest.mark.parametrize("stages", [None, ("inputs",)])
def test_what_a_later_stage_can_never_have_is_refused_before_the_first_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...] | None
) -> None:
    save_model(tiny_llama(), tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("some words\nand more of them\n" * 20)
    train = {"workers": 2, "gpus": 1, "accelerator": "A100"}
    resources = {"cluster": str(ROOT / "cluster/aws.yaml"), "train": train}

    def connect(config: RunConfig) -> None:
        raise ConnectionError("would have started to work")

    monkeypatch.setattr(pipeline, "connect", connect)
    expected = (ConfigError, r"resources\.train: wanted 2 .*A100") if stages is None else (ConnectionError, "started")
    with pytest.raises(expected[0], match=expected[1]):
        pipeline.run(tiny_config(tmp_path, resources=resources), stages)


def test_shares_of_a_gpu_need_fewer_nodes() -> None:
    found = place(config("resources.teacher={actors: [4, 8], gpus: 0.25, cpus: 1, accelerator: L40S}"))
    assert found[1].nodes == (("teachers", 1, 2),)


def test_elastic_workers_have_a_range_of_nodes() -> None:
    found = place(config("resources.train={workers: [8, 16], gpus: 1, cpus: 8, accelerator: H100}"))
    assert found[2].nodes == (("students", 1, 2),)
    assert "8 to 16 × (8 CPU, 1 GPU of type H100) on students: 1 to 2 nodes" in placement_table(
        config("resources.train={workers: [8, 16], gpus: 1, cpus: 8, accelerator: H100}")
    )


@pytest.mark.parametrize("wrong", ["accelerator=A100", "gpus=2", "cpus=17", "actors=[9, 9]"])
def test_what_no_node_type_can_meet_is_an_error(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"resources\.teacher: wanted"):
        place(config("resources.teacher.accelerator=L40S", f"resources.teacher.{wrong}"))


@pytest.mark.parametrize("text", [None, "a: [", "name: a cluster of another kind"])
def test_a_file_that_describes_no_cluster_is_named_with_its_key(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^resources\.cluster: {file}"):
        place(config(f"resources.cluster={file}"))


def test_without_a_file_nothing_is_said() -> None:
    assert placement_table(load_config([str(ROOT / "configs/lm_topk.yaml")], [])) == ""


def test_the_cluster_names_its_file_to_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_CLUSTER", str(ROOT / "cluster/gcp.yaml"))
    plain = resolve_paths(load_config([str(ROOT / "configs/lm_topk.yaml")], []))
    assert plain.resources.cluster == str(ROOT / "cluster/gcp.yaml")
    assert config().resources.cluster == str(ROOT / "cluster/aws.yaml")


def test_prices_by_accelerator() -> None:
    plan = PlanConfig(accelerator="H100", price_per_hour={"L40S": 2.0, "H100": 4.0})
    assert [plan.price_of(), plan.price_of("L40S"), plan.price_of("A100")] == [4.0, 2.0, None]
    assert PlanConfig(price_per_hour=3.0).price_of("L40S") == 3.0
    with pytest.raises(ValueError, match=r"price_per_hour: wanted more than 0, found 0 \(L40S\)"):
        PlanConfig(price_per_hour={"L40S": 0.0})


def test_stages_cost_what_their_own_accelerator_costs(tmp_path: Path) -> None:
    priced = config(
        f"run_dir={tmp_path}", "resources.teacher.accelerator=L40S", "resources.train.accelerator=H100",
        "plan.price_per_hour={L40S: 2.0, H100: 4.0}",
    )  # fmt: skip
    run = Run(priced)
    run.stages = {
        "inputs": {"seconds": 5.0},
        "signals": {"seconds": 900.0, "gpu_seconds": 3600.0, "teacher_gpu_seconds": 3600.0},
        "train": {"seconds": 900.0, "gpu_seconds": 1800.0},
    }
    assert [run.costs()[stage].get("price") for stage in ("inputs", "signals", "train")] == [None, 2.0, 2.0]
    assert run.costs()["signals"] == {**run.stages["signals"], "price": 2.0}
    run.store.publish("metrics.json", "{}")
    assert "GPU time: 1.50 h, 4.00 at the given prices" in summary(run)
