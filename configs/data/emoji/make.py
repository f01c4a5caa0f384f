"""Writes google.parquet and twitter.parquet: the named smileys, hearts and other emotions, in two styles.

    python configs/data/emoji/make.py        # needs npm, which fetches two packages of 136 MB

Columns: `id` (code points), `image` (PNG bytes, 64 × 64 RGBA), `caption` (the name in lower case).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "16.0.0"
SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
CATEGORIES = ("Smileys & Emotion",)


def main() -> None:
    for style, wanted in SHA256.items():
        with tempfile.TemporaryDirectory() as folder:
            package = f"emoji-datasource-{style}@{VERSION}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            archive = next(Path(folder).glob("*.tgz"))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            assert found == wanted, f"{package}: wanted sha256 {wanted}, found {found}"
            table = read(archive, style)
        path = Path(__file__).with_name(f"{style}.parquet")
        pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
        print(f"{path.name}: {table.num_rows} images, {path.stat().st_size:,} bytes")


def read(archive: Path, style: str) -> pa.Table:
    """The rows of one style, in the order of the Unicode charts."""
    with tarfile.open(archive) as package:

        def content(name: str) -> bytes:
            member = package.extractfile(f"package/{name}")
            assert member is not None, f"{archive.name} holds no {name}"
            return member.read()

        named = [e for e in json.loads(content("emoji.json")) if e[f"has_img_{style}"] and e["category"] in CATEGORIES]
        named.sort(key=lambda e: e["sort_order"])
        rows = [
            {"id": e["unified"], "image": content(f"img/{style}/64/{e['image']}"), "caption": e["name"].lower()}
            for e in named
        ]
    return pa.Table.from_pylist(rows)


if __name__ == "__main__":
    main()
