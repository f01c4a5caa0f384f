"""Relative paths become absolute in the driver, so that every process of a cluster means the same file.

They are taken against `$RAYDISTILL_HOME`, else against the working folder. The working folder of a Ray job is
temporary, so there, without `$RAYDISTILL_HOME`, what a run writes goes to `~/raydistill`, which only works on one node.
What a run reads is also looked for in the working folder, since that is where a job's own files are.
"""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path

from pydantic import JsonValue

from raydistill.config.models import (
    CheckpointInit,
    DiffusersModel,
    ModelConfig,
    ProjectionInit,
    PythonModel,
    StudentConfig,
)
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, SourceConfig, VaeConfig, VideosSource
from raydistill.config.world import EpisodesSource, WorldPythonModel
from raydistill.errors import ConfigError

JOB_FOLDER = re.compile(r"/(?:[^/\"]+/)*runtime_resources/working_dir_files/_ray_pkg_\w+/")
"""Where Ray unpacks the folder that `ray job submit --working-dir` sends."""


def inside_ray_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_ID" in os.environ


def placeless(value: JsonValue) -> JsonValue:
    """A dumped configuration with paths in a job's working folder as the job itself names them.

    Ray unpacks that folder in another place for each session of a cluster and for each change of a file in it, while it
    is one run that goes on.
    """
    found: JsonValue = json.loads(JOB_FOLDER.sub("", json.dumps(value)))
    return found


def base_folder() -> Path:
    """The folder that relative paths are taken against."""
    if home := os.environ.get("RAYDISTILL_HOME"):
        return Path(home).expanduser().absolute()
    return Path.home() / "raydistill" if inside_ray_job() else Path.cwd()


def require_shared_folder(config: RunConfig, num_nodes: int) -> None:
    """Raise `ConfigError` when the run would write into one node's home folder on a cluster of several."""
    local = {"run_dir": config.run_dir, "cache.dir": config.cache.dir}
    if num_nodes < 2 or "RAYDISTILL_HOME" in os.environ or not inside_ray_job():
        return
    wrong = [f"{key}={uri}" for key, uri in local.items() if Path(uri).is_relative_to(base_folder())]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: a folder of one node, on a cluster of {num_nodes}; wanted one that every node sees: "
            "set RAYDISTILL_HOME to a shared folder, or run_dir and cache.dir to shared folders or object stores."
        )


def resolve_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths; URIs, absolute paths and Hub ids stay as they are."""
    return config.model_copy(
        update={
            "run_dir": written(config.run_dir),
            "cache": config.cache.model_copy(update={"dir": written(config.cache.dir)}),
            "source": _source(config.source),
            "teachers": tuple(t.model_copy(update={"model": _model(t.model)}) for t in config.teachers),
            "student": _student(config.student),
            "resources": config.resources.model_copy(update={"cluster": _cluster(config.resources.cluster)}),
            "evaluate": config.evaluate.model_copy(
                update={"benchmarks": tuple(read(path) for path in config.evaluate.benchmarks)}
            ),
        }
    )


def _cluster(file: str | None) -> str | None:
    """The file of the cluster: the one configured, else the one that the cluster itself names to its jobs."""
    file = file or os.environ.get("RAYDISTILL_CLUSTER") or None
    return read(file) if file else None


def written(path: str) -> str:
    """The absolute form of a path that a run writes."""
    if "://" in path:
        return path
    return str(_normal(base_folder() / Path(path).expanduser()))


def read(path: str) -> str:
    """The absolute form of a path (or glob) that a run reads."""
    if path.startswith("run://"):
        return f"run://{read(path.removeprefix('run://'))}"
    if "://" in path:
        return path
    expanded = Path(path).expanduser()
    for folder in (base_folder(), Path.cwd()):
        if glob.has_magic(path) and any(glob.iglob(str(folder / expanded), recursive=True)):
            return str(_normal(folder / expanded))
        if (folder / expanded).exists():
            return str(_normal(folder / expanded))
    return str(_normal(base_folder() / expanded))


def source_or_id(text: str) -> str:
    """The absolute form of a model's, tokenizer's or data set's source, which may be a path or a Hub id.

    A text that starts like a path, names something that exists, or has a GGUF file's ending is a path.
    """
    is_path = text.startswith((".", "/", "~", "run://")) or text.endswith(".gguf")
    if is_path or Path(base_folder(), text).exists() or Path(text).exists():
        return read(text)
    return text


def _normal(path: Path) -> Path:
    """Without `.` and `..`, but with symbolic links kept as the user wrote them."""
    return Path(os.path.normpath(path))


def _source(source: SourceConfig) -> SourceConfig:
    paths = tuple(read(path) for path in source.paths)
    if isinstance(source, ImagesSource | VideosSource | PromptsSource):
        vae, encoders = source.vae, source.text_encoders
        if isinstance(vae, VaeConfig):
            vae = vae.model_copy(update={"source": source_or_id(vae.source)})
        encoders = tuple(e.model_copy(update={"source": source_or_id(e.source)}) for e in encoders)
        return source.model_copy(update={"paths": paths, "vae": vae, "text_encoders": encoders})
    if isinstance(source, EpisodesSource):
        domains = {
            name: domain.model_copy(update={"paths": tuple(read(path) for path in domain.paths)})
            for name, domain in source.domains.items()
        }
        return source.model_copy(update={"paths": paths, "domains": domains})
    dataset = source.dataset
    return source.model_copy(
        update={
            "paths": paths,
            "tokenizer": source_or_id(source.tokenizer),
            "dataset": dataset and dataset.model_copy(update={"id": source_or_id(dataset.id)}),
        }
    )


def _model(model: ModelConfig | WorldPythonModel) -> ModelConfig | WorldPythonModel:
    if isinstance(model, PythonModel | WorldPythonModel) or not model.source:
        return model
    update = {"source": source_or_id(model.source)}
    if isinstance(model, DiffusersModel) and model.scheduler is not None:
        update["scheduler"] = source_or_id(model.scheduler)
    return model.model_copy(update=update)


def _student(student: StudentConfig) -> StudentConfig:
    init = student.init
    if isinstance(init, CheckpointInit):
        init = init.model_copy(update={"path": source_or_id(init.path)})
    elif isinstance(init, ProjectionInit) and init.teacher is not None:
        init = init.model_copy(update={"teacher": _model(init.teacher)})
    return student.model_copy(update={"model": _model(student.model), "init": init})
