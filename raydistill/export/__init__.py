"""The export of a run: a folder that plain transformers or diffusers loads, with a card that says what was measured.

It holds the student's weights and configuration, what comes with them (a tokenizer, a scheduler) and README.md. The
folder appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from pyarrow import fs

from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource
from raydistill.evaluate.job import student_of
from raydistill.export.images import image_card, write_images
from raydistill.export.text import text_card, write_text
from raydistill.export.worlds import world_card, write_worlds
from raydistill.models.student import COMPACT
from raydistill.signals import JsonValue
from raydistill.storage import Store, full_disk_explained, readable_by_others

FOLDER = "export"


def export_run(config: RunConfig, run: Store, *, weights: str) -> None:
    """Write `export/` into the run folder from the weights at URI `weights`, replacing an older export.

    The measured numbers come from metrics.json. Raises `OutOfSpace` through the storage, `DataError` when a part of
    the student is missing.
    """
    # Object stores have no renaming: there the folder is made on the local disk and copied, its card last.
    parent = Path(run.path()) if run.is_local else Path(tempfile.mkdtemp())
    parent.mkdir(parents=True, exist_ok=True)
    part = parent / f".tmp-{FOLDER}-{uuid.uuid4().hex[:8]}"
    try:
        with full_disk_explained(part):
            _write(config, run, weights, part)
        if run.is_local:
            _replace(part, parent / FOLDER)
        else:
            _upload(part, run / FOLDER)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not run.is_local:
            shutil.rmtree(parent)


def _write(config: RunConfig, run: Store, weights: str, folder: Path) -> None:
    folder.mkdir()
    student = student_of(f"{run.uri}/init", weights, dtype=torch.float32)
    match config.source:
        case TextSource():
            write_text(config, student, folder)
        case ImagesSource() | VideosSource() | PromptsSource():
            write_images(config, student, folder)
        case EpisodesSource():
            write_worlds(config, student, folder)
    (folder / "README.md").write_text(model_card(config, _metrics(run), folder))
    for path in folder.rglob("*"):
        if path.is_file():
            readable_by_others(path)


def model_card(config: RunConfig, metrics: Mapping[str, JsonValue], folder: Path | None = None) -> str:
    """README.md of an export; `folder` holds its files."""
    match config.source:
        case TextSource():
            return text_card(config, metrics, has_compact=folder is not None and (folder / COMPACT).exists())
        case ImagesSource() | VideosSource() | PromptsSource():
            return image_card(config, metrics, folder)
        case EpisodesSource():
            return world_card(config, metrics)


def _replace(part: Path, final: Path) -> None:
    """Put `part` where `final` is; between the two renames there is no `final`, but never half of one."""
    old = part.with_name(f"{part.name}-old")
    if final.exists():
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _upload(part: Path, final: Store) -> None:
    card = part / "README.md"
    text = card.read_text()
    card.unlink()
    fs.copy_files(str(part), final.path(), destination_filesystem=final.filesystem)
    final.publish("README.md", text)


def _metrics(run: Store) -> Mapping[str, JsonValue]:
    found: Mapping[str, JsonValue] = json.loads(run.read_text("metrics.json")) if run.exists("metrics.json") else {}
    return found
