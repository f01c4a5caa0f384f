"""Trajectories that another trainer stored, one folder per sample, as a signal cache.

Each folder holds `prompt.txt`, `latent.pth` (the clean sample, [C, T, h, w]) and `path.pth` (the states,
[K, C, T, h, w]), as NVlabs/FastGen's `generate_ode_pairs.py` writes them, with or without a leading axis of one. They
are read with `weights_only`, so that nothing in them is run. They do not say at which sigmas their states are, and the
times that such scripts were asked for can be off by 0.026, so the sigmas at which the sampler really stood have to be
stated.

    python -m raydistill.run CONFIG --stages inputs            # source.paths: [FOLDER/*/prompt.txt]
    python -m raydistill.cache.trajectory_import CONFIG --from FOLDER --sigmas 0.9998 0.9353 0.8255 0.5981

It prints what `teachers.N.imported` then names. The noise is the first state; our seeds have no part in it.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from raydistill.cache.content import inputs_content
from raydistill.cache.dense import DenseShard, read_dense, write_dense
from raydistill.cache.dense_batch import noise_hashes
from raydistill.cache.dense_capture import signal_meta
from raydistill.cache.joined import open_manifest
from raydistill.cache.ledger import Ledger
from raydistill.cache.manifest import FieldRecord, fingerprint_of
from raydistill.cache.shards import publish_record
from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import OdeTrajectoryTeacher
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError, DataError, RaydistillError
from raydistill.models.denoiser import process_of
from raydistill.models.hashes import file_hashes
from raydistill.signals import JsonValue
from raydistill.storage import Store

IMPORT_VERSION = 1
"""Raised when the same files would give another cache."""
FILES = ("prompt.txt", "latent.pth", "path.pth")


def import_trajectories(config: RunConfig, name: str, folder: Path, sigmas: Sequence[float]) -> Store:
    """Make the signal cache of teacher `name` from the sample folders below `folder`; a finished one stays as it is.

    `sigmas` are those of the states, from noise on. Raises `ConfigError` for a teacher that keeps no trajectories and
    for sigmas that no times of its process have, `DataError` naming the file for whatever is missing, unreadable or of
    another shape, and for prompts that are not those of the inputs.
    """
    teacher = next((t for t in config.teachers if t.name == name), None)
    if not isinstance(teacher, OdeTrajectoryTeacher):
        raise ConfigError(f"--teacher: wanted a teacher of signal ode_trajectory, found {name!r}.")
    process = process_of(teacher.model)
    times, alphas = _times(process, sigmas)
    inputs = Store(config.cache.dir) / f"inputs-{fingerprint_of(inputs_content(config))}"
    manifest = open_manifest(inputs)
    samples = _samples(folder)
    draws = config.latents.noise.draws_per_row
    dtype: torch.dtype = getattr(torch, teacher.store_dtype)
    content: dict[str, JsonValue] = {
        "signal": "ode_trajectory",
        "imported": IMPORT_VERSION,
        "inputs": manifest.fingerprint,
        "files": _hash(samples),
        "sigmas": [*sigmas],
        "store_dtype": teacher.store_dtype,
        "process": process.to_json(),
        "noise": config.latents.noise.model_dump(mode="json"),
    }
    ledger = Ledger.below(Store(config.cache.dir), name, content)
    if ledger.finished:
        return ledger.store
    ledger.begin()
    dims: tuple[str, ...] = ()
    for record in manifest.shards:
        shard = read_dense(inputs, record.name)
        tensors = _tensors(shard, samples, draws, len(sigmas), dtype)
        dims = ("channel", "frame", "height", "width") if tensors["clean"].ndim == 6 else ("channel", "height", "width")
        written = write_dense(
            ledger.store, record.name, tensors, meta=signal_meta(shard), split=record.split, rows=record.rows
        )
        publish_record(ledger.store, written)
    stored = teacher.store_dtype
    ledger.finish(
        [record.name for record in manifest.shards],
        kind="signal",
        parent=manifest.fingerprint,
        fields={
            "clean": FieldRecord(dtype=stored, dims=("draw", *dims), doc="sample that the noise leads to, latents"),
            "path": FieldRecord(dtype=stored, dims=("draw", "step", *dims), doc="states at the times `t`, latents"),
            "noise_sha": FieldRecord(dtype="int64", dims=("draw",), doc="hash of the first state"),
        },
        facts={
            "t": [*times], "alphas": [*alphas], "sigmas": [*sigmas], "imported": True, "process": process.to_json(),
            "noise": config.latents.noise.model_dump(mode="json"), "guidance_scale": teacher.guidance_scale,
        },
        build={},
    )  # fmt: skip
    return ledger.store


def _times(process: Process, sigmas: Sequence[float]) -> tuple[list[float], list[float]]:
    """Times and alphas of sigmas; of a noise schedule the timestep that has it."""
    if any(a <= b for a, b in pairwise(sigmas)) or not sigmas or sigmas[-1] <= 0:
        raise ConfigError(f"--sigmas: wanted falling sigmas above 0, one for each state, found {list(sigmas)}.")
    if process.kind == "flow":
        return list(sigmas), [1 - sigma for sigma in sigmas]
    times = []
    for sigma in sigmas:
        step = int((process.sigmas - sigma).abs().argmin())
        if abs(float(process.sigmas[step]) - sigma) > 1e-4:
            raise ConfigError(
                f"--sigmas: wanted sigmas of the noise schedule (alpha² + sigma² = 1), found {sigma:g}; the nearest is "
                f"{float(process.sigmas[step]):.6f}, of timestep {step}."
            )
        times.append(step / process.num_timesteps)
    return times, [float(process.alphas[round(t * process.num_timesteps)]) for t in times]


def _samples(folder: Path) -> dict[str, list[Path]]:
    """Sample folders by prompt, in the order of their names."""
    found: dict[str, list[Path]] = {}
    places = sorted(path.parent for path in folder.glob("**/latent.pth"))
    if not places:
        raise DataError(f"{folder}: wanted folders with {', '.join(FILES)}, found none.")
    for place in places:
        missing = [name for name in FILES if not (place / name).is_file()]
        if missing:
            raise DataError(f"{place}: wanted {', '.join(FILES)}, found no {' and no '.join(missing)}.")
        found.setdefault((place / "prompt.txt").read_text(encoding="utf-8").strip(), []).append(place)
    return found


def _hash(samples: Mapping[str, Sequence[Path]]) -> str:
    files = [place / name for places in samples.values() for place in places for name in FILES]
    hashes = file_hashes(files)
    return hashlib.sha256("\n".join(sorted(hashes[file] for file in files)).encode()).hexdigest()[:16]


def _tensors(
    shard: DenseShard, samples: Mapping[str, Sequence[Path]], draws: int, steps: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Samples and states of the rows of an inputs shard, [rows, draws, ...]."""
    captions, shape = shard.texts("captions"), shard.latent_shape
    clean, path, hashes = [], [], []
    for index in shard.tensor("prompt_index").tolist():
        places = samples.get(captions[index], [])
        if len(places) != draws:
            raise DataError(
                f"prompt {captions[index]!r}: wanted {draws} sample(s) (source.noise.draws_per_row), found "
                f"{len(places)} folder(s); give every prompt as many."
            )
        for place in places:
            clean.append(_read(place / "latent.pth", shape).to(dtype))
            path.append(_read(place / "path.pth", (steps, *shape)).to(dtype))
            hashes += noise_hashes(path[-1][:1].float())
    fold = (shard.rows, draws)
    return {
        "clean": torch.stack(clean).unflatten(0, fold),
        "path": torch.stack(path).unflatten(0, fold),
        "noise_sha": torch.tensor(hashes).unflatten(0, fold),
    }


