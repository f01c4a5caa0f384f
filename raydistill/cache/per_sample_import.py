"""Caches out of one file per image and teacher (see `per_sample`).

Noise and timesteps in such files do not come from our row ids, so they are kept: the inputs hold `noise` and `timestep`
of every row, which then stand in the place of recomputed ones for all teachers, also for those captured later. The size
conditioning is the one that the teachers were given: where the file does not say, width before height, as other
trainers do it, whatever diffusers' order is. The layout has no empty caption; zeros stand for it, as in SDXL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raydistill.cache.dense import dense_name, row_sha, write_dense
from raydistill.cache.dense_batch import STORED_NOISE, noise_hashes
from raydistill.cache.dense_capture import OWN_FIELDS
from raydistill.cache.ledger import Ledger
from raydistill.cache.manifest import FieldRecord
from raydistill.cache.per_sample import SUFFIXES, Entry, entry_key, file_name, read_entry, read_latent
from raydistill.cache.shards import field_records, publish_record
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.process import Process
from raydistill.errors import DataError
from raydistill.signals import Field, JsonValue
from raydistill.sources.splits import split_of
from raydistill.storage import Store

IMPORT_VERSION = 1
"""Raised when the same files would give other caches."""
SDXL_SCHEDULER: dict[str, JsonValue] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files are."""

    folder: Path
    """Holds a folder per teacher."""
    teachers: tuple[str, ...]
    latents: Path
    """Latents, under the names of the entries; or, with `images`, under those of their own cache."""
    images: Path | None = None
    """The images, whose paths give ids and whose `.txt` files give captions."""
    version: str = "1"
    latent_version: str = "1"


@dataclass(frozen=True, slots=True)
class Row:
    """An image of the layout."""

    row_id: str
    file: str
    """Name of its file in each teacher's folder."""
    latents: Path
    caption: str
    bucket: tuple[int, int]
    time_ids: tuple[float, ...]
    split: str
    shared_sha: str
    """Hash of all that teachers share."""
    prediction_sha: tuple[str, ...]
    """Hash of the prediction of each teacher."""
    text_sha: str


def scheduler_settings(path: Path | None, prediction_type: str) -> dict[str, JsonValue]:
    """The scheduler configuration of the teachers; `DataError` when the file cannot be read."""
    if path is None:
        return {**SDXL_SCHEDULER, "prediction_type": prediction_type}
    try:
        settings: dict[str, JsonValue] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the scheduler configuration {path}: {error}") from error
    return settings


def import_entries(
    layout: Layout, caches: Store, *, scheduler: Mapping[str, JsonValue], held_out: float, shard_rows: int
) -> dict[str, Store]:
    """Make an inputs cache and a signal cache per teacher; returns them by teacher, the inputs as `inputs`.

    Finished caches of the same files stay as they are. Raises `DataError`, naming the file, for files that are missing,
    damaged or disagree between teachers, `ConfigError` for a scheduler that is no diffusion process.
    """
    process = Process.from_scheduler(scheduler)
    rows = _rows(layout, held_out)
    cuts = list(_shards(rows, shard_rows))
    inputs = Ledger.below(caches, "inputs", _inputs_content(rows, shard_rows))
    if not inputs.finished:
        _write_inputs(inputs, cuts, layout)
    stores = {"inputs": inputs.store}
    for place, teacher in enumerate(layout.teachers):
        content: dict[str, JsonValue] = {
            "signal": "noise_prediction",
            "imported": IMPORT_VERSION,
            "inputs": inputs.fingerprint,
            "predictions": _hash(row.prediction_sha[place] for row in rows),
            "process": process.to_json(),
        }
        ledger = Ledger.below(caches, teacher, content)
        if not ledger.finished:
            _write_signal(ledger, cuts, layout, teacher, process, parent=inputs.fingerprint)
        stores[teacher] = ledger.store
    return stores


# --- what there is ----------------------------------------------------------------------------------------------


