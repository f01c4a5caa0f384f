"""The weighted mean of several teachers' predictions, as a cache of its own (`cache.store: average`).

For a squared error the mean stands for all teachers: with m = Σ w_i p_i and Σ w_i = 1,
Σ w_i |q - p_i|² = |q - m|² + Σ w_i |p_i - m|², so the gradients to q are equal, and the second term, the least loss
that any q can reach, is kept for each draw as `variance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard, read_dense, write_dense
from raydistill.cache.dense_capture import OWN_FIELDS, signal_meta
from raydistill.cache.manifest import FieldRecord, Manifest
from raydistill.cache.shards import field_records, publish_record
from raydistill.diffusion.process import Process
from raydistill.errors import CacheMismatch, SignalMismatch
from raydistill.signals import AVERAGE, Field, JsonValue
from raydistill.storage import Store

AVERAGE_VERSION = 1
"""Raised when the same signals would give other numbers."""
SAME_FACTS = ("prediction_type", "noise")
"""Facts that must agree where predictions are averaged."""
VARIANCE = {
    "variance": Field(torch.float32, (), "weighted variance of the teachers, mean over a prediction's elements")
}

Signals = Mapping[str, tuple[Store, Manifest]]


def average_content(signals: Signals, weights: Mapping[str, float]) -> dict[str, JsonValue]:
    """What decides the bytes of the average: the signals by their fingerprints, and their normalised weights."""
    total = sum(weights.values())
    shares: dict[str, float] = {}
    for name, (_, manifest) in signals.items():
        if weights[name]:
            shares[manifest.fingerprint] = shares.get(manifest.fingerprint, 0.0) + weights[name] / total
    parents = {manifest.parent for _, manifest in signals.values()}
    if len(parents) != 1:
        raise CacheMismatch(f"the signals to be averaged were made from different inputs: {sorted(map(str, parents))}")
    return {
        "signal": AVERAGE,
        "inputs": parents.pop(),
        "weights": {fingerprint: shares[fingerprint] for fingerprint in sorted(shares)},
        "average_version": AVERAGE_VERSION,
    }


def sources(signals: Signals, content: Mapping[str, JsonValue]) -> list[tuple[str, float]]:
    """URI and share of each signal in the average of this `content`, in a fixed order."""
    shares = content["weights"]
    assert isinstance(shares, dict)
    uris = {manifest.fingerprint: store.uri for store, manifest in signals.values()}
    return [(uris[fingerprint], float(str(shares[fingerprint]))) for fingerprint in sorted(shares)]


def averaged(shards: Sequence[tuple[DenseShard, float]]) -> dict[str, Tensor]:
    """The tensors of the average of some teachers' shards of the same rows; shares sum to 1.

    Raises `SignalMismatch`, naming row and draw, when the teachers were not asked about the same noise.
    """
    first = shards[0][0]
    for shard, _ in shards[1:]:
        require_same_draws(first, shard)
    stored = [shard.tensor("prediction") for shard, _ in shards]
    shares = [share for _, share in shards]
    mean = torch.zeros(stored[0].shape)
    for share, values in zip(shares, stored, strict=True):
        mean += share * values.float()
    variance = torch.zeros(stored[0].shape[:2])
    for share, values in zip(shares, stored, strict=True):
        variance += share * (values.float() - mean).square().flatten(2).mean(2)
    dtype = stored[0].dtype
    for values in stored[1:]:
        dtype = torch.promote_types(dtype, values.dtype)
    own = {name: first.tensor(name) for name in OWN_FIELDS}
    return {"prediction": mean.to(dtype), "variance": variance, **own}


def require_same_draws(one: DenseShard, other: DenseShard) -> None:
    """Raise `SignalMismatch`, naming row and draw, unless two signals are about the same draws of the same rows."""
    if one.row_ids != other.row_ids:
        raise SignalMismatch(
            f"{other.path} has other rows than {one.path}. Run --stages verify, then --stages signals."
        )
    for name in OWN_FIELDS:
        wanted, found = one.tensor(name), other.tensor(name)
        if not torch.equal(wanted, found):
            row, draw = (wanted != found).nonzero()[0].tolist()
            raise SignalMismatch(
                f"the teachers disagree on the {'timestep' if name == 'timestep' else 'noise'} of row "
                f"{one.row_ids[row]}, draw {draw}: {one.path} and {other.path}. Run --stages verify, then "
                "--stages signals."
            )


class AverageWorker:
    """Averages shards."""

    def __init__(self, signals: Sequence[tuple[str, float]], store: str, splits: Mapping[str, str]):
        self._signals, self._store, self._splits = [(Store(uri), share) for uri, share in signals], Store(store), splits

    def __call__(self, name: str) -> dict[str, JsonValue]:
        shards = [(read_dense(store, name), share) for store, share in self._signals]
        first = shards[0][0]
        record = write_dense(
            self._store, name, averaged(shards), meta=signal_meta(first), split=self._splits[name], rows=first.rows
        )
        publish_record(self._store, record)
        return {"shard": name, "sha256": record.sha256}


def average_fields(signals: Signals) -> dict[str, FieldRecord]:
    """The fields of the average, as its manifest has them."""
    manifests = [manifest for _, manifest in signals.values()]
    dtype: torch.dtype = getattr(torch, manifests[0].fields["prediction"].dtype)
    for manifest in manifests[1:]:
        dtype = torch.promote_types(dtype, getattr(torch, manifest.fields["prediction"].dtype))
    kept = {name: manifests[0].fields[name] for name in ("prediction", *OWN_FIELDS)}
    kept["prediction"] = kept["prediction"].model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    variance = {n: f.model_copy(update={"dims": ("draw", *f.dims)}) for n, f in field_records(VARIANCE).items()}
    return {**kept, **variance}


def average_facts(signals: Signals, content: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What readers must know of the average; `CacheMismatch` when the signals do not agree on it."""
    manifests = sorted((manifest for _, manifest in signals.values()), key=lambda manifest: manifest.fingerprint)
    first = manifests[0].facts
    for name, (_, manifest) in signals.items():
        apart = {
            key: f"{manifest.facts[key]} and {first[key]}" for key in SAME_FACTS if manifest.facts[key] != first[key]
        }
        if schedule := _process(manifest.facts).differs(_process(first)):
            apart["noise schedule"] = schedule
        for key, values in apart.items():
            raise CacheMismatch(
                f"cache.store: average wants teachers of one {key}; that of {name} differs from another's: {values}. "
                "Set cache.store: each, or use teachers that agree."
            )
    return {
        **{key: first[key] for key in SAME_FACTS},
        "process": first["process"],
        "own_prediction_type": first["prediction_type"],
        "guidance_scale": {manifest.fingerprint: manifest.facts.get("guidance_scale") for manifest in manifests},
        "weights": content["weights"],
        "taps": {},
    }


def _process(facts: Mapping[str, JsonValue]) -> Process:
    process = facts["process"]
    assert isinstance(process, dict), "a teacher's facts hold its process"
    return Process.from_json(process)
