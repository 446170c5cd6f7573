"""Clips judged: the photo of each found, everything measured, table rows and JSON made, pictures drawn.

What was asked is checked before by ``command``, which loads without torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import media
from ..core import Event, Size, UsageError
from ..origin import Origin, find_photo, origin_of
from ..reference import fit_image
from . import report
from .picture import write_picture

BLOCK_FRAMES = 4


@dataclass(frozen=True, eq=False)
class Subject:
    """One clip, ready to be measured. ``photo`` (3, h, w) is fitted to it."""

    file: Path
    photo_name: str
    photo: Tensor
    frames: int
    segment_frames: int | None
    picture: Path | None


def subject(file: Path, *, image: Path | None, segment_frames: int | None, picture: Path | None) -> Subject:
    """Look at a clip without measuring it. ``image`` None: its photo is found by the checksum in the file.

    Raises ``UsageError`` if the clip or the photo cannot be read or the photo cannot be found.
    """
    facts, origin = media.probe(file), _origin(file)
    if image is None:
        if origin is None:
            raise UsageError(f"{file.name} does not say what made it; give its photo with --image PHOTO")
        image = find_photo(origin, [file.parent, Path.cwd()])
    if segment_frames is None and origin is not None:
        segment_frames = origin.request.csg.segment_blocks * BLOCK_FRAMES
    fit = "crop" if origin is None else origin.request.fit
    pixels = fit_image(media.read_image(image).pixels, Size(facts.size.width, facts.size.height), fit)
    return Subject(file, image.name, pixels[0, :, 0], facts.frames, segment_frames, picture)


def judge(subjects: Sequence[Subject], reference: Path | None, emit: Callable[[Event], None]) -> dict[str, Any]:
    """Measure every clip and draw the pictures asked for; the record for JSON (see ``table``)."""
    scores, begin = [], time.monotonic()
    for number, one in enumerate(subjects, start=1):

        def watched(one: Subject = one, number: int = number) -> Iterator[Tensor]:
            for step, frame in enumerate(media.read_video(one.file), start=1):
                yield frame
                emit(Event("progress", "measure", number, step, one.frames, time.monotonic() - begin, one.file.name))

        other = None if reference is None else media.read_video(reference)
        found = report.evaluate_clip(watched(), one.photo, segment_frames=one.segment_frames, reference=other)
        scores.append(found)
        if one.picture is not None:
            one.picture.parent.mkdir(exist_ok=True)
            write_picture(one.picture, found, one.photo, one.file.name)
    return _record(subjects, scores)


def _origin(file: Path) -> Origin | None:
    try:
        return origin_of(file)
    except UsageError:
        return None


def _record(subjects: Sequence[Subject], scores: Sequence[report.Scores]) -> dict[str, Any]:
    """Every clip, and the seams of all of them together."""
    clips = [
        {"file": one.file.name, "photo": one.photo_name, **found.record()}
        for one, found in zip(subjects, scores, strict=True)
    ]
    pooled: dict[str, list[Any]] = {}
    for found in scores:
        for signal, steps in found.steps:
            pooled.setdefault(signal, []).append(steps)
    seams = report.find_seams((signal, reduce(add, all_steps)) for signal, all_steps in pooled.items())
    return {"clips": clips, "seams": report.seam_records(seams)}


# --- the table --------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of measure, value and meaning: of one clip its values, of several their means and the worst."""
    clips = record["clips"]
    made = [
        (name, _summed([pick(clip) for clip in clips], unit, worst), meaning)
        for name, unit, worst, pick, meaning in MEASURES
    ]
    if len(clips) == 1 and (camera := clips[0]["camera"]) is not None:
        made.append(("camera pan, tilt", f"{camera['pan']:+.3f}, {camera['tilt']:+.3f}", "picture sides, 80 frames"))
        made.append(("camera zoom, roll", f"x{camera['zoom']:.3f}, {camera['roll']:+.1f}°", "in 80 frames"))
        made.append(("camera shake", f"{camera['shake']:.4f}", "picture widths"))
    for seam in record["seams"]:
        chance = "p < 0.001" if seam["p"] < 0.001 else f"p {seam['p']:.3f}"
        value = f"x{seam['ratio']:.2f} [{seam['low']:.2f}, {seam['high']:.2f}], {chance}"
        told = "stands out" if seam["distinguishable"] else "no difference"
        made.append((f"seam, {seam['signal']}/{seam['against']}", value, told))
    missing = dict.fromkeys(text for clip in clips for text in clip["missing"])
    return [*(row for row in made if row[1]), *(("not measured", text, "") for text in missing)]


Pick = Callable[[dict[str, Any]], float | None]


def _of(*path: str) -> Pick:
    return lambda clip: reduce(lambda held, key: None if held is None else held[key], path, clip)  # type: ignore[return-value]


def _change(name: str) -> Pick:
    def pick(clip: dict[str, Any]) -> float | None:
        line = clip["drift"][name]
        return None if line is None else line["last"] - line["first"]

    return pick


MEASURES: tuple[tuple[str, str, Callable[..., float], Pick, str], ...] = (
    ("frame 0, PSNR", " dB", min, _of("first_frame", "psnr"), "against the photo"),
    ("frame 0, SSIM", "", min, _of("first_frame", "ssim"), "1: equal"),
    ("frame 0, ST-LPIPS", "", max, _of("first_frame", "st_lpips"), "0: equal; not LPIPS"),
    ("frame 0, color", " dE00", max, _of("first_frame", "delta_e"), "1: just visible"),
    ("sharpness at the start", " dB", min, _of("drift", "sharpness_db", "first"), "against the photo"),
    ("sharpness, start to end", " dB", min, _change("sharpness_db"), "0: no drift"),
    ("color drift, mean color", " dE00", max, _of("drift", "color", "largest"), "largest"),
    ("color drift, followed", " dE00", max, _of("drift", "followed_color", "largest"), "largest, camera undone"),
    ("flicker", "", max, _of("flicker"), "8-bit levels"),
    ("warping error", "", max, _of("warping_error"), "8-bit levels"),
    ("reference, PSNR", " dB", min, _of("reference", "psnr"), "every frame"),
    ("reference, SSIM", "", min, _of("reference", "ssim"), ""),
    ("reference, ST-LPIPS", "", max, _of("reference", "st_lpips"), f"every {report.LPIPS_EVERY}th frame"),
    ("reference, color", " dE00", max, _of("reference", "delta_e"), ""),
)


def _summed(values: Sequence[float | None], unit: str, worst: Callable[..., float]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 2 if unit else 3
    if len(values) == 1:
        return f"{known[0]:.{digits}f}{unit}"
    return f"{statistics.fmean(known):.{digits}f}{unit}, worst {worst(known):.{digits}f}"
