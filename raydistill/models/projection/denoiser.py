"""A denoiser as a projection of a larger one."""

from __future__ import annotations

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from raydistill.config.models import DiffusersModel, ProjectionInit
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError, DataError
from raydistill.models.blocks import kept_prefixes
from raydistill.models.denoiser import blank_network, load_denoiser, predict, process_of, stored
from raydistill.models.projection.measure import Batch, Calibration, Rows
from raydistill.models.projection.report import ProjectionReport
from raydistill.models.projection.run import Sides, project
from raydistill.models.projection.stream import Streamed
from raydistill.models.projection.structure import Structure
from raydistill.models.projection.tensors import FileTensors, MemoryTensors, Tensors
from raydistill.models.projection.transformer import transformer_structure
from raydistill.models.projection.unet import unet_structure
from raydistill.progress import say

PATCH = 4
"""Numbers of a latent channel that make a token, about."""


def project_denoiser(
    student: ModelMixin, init: ProjectionInit, rows: Rows | None, *, process: Process, source: str
) -> ProjectionReport:
    """Fill `student`, randomly initialised, from `init.teacher`, which is read tensor by tensor.

    `process` and `source` are the student's. Raises `ConfigError` for models that do not go together and for a
    calibration without rows, `DataError` for weights that cannot be read.
    """
    teacher = init.teacher
    assert isinstance(teacher, DiffusersModel), "the configuration requires teachers of one kind"
    streamed = open_teacher(teacher)
    theirs = structure_of(streamed.network, f"teacher {teacher.source}")
    ours = structure_of(student, f"student {source}")
    calibration, notes = None, _differences(streamed.network, student)
    if init.calibration_rows:
        asked = process_of(teacher)
        calibration = _calibration(student, asked, process, rows, init)
        if asked.prediction_type != process.prediction_type:
            notes += (
                f"the teacher predicts {asked.prediction_type}, the student {process.prediction_type}: its output head "
                "begins with weights that mean the other",
            )
    return project(
        Sides(
            source=teacher.source,
            teacher=theirs,
            streamed=streamed,
            student=ours,
            network=student,
            moved=moved_stages(student, streamed.network),
            notes=notes,
        ),
        init,
        calibration,
    )


def structure_of(network: nn.Module, who: str) -> Structure:
    """The structure of a denoiser; `ConfigError` for one that no rules are for."""
    found = (
        unet_structure(network)
        if isinstance(network, UNet2DConditionModel | UNet2DModel)
        else transformer_structure(network)
    )
    if found is None:
        raise ConfigError(
            f"student.init ({who}): wanted a UNet, or a transformer of Wan, CogVideoX, PixArt or Stable Diffusion 3, "
            f"found {type(network).__name__}, for which there are no rules. Use init.kind: blocks, which keeps the "
            "width."
        )
    return found


def moved_stages(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """For UNets, the teacher's stages and layers that stand for the student's; `ConfigError` for more of them."""
    kinds = UNet2DConditionModel | UNet2DModel
    if not isinstance(student, kinds) or not isinstance(teacher, kinds):
        return {}
    return dict(kept_prefixes(student, teacher, where="student.init"))


def open_teacher(teacher: DiffusersModel) -> Streamed:
    """A teacher whose weights stay on disk, where its files name its tensors as diffusers does."""
    if teacher.overrides:
        raise ConfigError(
            f"student.init.teacher: {teacher.source}: overrides {sorted(teacher.overrides)} change the architecture, "
            "so its weights do not fit; drop the overrides."
        )
    config, files = stored(teacher)
    network = blank_network(config, source=teacher.source)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tensors: Tensors = FileTensors(files)
    found = tensors.shapes
    missing = sorted(set(wanted) - set(found))
    if 2 * len(missing) > len(wanted):
        # One file with the names of the family's original code, which diffusers reads as a whole.
        say(f"{teacher.source}: its file does not name tensors as diffusers does; reading the whole")
        network = load_denoiser(teacher)
        tensors, missing = MemoryTensors(network), []
    wrong = [n for n in wanted if n in tensors.shapes and tensors.shapes[n] != wanted[n]]
    if missing or wrong:
        name = (missing or wrong)[0]
        has = f"{list(tensors.shapes[name])}" if wrong and not missing else f"none ({len(missing)} are missing)"
        raise DataError(
            f"{teacher.source}: wanted {name} of shape {list(wanted[name])}, found {has}. Use the weights and the "
            "config.json of one and the same model."
        )
    return Streamed(network, tensors, getattr(torch, teacher.dtype), _streamed_parts(network), {})


def _streamed_parts(network: nn.Module) -> tuple[str, ...]:
    """Modules that are read one after another: blocks of a transformer, stages of a UNet."""
    names = ("blocks", "transformer_blocks", "down_blocks", "up_blocks")
    found = [f"{name}.{i}" for name in names for i in range(len(getattr(network, name, ())))]
    return (*found, *(("mid_block",) if getattr(network, "mid_block", None) is not None else ()))


def _calibration(
    student: nn.Module, theirs: Process, ours: Process, rows: Rows | None, init: ProjectionInit
) -> Calibration:
    """How denoisers are run: both on the images that the teacher's process noises; the outputs are compared where both
    predict the same thing."""
    if rows is None:
        raise ConfigError(
            f"student.init.calibration_rows: wanted {init.calibration_rows} rows of the inputs cache, found none at "
            "hand. Run the stage inputs first (--stages inputs), or set calibration_rows: 0."
        )
    batches = rows(init.calibration_rows)
    if not batches:
        raise DataError(
            "student.init.calibration_rows: the inputs cache has no images to train on; nothing to measure."
        )
    alike = theirs.differs(ours) is None and theirs.prediction_type == ours.prediction_type

    def run(network: nn.Module, batch: Batch) -> Tensor:
        x_t = theirs.noisy(batch["latents"], batch["noise"], batch["timestep"])
        told = (ours if network is student else theirs).times(batch["timestep"])
        with torch.no_grad():
            return predict(network, x_t, told, batch)

    def change(one: nn.Module, wanted: Tensor, other: nn.Module, found: Tensor) -> float:
        if other is student and not alike:
            return float("nan")
        return float((found - wanted).pow(2).mean() / wanted.pow(2).mean())

    return Calibration(batches, run, change, lambda batch: batch["latents"][0, 0].numel() // PATCH)


def _differences(teacher: nn.Module, student: nn.Module) -> tuple[str, ...]:
    notes = []
    if type(teacher) is not type(student):
        notes.append(
            f"a {type(student).__name__} from a {type(teacher).__name__}: what they do apart is left to training"
        )
    return tuple(notes)
