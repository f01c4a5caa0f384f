from __future__ import annotations

import pytest
from pydantic import JsonValue

from raydistill.config.load import load_config
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError

PHASE: dict[str, JsonValue] = {
    "name": "one",
    "steps": 4,
    "batch": {"global_size": 8, "micro_size": 4},
    "optimizer": {"student": {"lr": 0.1}},
}
MODEL: JsonValue = {"source": "org/model"}


def load(settings: dict[str, JsonValue]) -> RunConfig:
    base: dict[str, JsonValue] = {
        "name": "toy",
        "source": {"paths": ["a.txt"], "tokenizer": "gpt2", "seq_len": 16},
        "teachers": [{"name": "big", "model": MODEL}, {"name": "other", "model": MODEL}],
        "student": {"model": MODEL},
        "phases": [PHASE, {**PHASE, "name": "two"}],
    }
    return load_config([], (), {**base, **settings})


SAMPLE: dict[str, JsonValue] = {f"teachers.{i}.estimator": {"kind": "head_tail_sample"} for i in (0, 1)}
BEST: dict[str, JsonValue] = {
    "phases.0.checkpoint.best_metric": "top1_agreement", "evaluate.every_steps": 2,
}  # fmt: skip
GPU: dict[str, JsonValue] = {"resources.train": {"workers": 2, "gpus": 1}}

