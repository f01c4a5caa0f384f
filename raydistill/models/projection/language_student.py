"""A language model as a projection of a larger one."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from raydistill.config.models import LanguageModelConfig, ProjectionInit, PythonModel, TransformersModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.language import head_of, hidden_states
from raydistill.models.load import language_config, load_language_model, weights_folder
from raydistill.models.projection.language import language_structure
from raydistill.models.projection.measure import Batch, Calibration, Rows
from raydistill.models.projection.report import ProjectionReport
from raydistill.models.projection.run import Sides, project
from raydistill.models.projection.stream import Streamed
from raydistill.models.projection.structure import Structure
from raydistill.models.projection.tensors import FileTensors, MemoryTensors, StackedExperts, Tensors, files_in
from raydistill.progress import say

LOGITS = 1 << 25
"""Logits that are compared at once."""
SAME = ("hidden_act", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "logits_scaling",
        "residual_multiplier", "sliding_window", "norm_topk_prob", "rope_parameters")  # fmt: skip
"""Settings that decide what weights mean."""


def project_language(
    student: PreTrainedModel, init: ProjectionInit, rows: Rows | None, *, source: str
) -> ProjectionReport:
    """Fill `student`, randomly initialised, from `init.teacher`, which is read tensor by tensor.

    `source` is the student's, for messages. Raises `ConfigError` for models that do not go together and for a
    calibration without rows, `DataError` for weights that cannot be read.
    """
    teacher = init.teacher
    assert isinstance(teacher, TransformersModel | PythonModel), "the configuration requires teachers of one kind"
    streamed, network = open_teacher(teacher)
    return project(
        Sides(
            source=teacher.source,
            teacher=structure_of(network, teacher.source, "teacher"),
            streamed=streamed,
            student=structure_of(student, source, "student"),
            network=student,
            top_k=int(getattr(network.config.get_text_config(), "num_experts_per_tok", None) or 0),
            notes=_differences(network.config, student.config),
        ),
        init,
        calibration_of(rows, init.calibration_rows),
    )


def structure_of(model: PreTrainedModel, source: str, role: str) -> Structure:
    """The structure of a model; `ConfigError` for one whose tensors no rule names."""
    found = language_structure(model)
    if found is None:
        raise ConfigError(
            f"student.init ({role} {source}): wanted a decoder whose blocks are named like Llama's (Llama, Mistral, "
            f"Qwen, Gemma, Phi-3, OLMo and their mixtures), found {type(model).__name__}, for which there are no "
            "rules. Use init.kind: layers, which keeps the width."
        )
    return found


def open_teacher(teacher: LanguageModelConfig) -> tuple[Streamed, PreTrainedModel]:
    """A teacher whose weights stay on disk, where they are safetensors that hold its tensors as they are."""
    if isinstance(teacher, PythonModel):
        return _in_memory(load_language_model(teacher))
    config = language_config(teacher)
    network = blank_language_model(config, attention=teacher.attention)
    tensors = StackedExperts(FileTensors(files_in(weights_folder(teacher))), _shapes(network))
    missing = sorted(set(_shapes(network)) - set(tensors.shapes))
    if missing:
        # Stored in another layout: transformers knows how to read it, all at once.
        say(f"{teacher.source}: its files do not name {missing[0]}; reading the whole model")
        return _in_memory(load_language_model(teacher))
    wrong = [n for n, shape in _shapes(network).items() if tuple(tensors.shapes[n]) != shape]
    if wrong:
        raise DataError(
            f"{teacher.source}: wanted {wrong[0]} of shape {list(_shapes(network)[wrong[0]])} as its config.json says, "
            f"found {list(tensors.shapes[wrong[0]])}. Use the weights and the config.json of one and the same model."
        )
    return _streamed(network, tensors, getattr(torch, teacher.dtype)), network


def blank_language_model(config: PreTrainedConfig, *, attention: str) -> PreTrainedModel:
    """A model without weights: parameters on the meta device, buffers (rotary frequencies) real."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
        )
    return model.eval()


def _in_memory(model: PreTrainedModel) -> tuple[Streamed, PreTrainedModel]:
    return _streamed(model, MemoryTensors(model), next(model.parameters()).dtype), model


def _streamed(network: PreTrainedModel, tensors: Tensors, dtype: torch.dtype) -> Streamed:
    structure = language_structure(network)
    blocks = () if structure is None else structure.block_modules
    return Streamed(network, tensors, dtype, blocks, dict(network.all_tied_weights_keys))


def _shapes(network: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    tied = network.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name not in tied}


def calibration_of(rows: Rows | None, wanted: int) -> Calibration | None:
    """How language models are run and compared; None without rows."""
    if not wanted:
        return None
    if rows is None:
        raise ConfigError(
            f"student.init.calibration_rows: wanted {wanted} rows of the inputs cache, found none at hand. Run the "
            "stage inputs first (--stages inputs), or set calibration_rows: 0."
        )
    batches = rows(wanted)
    if not batches:
        raise DataError(
            "student.init.calibration_rows: the inputs cache has no rows to train on, so nothing to measure."
        )
    return Calibration(batches, _run, _kl, lambda batch: batch["input_ids"].shape[1])


def _run(network: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [tokens, width] after the last norm, without padding."""
    assert isinstance(network, PreTrainedModel), "language models are run here"
    with torch.no_grad():
        states = hidden_states(network, batch["input_ids"], batch["position_ids"]).states
    return states[batch["valid"]]


def _kl(one: nn.Module, wanted: Tensor, other: nn.Module, found: Tensor) -> float:
    """KL divergence, nats per token, of what two networks say the next token is."""
    assert isinstance(one, PreTrainedModel) and isinstance(other, PreTrainedModel)  # noqa: PT018
    first, second = head_of(one), head_of(other)
    rows = min(first.vocab_size, second.vocab_size)
    first, second = head_of(one, rows), head_of(other, rows)
    total, step = 0.0, max(1, LOGITS // rows)
    with torch.no_grad():
        for start in range(0, len(wanted), step):
            p = first.logits(wanted[start : start + step]).float().log_softmax(-1)
            q = second.logits(found[start : start + step]).float().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    return total / len(wanted)


def _differences(teacher: PreTrainedConfig, student: PreTrainedConfig) -> tuple[str, ...]:
    """Settings that decide what weights mean and that differ, in words."""
    a, b = teacher.get_text_config(), student.get_text_config()
    return tuple(
        f"{key} differs: {getattr(a, key, None)} in the teacher, {getattr(b, key, None)} in the student"
        for key in SAME
        if getattr(a, key, None) != getattr(b, key, None)
    )
