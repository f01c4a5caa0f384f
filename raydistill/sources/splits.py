"""Which part of a source a document or image belongs to, and text that UTF-8 can spell."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can spell and UTF-8 cannot; they become the replacement character."""

Split = Literal["train", "held_out"]


def split_of(content: str, held_out: float) -> Split:
    """The split of a document or image by the hash of its content, so that equal ones are never in both."""
    draw = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    return "held_out" if draw < held_out else "train"
