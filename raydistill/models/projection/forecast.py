"""What a projection will make and how much memory it will need, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistill.config.models import DiffusersModel, ProjectionInit, PythonModel, StudentConfig, TransformersModel
from raydistill.config.world import WorldModel
from raydistill.models.denoiser import blank_network, empty_denoiser, with_one_sample
from raydistill.models.denoiser import denoiser_config as denoiser_settings
from raydistill.models.load import empty_language_model, language_config
from raydistill.models.projection.denoiser import PATCH, moved_stages
from raydistill.models.projection.denoiser import structure_of as denoiser_structure
from raydistill.models.projection.language_student import blank_language_model
from raydistill.models.projection.language_student import structure_of as language_structure
from raydistill.models.projection.living import Living
from raydistill.models.projection.measure import REMOVAL_TOKENS, REMOVED, flat
from raydistill.models.projection.report import ProjectionReport
from raydistill.models.projection.run import Sides, account
from raydistill.models.projection.stream import Streamed
from raydistill.models.projection.structure import RESIDUAL, Structure
from raydistill.models.projection.tensors import ShapeTensors

TOKENS = 8192
"""Tokens of text that go through the teacher at once."""
PIXELS = 1 << 15
"""Pixels of latents that do."""
FLOAT = 4
BESIDES = 150_000_000
"""Bytes that libraries take when they load and run models, measured with benchmarks/projection_memory.py."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a projection will make, and the most memory it will need, in bytes."""

    report: ProjectionReport
    """What comes from where; which channels and blocks is not known yet."""
    teacher_blocks: int
    """Blocks of the teacher."""
    student: int
    """The student in fp32."""
    reading: int
    """The largest tensor of the teacher as it is read, in fp32 and what is made of it."""
    weights: int
    """The teacher's weights that are in memory while it runs: all outside blocks, and one block."""
    activations: int
    """What the calibration rows leave behind while they pass a block; 0 without calibration."""

    @property
    def peak(self) -> int:
        """The most memory: the student, and either a tensor or a running block, and what libraries take."""
        running = self.weights + self.activations if self.activations else 0
        return self.student + max(self.reading, running) + BESIDES


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of the calibration is, as far as it takes memory."""

    tokens: int = 1
    """Tokens of text: of a language model's row, or of a caption."""
    latents: tuple[int, int] | None = None
    """Height and width of an image's latents; by default what its denoiser usually sees."""


def forecast(student: StudentConfig, row: Row = Row()) -> Forecast:
    """The forecast of a student with a projection that names its teacher.

    Reads configurations alone. Raises what `project` would raise for models that do not go together.
    """
    init = student.init
    assert isinstance(init, ProjectionInit) and init.teacher is not None  # noqa: PT018
    if isinstance(student.model, DiffusersModel):
        assert isinstance(init.teacher, DiffusersModel), "the configuration requires teachers of one kind"
        return _denoiser(student.model, init.teacher, init, row)
    assert not isinstance(init.teacher, DiffusersModel | WorldModel), "the configuration requires teachers of one kind"
    assert not isinstance(student.model, WorldModel), "world models are not projected"
    return _language(student.model, init.teacher, init, row.tokens)


def _language(
    model: TransformersModel | PythonModel, source: TransformersModel | PythonModel, init: ProjectionInit, tokens: int
) -> Forecast:
    teacher = _blank(source)
    student = _blank(model)
    theirs = language_structure(teacher, source.source, "teacher")
    ours = language_structure(student, model.source, "student")
    sides = _sides(source.source, teacher, theirs, student, ours, dict(teacher.all_tied_weights_keys))
    width, units = theirs.sizes[RESIDUAL], [n for name, n in theirs.sizes.items() if name.endswith(".inner")]
    top_k = int(getattr(teacher.config.get_text_config(), "num_experts_per_tok", None) or 1)
    at_once = max(tokens, min(TOKENS, tokens * init.calibration_rows))
    if init.depth == "importance":
        at_once = max(at_once, REMOVED * max(tokens, min(REMOVAL_TOKENS, tokens * init.calibration_rows)))
    # The stream, its norm, queries, keys, values and their mix, and the MLP's gate, up and product.
    activations = at_once * (8 * width + 3 * top_k * max(units, default=0)) * FLOAT + width * width * FLOAT * 3
    return _forecast(sides, init, source.dtype, activations if init.calibration_rows else 0)


