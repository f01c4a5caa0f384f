"""What an actor that writes a signal needs to know, and the rule for shards that come out otherwise than before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from raydistill.cache.ledger import require_begun
from raydistill.cache.manifest import ShardRecord
from raydistill.config.sources import NoiseConfig, VaeConfig
from raydistill.config.teachers import TeacherConfig
from raydistill.errors import VerificationFailed
from raydistill.signals import JsonValue, Teacher
from raydistill.storage import Store

TeacherFactory = Callable[[TeacherConfig, int | NoiseConfig], Teacher]
"""Loads a teacher; it is told the number of real token ids, or what noise denoisers are asked about."""


@dataclass(frozen=True, slots=True)
class SignalJob:
    """The same for all actors and shards of one signal cache."""

    teacher: TeacherConfig
    factory: TeacherFactory
    inputs: str
    """URI of the inputs cache."""
    store: str
    """URI of the signal cache."""
    facts: dict[str, JsonValue]
    """Facts of the inputs that the signal's manifest repeats."""
    splits: dict[str, str]
    """Split of each shard."""
    expected: dict[str, str]
    """Hashes that a finished cache had, by shard: a rebuilt shard with another one is audited."""
    noise: NoiseConfig | None
    """What denoisers are asked about."""
    threads: int
    audit_rows: int
    audit_tolerance: float
    previews: Previews | None = None
    """Of trajectories."""

    def open(self) -> tuple[Store, Store]:
        """The caches of inputs and of the signal; `ConfigError` where this actor sees nothing of the driver's."""
        store = Store(self.store)
        require_begun(store)
        return Store(self.inputs), store


@dataclass(frozen=True, slots=True)
class Previews:
    """Samples that are also kept as files to look at."""

    rows: int
    """Of each shard."""
    vae: VaeConfig | Literal["none"]
    fps: float


class Comparison(Protocol):
    """A teacher that was run again, against what was just written."""

    @property
    def mean_difference(self) -> float:
        """In the unit of `cache.audit_tolerance`."""

    def wrong(self, tolerance: float) -> str | None:
        """What exceeds `tolerance`, in words."""


def audit_if_changed(job: SignalJob, record: ShardRecord, compare: Callable[[], Comparison]) -> JsonValue:
    """None when a shard has the hash that it had before, or had none; else what build.json keeps of its audit.

    Raises `VerificationFailed` when the audit fails: the teacher computes something else here than it did.
    """
    before = job.expected.get(record.name, record.sha256)
    if before == record.sha256:
        return None
    found = compare()
    if wrong := found.wrong(job.audit_tolerance):
        raise VerificationFailed(
            f"{job.store}/{record.name} was rebuilt with another hash, and the audit fails: {wrong}. "
            "Look for another library version or device, or remove the cache to build it anew."
        )
    return {"old": before, "new": record.sha256, "mean_difference": found.mean_difference}
