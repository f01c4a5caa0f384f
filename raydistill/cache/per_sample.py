"""Caches of denoisers as one file per image and teacher, `{folder}/{teacher_id}/{key}_{W}x{H}.safetensors`.

Other trainers of several SDXL teachers keep their predictions so, with seven tensors per file and the latents apart:

| tensor                  | shape      | dtype   |
|-------------------------|------------|---------|
| `teacher_pred`          | [C, h, w]  | float16 |
| `noise`                 | [C, h, w]  | float16 |
| `timestep`              | [1]        | int64   |
| `seed`                  | [1]        | int64   |
| `resolution`            | [2] (W, H) | int32   |
| `encoder_hidden_states` | [L, D]     | float16 |
| `pooled_embeds`         | [P]        | float16 |

`export` writes one draw of our caches in this layout, and each image's latents as `latents/{key}_{W}x{H}.safetensors`
(tensor `latent`); the files' metadata also hold id, caption and size conditioning, which other readers pass over.
`per_sample_import` makes caches of such files, with or without that. From the command line:

    python -m raydistill.cache.per_sample export --inputs CACHE --signal NAME=CACHE … --to FOLDER
    python -m raydistill.cache.per_sample import --from FOLDER --teachers NAME … --latents FOLDER --to CACHES
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raydistill.cache.dense import META, DenseShard, read_dense
from raydistill.cache.dense_batch import Draw
from raydistill.cache.dense_checks import noise_of_facts
from raydistill.cache.dense_read import require_same_rows as require_same_shards
from raydistill.cache.joined import require_same_rows, sound_manifest
from raydistill.config.sources import NoiseConfig
from raydistill.errors import ConfigError, DataError, RaydistillError
from raydistill.signals import JsonValue, sample_seed
from raydistill.storage import Store

VERSION = "1"
"""Version that goes into the keys by default."""
LATENTS = "latents"
"""Folder of the latents that `export` writes."""
KEY = re.compile("[0-9a-f]{40}")
"""A key that stands alone as a row's id."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings that an image's id does not have."""
DTYPES = {
    "teacher_pred": torch.float16,
    "noise": torch.float16,
    "timestep": torch.int64,
    "seed": torch.int64,
    "resolution": torch.int32,
    "encoder_hidden_states": torch.float16,
    "pooled_embeds": torch.float16,
}
AXES = {
    "teacher_pred": 3,
    "noise": 3,
    "timestep": 1,
    "seed": 1,
    "resolution": 1,
    "encoder_hidden_states": 2,
    "pooled_embeds": 1,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: what one teacher said about one image at one draw of noise."""

    tensors: dict[str, Tensor]
    origin: dict[str, JsonValue] | None = None
    """What our own files say besides: row_id, caption and time_ids."""

    @property
    def timestep(self) -> int:
        """Timestep of the draw."""
        return int(self.tensors["timestep"][0])

    @property
    def bucket(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        width, height = self.tensors["resolution"].tolist()
        return height, width


def file_name(key: str, bucket: Sequence[int]) -> str:
    """Name of the file of an image in a bucket [height, width]."""
    height, width = bucket
    return f"{key}_{width}x{height}.safetensors"


def entry_key(image_id: str, bucket: Sequence[int], version: str = VERSION) -> str:
    """Key of an image in the names of its files: a sha1 of id, size and version."""
    height, width = bucket
    return hashlib.sha1(f"{image_id}|{width}x{height}|{version}".encode(), usedforsecurity=False).hexdigest()


def image_id(row_id: str) -> str:
    """The id of an image: its path without the ending."""
    path = PurePosixPath(row_id)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else row_id


def read_entry(path: Path) -> Entry:
    """A file of the layout; `DataError`, naming file and fault, when it is damaged or something else."""
    tensors, metadata = _read(path)
    missing = [name for name in DTYPES if name not in tensors]
    if missing:
        raise DataError(f"{path}: wanted the tensors {', '.join(DTYPES)}; missing: {', '.join(missing)}")
    for name, axes in AXES.items():
        values = tensors[name]
        floating = DTYPES[name].is_floating_point
        if values.ndim != axes or values.is_floating_point() != floating:
            raise DataError(f"{path}: {name} should have {axes} axes and dtype {DTYPES[name]}, found {_shown(values)}")
        if floating and not values.isfinite().all():
            raise DataError(f"{path}: {name} has a value that is not finite")
    prediction, noise = tensors["teacher_pred"], tensors["noise"]
    if prediction.shape != noise.shape:
        raise DataError(f"{path}: teacher_pred and noise differ: {_shown(prediction)} and {_shown(noise)}")
    origin = json.loads(metadata[META]) if META in metadata else None
    entry = Entry({name: tensors[name] for name in DTYPES}, origin)
    height, width = entry.bucket
    if height % noise.shape[1] or height * noise.shape[2] != width * noise.shape[1]:
        raise DataError(f"{path}: noise of {tuple(noise.shape)} does not belong to an image of {width}x{height}")
    if not 0 <= entry.timestep < 1000:
        raise DataError(f"{path}: timestep should be 0 to 999, found {entry.timestep}")
    return entry


def read_latent(path: Path, shape: Sequence[int]) -> Tensor:
    """The latents of an image; `DataError` when the file is damaged or holds others than of this shape."""
    tensors, _ = _read(path)
    if "latent" not in tensors or tensors["latent"].shape != torch.Size(shape):
        found = {name: tuple(values.shape) for name, values in tensors.items()}
        raise DataError(f"{path}: wanted the tensor latent of {tuple(shape)}, found {found}")
    return tensors["latent"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _shown(values: Tensor) -> str:
    return f"{tuple(values.shape)} {values.dtype}"


# --- export -----------------------------------------------------------------------------------------------------


def export(inputs: Store, signals: Mapping[str, Store], to: Store, *, version: str = VERSION, draw: int = 0) -> int:
    """Write draw `draw` of every image of the signals, and the latents; returns the number of images.

    Raises `CacheMismatch` for signals of other inputs, `ConfigError` for caches that the layout cannot hold (without
    text, or with values beyond fp16), `DataError` when two rows have one image id.
    """
    manifest = sound_manifest(inputs, "inputs")
    opened: dict[str, tuple[Store, NoiseConfig]] = {}
    for name, store in signals.items():
        signal = sound_manifest(store, "signal")
        require_same_rows(store, signal, manifest)
        noise = noise_of_facts(signal.facts)
        if draw >= noise.draws_per_row:
            raise ConfigError(f"--draw {draw}: {store.uri} has the draws 0 to {noise.draws_per_row - 1}")
        opened[name] = store, noise
    seen: dict[str, str] = {}
    for record in manifest.shards:
        shard = read_dense(inputs, record.name)
        beside = {name: read_dense(store, record.name) for name, (store, _) in opened.items()}
        for name, signal_shard in beside.items():
            require_same_shards(shard, signal_shard, where=f"{opened[name][0].uri}/{record.name}")
        for row in range(shard.rows):
            file = _name_of(shard, row, version)
            if file in seen:
                raise DataError(f"rows {seen[file]} and {shard.row_ids[row]} have the same image id; rename an image")
            seen[file] = shard.row_ids[row]
            latent = shard.tensor("latents")[row].clone()
            (to / LATENTS).publish(file, partial(save_file, {"latent": latent}))
            for name, (_, noise) in opened.items():
                entry = _entry(shard, beside[name], Draw(shard, row, draw), noise)
                metadata = {META: json.dumps(entry.origin, sort_keys=True)}
                (to / name).publish(file, partial(save_file, entry.tensors, metadata=metadata))
    return len(seen)


def _name_of(shard: DenseShard, row: int, version: str) -> str:
    row_id, bucket = shard.row_ids[row], bucket_of(shard)
    if KEY.fullmatch(row_id):  # what an import calls a row of which it knows nothing but the name of its file
        return file_name(row_id, bucket)
    return file_name(entry_key(image_id(row_id), bucket, version), bucket)


def bucket_of(shard: DenseShard) -> tuple[int, int]:
    """Height and width in pixels of the images of an inputs shard."""
    bucket = shard.meta["bucket"]
    assert isinstance(bucket, list), "an inputs shard of images names its bucket"
    height, width = (int(str(side)) for side in bucket)
    return height, width


def _entry(shard: DenseShard, signal: DenseShard, draw: Draw, noise: NoiseConfig) -> Entry:
    if "prompt_embeds" not in shard.names or "pooled" not in shard.names:
        raise ConfigError(f"{shard.path}: the layout wants text embeddings and pooled ones, found {list(shard.names)}")
    height, width = bucket_of(shard)
    prompt = draw.prompt(noise)
    if "seed" in shard.names:
        seed = int(shard.tensor("seed")[draw.row, draw.draw])
    else:  # the key of the Philox generator; as a signed number, since the file has no unsigned ones
        seed = sample_seed(draw.row_id, draw.draw, "noise", noise.seed)
        seed -= 2**64 if seed >= 2**63 else 0
    tensors = {
        "teacher_pred": signal.tensor("prediction")[draw.row, draw.draw],
        "noise": draw.noise(noise),
        "timestep": torch.tensor([draw.timestep(noise)]),
        "seed": torch.tensor([seed]),
        "resolution": torch.tensor([width, height]),
        "encoder_hidden_states": shard.tensor("prompt_embeds")[prompt],
        "pooled_embeds": shard.tensor("pooled")[prompt],
    }
    stored = {name: values.to(DTYPES[name], copy=True).contiguous() for name, values in tensors.items()}
    for name, values in stored.items():
        if not values.isfinite().all():
            raise ConfigError(f"row {draw.row_id}: {name} has a value beyond float16, which is all the layout has")
    caption = shard.texts("captions")[prompt]
    time_ids = shard.tensor("time_ids")[draw.row].tolist()
    return Entry(stored, {"row_id": draw.row_id, "caption": caption, "time_ids": time_ids})


# --- command line -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m raydistill.cache.per_sample", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a cache as one file per image and teacher")
    out.add_argument("--inputs", required=True, help="folder of the inputs cache")
    out.add_argument("--signal", action="append", required=True, metavar="NAME=CACHE", help="a teacher's signal cache")
    out.add_argument("--to", required=True, help="folder that is written")
    out.add_argument("--draw", type=int, default=0, help="which draw of each image (default: 0)")
    out.add_argument("--version", default=VERSION, help="version in the keys (default: 1)")
    into = commands.add_parser("import", help="make caches of one file per image and teacher")
    into.add_argument("--from", dest="folder", type=Path, required=True, help="folder with a folder per teacher")
    into.add_argument("--teachers", nargs="+", required=True, help="names of these folders")
    into.add_argument("--latents", type=Path, required=True, help="folder of the latents, tensor `latent` in each file")
    into.add_argument(
        "--images", type=Path, help="folder of the images, which gives ids and captions, and finds latents"
    )
    into.add_argument("--to", required=True, help="folder of the caches: cache.dir of the run that is to use them")
    into.add_argument("--scheduler", type=Path, help="scheduler_config.json of the teachers (default: that of SDXL)")
    into.add_argument("--prediction-type", default="epsilon", help="what the teachers predict (default: epsilon)")
    into.add_argument("--held-out", type=float, default=0.02, help="share of the images for evaluation (default: 0.02)")
    into.add_argument("--shard-rows", type=int, default=256, help="most images in a shard (default: 256)")
    into.add_argument("--version", default=VERSION, help="version in the keys (default: 1)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    from raydistill.cache.per_sample_import import Layout, import_entries, scheduler_settings

    given = _parser().parse_args(arguments)
    try:
        if given.command == "export":
            pairs = [pair.partition("=") for pair in given.signal]
            if bad := [name for name, equals, _ in pairs if not equals]:
                raise ConfigError(f"--signal: wanted NAME=CACHE, found {bad[0]!r}")
            signals = {name: Store(uri) for name, _, uri in pairs}
            count = export(Store(given.inputs), signals, Store(given.to), version=given.version, draw=given.draw)
            print(f"{given.to}: {count:,} images of {len(signals)} teacher(s)")
            return 0
        layout = Layout(given.folder, tuple(given.teachers), given.latents, given.images, given.version)
        stores = import_entries(
            layout,
            Store(given.to),
            scheduler=scheduler_settings(given.scheduler, given.prediction_type),
            held_out=given.held_out,
            shard_rows=given.shard_rows,
        )
        print(json.dumps({name: store.uri for name, store in stores.items()}, indent=1))
    except RaydistillError as error:
        print(f"raydistill: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