def _blank(source: TransformersModel | PythonModel) -> PreTrainedModel:
    if isinstance(source, PythonModel):
        return empty_language_model(source)
    model = blank_language_model(language_config(source), attention=source.attention)
    model.tie_weights()  # which making it without memory undid; tied weights count once
    return model


def _denoiser(model: DiffusersModel, source: DiffusersModel, init: ProjectionInit, row: Row) -> Forecast:
    teacher = blank_network(denoiser_settings(source), source=source.source)
    student = empty_denoiser(model)
    theirs = denoiser_structure(teacher, f"teacher {source.source}")
    ours = denoiser_structure(student, f"student {model.source}")
    sides = _sides(source.source, teacher, theirs, student, ours, {}, moved_stages(student, teacher))
    activations = 0
    if init.calibration_rows:
        each, pixels = _for_one_image(teacher, row, source.dtype)
        images = min(init.calibration_rows, max(1, PIXELS // pixels))
        if init.depth == "importance":
            images = max(images, REMOVED * min(init.calibration_rows, max(1, REMOVAL_TOKENS * PATCH // pixels)))
        activations = images * each
    return _forecast(sides, init, source.dtype, activations)


def _for_one_image(network: ModelMixin, row: Row, dtype: str) -> tuple[int, int]:
    """Most bytes of tensors that live at once while one image passes `network` and is measured; pixels of its latents.

    Found on the meta device, where nothing takes memory: `network` is put there, in the format that it will run in.
    """
    nn.Module.to(network, device="meta", dtype=getattr(torch, dtype))

    def measured(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if isinstance(given, Tensor):
            flat(module, given, None).pow(2).sum(0)

    handles = [
        module.register_forward_pre_hook(measured, with_kwargs=True)
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]
    with torch.no_grad(), Living(network) as living:
        out = with_one_sample(network, size=row.latents, tokens=max(row.tokens, 1))
    for handle in handles:
        handle.remove()
    return living.most, out[0, 0].numel()


def _sides(
    source: str,
    teacher: nn.Module,
    theirs: Structure,
    student: nn.Module,
    ours: Structure,
    tied: dict[str, str],
    moved: dict[str, str] | None = None,
) -> Sides:
    blocks = theirs.block_modules
    return Sides(
        source=source,
        teacher=theirs,
        streamed=Streamed(teacher, ShapeTensors(teacher), torch.float32, blocks, tied),
        student=ours,
        network=student,
        moved=moved or {},
    )


def _forecast(sides: Sides, init: ProjectionInit, dtype: str, activations: int) -> Forecast:
    size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    numbers = {name: tensor.numel() for name, tensor in sides.streamed.network.state_dict().items()}
    inside = [sum(n for name, n in numbers.items() if name.startswith(f"{block}.")) for block in sides.streamed.blocks]
    largest = max((piece.size for piece in sides.teacher.pieces.values()), default=0)
    tied = sum(numbers.get(name, 0) for name in sides.streamed.tied)
    return Forecast(
        report=account(sides, init),
        teacher_blocks=len(sides.teacher.block_modules),
        student=sum(p.numel() for p in sides.network.parameters()) * FLOAT,
        # A selection squares what it reads; a rotation also takes it to where its axis is the last.
        reading=largest * (2 * FLOAT if init.basis == "importance" else size + 3 * FLOAT),
        weights=(sum(numbers.values()) - tied - sum(inside) + max(inside, default=0)) * size,
        activations=activations,
    )