def _rows(layout: Layout, held_out: float) -> list[Row]:
    """The images of the layout in cache order: by split, bucket, text and id."""
    names = {teacher: _names(layout.folder / teacher) for teacher in layout.teachers}
    wanted = sorted(set().union(*names.values()))
    for teacher, found in names.items():
        if lacking := sorted(set(wanted) - found):
            raise DataError(
                f"{layout.folder / teacher}: wanted the images of all teachers, {len(lacking):,} are missing, the "
                f"first is {lacking[0]}. Build them, or remove the others."
            )
    if not wanted:
        raise DataError(f"{layout.folder}: found no .safetensors file in the folders {', '.join(layout.teachers)}")
    known = _images(layout, wanted) if layout.images is not None else {}
    rows = [_row(layout, name, known.get(name), held_out) for name in wanted]
    return sorted(rows, key=lambda row: (row.split, row.bucket, row.text_sha, row.row_id))


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise DataError(f"wanted a folder of a teacher's files, found none at {folder}")
    return {path.name for path in folder.glob("*.safetensors")}


def _images(layout: Layout, wanted: Sequence[str]) -> dict[str, tuple[str, str, Path]]:
    """Id, caption and latents file of the image of each entry, by the name of its file."""
    assert layout.images is not None
    sizes = sorted({_size(name, layout.folder) for name in wanted})
    found = {}
    for path in sorted(layout.images.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        relative = path.relative_to(layout.images)
        stat, text = path.stat(), path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        for bucket in sizes:
            name = file_name(entry_key(str(relative.with_suffix("")), bucket, layout.version), bucket)
            signature = f"{relative}|{stat.st_size}|{stat.st_mtime_ns}|{bucket[1]}x{bucket[0]}|{layout.latent_version}"
            own = hashlib.sha1(signature.encode(), usedforsecurity=False).hexdigest()
            latents = next(
                (p for p in (layout.latents / name, layout.latents / file_name(own, bucket)) if p.is_file()),
                layout.latents / name,
            )
            found[name] = str(relative.with_suffix("")), caption, latents
    if lacking := [name for name in wanted if name not in found]:
        raise DataError(
            f"{layout.images}: {len(lacking):,} of {len(wanted):,} files belong to no image there, the first is "
            f"{lacking[0]}. Name the folder that their ids are relative to, or leave --images out."
        )
    return found


def _size(name: str, folder: Path) -> tuple[int, int]:
    """Height and width in the name of an entry."""
    width, x, height = name.removesuffix(".safetensors").rpartition("_")[2].partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise DataError(f"{folder}: wanted files named <key>_<W>x<H>.safetensors, found {name}")
    return int(height), int(width)


def _row(layout: Layout, name: str, known: tuple[str, str, Path] | None, held_out: float) -> Row:
    bucket = _size(name, layout.folder)
    key = name.removesuffix(".safetensors").rpartition("_")[0]
    paths = [layout.folder / teacher / name for teacher in layout.teachers]
    entries = [read_entry(path) for path in paths]
    first = entries[0]
    row_id, caption, latents = known or (key, "", layout.latents / name)
    if first.origin is not None and known is None:
        row_id, caption = str(first.origin["row_id"]), str(first.origin["caption"])
    time_ids = _time_ids(first)
    if first.bucket != bucket:
        raise DataError(f"{paths[0]}: its resolution is {first.bucket[1]}x{first.bucket[0]}")
    for path, entry in zip(paths[1:], entries[1:], strict=True):
        for tensor in ("noise", "timestep", "encoder_hidden_states", "pooled_embeds"):
            if not torch.equal(entry.tensors[tensor], first.tensors[tensor]):
                raise DataError(
                    f"the teachers disagree on {tensor}: {paths[0]} and {path}. Predictions of different noise or text "
                    "cannot be learned together; import these teachers one by one."
                )
    latent = read_latent(latents, first.tensors["noise"].shape)
    others = [values for tensor, values in first.tensors.items() if tensor != "teacher_pred"]
    shared = _hash(_sha(values) for values in (latent, *others, torch.tensor(time_ids)))
    return Row(
        row_id=row_id,
        file=name,
        latents=latents,
        caption=caption,
        bucket=bucket,
        time_ids=time_ids,
        split=split_of(shared, held_out),
        shared_sha=shared,
        prediction_sha=tuple(_sha(entry.tensors["teacher_pred"]) for entry in entries),
        text_sha=_hash(_sha(first.tensors[name]) for name in ("encoder_hidden_states", "pooled_embeds")),
    )


def _time_ids(entry: Entry) -> tuple[float, ...]:
    """The size conditioning that the teacher was given."""
    height, width = entry.bucket
    told = entry.origin["time_ids"] if entry.origin is not None else [width, height, 0, 0, width, height]
    assert isinstance(told, list), "a file of ours names its time ids"
    return tuple(float(str(number)) for number in told)


def _stacked(entries: Sequence[Entry], name: str, rows: Sequence[Row]) -> Tensor:
    """A tensor of all files; `DataError` when one has another shape or dtype than the first."""
    first = entries[0].tensors[name]
    for entry, row in zip(entries, rows, strict=True):
        values = entry.tensors[name]
        if (values.shape, values.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{row.file}: {name} is {tuple(values.shape)} {values.dtype}, that of {rows[0].file} "
                f"{tuple(first.shape)} {first.dtype}; import files of one kind"
            )
    return torch.stack([entry.tensors[name] for entry in entries])


def _sha(values: Tensor) -> str:
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode() + data).hexdigest()


