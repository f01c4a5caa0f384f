"""From the bytes of a video file to the frames that are wanted of it.

Films go through PyAV, animated WebP and GIF through Pillow; a folder of frames arrives as an uncompressed tar of its
images, which have no times.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import TypeAlias

import av
from PIL import Image, ImageSequence

from raydistill.sources.pixels import Unreadable, decoded, flat

Shown: TypeAlias = "tuple[float, float, Callable[[], Image.Image]]"
"""When a frame is first shown and for how long, in seconds, and what makes its picture."""
ROUNDING = 1e-6
"""Times of frames are multiples of a clock's ticks and not exact."""


def read_clip(data: bytes, *, frames: int, fps: float | None, background: tuple[int, int, int]) -> list[Image.Image]:
    """The first `frames` frames of a clip as 8-bit RGB, all of one size.

    With `fps` the frames that are shown at the times 0, 1/fps, 2/fps …, where frames have times at all. Raises
    `Unreadable` for bytes that cannot be decoded and for a clip with too few frames.
    """
    if data[257:262] == b"ustar":
        shown, fps = _stills(data, background), None
    elif data[:3] == b"GIF" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        shown = _animation(data, background)
    else:
        shown = _film(data)
    found = list(_taken(shown, frames, fps))
    if len(found) < frames:
        at = "" if fps is None else f" at {fps:g} frames per second"
        raise Unreadable(f"wanted {frames} frames{at}, found {len(found)}")
    if len({picture.size for picture in found}) > 1:
        sizes = sorted({picture.size for picture in found})
        raise Unreadable(f"wanted frames of one size, found {sizes[0]} and {sizes[1]} (width, height)")
    return found


def packed(frames: Sequence[tuple[str, bytes]]) -> bytes:
    """Images of a folder of frames (name and bytes, in order) as the bytes of one clip."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, data) in enumerate(frames):
            member = tarfile.TarInfo(f"{number:06d}{PurePosixPath(name).suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _taken(shown: Iterator[Shown], frames: int, fps: float | None) -> Iterator[Image.Image]:
    count = 0
    for start, seconds, picture in shown:
        made: Image.Image | None = None
        while count < frames and (made is None if fps is None else count / fps < start + seconds - ROUNDING):
            made = made or picture()
            yield made
            count += 1
        if count == frames:
            return


def _film(data: bytes) -> Iterator[Shown]:
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise Unreadable("the file has no video stream")
            stream = container.streams.video[0]
            usual = 1 / float(stream.average_rate) if stream.average_rate else 0.0
            first, before = None, None
            for frame in container.decode(stream):
                time = frame.time
                if time is None:
                    raise Unreadable("a frame has no time")
                first = time if first is None else first
                if before is not None:  # how long a frame is shown is known when the next one comes
                    yield before[0], time - first - before[0], before[1]
                before = (time - first, _Picture(frame))
            if before is not None:
                yield before[0], usual, before[1]
    except av.error.FFmpegError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error


class _Picture:
    """A decoded frame that becomes RGB when it is wanted."""

    def __init__(self, frame: av.VideoFrame):
        self.frame = frame

    def __call__(self) -> Image.Image:
        picture = self.frame.to_image()
        turn = int(self.frame.rotation) % 360
        return picture.rotate(turn, expand=True) if turn else picture


def _animation(data: bytes, background: tuple[int, int, int]) -> Iterator[Shown]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            start = 0.0
            for frame in ImageSequence.Iterator(image):
                frame.load()
                seconds = float(frame.info.get("duration", 0)) / 1000
                picture = flat(frame, background)
                yield start, seconds, lambda picture=picture: picture  # type: ignore[misc]
                start += seconds
    except Unreadable:
        raise
    except Exception as error:  # as in `decoded`: broken bytes make Pillow's plugins stumble in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreadable(reason.split(" <_io.BytesIO", 1)[0]) from error


def _stills(data: bytes, background: tuple[int, int, int]) -> Iterator[Shown]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for number, member in enumerate(tar):
            stream = tar.extractfile(member)
            assert stream is not None, "`packed` writes files alone"
            content = stream.read()
            yield float(number), 1.0, lambda content=content: decoded(content, background)  # type: ignore[misc]
