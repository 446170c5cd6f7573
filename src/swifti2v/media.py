"""Video files in and out: lazy reading, and streaming H.264, H.265 or AV1 that is whole or absent.

With ``images`` the only user of av and PIL; what the pixels mean is ``color``'s, how files are named ``outputs``'.

Every chunk is encoded on its own (closed GOP, no reordering) and appended to the part file as exactly one MP4
fragment, so the part decodes to the last frame given so far at any time. A muxer per chunk does it: libav's
own fragmenting either cuts at every frame or keeps the newest fragment in memory until the next one starts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from .color import rgb_to_yuv420
from .core import MAX_SIDE, RunError, Size, UsageError
from .images import Photo, read_image, write_png_sequence
from .outputs import check_writable, locked_part, part_path, publish, release, sync_folder, unique_path
from .video_reader import BT709, LIMITED, VideoInfo, probe, read_metadata, read_video

__all__ = [
    "Encoding",
    "Photo",
    "VideoInfo",
    "check_writable",
    "part_path",
    "probe",
    "read_image",
    "read_metadata",
    "read_video",
    "release",
    "unique_path",
    "write_png_sequence",
    "write_video",
]

_PLAIN_KEYS = frozenset({"title", "artist", "comment", "description", "copyright", "date", "genre"})


@dataclass(frozen=True)
class _Encoder:
    library: str
    tag: str
    crf: float
    max_crf: float
    options: Mapping[str, str]


# No B-frames, so that every packet's time of decoding is its time of showing and fragments join exactly.
_ENCODERS = {
    "h264": _Encoder(
        "libx264", "avc1", 14, 51, {"preset": "veryfast", "bf": "0", "sc_threshold": "0", "x264-params": "mbtree=0"}
    ),
    "h265": _Encoder("libx265", "hvc1", 15, 51, {"preset": "ultrafast", "x265-params": "bframes=0:log-level=error"}),
    "av1": _Encoder("libsvtav1", "av01", 18, 63, {"preset": "9"}),
}


@dataclass(frozen=True)
class Encoding:
    """How frames become a stream: refused at birth, hence before weights load, if it cannot be done.

    ``codec``: h264, h265 or av1; ``bit_depth``: 8 or 10; ``crf``: quality, lower is better, None for the
    visually lossless default; ``threads``: of the encoder, 0 for as many as it likes.
    """

    codec: str = "h264"
    bit_depth: int = 8
    crf: float | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if self.codec not in _ENCODERS:
            raise UsageError(f"codec {self.codec!r} is not one of {', '.join(_ENCODERS)}; the default is h264")
        if self.bit_depth not in (8, 10):
            raise UsageError(f"bit_depth {self.bit_depth!r} is not 8 or 10")
        limit = self.encoder.max_crf
        if self.crf is not None and not 0 <= self.crf <= limit:
            raise UsageError(f"crf {self.crf} is not between 0 and {limit:g}; the default is {self.encoder.crf:g}")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or not 0 <= self.threads <= 64:
            raise UsageError(f"encoder threads {self.threads!r} is not between 0 (automatic) and 64")
        try:
            av.Codec(self.encoder.library, "w")
        except av.codec.codec.UnknownCodecError:
            raise UsageError(
                f"this PyAV has no {self.encoder.library}; choose another codec than {self.codec}"
            ) from None

    @property
    def encoder(self) -> _Encoder:
        return _ENCODERS[self.codec]

    @property
    def pix_fmt(self) -> str:
        return "yuv420p" if self.bit_depth == 8 else "yuv420p10le"

    def options(self) -> dict[str, str]:
        """For libav. ``threads`` has to be said in each library's own words."""
        options = {"crf": f"{self.encoder.crf if self.crf is None else self.crf:g}", **self.encoder.options}
        options["chroma_sample_location"] = "left"
        if self.codec == "h265" and self.threads:
            options["x265-params"] += f":pools={self.threads}:frame-threads=1"
        if self.codec == "av1" and self.threads:
            options["svtav1-params"] = f"lp={self.threads}"
        return options


