"""Images and captions out of every kind of file, with stable names, and what becomes of broken ones."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_encoders import picture, png, write_pictures

from raydistill.config.sources import ImagesSource
from raydistill.errors import DataError
from raydistill.models.sources import folder_sha256
from raydistill.sources import image_files, images
from raydistill.sources.buckets import buckets_of
from raydistill.sources.images import ImageRow, Lost, require_enough, rows, units
from raydistill.sources.pixels import Unreadable, decoded, fitted, nearest_bucket, time_ids

WHITE = (255, 255, 255)
TEXT = ({"source": "text encoder that nobody loads here"},)


def source_of(*paths: Path | str, text: bool = True, **settings: Any) -> ImagesSource:
    plain = {"kind": "images", "paths": [str(p) for p in paths], "vae": "none", "resolution": 64}
    return ImagesSource.model_validate(plain | {"text_encoders": TEXT if text else ()} | settings)


def read(source: ImagesSource, held_out: float = 0.0) -> tuple[list[ImageRow], Lost]:
    lost = Lost()
    return [row for unit in units(source) for row in rows(unit, source, held_out, lost)], lost


def captions(source: ImagesSource) -> dict[str, str]:
    return {row.row_id: row.caption for row in read(source)[0]}


# --- one image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_orientation_by_exif_is_undone(format: str, options: dict[str, Any]) -> None:
    upright = Image.fromarray(picture(1, 8, 6))
    stored_as = {
        1: lambda i: i, 2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: lambda i: i.rotate(180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90), 7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }  # fmt: skip
    for orientation, store in stored_as.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decoded(png(store(upright), format, exif=exif, **options), WHITE)
        assert np.array_equal(np.asarray(found), np.asarray(upright)), orientation


def test_transparency_shows_the_background() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)
    found = np.asarray(decoded(png(pixels), (200, 100, 50)))
    assert found[0].tolist() == [[200, 100, 50], [100, 50, 25], [0, 0, 0]]


def test_transparency_of_palettes_grey_and_colour_keys_counts_too() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    grey_alpha = Image.fromarray(np.array([[[7, 255], [8, 0]]], np.uint8))
    for image, options, wanted in (
        (palette, {"transparency": 1}, [[10, 20, 30], [255, 255, 255]]),
        (keyed, {"transparency": (9, 9, 9)}, [[1, 2, 3], [255, 255, 255]]),
        (grey_alpha, {}, [[7, 7, 7], [255, 255, 255]]),
    ):
        assert np.asarray(decoded(png(image, **options), WHITE))[0].tolist() == wanted


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    found = np.asarray(decoded(png(Image.fromarray(values)), WHITE))
    assert found[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_other_modes_become_rgb() -> None:
    grey = Image.fromarray(picture(0, 4, 4, 1)[..., 0])
    assert np.array_equal(np.asarray(decoded(png(grey), WHITE))[..., 1], np.asarray(grey))
    assert np.asarray(decoded(png(grey.convert("1")), WHITE)).max() == 255
    ink = Image.fromarray(picture(0, 4, 4)).convert("CMYK")
    assert decoded(png(ink, "JPEG"), WHITE).mode == "RGB"
    with pytest.raises(Unreadable, match="32-bit values"):
        decoded(png(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), WHITE)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_and_overwritten_images_are_unreadable(format: str) -> None:
    whole = png(picture(0, 64, 64), format)
    assert decoded(whole, WHITE).size == (64, 64)
    with pytest.raises(Unreadable):
        decoded(whole[: len(whole) // 2], WHITE)
    for bytes_of in (b"", b"<html>404 not found</html>", bytes(200)):
        with pytest.raises(Unreadable, match="cannot identify"):
            decoded(bytes_of, WHITE)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_noise_in_a_file_never_raises_anything_else() -> None:
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        whole = png(picture(0, 32, 32), format)
        for _ in range(60):
            broken = np.frombuffer(whole, np.uint8).copy()
            broken[random.integers(0, len(broken), 8)] = random.integers(0, 256, 8)
            try:
                image = decoded(broken.tobytes(), WHITE)
            except Unreadable:
                continue
            assert image.mode == "RGB"


# --- buckets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "corner"),
    [
        ((8, 8), (8, 8), (8, 8), (0, 0)),
        ((16, 16), (8, 8), (8, 8), (0, 0)),
        ((20, 10), (8, 8), (16, 8), (4, 0)),
        ((10, 21), (8, 8), (8, 17), (0, 4)),
        ((4, 4), (8, 8), (8, 8), (0, 0)),
        ((9, 5), (4, 8), (14, 8), (5, 0)),
        ((1, 100), (8, 16), (8, 800), (0, 392)),
    ],
)
def test_images_cover_their_bucket_and_are_cut_at_the_centre(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = Image.fromarray(picture(0, *size))
    found, where = fitted(image, bucket)
    assert where == corner
    assert found.shape == (*bucket, 3)
    grows = resized[0] > size[0]
    scaled = image if resized == size else image.resize(resized[::-1], Image.Resampling(3 if grows else 1))
    top, left = corner
    assert np.array_equal(found, np.asarray(scaled)[top : top + bucket[0], left : left + bucket[1]])


def test_time_ids_are_in_the_order_of_diffusers() -> None:
    from diffusers import StableDiffusionXLPipeline
    from tiny_denoisers import POOLED_WIDTH, tiny_sdxl

    class Pipeline:
        unet = tiny_sdxl()

    original, corner, bucket = (480, 640), (3, 5), (64, 128)
    wanted = StableDiffusionXLPipeline._get_add_time_ids(
        Pipeline(), original, corner, bucket, dtype=torch.float32, text_encoder_projection_dim=POOLED_WIDTH
    )
    assert list(time_ids(original, corner, bucket)) == wanted[0].tolist()


def test_generated_buckets_have_one_area_and_bounded_sides() -> None:
    for aspect in (1.0, 1.5, 2.0, 4.0):
        source = source_of("x", resolution=1024, max_aspect=aspect)
        found = buckets_of(source)
        assert found == tuple(sorted(set(found)))
        assert (1024, 1024) in found
        assert all(h % 64 == 0 and w % 64 == 0 and max(h, w) <= aspect * min(h, w) for h, w in found)
        assert all(abs(h * w / 1024**2 - 1) < 0.1 for h, w in found)
        assert all((w, h) in found for h, w in found)
    assert buckets_of(source_of("x", max_aspect=1)) == ((64, 64),)
    assert buckets_of(source_of("x", buckets=[[64, 32], [8, 16]])) == ((8, 16), (64, 32))


def test_the_nearest_bucket_is_that_of_the_nearest_shape_then_size() -> None:
    buckets = ((64, 64), (64, 128), (128, 64), (512, 512))
    assert nearest_bucket(100, 100, buckets) == (64, 64)
    assert nearest_bucket(500, 500, buckets) == (512, 512)
    assert nearest_bucket(1000, 900, buckets) == (512, 512)  # diffusers' measure in pixels says (64, 64)
    assert nearest_bucket(40, 90, buckets) == (64, 128)
    assert nearest_bucket(90, 40, buckets) == (128, 64)


# --- files ------------------------------------------------------------------------------------------------------


def test_metadata_speaks_for_its_folder_and_those_below(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a.png": "one", "sub/deep/b.png": "two", "c.png": None, "sub/d.png": None})
    (tmp_path / "c.txt").write_text(" by a file\n")
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "./d.png", "caption": "near"}\n')
    (tmp_path / "notes.txt").write_text("of nobody")
    found = captions(source_of(tmp_path))
    assert found == {"a.png": "one", "c.png": "by a file", "sub/d.png": "near", "sub/deep/b.png": "two"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file_name": "a.png", "caption": "x"\n', r"metadata\.jsonl, line 1: no valid JSON"),
        ('["a.png"]\n', "line 1: wanted an object"),
        ('{"file": "a.png"}\n', "line 1: wanted the image's path in 'file_name', found the keys file"),
        ('{"file_name": "a.png", "text": "x"}\n', "no line has 'caption' .* found text; set source.caption_key"),
        ('{"file_name": "a.png", "caption": 3}\n', "line 1: wanted a text in 'caption', found 3"),
        (
            '{"file_name": "z.png", "caption": "x"}\n',
            r"names 1 file.s. that are no images or not there: z\.png .line 1",
        ),
        ('{"file_name": "a.png", "caption": "x"}\n' * 2, r"line 2: a\.png has a line already"),
        ('{"file_name": "a.png"}\n{"file_name": "./a.png"}\n', r"line 2: a\.png has a line already"),
    ],
)
def test_broken_metadata_is_named_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    write_pictures(tmp_path, {"a.png": "one"})
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        units(source_of(tmp_path))


def test_captions_are_left_alone_where_nobody_reads_them(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a.png": None, "b.png": None})
    (tmp_path / "metadata.jsonl").write_text("no JSON")
    assert captions(source_of(tmp_path, text=False)) == {"a.png": "", "b.png": ""}


def test_an_image_without_a_caption_counts_as_unusable_and_an_empty_caption_does_not(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a.png": "one", "b.png": None, "c.png": "", "d.png": None})
    (tmp_path / "d.txt").write_text("")
    source = source_of(tmp_path)
    found, lost = read(source)
    assert {row.row_id: row.caption for row in found} == {"a.png": "one", "c.png": "", "d.png": ""}
    assert lost.images == [("b.png", "no_caption", "no caption")]
    with pytest.raises(
        DataError, match=r"1 of 4 images cannot be used.*max_corrupt \(0\.01\)(.|\n)*b\.png: no caption"
    ):
        require_enough(len(found), lost, source)
    require_enough(len(found), lost, source_of(tmp_path, max_corrupt=0.25))


def test_corrupt_files_are_named_and_stop_the_run_above_a_share(tmp_path: Path) -> None:
    write_pictures(tmp_path, {f"{i:02}.png": "x" for i in range(20)})
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    (tmp_path / "07.png").write_bytes(b"<html>")
    source = source_of(tmp_path, max_corrupt=0.1)
    found, lost = read(source)
    assert len(found) == 18
    assert [name for name, _, _ in lost.images] == ["03.png", "07.png"]
    require_enough(len(found), lost, source)
    with pytest.raises(
        DataError, match=r"2 of 20 images cannot be used(.|\n)*03\.png: (.|\n)*07\.png: cannot identify"
    ):
        require_enough(len(found), lost, source_of(tmp_path, max_corrupt=0.09))
    with pytest.raises(DataError, match=r"20 of 20 images cannot be used, which leaves none"):
        require_enough(0, Lost(lost.images * 10), source_of(tmp_path, max_corrupt=1))


def write_parquet(path: Path, count: int = 5, *, struct: bool = False, **columns: Any) -> Path:
    data: list[Any] = [png(picture(i)) for i in range(count)]
    if struct:
        data = [{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)]
    table = pa.table({"image": data, "caption": [f"number {i}" for i in range(count)]} | columns)
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_of_bytes_or_of_structs(tmp_path: Path, struct: bool) -> None:
    write_parquet(tmp_path / "part.parquet", struct=struct)
    found, _ = read(source_of(tmp_path))
    assert [row.row_id for row in found] == [f"part.parquet#{i}" for i in range(5)]
    assert [row.caption for row in found] == [f"number {i}" for i in range(5)]
    assert all(row.place is None and row.data == png(picture(i)) for i, row in enumerate(found))


def test_units_change_neither_rows_nor_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "b.parquet")
    write_pictures(tmp_path, {"a.png": "one", "c.png": "two"})
    write_tar(tmp_path / "d.tar", {"x": "three", "y": "four"})
    source = source_of(tmp_path)
    whole, _ = read(source)
    monkeypatch.setattr(images, "UNIT_BYTES", 1)
    parts = units(source)
    assert [unit.index for unit in parts] == list(range(6))  # two images, three row groups, one tar
    assert read(source)[0] == whole
    assert [images.Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in parts] == parts


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({}, {"image_key": "jpg"}, "wanted the column 'jpg', found 'image', 'caption'; set source.image_key"),
        ({}, {"caption_key": "text"}, "wanted the column 'text', found 'image', 'caption'; set source.caption_key"),
        ({"image": ["a.png"] * 5}, {}, "row 0: wanted the bytes of an image file in 'image' .*, found str"),
        ({"caption": [["a"]] * 5}, {}, r"row 0: wanted a text in 'caption', found \['a'\]"),
    ],
)
def test_parquet_of_other_columns_is_refused(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    write_parquet(tmp_path / "part.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read(source_of(tmp_path, **settings))


def test_empty_cells_of_parquet_are_counted(tmp_path: Path) -> None:
    good = png(picture(0))
    write_parquet(tmp_path / "a.parquet", 3, image=[good, None, good], caption=["x", "y", None])
    only_path = pa.array([{"bytes": None, "path": "x.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    write_parquet(tmp_path / "b.parquet", 1, image=only_path)
    found, lost = read(source_of(tmp_path))
    assert [row.row_id for row in found] == ["a.parquet#0"]
    assert lost.images == [
        ("a.parquet#1", "unreadable", "there is no image in this record"),
        ("a.parquet#2", "no_caption", "no caption"),
        ("b.parquet#0", "unreadable", "the file holds only a path of this image, no bytes"),
    ]


def write_tar(path: Path, captions: dict[str, str], *, suffix: str = "txt", image: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for seed, (key, caption) in enumerate(captions.items()):
            text = json.dumps({"caption": caption}) if suffix == "json" else caption
            members = {f"{key}.png": png(picture(seed))} if image else {}
            for name, data in (members | {f"{key}.{suffix}": text.encode(), f"{key}.cls": b"3"}).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix", ["txt", "json", "caption"])
def test_webdataset_tars(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / "shard-0.tar", {"a/000": "one", "a/001": "two"}, suffix=suffix)
    found, _ = read(source_of(tmp_path))
    assert [(row.row_id, row.caption) for row in found] == [("shard-0.tar#a/000", "one"), ("shard-0.tar#a/001", "two")]
    for seed, row in enumerate(found):
        assert row.place is not None
        assert row.place.read() == png(picture(seed))
        assert row.place.uri == str(path)


def test_samples_of_tars_without_image_or_caption(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x": "one"})
    write_tar(tmp_path / "b.tar", {"y": "two"}, image=False)
    found, lost = read(source_of(tmp_path))
    assert [row.row_id for row in found] == ["a.tar#x"]
    assert lost.images == [("b.tar#y", "unreadable", "the sample has no image, only cls, txt")]
    write_tar(tmp_path / "b.tar", {"y": "two"}, suffix="label")
    with pytest.raises(DataError, match=r"b\.tar: none of its 1 samples has a caption.*found cls, label, png"):
        read(source_of(tmp_path))
    write_tar(tmp_path / "b.tar", {"y": ""}, suffix="txt")
    assert captions(source_of(tmp_path))["b.tar#y"] == ""


@pytest.mark.parametrize("name", ["part.parquet", "part.tar"])
def test_a_truncated_container_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_parquet(path) if name.endswith("parquet") else write_tar(path, {"x": "a", "y": "b"})
    whole = path.read_bytes()
    end = len(whole) if name.endswith("parquet") else 6144  # a tar is filled up with zeros
    for size in {0, 700, *range(0, end, 512), end - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{name}: unreadable or truncated .*it has [0-9,]+ bytes"):
            read(source_of(tmp_path))


def test_names_do_not_depend_on_where_folders_lie_nor_on_other_files(tmp_path: Path) -> None:
    write_pictures(tmp_path / "here" / "set", {"x/a.png": "one", "x/b.png": "two"})
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "deeper")
    first, second = tmp_path / "here" / "set", tmp_path / "there" / "deeper" / "set"
    assert captions(source_of(first)) == captions(source_of(second)) == {"x/a.png": "one", "x/b.png": "two"}
    (first / "y").mkdir()
    (first / "y" / "c.png").write_bytes(png(picture(9)))
    assert {"x/a.png", "x/b.png", "y/c.png"} == set(captions(source_of(first, text=False)))
    both = set(captions(source_of(first, second, text=False)))
    assert {"here/set/x/a.png", "deeper/set/x/a.png", "here/set/y/c.png"} < both


def test_globs_hidden_files_and_unknown_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a.png": "one", "sub/B.JPG": "two", ".hidden/c.png": None, "_tmp/d.png": None})
    (tmp_path / "readme.md").write_text("nothing")
    assert set(captions(source_of(tmp_path))) == {"a.png", "sub/B.JPG"}
    assert captions(source_of(f"{tmp_path}/**/*.JPG")) == {"sub/B.JPG": "two"}
    assert captions(source_of(f"{tmp_path}/*.*")) == {"a.png": "one"}
    assert captions(source_of(tmp_path / "a.png", tmp_path)) == captions(source_of(tmp_path))
    with pytest.raises(DataError, match=r"readme\.md gives no image; wanted image files"):
        units(source_of(tmp_path / "readme.md"))
    with pytest.raises(DataError, match="wanted a file or folder"):
        units(source_of(tmp_path / "nowhere"))


def test_files_of_packages_and_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures_of_a_package" / "data", {"a.png": "one"})
    (tmp_path / "pictures_of_a_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert captions(source_of("package://pictures_of_a_package/data")) == {"a.png": "one"}
    digest = folder_sha256(tmp_path / "pictures_of_a_package" / "data")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    fetched = tmp_path / "home" / "downloads" / "pictures-1.0" / digest[:16] / "data"
    shutil.copytree(tmp_path / "pictures_of_a_package" / "data", fetched)
    assert captions(source_of(f"pypi://pictures==1.0/data/#sha256={digest}")) == {"a.png": "one"}


def test_splits_follow_content_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", {f"{i}.png": f"caption {i}" for i in range(40)})
    first, _ = read(source_of(tmp_path / "a"), 0.4)
    by_content = {row.sha: row.split for row in first}
    held_out = {key for key, split in by_content.items() if split == "held_out"}
    assert 5 < len(held_out) < 30
    write_pictures(tmp_path / "b" / "renamed", {f"{i}.png": f"another caption {i}" for i in range(40)})
    twice, _ = read(source_of(tmp_path / "a", tmp_path / "b"), 0.4)
    assert len(twice) == 80
    assert all(by_content[row.sha] == row.split for row in twice)
    fewer = {row.sha for row in read(source_of(tmp_path / "a"), 0.2)[0] if row.split == "held_out"}
    assert fewer < held_out


def test_hashes_of_files_see_every_byte_and_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))

    def content(folder: Path) -> str:
        source = source_of(folder)
        files = image_files.find_image_files(source.paths)
        return json.dumps(image_files.file_content(files, images.captions_of(files, source).files), sort_keys=True)

    write_pictures(tmp_path / "a", {"x/a.png": "one", "b.png": None})
    (tmp_path / "a" / "b.txt").write_text("two")
    write_parquet(tmp_path / "a" / "c.parquet")
    for path in (tmp_path / "a").rglob("*"):
        os.utime(path, (1e9, 1e9))
    base = content(tmp_path / "a")
    assert content(tmp_path / "a") == base
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "b") == base

    def changed(change: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "b")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        change(tmp_path / "b")
        return content(tmp_path / "b")

    others = [
        changed(lambda f: (f / "b.txt").write_text("three")),
        changed(lambda f: (f / "metadata.jsonl").write_text('{"file_name": "x/a.png", "caption": "uno"}')),
        changed(lambda f: (f / "b.png").write_bytes(png(picture(5)))),
        changed(lambda f: (f / "b.png").rename(f / "x" / "b.png")),
        changed(lambda f: write_parquet(f / "c.parquet", 4)),
        changed(lambda f: (f / "x" / "new.png").write_bytes(png(picture(5)))),
    ]
    assert len({base, *others}) == 7
    assert changed(lambda f: (f / "stray.txt").write_text("of nobody")) == base
