"""Which caches a trial reads, and whether they are those of the run that is varied.

Decided by the fingerprints of the caches' contents, so a key that changes a cache is known by what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from raydistill.cache.average import average_content
from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.manifest import fingerprint_of
from raydistill.config.schema import RunConfig
from raydistill.config.spaces import Point, probes, shown
from raydistill.config.tune import Space
from raydistill.errors import ConfigError
from raydistill.pipeline import Run, advance
from raydistill.signals import AVERAGE

Configured = Callable[[Point], RunConfig]
"""The configuration of a trial at a point."""
BUILT = ("inputs", "signals", "verify")
"""Stages that make the caches of a run."""


@dataclass
class Caches:
    """The caches of a run and of its trials."""

    run: Run
    built: Literal["nothing", "inputs", "signals"] = "nothing"
    """How far the run's own caches are there."""
    _names: dict[str, dict[str, str]] = field(default_factory=dict)
    _others: dict[str, Run] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """The run that is varied, and those that stand for other caches."""
        return [self.run, *self._others.values()]

    def changed(self, config: RunConfig) -> list[str]:
        """Folders of the run's caches that `config` would not read, as far as the run's own are built by now."""
        own, other = self.names(self.run.config), self.names(config)
        return [f"{name}-{fingerprint}" for name, fingerprint in own.items() if other.get(name) != fingerprint]

    def names(self, config: RunConfig) -> dict[str, str]:
        """Fingerprints by the name of the cache: the inputs; once the run's inputs are built, the signals; and once
        these are built, their average. Those that follow from other inputs or signals are left out."""
        key = f"{self.built} {_caching(config)}"
        if key not in self._names:
            self._names[key] = self._fingerprints(config)
        return self._names[key]

    def _fingerprints(self, config: RunConfig) -> dict[str, str]:
        found = {"inputs": fingerprint_of(inputs_content(config))}
        if self.built == "nothing" or found["inputs"] != self.run.inputs[1].fingerprint:
            return found
        for teacher in config.teachers:
            found[teacher.name] = fingerprint_of(signal_content(config, teacher, self.run.inputs[1]))
        weights = {teacher.name: teacher.weight for teacher in config.teachers if teacher.weight > 0}
        if self.built == "inputs" or config.cache.store == "each" or not weights:
            return found
        signals = {name: self.run.signals[name] for name in weights if name in self.run.signals}
        if all(name in signals and signals[name][1].fingerprint == found[name] for name in weights):
            found[AVERAGE] = fingerprint_of(average_content(signals, weights))
        return found

    def of(self, config: RunConfig) -> Run:
        """The run whose caches a trial of `config` reads: the one that is varied, or one of its own, built now."""
        if not self.changed(config):
            return self.run
        key = _caching(config)
        if key not in self._others:
            self._others[key] = Run(config)
            advance(self._others[key], BUILT)
        return self._others[key]


def _caching(config: RunConfig) -> str:
    """A configuration without what no cache is made from."""
    return config.model_dump_json(exclude={"name", "run_dir", "student", "phases"})


def refuse_rebuilds(space: Space, caches: Caches, configured: Configured) -> None:
    """`ConfigError` for each dimension with a value that would need another cache, as far as that is known by now."""
    if space.sweep.allow_rebuild:
        return
    found: dict[str, str] = {}
    for name, point in probes(space.sweep):
        if name not in found and (folders := caches.changed(configured(point))):
            value = shown(space.sweep, {name: point[name]})
            found[name] = f"{value} would need another cache than {', '.join(folders)}"
    if found:
        raise ConfigError(
            f"{space.file}: a sweep shares the caches of its run, and these values change them:\n  "
            + "\n  ".join(found.values())
            + "\nTake them out, or set allow_rebuild: true, with which every cache is built before the first trial."
        )
