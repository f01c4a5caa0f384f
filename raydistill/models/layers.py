"""A shorter model out of some of a pretrained model's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from raydistill.errors import ConfigError
from raydistill.models.assemble import fill, own_state, skeleton
from raydistill.signals import JsonValue


def spread(num_blocks: int, keep: int) -> tuple[int, ...]:
    """`keep` of `num_blocks` blocks, evenly spread with both ends: block round(i (L-1) / (S-1)); the first if one.

    Source: Shleifer and Rush 2020, arXiv 2010.13002 ("shrink and fine-tune" copies maximally spaced blocks).
    """
    if keep > num_blocks:
        raise ConfigError(
            f"student.init.num_layers: wanted {keep} blocks, found a model of {num_blocks}. "
            f"Ask for at most {num_blocks}, or start from a deeper model."
        )
    return tuple(round(i * (num_blocks - 1) / max(keep - 1, 1)) for i in range(keep))


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new fp32 model with the blocks `layers` of `model`, in that order, and everything outside the blocks.

    It is built from a configuration that describes it, so that saving, loading and generation with a cache work.
    `model` lends its tensors where they are fp32. Raises `ConfigError` when the blocks do not exist, or when the
    architecture cannot describe just these blocks.
    """
    prefix, blocks = _blocks(model)
    outside = [i for i in layers if not 0 <= i < len(blocks)]
    if outside:
        raise ConfigError(
            f"student.init.layers: wanted the blocks {list(layers)}, found a model with the blocks 0 to "
            f"{len(blocks) - 1}; not there: {outside}. Blocks are counted from 0."
        )
    config = _shortened(model.config, layers)
    student = skeleton(config, attention=model.config._attn_implementation)
    _, kept = _blocks(student)
    for new, old in enumerate(layers):
        _require_same_kind(blocks[old], kept[new], old, new)
    position = {old: new for new, old in enumerate(layers)}
    state = {}
    for name, tensor in own_state(model).items():
        if name.startswith(f"{prefix}."):
            number, rest = name.removeprefix(f"{prefix}.").split(".", 1)
            if int(number) not in position:
                continue
            name = f"{prefix}.{position[int(number)]}.{rest}"
        state[name] = tensor
    student.generation_config = model.generation_config
    return fill(student, state, where=f"the blocks {list(layers)} of {type(model).__name__}")


def num_blocks(model: PreTrainedModel) -> int:
    """Decoder blocks of `model`."""
    return len(_blocks(model)[1])


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name: the outermost module list of `num_hidden_layers` entries."""
    number = getattr(model.config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not lists:
        raise ConfigError(
            f"student.init.kind: layers wants a decoder whose blocks stand in one list of num_hidden_layers entries, "
            f"found {type(model).__name__} without one. Use init.kind: pretrained, or random with overrides."
        )
    return min(lists, key=lambda entry: entry[0].count("."))


def _shortened(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of the kept blocks: their number, and what is listed by block."""
    values: dict[str, JsonValue] = config.to_dict()
    total = config.num_hidden_layers
    for name, value in values.items():
        if name == "mlp_only_layers":
            continue
        if isinstance(value, list | tuple) and len(value) == total and ("layer" in name or "block" in name):
            values[name] = [value[i] for i in layers]
    if "mlp_only_layers" in values:
        # Qwen's MoE rule is by block number; a list of the dense blocks says the same for any selection.
        dense, step = set(config.mlp_only_layers or ()), config.decoder_sparse_step
        values["mlp_only_layers"] = [new for new, old in enumerate(layers) if old in dense or (old + 1) % step]
        values["decoder_sparse_step"] = 1
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(values)


def _require_same_kind(wanted: nn.Module, found: nn.Module, old: int, new: int) -> None:
    """`ConfigError` unless block `new` of the new model would compute what block `old` of the old one does."""
    theirs, ours = dict(wanted.named_modules()), dict(found.named_modules())
    different = sorted(set(theirs) ^ set(ours))
    for name in set(theirs) & set(ours):
        a, b = _settings(theirs[name]), _settings(ours[name])
        different += [f"{name or 'block'}.{key}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if different:
        raise ConfigError(
            f"student.init.kind: layers: wanted block {old} of the model as block {new}, found that the configuration "
            f"of this architecture cannot say so; different: {', '.join(different[:4])}. "
            "Choose blocks that keep the model's pattern, e.g. a multiple of its period."
        )


def _settings(module: nn.Module) -> dict[str, bool | int | float | str | None]:
    """What a module was told by its configuration, apart from its number."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and name not in ("layer_idx", "training")
        and name[0] != "_"
    } | {"class": type(module).__name__}