def _read(file: Path, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a `.pth` file, without a leading axis of one; `DataError` for anything else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file}: wanted a tensor that torch.load reads with weights_only, found: {reason}") from error
    if not isinstance(found, Tensor):
        raise DataError(f"{file}: wanted one tensor, found {type(found).__name__}.")
    tensor = found[0] if found.ndim == len(shape) + 1 and found.shape[0] == 1 else found
    if tuple(tensor.shape) != shape:
        raise DataError(
            f"{file}: wanted the shape {list(shape)} (states first, then that of source.size and source.frames), found "
            f"{list(found.shape)}. State as many sigmas as there are states, and the size of the samples."
        )
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{file}: holds NaN or infinity; make the sample again.")
    return tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m raydistill.cache.trajectory_import", description=__doc__)
    parser.add_argument("config", nargs="+", help="files and overrides of the run, as for raydistill.run")
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder of sample folders")
    parser.add_argument("--sigmas", type=float, nargs="+", required=True, help="those of the states, from noise on")
    parser.add_argument("--teacher", help="name of the teacher; by default the first")
    given = parser.parse_args(arguments)
    try:
        files = [text for text in given.config if "=" not in text]
        config = resolve_paths(load_config(files, [text for text in given.config if "=" in text]))
        name = given.teacher or (config.teachers[0].name if config.teachers else "")
        store = import_trajectories(config, name, given.folder, given.sigmas)
    except RaydistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"imported: {store.uri.rpartition('/')[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
