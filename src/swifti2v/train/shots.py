"""Where one shot ends and the next begins, from the pixels alone, in one streaming pass; frames of a shot by number.

No learned model: a hard cut is a frame whose difference from the one before stands far above the differences around it,
in its downsampled picture and in its color histogram. Dissolves are not found, nor every cut of shots shorter than
``NEAR`` frames; black frames end a shot. Knows frames, not lists of files; what it found in Big Buck Bunny was looked
at pair by pair (docs/data.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from torch import Tensor

from ..core import UsageError
from ..video_reader import opened, probe, to_rgb
from .files import write_json

LOOK = (160, 90)  # width, height at which frames are compared
BINS = 8  # of the histogram of every color
NEAR = 6  # frames on either side whose differences say what is usual here
PICTURE_FLOOR, HISTOGRAM_FLOOR = 0.035, 0.10
RATIO = 2.5
CERTAIN = 0.5  # histogram distance that is a cut whatever moves around it
DETECTOR = 1  # counts changes of any of these, so that kept scans are not taken for new ones
BLACK = 0.02  # mean light below which a frame shows nothing


@dataclass(frozen=True, order=True)
class Shot:
    """Frames ``start`` to ``end`` (exclusive) of one take; ValueError if there are none."""

    start: int
    end: int

    @property
    def frames(self) -> int:
        return self.end - self.start

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a shot of frames {self.start} to {self.end} is empty or starts before 0")


@dataclass(frozen=True)
class Change:
    """How far a frame is from the one before it: mean absolute difference of pixels in [0, 1], and half the L1
    distance of the color histograms in [0, 1]; ``light`` is the frame's own mean in [0, 1]."""

    picture: float
    histogram: float
    light: float


@dataclass(frozen=True)
class Scan:
    """One pass over a file: its shots, and when every frame is shown (in units of the stream, None if it does not say).

    ``times`` is what makes frames reachable by number whatever the container believes about its length and rate.
    """

    shots: tuple[Shot, ...]
    times: tuple[int | None, ...]


@lru_cache(maxsize=256)
def scan(path: Path, kept_in: Path | None = None) -> Scan:
    """Decode the whole file once, or read what an earlier scan left in the folder ``kept_in``.

    ``UsageError`` if the file is no video, is truncated or damaged, or holds no frame.
    """
    probe(path)
    status = path.stat()
    kept = None if kept_in is None else kept_in / f"{path.name}-{status.st_size}-{status.st_mtime_ns}.{DETECTOR}.json"
    if kept is not None and kept.exists():
        found = json.loads(kept.read_bytes())
        return Scan(tuple(Shot(*shot) for shot in found["shots"]), tuple(found["times"]))
    times: list[int | None] = []
    series = list(changes(looks(path, times)))
    if not series:
        raise UsageError(f"{path}: holds no video frame")
    made = Scan(tuple(find_shots(series)), tuple(times))
    if kept is not None:
        write_json(kept, {"shots": [[shot.start, shot.end] for shot in made.shots], "times": times})
    return made


def looks(path: str | Path, times: list[int | None] | None = None) -> Iterator[np.ndarray]:
    """Every decoded frame as uint8 (90, 160, 3) RGB, in order; their times are appended to ``times``."""
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if times is not None:
                times.append(frame.pts)
            yield frame.reformat(*LOOK, format="rgb24", interpolation=Interpolation.AREA).to_ndarray()


