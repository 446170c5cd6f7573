"""Video files in: what they are, and their frames one by one, upright and in RGB.

Untagged and foreign files are expected here (``--motion FILE``); what is refused is refused in one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Interpolation
from torch import Tensor

from .color import Planes, knows_matrix, yuv420_to_rgb
from .core import MAX_SIDE, Size, UsageError
from .images import check_file
from .reference import fit_pixels

BT709 = 1  # primaries, transfer and matrix have the same code in ITU-T H.273
LIMITED, FULL = 1, 2
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
# Containers only: a playlist or a concat list could make libav open files that the user never named.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,ivf,gif,apng,yuv4mpegpipe,h264,hevc,obu"
_ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself. Color tags are ITU-T H.273 codes; 1 is BT.709, 2 unspecified.

    ``frames`` are counted, not believed; ``size`` is as shown, after ``rotation`` (degrees counter-clockwise).
    """

    frames: int
    fps: float
    size: Size
    codec: str
    pix_fmt: str
    color_primaries: int
    color_transfer: int
    color_matrix: int
    full_range: bool
    rotation: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


def probe(path: str | Path) -> VideoInfo:
    """Facts of a video file, from its packets and first frame. Bad files are refused with ``UsageError``."""
    with opened(path) as container:
        stream = container.streams.video[0]
        frames = sum(1 for packet in container.demux(stream) if packet.size)
    with opened(path) as container:
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        if first is None:
            raise UsageError(f"{path}: holds no video frame")
        if stream.frames > frames:
            raise UsageError(f"{path}: truncated, {frames} of {stream.frames} frames are there")
        rotation = first.rotation % 360
        size = Size(first.width, first.height)
        context = stream.codec_context
        return VideoInfo(
            frames=frames,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            size=Size(size.height, size.width) if rotation in (90, 270) else size,
            codec=context.codec.canonical_name,
            pix_fmt=first.format.name,
            color_primaries=int(context.color_primaries),
            color_transfer=int(context.color_trc),
            color_matrix=int(first.colorspace),
            full_range=int(first.color_range) == FULL,
            rotation=rotation,
            metadata=dict(container.metadata),
        )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The container's own tags (``comment`` holds the request of a video made here)."""
    with opened(path) as container:
        return dict(container.metadata)


def read_video(path: str | Path, size: Size | None = None) -> Iterator[Tensor]:
    """Frames one by one, (1, 3, 1, h, w) float32 in [-1, 1], upright; cropped and resized to ``size`` if given.

    The file is opened and checked by the call itself; decoding is lazy. Raises ``UsageError``, from the
    iterator too if the damage is further inside.
    """
    info = probe(path)
    if info.color_transfer in _HDR_TRANSFERS:
        raise UsageError(f"{path}: is HDR ({_HDR_TRANSFERS[info.color_transfer]}); convert it to SDR BT.709 first")
    if max(info.size.width, info.size.height) > MAX_SIDE:
        raise UsageError(f"{path}: {info.size} is over the limit of {MAX_SIDE} pixels a side")
    return _frames(path, size)


def _frames(path: str | Path, size: Size | None) -> Iterator[Tensor]:
    with opened(path) as container:
        for frame in container.decode(container.streams.video[0]):
            pixels = torch.rot90(to_rgb(frame), frame.rotation // 90 % 4, dims=(1, 2))
            if size is not None and pixels.shape[-2:] != (size.height, size.width):
                pixels = fit_pixels(pixels, size)
            yield pixels[None, :, None].contiguous()


def to_rgb(frame: av.VideoFrame) -> Tensor:
    """(3, h, w) float32 in [-1, 1]. Untagged video is taken for BT.709 from 720 lines on, else for BT.601."""
    matrix = int(frame.colorspace)
    if not knows_matrix(matrix):
        matrix = BT709 if frame.height >= 720 else 5
    full_range = int(frame.color_range) == FULL or frame.format.name.startswith("yuvj")
    depth = {"yuv420p": 8, "yuvj420p": 8, "yuv420p10le": 10}.get(frame.format.name)
    if depth and frame.width % 2 == 0 and frame.height % 2 == 0:
        kind: Any = np.uint8 if depth == 8 else np.uint16
        planes = []
        for plane in frame.planes:
            buffer: Any = plane
            rows = np.frombuffer(buffer, kind).reshape(plane.height, -1)
            planes.append(torch.from_numpy(rows[:, : plane.width].astype(np.float32)))
        return yuv420_to_rgb(Planes(*planes), bit_depth=depth, matrix=matrix, full_range=full_range)
    rgb = frame.format.name.startswith(("rgb", "bgr", "gbr", "pal", "argb", "abgr"))
    picture = frame.reformat(
        format="rgb24",
        src_colorspace=None if rgb else matrix,
        src_color_range=ColorRange.JPEG if rgb or full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_ACCURATE,
    )
    return torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """The container of a local video file; every way in which it is not one is a ``UsageError``."""
    checked = check_file(path, "video")
    try:
        # Under "file:" no part of a name can be taken for another protocol.
        with av.open(f"file:{checked}", options={"format_whitelist": _DEMUXERS}) as container:
            if not container.streams.video:
                raise UsageError(f"{path}: holds no video")
            yield container
    except av.FFmpegError as error:
        raise UsageError(f"{path}: not a readable video ({error.strerror}); give MP4, MOV, WebM, MKV or AVI") from None