REFUSED: list[tuple[str, dict[str, JsonValue], str]] = [
    ("sizes that do not divide", {"phases.0.batch.micro_size": 3}, "set micro_size to a divisor, e.g. 2"),
    ("teachers of one name", {"teachers.1.name": "big"}, "teachers.1.name (settings): wanted a name of its own"),
    ("phases of one name", {"phases.1.name": "one"}, "phases.1.name (settings): wanted a name of its own"),
    ("a teacher called inputs", {"teachers.0.name": "inputs"}, "'inputs' is reserved"),
    ("a phase called baseline", {"phases.0.name": "baseline"}, "'baseline' is reserved"),
    ("a name with a slash", {"name": "a/b"}, "wanted text matching"),
    ("no teacher that counts", {"teachers.0.weight": 0, "teachers.1.weight": 0}, "wanted at least one above 0"),
    ("an optimizer for nobody", {"phases.0.optimizer.critic": {"lr": 1}}, "trains student, found 'critic'"),
    ("a player without optimizer", {"phases": [{**PHASE, "optimizer": {}}]}, "add student: {lr: …}"),
    ("K' above K", {"phases.0.recipe.top_k": 65}, "teacher 'big' keeps 64, found 65"),
    ("a temperature that is not stored",
     {"phases.0.recipe": {"temperature": 3, "temperature_mode": "exact"}}, "stores (1, 2, 4), found 3"),
    ("a temperature that one teacher lacks",
     {"phases.0.recipe": {"temperature": 4, "temperature_mode": "exact"}, "teachers.1.temperatures": [2]},
     "teacher 'other' stores (1, 2), found 4"),
    ("top_k estimator without K", {"teachers.0.top_k": 0}, "only head_tail_sample allows 0"),
    ("two estimators", {"teachers.0.estimator": {"kind": "head_tail_sample"}}, "one estimator"),
    ("samples and K'", {**SAMPLE, "phases.0.recipe.top_k": 2}, "wants null, found 2"),
    ("samples and reverse KL", {**SAMPLE, "phases.0.recipe.divergence": "reverse_kl"}, "wants forward_kl"),
    ("samples and coarse T", {**SAMPLE, "phases.0.recipe.temperature": 2}, "wants exact at T = 2"),
    ("a temperature twice", {"teachers.0.temperatures": [2, 2]}, "wanted different numbers"),
    ("offload at stage 0", {"phases.0.zero.offload_optimizer": {"device": "cpu"}}, "needs stage 1, 2 or 3"),
    ("offloaded parameters at stage 2",
     {"phases.0.zero": {"stage": 2, "offload_parameters": {"device": "cpu"}}}, "needs stage 3, found stage 2"),
    ("NVMe at stage 2",
     {"phases.0.zero": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "nvme needs stage 3"),
    ("NVMe without a path",
     {"phases.0.zero": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "goes with device: nvme"),
    ("a metric that is never measured", {"phases.0.checkpoint.best_metric": "perplexity"}, "set it, or"),
    ("a metric that does not exist",
     {"phases.0.checkpoint.best_metric": "perplexty", "evaluate.every_steps": 2},
     "phases.0.checkpoint.best_metric (settings): wanted one of loss, perplexity, top1_accuracy, ece, bits_per_byte, "
     "kl_to_teacher, top1_agreement; found 'perplexty'; nearest: perplexity"),
    ("an agreement without ids", {**SAMPLE, **BEST, "teachers.0.top_k": 0, "teachers.1.top_k": 0}, "'top1_agreement'"),
    ("an average from nowhere", {"phases.0.start_from": "ema"}, "the first phase has none before it"),
    ("an average that is not kept", {"phases.1.start_from": "ema"}, "phases.0.ema is null"),
    ("half a GPU to train", {"resources.train": {"workers": 2, "gpus": 0.5}}, "wanted 0 or 1 per worker"),
    ("a GPU in the driver", {"resources.train.gpus": 1}, "trains in the driver, without a GPU"),
    ("fewer than the fewest", {"resources.train.workers": [4, 2]}, "1 ≤ fewest ≤ most, found [4, 2]"),
    ("no actor", {"resources.teacher.actors": [0, 2]}, "1 ≤ fewest ≤ most, found [0, 2]"),
    ("a GPU and a half", {"resources.teacher.gpus": 1.5}, "found 1.5"),
    ("an accelerator without GPU", {"resources.teacher.accelerator": "H100"}, "resources.teacher.gpus is 0"),
    ("an accelerator that nobody sells",
     {"resources.teacher": {"gpus": 1, "accelerator": "L40s"}},
     "resources.teacher.accelerator (settings): wanted Ray's name of an accelerator (L40S, H100, …), found 'L40s'; "
     "nearest: L40S; for a name of your cluster's own, name its file: resources.cluster."),
    ("a price of what nobody sells", {"plan.price_per_hour": {"L40S": 1.9, "H1000": 4.1}}, "'H1000'; nearest: H100."),
    ("a bucket without its second slash", {"run_dir": "s3:/bucket/run"},
     "run_dir (settings): wanted a folder or a URI with two slashes, found 's3:/bucket/run'; nearest: s3://bucket/run"),
    ("asynchronous without steps", {**GPU, "evaluate.asynchronous": True}, "set evaluate.every_steps"),
    ("asynchronous in the driver", {"evaluate": {"asynchronous": True, "every_steps": 2}}, "workers of their own"),
    ("steps and epochs", {"phases.0.epochs": 1}, "exactly one of steps and epochs"),
    ("restarts without length", {"phases.0.optimizer.student.schedule": "cosine_restarts"}, "restart_steps"),
    ("no data", {"source.paths": []}, "exactly one of paths and dataset"),
    ("rows shorter than the shortest", {"source.min_tokens": 17}, "at most seq_len (16), found 17"),
    ("a broken expression", {"phases.0.trainable": [{"match": "("}]}, "wanted a regular expression, found '('"),
    ("layers without a choice", {"student.init": {"kind": "layers"}}, "exactly one of num_layers and layers"),
    ("a projection of nobody", {"teachers": [], "student.init": {"kind": "projection"}}, "there are no teachers"),
    ("a measured basis without rows", {"student.init": {"kind": "projection", "basis": "pca", "calibration_rows": 0}},
     "basis: pca is measured on rows, found 0; set it to 16"),
    ("blocks in no order", {"student.init": {"kind": "projection", "depth": [3, 1]}}, "in rising order, found [3, 1]"),
    ("a head twice", {"student.init": {"kind": "projection", "heads": {"x": [1, 1]}}}, "different heads from 0"),
    ("no regular expression", {"student.init": {"kind": "projection", "rename": {"(": "x"}}}, "found that it is none"),
    ("a projection of another library",
     {"student.init": {"kind": "projection", "teacher": {"library": "diffusers", "source": "x"}}},
     "wanted a model like the student of library transformers, found diffusers"),
    ("a layer twice", {"student.init": {"kind": "layers", "layers": [0, 0]}}, "found [0, 0]"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(settings: dict[str, JsonValue], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(settings)
    assert text in str(caught.value)


ALLOWED: list[tuple[str, dict[str, JsonValue]]] = [
    ("a cluster's own name for its GPUs",
     {"resources": {"cluster": "cluster.yaml", "teacher": {"gpus": 1, "accelerator": "our-gpus"}},
      "plan.price_per_hour": {"our-gpus": 1.0, "A100-80G": 2.0}}),
    ("exact at T = 1 needs no grid",
     {"phases.0.recipe": {"temperature_mode": "exact"}, "teachers.0.temperatures": [], "teachers.1.temperatures": []}),
    ("exact inside K needs no grid",
     {"phases.0.recipe": {"temperature": 3, "temperature_mode": "exact", "tail": "renormalise"}}),
    ("a sampled head of nothing", {**SAMPLE, "teachers.0.top_k": 0, "teachers.1.top_k": 0}),
    ("an unused teacher with another estimator",
     {"teachers.0.estimator": {"kind": "head_tail_sample"}, "teachers.0.weight": 0}),
    ("anything about the signal when alpha is 0",
     {"phases.0.recipe": {"alpha": 0, "top_k": 99}, "phases.1.recipe.alpha": 0, "teachers.0.weight": 0,
      "teachers.1.weight": 0}),
    ("an average that is kept", {"phases.0.ema": {}, "phases.1.start_from": "ema"}),
    ("the best agreement", BEST),
    ("elastic training", {"resources.train": {"workers": [4, 8], "gpus": 1}}),
    ("a share of a GPU", {"resources.teacher.gpus": 0.25}),
]  # fmt: skip


@pytest.mark.parametrize("settings", [a[1] for a in ALLOWED], ids=[a[0] for a in ALLOWED])
def test_allowed(settings: dict[str, JsonValue]) -> None:
    load(settings)


def test_problems_of_several_sections_are_listed_with_their_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"phases.0.recipe.top_k": 65, "teachers.1.name": "big", "phases.1.start_from": "ema"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the configuration:"
    keys = [line.split()[0].rstrip(":") for line in lines[1:]]
    assert keys == ["teachers.1.name", "phases.0.recipe.top_k", "phases.1.start_from"]
