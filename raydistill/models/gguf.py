"""GGUF files as ordinary folders: converted once, then loaded like any other model (1 s instead of 12)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from raydistill.errors import DataError, OutOfSpace
from raydistill.models.hashes import file_sha256, home
from raydistill.models.hub import first_line
from raydistill.progress import say

MAGIC = b"GGUF"


def gguf_base(path: Path) -> Path:
    """A folder with the configuration and the tokenizer of a GGUF file."""

    def convert(folder: Path) -> None:
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)

    return _converted(path, "base", convert)


def gguf_folder(path: Path, dtype: torch.dtype) -> Path:
    """A folder with configuration, tokenizer and the dequantised weights of a GGUF file in `dtype`."""
    base = gguf_base(path)

    def convert(folder: Path) -> None:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # it would advise on running the packed weights, which nobody does here
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        logging.set_verbosity(level)
        # transformers refuses to save what it takes for a quantised model; the weights here are plain tensors.
        del model.config.quantization_config
        del model.hf_quantizer
        model.save_pretrained(folder)
        for file in base.iterdir():
            if not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)

    return _converted(path, str(dtype).removeprefix("torch."), convert)


def _converted(path: Path, kind: str, convert: Callable[[Path], None]) -> Path:
    with path.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise DataError(f"{path} is no GGUF file: wanted the first bytes {MAGIC!r}, found {magic!r}")
    final = home() / "converted" / f"{file_sha256(path)[:16]}-{kind}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f"{final.name}.lock")):
        if final.is_dir():
            return final
        say(f"converting {path.name} ({kind}) once")
        part = Path(tempfile.mkdtemp(dir=final.parent, prefix=".tmp-"))
        try:
            convert(part)
            part.chmod(0o755)
            part.rename(final)
        except Exception as error:  # a reader of binary files fails in whatever way the bytes make it
            if "No space left" in str(error):
                raise OutOfSpace(f"cannot write {final}: the disk is full; make room or set RAYDISTILL_HOME") from error
            raise DataError(f"cannot read the GGUF file {path}, it may be truncated: {first_line(error)}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final
