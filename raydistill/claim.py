"""Whose run folder it is: config.json says which configuration made what is in it, and another one is refused.

Which command works in it: one at a time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO, TypeAlias

from pydantic import BaseModel, JsonValue

from raydistill.cache.local import local_folder
from raydistill.cache.manifest import parsed
from raydistill.config.paths import inside_ray_job, placeless
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store, full_disk_explained, refusal_explained
from raydistill.train.job import MAY_CHANGE

CONFIG = "config.json"
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a network file system answers that is mounted without locks."""
Trained: TypeAlias = Literal["open", "begun", "done"]
"""How far a phase is."""

FREE = re.compile(
    r"(resources|tracking|plan|export|cache\.(?!store)|run_dir|evaluate\.(?!held_out))|student\.gradient_checkpointing"
    r"|phases\.\d+\.(zero|log_every|explode_factor|checkpoint\.(every_steps|keep)|batch\.micro_size)"
)
"""Keys that say where and how the work is done, or how it is looked at, but not what comes out of training."""
FREE_WITHIN = re.compile(rf"phases\.\d+\.({'|'.join(key.removeprefix('phase.') for key in MAY_CHANGE)})(\.|$)")
"""Keys of a phase that may also change between its first checkpoint and its end."""


class _Claimed(BaseModel):
    """config.json."""

    config: dict[str, JsonValue]


def require_own(store: Store, config: RunConfig, phases: Sequence[str]) -> None:
    """Refuse a run folder whose student, or a phase of which something is trained, is of another configuration.

    `phases` are the folders of the phases. Phases that are not begun may change.
    """
    if not store.exists(CONFIG) or not store.exists("init"):
        return
    remedy = "Put back what was there, or set another name or run_dir."
    old = parsed(_Claimed, store.read(CONFIG), where=f"{store.uri}/{CONFIG}", remedy=remedy).config
    trained = [_trained(store, folder) for folder in phases]
    changed = _differences(_defining(old, trained), _defining(config.model_dump(mode="json"), trained))
    if changed:
        raise ConfigError(
            f"{store.uri} holds a run that was made with another configuration. These keys differ:\n"
            + "\n".join(f"  {key}: it has {was}, this configuration {now}" for key, was, now in changed[:8])
            + "\nSet another name or run_dir, or remove that folder."
        )


def claim(store: Store, config: RunConfig) -> None:
    """Write config.json: from here on, what comes into the folder is of this configuration."""
    claimed = {"config": config.model_dump(mode="json"), "versions": versions()}
    store.publish(CONFIG, json.dumps(claimed, indent=1))


@contextmanager
def alone(run_dir: str) -> Iterator[None]:
    """Hold a run folder while a command works in it; `ConfigError` when another command does so already.

    The operating system ends the hold with its process, however that ends, so nothing is in the way of the next one.
    The hold is seen wherever the folder is. That of an object store, or of a file system without locks, is seen on this
    machine alone; the drivers of a cluster's jobs are all on one.
    """
    store = Store(run_dir)
    name = hashlib.sha256(store.uri.encode()).hexdigest()[:32]
    here = local_folder().parent / "runs" / f"{name}{LOCK}"
    file = Path(store.path(LOCK)) if store.is_local else here
    with _opened(file) as lock, _opened(here) as spare:
        try:
            held = _held(lock)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            held = _held(spare)
        if not held:
            who = file.read_text() or "another command"
            raise ConfigError(
                f"{who} is working in {store.uri}. Let it end, or stop it and run this command again: it goes on from "
                "there."
            )
        with full_disk_explained(file):
            file.write_text(_this_command())
        yield


def _opened(file: Path) -> TextIO:
    try:
        with refusal_explained(f"write {file}"), full_disk_explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open("a")
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"run_dir: wanted a folder, found {file.parent}: {error.strerror}.") from error


def _held(lock: TextIO) -> bool:
    """Whether nobody else holds the open file; from now on, this process does until it closes it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_command() -> str:
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")
    named = f" (the Ray job {job})" if inside_ray_job() and job else ""
    return f"Process {os.getpid()} on {platform.node()}{named}"


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers."""
    packages = (
        "raydistill", "ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow", "safetensors", "numpy",
        "pillow",
    )  # fmt: skip
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _trained(store: Store, folder: str) -> Trained:
    if store.exists(f"{folder}/final/phase.json"):
        return "done"
    begun = any(name.endswith(".json") for name in (store / folder / "checkpoints").names())
    return "begun" if begun else "open"


def _defining(config: Mapping[str, JsonValue], trained: Sequence[Trained]) -> dict[str, JsonValue]:
    """What of a dumped configuration decided the weights that are there already, by dotted key."""

    def counts(key: str) -> bool:
        if FREE.match(key):
            return False
        section, _, rest = key.partition(".")
        if section == "phases":
            index = int(rest.partition(".")[0])
            state = trained[index] if index < len(trained) else "open"
            return state == "done" or (state == "begun" and not FREE_WITHIN.match(key))
        return section in ("student", "seed") or any(state != "open" for state in trained)

    return {key: placeless(value) for key, value in flat("", dict(config)) if counts(key)}


def flat(key: str, value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    """The values in nested maps and lists, by dotted key below `key`."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not children:
        yield key, value
        return
    for name, child in children:
        yield from flat(f"{key}.{name}" if key else str(name), child)


def _differences(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[tuple[str, JsonValue, JsonValue]]:
    keys = sorted({*old, *new})
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]