def write_video(
    target: str | Path,
    chunks: Iterable[Tensor],
    *,
    fps: float,
    codec: str | Encoding = "h264",
    metadata: Mapping[str, str] | None = None,
    expected_frames: int | None = None,
) -> int:
    """Write chunks, (1, 3, t, h, w) in [-1, 1], h and w even, as MP4; returns the number of frames.

    Meanwhile ``NAME.part.mp4`` plays what was given so far; it is on the disk after every chunk. At the end it
    is remuxed (not re-encoded) to faststart and becomes ``target``, which never overwrites. On any error
    ``target`` does not appear and the part stays as a playable remainder (nothing if there was no frame yet);
    ``chunks``, if a generator, is closed. ``codec`` is a name or an ``Encoding``. ``metadata`` may be long and
    in any script. Raises ``UsageError`` before the first chunk is asked for, then ``RunError``.
    """
    target = Path(target)
    encoding = codec if isinstance(codec, Encoding) else Encoding(codec)
    tags = _checked_tags(metadata or {})
    rate = _exact_rate(fps)
    check_writable(target)
    with _closing_if_generator(chunks), locked_part(target) as file:
        if os.path.lexists(target):
            raise UsageError(f"{target} exists and is not overwritten; choose another name")
        job = _Job(target, encoding, rate, tags)
        count = _write_fragments(file, chunks, job)
        if count == 0:
            raise RunError(f"{target}: there were no frames to write")
        if expected_frames is not None and count != expected_frames:
            raise RunError(f"{target}: {count} of {expected_frames} frames came; they are in {part_path(target)}")
        _finish(target, tags)
    return count


@dataclass(frozen=True)
class _Job:
    """What stays the same from the first chunk to the last."""

    target: Path
    encoding: Encoding
    rate: Fraction
    tags: Mapping[str, str]


def _write_fragments(file: io.FileIO, chunks: Iterable[Tensor], job: _Job) -> int:
    count, extradata = 0, b""
    shape: tuple[int, ...] | None = None
    for chunk in filter(torch.numel, chunks):
        _check_chunk(chunk, shape, count)
        shape = tuple(chunk.shape[-2:])
        try:
            fragment = _encode(chunk, job, count)
        except av.FFmpegError as error:
            raise RunError(f"{job.encoding.codec} cannot encode frame {count}: {error.strerror or error}") from None
        if count and fragment.extradata != extradata:
            raise RunError("the encoder changed its parameters between chunks; one file cannot hold both")
        extradata = fragment.extradata
        if count == 0:  # only now may the remainder of an earlier, killed run go
            file.truncate(0)
        try:
            _append(file, b"" if count else fragment.init, fragment.body)
        except OSError as error:
            raise RunError(f"cannot write {part_path(job.target)}: {error.strerror}; it holds {count} frames") from None
        count += chunk.shape[2]
        del chunk  # large, and the next is about to be made
    return count


@dataclass(frozen=True)
class _Fragment:
    """One encoded chunk: ``init`` (ftyp and moov), ``body`` (moof and mdat), and the codec's parameter sets."""

    init: bytes
    body: bytes
    extradata: bytes


def _append(file: io.FileIO, init: bytes, body: bytes) -> None:
    """A fragment on the disk, whole or not there: libav cannot open a file that ends inside a ``moof``.

    So the fragment is written as one ``free`` box, which players skip, and becomes one by its first eight bytes.
    """
    start = file.tell()
    try:
        _write_all(file, init + len(body).to_bytes(4, "big") + b"free" + body[8:])
        os.fsync(file.fileno())
        file.seek(start + len(init))
        _write_all(file, body[:8])
        os.fsync(file.fileno())
        file.seek(0, os.SEEK_END)
    except OSError:
        file.truncate(start)
        raise


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _encode(chunk: Tensor, job: _Job, start: int) -> _Fragment:
    """Encode (1, 3, t, h, w) whose first frame is number ``start`` as a closed group of pictures."""
    flags = "frag_custom+empty_moov+default_base_moof+skip_trailer" + ("+frag_discont" if start else "")
    options = {"movflags": flags + _tag_flag(job.tags), "use_editlist": "0", "avoid_negative_ts": "disabled"}
    options["fragment_index"] = str(start + 1)  # has to grow, not to be consecutive
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=options) as container:
        container.metadata.update(job.tags)
        stream = _add_stream(container, job, Size(chunk.shape[-1], chunk.shape[-2]))
        due = start
        for picture in _pictures(chunk, job.encoding, start):
            for packet in stream.encode(picture):
                if packet.pts != due:
                    raise RunError(f"the encoder gave frame {packet.pts} where frame {due} was due")
                packet.dts, packet.duration = packet.pts, 1
                container.mux(packet)
                due += 1
        if due != start + chunk.shape[2]:
            raise RunError(f"the encoder kept {start + chunk.shape[2] - due} frames back")
        extradata = bytes(stream.codec_context.extradata or b"")
    data = buffer.getvalue()
    cut = _init_length(data)
    return _Fragment(data[:cut], data[cut:], extradata)


def _add_stream(container: Any, job: _Job, size: Size) -> Any:
    encoding = job.encoding
    stream = container.add_stream(encoding.encoder.library, rate=job.rate, options=encoding.options())
    stream.width, stream.height, stream.pix_fmt = size.width, size.height, encoding.pix_fmt
    context = stream.codec_context
    context.codec_tag = encoding.encoder.tag
    context.time_base = 1 / job.rate
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED
    context.thread_count = encoding.threads
    return stream