def _hash(parts: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- caches -----------------------------------------------------------------------------------------------------


def _inputs_content(rows: Sequence[Row], shard_rows: int) -> dict[str, JsonValue]:
    return {
        "kind": "images",
        "imported": IMPORT_VERSION,
        "rows": _hash(f"{row.row_id} {row.caption} {row.split} {row.shared_sha}" for row in rows),
        "shard_rows": shard_rows,
    }


def _shards(rows: Sequence[Row], shard_rows: int) -> Iterator[list[Row]]:
    """Consecutive rows of one split and one bucket, at most `shard_rows`."""
    start = 0
    for place, row in enumerate(rows):
        if place > start and (
            place - start == shard_rows or (row.split, row.bucket) != (rows[start].split, rows[start].bucket)
        ):
            yield list(rows[start:place])
            start = place
    yield list(rows[start:])


def _write_inputs(ledger: Ledger, cuts: Sequence[list[Row]], layout: Layout) -> None:
    ledger.begin()
    names = [dense_name(index) for index in range(len(cuts))]
    pending = set(ledger.pending(names))
    teacher = layout.teachers[0]
    for name, rows in zip(names, cuts, strict=True):
        if name in pending:
            tensors, meta = _inputs_shard(rows, layout.folder / teacher)
            record = write_dense(ledger.store, name, tensors, meta=meta, split=rows[0].split, rows=len(rows))
            publish_record(ledger.store, record)
    first = read_entry(layout.folder / teacher / cuts[0][0].file).tensors
    latent = read_latent(cuts[0][0].latents, first["noise"].shape)
    buckets = sorted({rows[0].bucket for rows in cuts})
    counts = {split: sum(len(rows) for rows in cuts if rows[0].split == split) for split in ("train", "held_out")}
    facts: dict[str, JsonValue] = {
        "latent_channels": latent.shape[0],
        "vae_factor": cuts[0][0].bucket[0] // latent.shape[1],
        "scaling": "as imported",
        "text_width": first["encoder_hidden_states"].shape[1],
        "text_tokens": first["encoder_hidden_states"].shape[0],
        "pooled_width": first["pooled_embeds"].shape[0],
        "buckets": [list(bucket) for bucket in buckets],
        "num_rows": dict(counts),
        "imported": True,
        "stored_draws": 1,
        "empty_caption": "zeros",
    }
    fields = {
        "latents": Field(latent.dtype, ("channel", "height", "width"), "latents, as imported"),
        "time_ids": Field(torch.float32, ("number",), "size conditioning as the teachers were given it; pixels"),
        "prompt_index": Field(torch.int32, (), "place of the row's caption among the shard's prompts"),
        "prompt_embeds": Field(
            first["encoder_hidden_states"].dtype,
            ("token", "feature"),
            "hidden states of a prompt; zeros for the empty one",
        ),
        "pooled": Field(
            first["pooled_embeds"].dtype, ("pooled",), "embedding of a whole prompt; zeros for the empty one"
        ),
        STORED_NOISE: Field(first["noise"].dtype, ("draw", "channel", "height", "width"), "noise of the draw"),
        "timestep": Field(torch.int32, ("draw",), "timestep of the draw"),
        "seed": Field(torch.int64, ("draw",), "seed that came with the draw"),
    }
    ledger.finish(names, kind="inputs", parent=None, fields=field_records(fields), facts=facts, build={})


def _inputs_shard(rows: Sequence[Row], folder: Path) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    entries = [read_entry(folder / row.file) for row in rows]
    latents = _latents(entries, rows)
    shown = [(row.text_sha, row.caption) for row in rows]
    texts = list(dict.fromkeys(shown))
    height, width = rows[0].bucket
    tensors = {
        "latents": latents,
        "time_ids": torch.tensor([row.time_ids for row in rows], dtype=torch.float32),
        "prompt_index": torch.tensor([texts.index(text) for text in shown], dtype=torch.int32),
        STORED_NOISE: _stacked(entries, "noise", rows)[:, None],
        "timestep": _stacked(entries, "timestep", rows).int(),
        "seed": _stacked(entries, "seed", rows),
    }
    for name, given in (("prompt_embeds", "encoder_hidden_states"), ("pooled", "pooled_embeds")):
        every = _stacked(entries, given, rows)
        tensors[name] = torch.cat([every[[shown.index(text) for text in texts]], torch.zeros_like(every[:1])])
    captions = [caption for _, caption in texts]
    meta: dict[str, JsonValue] = {
        "kind": "inputs", "format": IMPORT_VERSION, "split": rows[0].split, "bucket": [height, width],
        "row_ids": [row.row_id for row in rows], "captions": [*captions, ""],
        "row_sha": [row_sha(latent, row.caption) for latent, row in zip(latents, rows, strict=True)],
    }  # fmt: skip
    return tensors, meta


def _latents(entries: Sequence[Entry], rows: Sequence[Row]) -> Tensor:
    found = [read_latent(row.latents, entry.tensors["noise"].shape) for row, entry in zip(rows, entries, strict=True)]
    if len({latent.dtype for latent in found}) > 1:
        raise DataError(
            f"{rows[0].latents.parent}: wanted latents of one dtype, found {sorted({str(z.dtype) for z in found})}"
        )
    return torch.stack(found)


def _write_signal(
    ledger: Ledger, cuts: Sequence[list[Row]], layout: Layout, teacher: str, process: Process, *, parent: str
) -> None:
    ledger.begin()
    names = [dense_name(index) for index in range(len(cuts))]
    pending = set(ledger.pending(names))
    for name, rows in zip(names, cuts, strict=True):
        if name in pending:
            entries = [read_entry(layout.folder / teacher / row.file) for row in rows]
            tensors = {
                "prediction": _stacked(entries, "teacher_pred", rows)[:, None],
                "timestep": _stacked(entries, "timestep", rows).int(),
                "noise_sha": torch.tensor(noise_hashes(_stacked(entries, "noise", rows).float()))[:, None],
            }
            latents = _latents(entries, rows)
            meta: dict[str, JsonValue] = {
                "kind": "signal", "split": rows[0].split, "bucket": list(rows[0].bucket),
                "row_ids": [row.row_id for row in rows],
                "row_sha": [row_sha(latent, row.caption) for latent, row in zip(latents, rows, strict=True)],
            }  # fmt: skip
            record = write_dense(ledger.store, name, tensors, meta=meta, split=rows[0].split, rows=len(rows))
            publish_record(ledger.store, record)
    noise_settings = NoiseConfig(prediction_type=process.prediction_type)
    facts: dict[str, JsonValue] = {
        "prediction_type": process.prediction_type,
        "own_prediction_type": process.prediction_type,
        "process": process.to_json(),
        "noise": noise_settings.model_dump(mode="json"),
        "guidance_scale": None,
        "taps": {},
        "imported": True,
    }
    stored = read_entry(layout.folder / teacher / cuts[0][0].file).tensors["teacher_pred"].dtype
    doc = f"prediction of the kind {process.prediction_type}, as imported"
    own: dict[str, FieldRecord] = field_records(
        {"prediction": Field(stored, ("channel", "height", "width"), doc), **OWN_FIELDS}
    )
    fields = {name: field.model_copy(update={"dims": ("draw", *field.dims)}) for name, field in own.items()}
    ledger.finish(names, kind="signal", parent=parent, fields=fields, facts=facts, build={})
