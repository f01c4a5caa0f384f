"""The actor that encodes planned shards of images: pixels or latents, size conditioning and text embeddings."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill.cache.dense import row_sha, write_dense
from raydistill.cache.image_index import IMAGES_FORMAT, ShardPlan, read_plan
from raydistill.cache.ledger import write_description
from raydistill.cache.shards import field_records, publish_record
from raydistill.config.sources import ImagesSource
from raydistill.errors import DataError
from raydistill.models.autoencoder import Space, load_space
from raydistill.models.text_encoder import TextEncoders, TextFacts
from raydistill.signals import Field, JsonValue, Schema, sample_seed
from raydistill.sources.image_files import Place
from raydistill.sources.pixels import Bucket, Unreadable, decoded, fitted, time_ids
from raydistill.storage import Store

VERSIONS = ("torch", "diffusers", "transformers", "pillow", "pyarrow")


def image_fields(source: ImagesSource, text: TextFacts) -> Schema:
    """What a row of images holds."""
    stored = getattr(torch, source.store_dtype)
    what = "pixels in [-1, 1]" if source.vae == "none" else "normalised latents"
    fields: dict[str, Field] = {
        "latents": Field(stored, ("channel", "height", "width"), what),
        "time_ids": Field(
            torch.float32, ("number",), "original height, width, top, left, target height, width; pixels"
        ),
    }
    if text.width:
        fields["prompt_index"] = Field(torch.int32, (), "place of the row's caption among the shard's prompts")
        fields["prompt_embeds"] = Field(
            stored, ("token", "feature"), "hidden states of a prompt; the last one is empty"
        )
    if text.pooled_width:
        fields["pooled"] = Field(stored, ("pooled",), "embedding of a whole prompt")
    return fields


class EncodeWorker:
    """Holds the autoencoder and the text encoders. Two calls may run at a time: one shard is encoded, one written."""

    def __init__(self, source: ImagesSource, staging: str, store: str, threads: int, tally: Any):
        self._source, self._threads, self._tally = source, threads, tally
        self._staging, self._store = Store(staging), Store(store)
        self._computing = threading.Lock()
        torch.set_num_threads(threads)  # Ray's OMP_NUM_THREADS does not bind a model that sets its own
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._space: Space = load_space(source.vae, device)
        self._texts = TextEncoders(source.text_encoders, device)
        facts: dict[str, JsonValue] = {
            **self._space.facts.to_json(),
            **self._texts.facts.to_json(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": {name: version(name) for name in VERSIONS},
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
        for key, tensor in tensors.items():
            self._require_finite(key, tensor, name)
        captions = plan.rows["caption"].to_pylist()
        shas = [row_sha(latent, caption) for latent, caption in zip(tensors["latents"], captions, strict=True)]
        meta: dict[str, JsonValue] = {
            "kind": "inputs", "format": IMAGES_FORMAT, "split": plan.split, "bucket": list(plan.bucket),
            "row_ids": row_ids, "row_sha": list(shas), "captions": list(prompts),
        }  # fmt: skip
        record = write_dense(self._store, name, tensors, meta=meta, split=plan.split, rows=len(row_ids))
        publish_record(self._store, record)
        return {"shard": name}

    def _encoded_text(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        """Embeddings of the shard's different captions, the empty one last, and which row has which."""
        if not self._source.text_encoders:
            return {}, []
        prompts = [*dict.fromkeys(caption for caption in captions if caption), ""]
        place = {caption: index for index, caption in enumerate(prompts)}
        embeds, pooled = self._texts(prompts, batch=self._source.encode_rows)
        stored = getattr(torch, self._source.store_dtype)
        tensors = {
            "prompt_embeds": embeds.to(stored),
            "prompt_index": torch.tensor([place[caption] for caption in captions], dtype=torch.int32),
        }
        if pooled.shape[1]:
            tensors["pooled"] = pooled.to(stored)
        return tensors, prompts

    def _encoded_images(self, plan: ShardPlan, row_ids: list[str]) -> dict[str, Tensor]:
        """Latents and size conditioning of the rows, encoded `encode_rows` at a time."""
        stored, done = getattr(torch, self._source.store_dtype), 0
        latents, sizes = [], []
        with ThreadPoolExecutor(self._threads) as pool:
            read = _ahead(pool, self._read, plan, 2 * max(self._source.encode_rows, self._threads))
            while batch := list(islice(read, self._source.encode_rows)):
                pixels = torch.from_numpy(np.stack([image for image, _ in batch])).permute(0, 3, 1, 2)
                noise = self._noise(row_ids[done : done + len(batch)], plan.bucket)
                latents.append(self._space.encode(pixels.float() / 127.5 - 1, noise).to(stored))
                sizes += [ids for _, ids in batch]
                done += len(batch)
                self._tally.set.remote(plan.name, done)
        return {"latents": torch.cat(latents), "time_ids": torch.tensor(sizes, dtype=torch.float32)}

    def _read(self, row: dict[str, Any], bucket: Bucket) -> tuple[np.ndarray, tuple[int, ...]]:
        """Pixels [height, width, 3] and size conditioning of a planned row."""
        uri = row["uri"] if "/" in row["uri"] else f"{self._staging.uri}/{row['uri']}"
        try:
            data = Place(uri, row["offset"], row["size"]).read()
            if hashlib.sha256(data).digest() != row["sha"]:
                raise Unreadable("other bytes than before")
            pixels, corner = fitted(decoded(data, self._source.background), bucket)
        except (OSError, Unreadable) as error:
            raise DataError(
                f"{row['row_id']} ({uri}) changed while the inputs were built: {error}. Run the same command again."
            ) from error
        return pixels, time_ids((row["height"], row["width"]), corner, bucket)

    def _noise(self, row_ids: Sequence[str], bucket: Bucket) -> Tensor | None:
        """Standard normal noise for samples of the latent distribution, drawn from the rows' ids."""
        vae = self._source.vae
        if vae == "none" or vae.latents == "mode":
            return None
        facts = self._space.facts
        shape = (facts.channels, bucket[0] // facts.factor, bucket[1] // facts.factor)
        draws = [np.random.Philox(sample_seed(row_id, 0, "vae", vae.seed)) for row_id in row_ids]
        return torch.from_numpy(
            np.stack([np.random.Generator(draw).standard_normal(shape, dtype=np.float32) for draw in draws])
        )

    def _require_finite(self, key: str, tensor: Tensor, name: str) -> None:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(
                f"shard {name}: {key} holds NaN or infinity in {self._source.store_dtype}. Encode in a wider format "
                "(dtype of source.vae or source.text_encoders), or set source.store_dtype: bfloat16."
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
