"""From the bytes of an image file to the pixels of the bucket that suits it."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from io import BytesIO
from typing import TypeAlias

import numpy as np
from PIL import Image

Bucket: TypeAlias = tuple[int, int]
"""Height and width in pixels."""
ORIENTATION = 0x0112
"""EXIF tag of how the camera was held."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Unreadable(Exception):
    """An image that cannot be decoded; says why."""


def decoded(data: bytes, background: tuple[int, int, int]) -> Image.Image:
    """The image as it is meant to be seen: 8-bit RGB, upright by its EXIF orientation, on `background` where it is
    transparent. Of several frames the first. Colour profiles are not applied.

    Grey and 16-bit values are scaled to 0–255. Raises `Unreadable` for broken, truncated or too large files, and for
    32-bit values, which have no range.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            orientation = image.getexif().get(ORIENTATION)
            upright = flat(image, background)
    except Unreadable:
        raise
    except Exception as error:  # Pillow's plugins raise whatever broken bytes make them stumble over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreadable(reason.split(" <_io.BytesIO", 1)[0]) from error
    return upright.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else upright


def flat(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """8-bit RGB without transparency."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        key = image.info.get("transparency")
        if key is None:
            return grey.convert("RGB")
        opaque = grey.convert("RGBA")
        opaque.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif image.mode in ("I", "F"):
        raise Unreadable(f"32-bit values (mode {image.mode}) have no range; wanted 8 or 16 bits")
    elif image.has_transparency_data:
        opaque = image.convert("RGBA")
    else:
        return image.convert("RGB")
    behind = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(behind, opaque).convert("RGB")


def fitted(image: Image.Image, bucket: Bucket) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels [height, width, 3] of the bucket, uint8, and the corner (top, left) of the crop in the resized image.

    The image is scaled until it just covers the bucket, antialiased (Lanczos; bicubic when it grows), and cut at its
    centre.
    """
    (height, width), (wanted_height, wanted_width) = (image.height, image.width), bucket
    scale = max(wanted_height / height, wanted_width / width)
    size = max(wanted_width, round(width * scale)), max(wanted_height, round(height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    top, left = (image.height - wanted_height) // 2, (image.width - wanted_width) // 2
    cut = image.crop((left, top, left + wanted_width, top + wanted_height))
    return np.array(cut, dtype=np.uint8), (top, left)


def time_ids(original: tuple[int, int], corner: tuple[int, int], bucket: Bucket) -> tuple[int, ...]:
    """SDXL's size conditioning in the order of diffusers: original height and width, top and left of the crop, height
    and width of the bucket (Podell et al. 2023, arXiv 2307.01952, §2.2)."""
    return (*original, *corner, *bucket)


@lru_cache(maxsize=65536)
def nearest_bucket(height: int, width: int, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket whose ratio of sides is nearest to the image's on a logarithmic scale; of equal ones the nearest in
    area, then the first.

    diffusers' `find_nearest_bucket` measures in pixels of the bucket, which favours small buckets where areas differ.
    """

    def distance(bucket: Bucket) -> tuple[float, float, Bucket]:
        ratio = math.log(height / width) - math.log(bucket[0] / bucket[1])
        area = math.log(height * width) - math.log(bucket[0] * bucket[1])
        return round(abs(ratio), 9), round(abs(area), 9), bucket

    return min(buckets, key=distance)


def caption_sha(caption: str) -> str:
    """What sorts rows by caption: 16 hexadecimal digits."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]
