"""Lists of clips and photos, checked at the door, cut into windows of one shot each, and given a bucket.

DiffSynth's ``metadata`` convention: a CSV, JSON or JSONL file with a column ``video`` or ``image`` (a path relative to
the list) and ``prompt``; other columns are kept and ignored, but ``split``, ``kind``, ``start`` and ``end`` mean what
they say (a line of ``clips.jsonl`` is one shot). Whatever cannot be used is in the ``Report``: path, reason, count.
This module knows no networks and no latents.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core import Grid, Size, UsageError
from ..images import read_image
from ..reference import GROUP, fit_pixels
from ..video_reader import probe
from . import prompts
from .data import Pixels, rng_of, to_bytes, upscale
from .files import write_json
from .shots import Scan, Shot, read_frames, scan
from .synthetic import make_scene, render

COLUMNS = ("video", "image", "path")
ASPECTS = (16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".avif", ".bmp"})


@dataclass(frozen=True)
class Entry:
    """A row: one file, or one shot of it. ``extra``: the columns that mean nothing here, as they were."""

    path: Path
    prompt: str
    kind: str
    shot: Shot | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_photo(self) -> bool:
        return self.kind == "photo"


@dataclass(frozen=True, order=True)
class Skip:
    """What was left out, and why, in words."""

    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What came of a list: how many samples, and everything that was skipped."""

    samples: int
    skipped: tuple[Skip, ...] = ()

    def lines(self) -> list[str]:
        """For the reader's eyes: the counts, then one line a skip."""
        head = f"{self.samples} samples, {len(self.skipped)} skipped"
        return [head, *(f"  skipped {skip.path}: {skip.reason}" for skip in self.skipped)]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_json(path, asdict(self))


@dataclass(frozen=True)
class Sample:
    """A window of ``frames`` pictures, every ``step``-th from ``start`` on, of one shot; or a photo (``start`` 0).

    ``motion_score``: of the list's column of that name, if there is one.
    """

    path: str
    start: int
    step: int
    frames: int
    width: int
    height: int
    prompt: str
    kind: str
    motion_score: float | None = None

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def name(self) -> str:
        return f"{Path(self.path).name}@{self.start}"


@dataclass(frozen=True)
class Buckets:
    """The few sizes that clips are brought to; a clip is enlarged at most ``max_upscale`` times to fill one."""

    sizes: tuple[Size, ...]
    max_upscale: float = 1.0

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UsageError("no bucket sizes; give at least one, e.g. 1280x704")
        if not self.max_upscale > 0:
            raise UsageError(f"max_upscale {self.max_upscale} is not positive; 1 enlarges nothing")

    @classmethod
    def of(
        cls, grid: Grid, areas: Sequence[int], aspects: Sequence[float] = ASPECTS, max_upscale: float = 1.0
    ) -> Buckets:
        """The legal sizes of ``grid`` of about these areas and aspects."""
        return cls(tuple(sorted({grid.size_for(area, a) for area in areas for a in aspects})), max_upscale)

    def of_clip(self, size: Size) -> Size:
        """The bucket of the nearest aspect, among equals the largest, that ``size`` can fill; UsageError if none."""
        fitting = [bucket for bucket in self.sizes if upscale(size, bucket) <= self.max_upscale]
        if not fitting:
            least = min(self.sizes, key=lambda bucket: (upscale(size, bucket), bucket))
            raise UsageError(
                f"{size} would be enlarged {upscale(size, least):.2f} times to fill {least}; at most "
                f"{self.max_upscale:g} is allowed"
            )
        return min(fitting, key=lambda b: (abs(math.log(b.aspect / size.aspect)), -b.area, b.width))


