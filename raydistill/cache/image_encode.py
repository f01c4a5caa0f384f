"""The actor that encodes planned shards of images or clips: pixels or latents, size conditioning, text embeddings."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill.cache.dense import row_sha, write_dense
from raydistill.cache.image_index import IMAGES_FORMAT, ShardPlan, read_plan
from raydistill.cache.ledger import require_begun, write_description
from raydistill.cache.shards import field_records, publish_record
from raydistill.config.sources import Pictures, VideosSource
from raydistill.errors import DataError
from raydistill.models.autoencoder import Space, load_space
from raydistill.models.text_encoder import TextEncoders, TextFacts
from raydistill.signals import Field, JsonValue, Schema, sample_seed
from raydistill.sources.image_files import Place
from raydistill.sources.images import pictures
from raydistill.sources.pixels import Bucket, Unreadable, fitted, time_ids
from raydistill.storage import Store

VERSIONS = ("torch", "diffusers", "transformers", "pillow", "pyarrow")


def image_fields(source: Pictures, text: TextFacts) -> Schema:
    """What a row of images holds."""
    stored = getattr(torch, source.store_dtype)
    what = "pixels in [-1, 1]" if source.vae == "none" else "normalised latents"
    frames = ("frame",) if isinstance(source, VideosSource) else ()
    fields: dict[str, Field] = {
        "latents": Field(stored, ("channel", *frames, "height", "width"), what),
        "time_ids": Field(
            torch.float32, ("number",), "original height, width, top, left, target height, width; pixels"
        ),
    }
    if text.width:
        fields |= text_fields(stored, text)
    return fields


def text_fields(stored: torch.dtype, text: TextFacts) -> Schema:
    """What a row has of its caption."""
    fields: dict[str, Field] = {
        "prompt_index": Field(torch.int32, (), "place of the row's caption among the shard's prompts"),
        "prompt_embeds": Field(stored, ("token", "feature"), "hidden states of a prompt; the last one is empty"),
    }
    if text.pooled_width:
        fields["pooled"] = Field(stored, ("pooled",), "embedding of a whole prompt")
    return fields


class EncodeWorker:
    """Holds the autoencoder and the text encoders. Two calls may run at a time: one shard is encoded, one written."""

    def __init__(self, source: Pictures, staging: str, store: str, threads: int, tally: Any):
        self._source, self._threads, self._tally = source, threads, tally
        self._staging, self._store = Store(staging), Store(store)
        require_begun(self._store)
        self._computing = threading.Lock()
        torch.set_num_threads(threads)  # Ray's OMP_NUM_THREADS does not bind a model that sets its own
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._space: Space = load_space(source.vae, device)
        self._frames = source.frames if isinstance(source, VideosSource) else None
        self._texts = TextEncoders(source.text_encoders, device)
        facts: dict[str, JsonValue] = {
            **self._space.facts.to_json(),
            **self._texts.facts.to_json(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": {name: version(name) for name in (*VERSIONS, *(["av"] if self._frames else []))},
        }
        write_description(self._store, field_records(image_fields(source, self._texts.facts)), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description."""
        if not name:
            return {"shard": name}
        plan = read_plan(self._staging, name)
        row_ids = plan.rows["row_id"].to_pylist()
        with self._computing:
            torch.set_num_threads(self._threads)  # a setting of the calling thread
            tensors, prompts = self._encoded_text(plan.rows["caption"].to_pylist())
            tensors |= self._encoded_images(plan, row_ids)
        require_finite(tensors, name, self._source.store_dtype)
        captions = plan.rows["caption"].to_pylist()
        shas = [row_sha(latent, caption) for latent, caption in zip(tensors["latents"], captions, strict=True)]
        meta: dict[str, JsonValue] = {
            "kind": "inputs", "format": IMAGES_FORMAT, "split": plan.split, "bucket": list(plan.bucket),
            "row_ids": row_ids, "row_sha": list(shas), "captions": list(prompts),
        }  # fmt: skip
        if isinstance(self._source, VideosSource):
            meta["negative_prompt"] = self._source.negative_prompt
        record = write_dense(self._store, name, tensors, meta=meta, split=plan.split, rows=len(row_ids))
        publish_record(self._store, record)
        return {"shard": name}

    def _encoded_text(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        source = self._source
        if not source.text_encoders:
            return {}, []
        empty = source.negative_prompt if isinstance(source, VideosSource) else ""
        dtype = getattr(torch, source.store_dtype)
        return encoded_text(self._texts, captions, empty=empty, batch=source.encode_rows, dtype=dtype)

    def _encoded_images(self, plan: ShardPlan, row_ids: list[str]) -> dict[str, Tensor]:
        """Latents and size conditioning of the rows, encoded `encode_rows` at a time."""
        stored, done = getattr(torch, self._source.store_dtype), 0
        latents, sizes = [], []
        with ThreadPoolExecutor(self._threads) as pool:
            read = _ahead(pool, self._read, plan, 2 * max(self._source.encode_rows, self._threads))
            while batch := list(islice(read, self._source.encode_rows)):
                pixels = torch.from_numpy(np.stack([image for image, _ in batch])).movedim(-1, 1)
                noise = self._noise(row_ids[done : done + len(batch)], plan.bucket)
                latents.append(self._space.encode(pixels.float() / 127.5 - 1, noise).to(stored))
                sizes += [ids for _, ids in batch]
                done += len(batch)
                self._tally.set.remote(plan.name, done)
        return {"latents": torch.cat(latents), "time_ids": torch.tensor(sizes, dtype=torch.float32)}

    def _read(self, row: dict[str, Any], bucket: Bucket) -> tuple[np.ndarray, tuple[int, ...]]:
        """Pixels [(frames,) height, width, 3] and size conditioning of a planned row."""
        uri = row["uri"] if "/" in row["uri"] else f"{self._staging.uri}/{row['uri']}"
        try:
            data = Place(uri, row["offset"], row["size"]).read()
            if hashlib.sha256(data).digest() != row["sha"]:
                raise Unreadable("other bytes than before")
            found = [fitted(picture, bucket) for picture in pictures(data, self._source)]
        except (OSError, Unreadable) as error:
            raise DataError(
                f"{row['row_id']} ({uri}) changed while the inputs were built: {error}. Run the same command again."
            ) from error
        pixels = np.stack([frame for frame, _ in found]) if self._frames is not None else found[0][0]
        return pixels, time_ids((row["height"], row["width"]), found[0][1], bucket)

    def _noise(self, row_ids: Sequence[str], bucket: Bucket) -> Tensor | None:
        """Standard normal noise for samples of the latent distribution, drawn from the rows' ids."""
        vae = self._source.vae
        if vae == "none" or vae.latents == "mode":
            return None
        shape = self._space.facts.latent_shape(bucket, self._frames)
        draws = [np.random.Philox(sample_seed(row_id, 0, "vae", vae.seed)) for row_id in row_ids]
        return torch.from_numpy(
            np.stack([np.random.Generator(draw).standard_normal(shape, dtype=np.float32) for draw in draws])
        )


def encoded_text(
    encoders: TextEncoders, captions: Sequence[str], *, empty: str, batch: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """Embeddings of a shard's different captions, with `empty` at the end, and which row has which.

    `empty` is the text that stands for no caption; each text is encoded once.
    """
    prompts = [*dict.fromkeys(caption for caption in captions if caption != empty), empty]
    place = {caption: index for index, caption in enumerate(prompts)}
    embeds, pooled = encoders(prompts, batch=batch)
    tensors = {
        "prompt_embeds": embeds.to(dtype),
        "prompt_index": torch.tensor([place[caption] for caption in captions], dtype=torch.int32),
    }
    if pooled.shape[1]:
        tensors["pooled"] = pooled.to(dtype)
    return tensors, prompts


def require_finite(tensors: Mapping[str, Tensor], name: str, stored: str) -> None:
    """Raise `DataError` where a tensor of shard `name`, stored as `stored`, holds what is no number."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(
                f"shard {name}: {key} holds NaN or infinity in {stored}. Encode in a wider format (dtype of source.vae "
                "or source.text_encoders), or set source.store_dtype: bfloat16."
            )


def _ahead(
    pool: ThreadPoolExecutor, read: Any, plan: ShardPlan, most: int
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Rows of a shard in order, read by the pool's threads, at most `most` rows ahead."""
    planned = iter(plan.rows.to_pylist())
    waiting = [pool.submit(read, row, plan.bucket) for row in islice(planned, most)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(read, row, plan.bucket) for row in islice(planned, 1)]