def _pictures(chunk: Tensor, encoding: Encoding, start: int) -> Iterator[av.VideoFrame | None]:
    """libav's frames, made one at a time, and None at the end to drain the encoder."""
    kind: Any = np.uint8 if encoding.bit_depth == 8 else np.uint16
    for number, frame in enumerate(chunk[0].unbind(1), start):
        planes = rgb_to_yuv420(frame.detach().to("cpu", torch.float32), bit_depth=encoding.bit_depth)
        if not bool(torch.isfinite(planes.y).all()):
            raise RunError(f"frame {number} holds NaN; the model or its dtype is broken (doctor checks both)")
        picture = av.VideoFrame(chunk.shape[-1], chunk.shape[-2], encoding.pix_fmt)
        for plane, values in zip(picture.planes, (planes.y, planes.cb, planes.cr), strict=True):
            rows = np.zeros((plane.height, plane.line_size // kind().itemsize), kind)
            rows[:, : plane.width] = values.numpy()
            plane.update(rows.tobytes())
        picture.pts = number
        yield picture
    yield None


def _init_length(data: bytes) -> int:
    """Bytes before the first ``moof``, walking the boxes (the word may also occur in the metadata)."""
    offset = 0
    while data[offset + 4 : offset + 8] != b"moof":
        length = int.from_bytes(data[offset : offset + 4], "big")
        if length < 8 or offset + length > len(data):
            raise RunError("the MP4 muxer wrote no fragment")
        offset += length
    return offset


def _finish(target: Path, tags: Mapping[str, str]) -> None:
    """Copy the packets of the part into a faststart file and publish it; the part goes when it is there."""
    part = part_path(target)
    made = part.with_name(f"{target.stem}.part.remux{target.suffix}")
    try:
        with (
            av.open(str(part)) as source,
            av.open(str(made), "w", format="mp4", options={"movflags": "faststart" + _tag_flag(tags)}) as container,
        ):
            container.metadata.update(tags)
            inner = source.streams.video[0]
            # A template becomes an encoder, which AV1's decoder has none of; as coded, H.265 would lose its hvc1.
            stream: Any = container.add_stream_from_template(inner, opaque=inner.codec_context.name == "libdav1d")
            if stream.codec_context is not None:
                stream.codec_context.codec_tag = inner.codec_context.codec_tag
            for packet in source.demux(inner):
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        publish(made, target)
        part.unlink()
        sync_folder(target.parent)
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"cannot finish {target}: {error.strerror or error}; all frames are in {part}") from None
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def _closing_if_generator(chunks: Iterable[Tensor]) -> Iterator[None]:
    """An abandoned generator frees its model now, not when the garbage collector comes."""
    try:
        yield
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()


def _check_chunk(chunk: Tensor, shape: tuple[int, ...] | None, start: int) -> None:
    if chunk.ndim != 5 or chunk.shape[:2] != (1, 3) or not chunk.is_floating_point():
        raise RunError(f"frame {start}: a {chunk.dtype} chunk {tuple(chunk.shape)} is not float (1, 3, t, h, w)")
    height, width = chunk.shape[-2:]
    if height % 2 or width % 2 or not 16 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise RunError(f"frame {start}: {width}x{height} cannot be encoded; sides are even, from 16 to {MAX_SIDE}")
    if shape is not None and shape != (height, width):
        raise RunError(f"frame {start}: {width}x{height} after {shape[1]}x{shape[0]}; all chunks have one size")


def _checked_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not key or "\x00" in key + value:
            raise UsageError(f"metadata {key!r} is empty or holds a NUL character; remove it")
        try:
            (key + value).encode()
        except UnicodeEncodeError:
            raise UsageError(f"metadata {key!r} is not valid Unicode (lone surrogate); re-type it") from None
    return dict(metadata)


def _tag_flag(tags: Mapping[str, str]) -> str:
    """Keys that iTunes-style tags lack need QuickTime's; otherwise the kind that most players show."""
    return "" if set(tags) <= _PLAIN_KEYS else "+use_metadata_tags"


def _exact_rate(fps: float) -> Fraction:
    """The rate as a fraction: 23.976 and its NTSC relatives are 24000/1001 and so on."""
    if not 0 < fps <= 240:
        raise UsageError(f"fps {fps} is not above 0 and at most 240; 15 is usual here")
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(ntsc) - fps) < 1e-3:
        return ntsc
    return max(Fraction(fps).limit_denominator(1000), Fraction(1, 1000))