def changes(frames: Iterable[np.ndarray]) -> Iterator[Change]:
    """One ``Change`` a frame, uint8 (h, w, 3); the first is Change(0, 0, light)."""
    before: tuple[np.ndarray, np.ndarray] | None = None
    for frame in frames:
        joint = (frame.astype(np.int64) // (256 // BINS)) @ np.array([BINS * BINS, BINS, 1])
        histogram = np.bincount(joint.ravel(), minlength=BINS**3) / joint.size
        picture = frame.astype(np.float32) / 255
        moved, turned = 0.0, 0.0
        if before is not None:
            moved = float(np.abs(picture - before[0]).mean())
            turned = float(np.abs(histogram - before[1]).sum()) / 2
        yield Change(moved, turned, float(picture.mean()))
        before = picture, histogram


def cuts(series: Sequence[Change]) -> list[int]:
    """Frames that start a new shot (never 0), ascending.

    A cut lies above both floors, and stands ``RATIO`` times above the two greatest differences within ``NEAR`` frames,
    in the picture, or in the histogram with the picture at least half again as far; or its histogram is far in itself.
    """
    picture = np.array([change.picture for change in series])
    histogram = np.array([change.histogram for change in series])
    found = []
    for frame in range(1, len(series)):
        if picture[frame] < PICTURE_FLOOR or histogram[frame] < HISTOGRAM_FLOOR:
            continue
        around = [i for i in range(max(1, frame - NEAR), min(len(series), frame + NEAR + 1)) if i != frame]
        moves, turns = (
            float(np.sort(values[around])[-2:].mean()) if around else 0.0 for values in (picture, histogram)
        )
        stands_out = picture[frame] > RATIO * moves or (
            histogram[frame] > RATIO * turns and picture[frame] > 1.5 * moves
        )
        if stands_out or histogram[frame] > CERTAIN:
            found.append(frame)
    return found


def find_shots(series: Sequence[Change]) -> list[Shot]:
    """The clip as shots in order, black frames left out (they end a shot)."""
    edges = sorted({0, *cuts(series), *_dark_edges(series), len(series)})
    return [Shot(start, end) for start, end in pairwise(edges) if series[start].light >= BLACK]


def _dark_edges(series: Sequence[Change]) -> list[int]:
    dark = [change.light < BLACK for change in series]
    return [i for i in range(1, len(series)) if dark[i] != dark[i - 1]]


def without(shots: Iterable[Shot], ranges: Iterable[tuple[int, int]]) -> list[Shot]:
    """``shots`` without the frames of ``ranges`` (start, end exclusive): titles, dissolves, credits."""
    kept = list(shots)
    for first, last in ranges:
        parts = [((shot.start, min(shot.end, first)), (max(shot.start, last), shot.end)) for shot in kept]
        kept = [Shot(start, end) for pair in parts for start, end in pair if start < end]
    return kept


def read_frames(
    path: str | Path, start: int, count: int, *, step: int = 1, times: Sequence[int | None] = ()
) -> Iterator[Tensor]:
    """Frames ``start``, ``start + step``, ... (``count`` of them), each (3, h, w) float32 in [-1, 1], upright.

    With the ``times`` of a ``Scan`` decoding begins at the key frame before ``start``, else at the file's beginning;
    the frames are the same. ``UsageError`` if the file is damaged or ends too early.
    """
    if start < 0 or count < 1 or step < 1:
        raise ValueError(f"{count} frames from {start} in steps of {step}: counts are positive, start is 0 or more")
    wanted = range(start, start + count * step, step)
    given = 0
    with opened(path) as container:
        for number, frame in _from_key_frame(container, start, times):
            if number == wanted[given]:
                yield to_rgb(frame).rot90(frame.rotation // 90 % 4, dims=(1, 2))
                given += 1
            if given == count:
                return
    raise UsageError(f"{path}: ends before frame {wanted[given]}; the list it is read by is of another file")


def _from_key_frame(
    container: av.container.InputContainer, start: int, times: Sequence[int | None]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) from some frame at or before ``start`` on."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    number_at = {time: number for number, time in enumerate(times)}
    target = times[start] if start < len(times) else None
    if start and target is not None and len(number_at) == len(times):
        container.seek(target, stream=stream)
        expected: int | None = None
        for frame in container.decode(stream):
            number = number_at.get(frame.pts)
            # Some containers land behind the place asked for, or lose frames: then the whole way, slow but right.
            if number is None or (number > start if expected is None else number != expected):
                break
            yield number, frame
            expected = number + 1
        container.seek(0, stream=stream)
    yield from enumerate(container.decode(stream))
