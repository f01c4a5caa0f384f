"""Teachers and student must speak the ids of the one tokenizer that wrote the inputs; said before anything is run."""

from __future__ import annotations

from raydistill.config.models import ModelConfig, TransformersModel
from raydistill.config.schema import RunConfig
from raydistill.config.world import WorldPythonModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.load import effective_vocab_size, language_config, load_tokenizer, require_same_vocabulary
from raydistill.progress import say


def check_vocabularies(config: RunConfig) -> None:
    """Raise `ConfigError` for a model with fewer ids than the tokenizer, `DataError` for one with other tokens."""
    source = config.text
    models: dict[str, ModelConfig | WorldPythonModel] = {
        f"teachers.{i}.model": t.model for i, t in enumerate(config.teachers)
    }
    models["student.model"] = config.student.model
    tokenizer = load_tokenizer(source.tokenizer)
    num_ids = effective_vocab_size(tokenizer)
    seen: list[TransformersModel] = []
    for key, model in models.items():
        # Models of the user's own function have no tokenizer, and building them may be dear: checked later.
        if not isinstance(model, TransformersModel) or model in seen:
            continue
        seen.append(model)
        rows = int(language_config(model).get_text_config().vocab_size)
        if rows < num_ids:
            raise ConfigError(
                f"{key} ({model.source}) knows {rows:,} ids, source.tokenizer ({source.tokenizer}) has "
                f"{num_ids:,}. Teachers, student and source need one tokenizer: name that of the teacher, and a "
                "student with room for it."
            )
        if model.source == source.tokenizer:
            continue
        try:
            own = load_tokenizer(model.source, model.revision)
        except DataError:
            say(f"{key} ({model.source}) has no tokenizer of its own; taking source.tokenizer for it")
            continue
        require_same_vocabulary(tokenizer, own, names=("source.tokenizer", key))