@dataclass(frozen=True)
class Cutting:
    """How clips become samples: ``frames`` (4k+1) a window, windows ``hop`` frames apart (None: side by side), at most
    ``per_shot`` of a shot; ``fps``: the rate wanted, reached by leaving out whole frames (None: the file's own)."""

    frames: int
    hop: int | None = None
    per_shot: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % GROUP != 1:
            raise UsageError(f"{self.frames} frames are not 4k+1; the nearest is {max(1, self.frames // 4 * 4 + 1)}")
        if (self.hop is not None and self.hop < 1) or (self.per_shot is not None and self.per_shot < 1):
            raise UsageError(f"hop {self.hop} and per_shot {self.per_shot} are positive or not given")
        if self.fps is not None and not self.fps > 0:
            raise UsageError(f"fps {self.fps} is not positive; 16 is usual")

    def step(self, fps: float) -> int:
        return 1 if self.fps is None or fps <= 0 else max(1, round(fps / self.fps))

    def starts(self, shot: Shot, step: int) -> range:
        """First frames of the windows inside ``shot``; empty if it is too short."""
        span = (self.frames - 1) * step + 1
        starts = range(shot.start, shot.end - span + 1, self.hop or span)
        return starts if self.per_shot is None else starts[: self.per_shot]


def read_manifest(path: Path, split: str | None = None) -> list[Entry]:
    """The rows of a list in order; of ``split`` only, if given. UsageError if it is no such list."""
    try:
        rows = _rows(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: not a readable list ({error}); give CSV, JSON or JSONL") from None
    if not rows:
        raise UsageError(f"{path}: lists nothing")
    entries = [_entry(row, number, path) for number, row in enumerate(rows, start=1)]
    kept = [entry for entry in entries if split is None or entry.extra.get("split") == split]
    if not kept:
        known = sorted({str(entry.extra.get("split")) for entry in entries})
        raise UsageError(f"{path}: no row of split {split!r}; there are {', '.join(known)}")
    return kept


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        rows: Any = [{k: v for k, v in row.items() if k is not None} for row in csv.DictReader(io.StringIO(text))]
    elif path.suffix.lower() == ".json":
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are not objects")
    return rows


def _entry(row: dict[str, Any], number: int, listing: Path) -> Entry:
    column = next((column for column in COLUMNS if row.get(column)), None)
    if column is None:
        raise UsageError(f"{listing}: row {number} names no file; it needs a column {' or '.join(COLUMNS[:2])}")
    path = Path(str(row[column]))
    photo = column == "image" or (column == "path" and path.suffix.lower() in PHOTO_SUFFIXES)
    try:
        shot = Shot(int(row["start"]), int(row["end"])) if row.get("end") not in (None, "") else None
    except (KeyError, TypeError, ValueError):
        given = f"{row.get('start')!r} to {row.get('end')!r}"
        raise UsageError(f"{listing}: row {number}: start and end {given} are no frames, e.g. 0 and 49") from None
    kind = "photo" if photo else str(row.get("kind") or "film")
    extra = {key: value for key, value in row.items() if key not in (column, "prompt", "kind", "start", "end")}
    return Entry(listing.parent / path, str(row.get("prompt") or ""), kind, shot, extra)


def plan_samples(
    entries: Iterable[Entry], buckets: Buckets, cutting: Cutting, scans: Path | None = None
) -> tuple[list[Sample], Report]:
    """Every sample that the entries hold, in order; files are opened, and videos decoded once, to find out.

    ``scans``: a folder for what the decoding found, so that it is not done again.
    """
    samples: list[Sample] = []
    skipped: list[Skip] = []
    bad: dict[Path, UsageError] = {}
    for entry in entries:
        try:
            if entry.is_photo:
                made, reasons = [_photo_sample(entry, buckets, cutting)], list[str]()
            else:
                made, reasons = _video_samples(entry, buckets, cutting, _scanned(entry.path, scans, bad))
        except UsageError as error:
            made, reasons = [], [str(error).removeprefix(f"{entry.path}: ")]
        samples += made
        skipped += [Skip(str(entry.path), reason) for reason in reasons]
    return samples, Report(len(samples), tuple(skipped))


def _scanned(path: Path, scans: Path | None, bad: dict[Path, UsageError]) -> Scan:
    """``scan``, but a damaged file with many rows is tried only once."""
    if path not in bad:
        try:
            return scan(path, scans)
        except UsageError as error:
            bad[path] = error
    raise bad[path]


def _photo_sample(entry: Entry, buckets: Buckets, cutting: Cutting) -> Sample:
    size = buckets.of_clip(read_image(entry.path).size)
    return Sample(str(entry.path), 0, 1, cutting.frames, size.width, size.height, entry.prompt, "photo")


def _video_samples(entry: Entry, buckets: Buckets, cutting: Cutting, found: Scan) -> tuple[list[Sample], list[str]]:
    """Samples, and reasons for the shots that gave none."""
    info = probe(entry.path)
    size, step = buckets.of_clip(info.size), cutting.step(info.fps)
    shots = found.shots if entry.shot is None else _inside(found, entry.shot)
    samples: list[Sample] = []
    reasons: list[str] = []
    score = _score(entry)
    for shot in shots:
        starts = cutting.starts(shot, step)
        if not starts:
            span = (cutting.frames - 1) * step + 1
            reasons.append(f"shot {shot.start}-{shot.end} has {shot.frames} frames, {span} are needed")
        for start in starts:
            common = (size.width, size.height, entry.prompt, entry.kind, score)
            samples.append(Sample(str(entry.path), start, step, cutting.frames, *common))
    return samples, reasons if shots else ["shows nothing: every frame is black"]


def _score(entry: Entry) -> float | None:
    given = entry.extra.get("motion_score")
    if given in (None, ""):
        return None
    try:
        score = float(str(given))
    except ValueError:
        score = -1.0
    if not 0 <= score < math.inf:
        raise UsageError(f"motion_score {given!r} is not a number of 0 or more; leave it out to have it measured")
    return score


def _inside(found: Scan, wanted: Shot) -> list[Shot]:
    """What the list calls one shot, cut again wherever the pixels say so."""
    if wanted.end > len(found.times):
        raise UsageError(f"frames {wanted.start} to {wanted.end} are asked for, {len(found.times)} are there")
    pairs = ((max(shot.start, wanted.start), min(shot.end, wanted.end)) for shot in found.shots)
    return [Shot(start, end) for start, end in pairs if start < end]


@dataclass(frozen=True)
class ManifestSource:
    """Samples as pixels, in the list's order, again from the first after the last.

    A photo becomes a clip whose camera does what its prompt says; without a prompt, what a prompt drawn for it says.
    """

    samples: tuple[Sample, ...]
    seed: int = 0
    scans: Path | None = None

    def at(self, index: int) -> Pixels:
        """Raises UsageError if the file cannot give the frames."""
        index %= len(self.samples)
        sample = self.samples[index]
        if sample.kind == "photo":
            return photo_pixels(sample, rng_of(self.seed, index, "photo"))
        times = scan(Path(sample.path), self.scans).times
        frames = read_frames(sample.path, sample.start, sample.frames, step=sample.step, times=times)
        pictures = [to_bytes(fit_pixels(frame, sample.size)) for frame in frames]
        words = (sample.prompt, sample.name, sample.kind)
        return Pixels(torch.stack(pictures, dim=1), *words, motion_score=sample.motion_score)


def photo_pixels(sample: Sample, rng: random.Random) -> Pixels:
    """A moving camera over the photo. Raises UsageError if the motion leaves it however small the window."""
    if sample.prompt.strip():
        asked = prompts.Caption(sample.prompt, prompts.parse(sample.prompt))
    else:
        asked = prompts.caption(rng)
    photo = read_image(sample.path).pixels
    try:
        scene = make_scene(photo, sample.size, asked.motion, sample.frames - 1, rng)
    except ValueError as error:
        raise UsageError(f"{sample.path}: {error}") from None
    frames = [to_bytes(render(scene, [frame])) for frame in range(sample.frames)]
    return Pixels(torch.cat(frames, dim=1), asked.prompt, sample.name, "photo", asked.motion)
