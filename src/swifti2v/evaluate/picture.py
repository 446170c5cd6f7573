"""One PNG that tells a clip's story: the photo beside frame 0, frames over time, details, and curves with the seams.

Draws what ``report`` found; measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core import RunError, Size
from ..reference import resize
from .report import Scores, as_bytes, as_float, crop, crop_corner

WIDTH, MARGIN, GAP = 1600, 40, 12
_STILLS, _CURVE = 6, 150
_INK, _PALE, _LINE = (32, 33, 36), (120, 124, 130), (226, 228, 232)
_COLORS = ((31, 111, 180), (214, 94, 0), (0, 135, 108))
_SEAM = (200, 40, 60)


@dataclass(frozen=True)
class Curve:
    """Values over frames (``x``, ``y``) under one name."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    curves: tuple[Curve, ...]


def write_picture(path: Path, scores: Scores, photo: Tensor, title: str) -> None:
    """Draw ``scores`` of a clip and its ``photo`` (3, h, w), as PNG: whole or not there, replacing what was there."""
    part = path.with_name(f".{path.name}.part")
    try:
        draw(scores, photo, title).save(part, format="PNG")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def draw(scores: Scores, photo: Tensor, title: str) -> Image.Image:
    """The picture, 1600 pixels wide."""
    rows = [_heading(scores, title), *_pictures(scores, photo), *(_panel(panel, scores) for panel in panels(scores))]
    height = sum(row.height for row in rows) + GAP * (len(rows) - 1) + 2 * MARGIN
    page = Image.new("RGB", (WIDTH, height), "white")
    top = MARGIN
    for row in rows:
        page.paste(row, (MARGIN, top))
        top += row.height + GAP
    return page


def panels(scores: Scores) -> list[Panel]:
    """The curves of a clip."""
    series, frames = scores.series, tuple(range(scores.frames))
    color = [Curve("mean color", frames, series.color)]
    if series.followed_color:
        marks, values = zip(*series.followed_color, strict=True)
        color.append(Curve("camera followed", tuple(marks), tuple(values)))
    steps = tuple(range(1, scores.frames))
    return [
        Panel("sharpness against the photo, dB", (Curve("high-frequency energy", frames, series.sharpness_db),)),
        Panel("color against the photo, dE00", tuple(color)),
        Panel("change from the frame before, 8-bit levels", _changes(scores, steps)),
    ]


def _changes(scores: Scores, steps: tuple[float, ...]) -> tuple[Curve, ...]:
    series = scores.series
    named = {"all": series.change, "detail": series.detail_change, "not explained by motion": series.warping}
    return tuple(Curve(name, steps, values) for name, values in named.items() if values)


# --- rows -------------------------------------------------------------------------------------------------------


def _heading(scores: Scores, title: str) -> Image.Image:
    row = Image.new("RGB", (WIDTH - 2 * MARGIN, 84), "white")
    pen = ImageDraw.Draw(row)
    pen.text((0, 0), title, fill=_INK, font=_font(34))
    pen.text((0, 50), ", ".join(_facts(scores)), fill=_PALE, font=_font(20))
    return row


def _facts(scores: Scores) -> list[str]:
    facts = [str(scores.size), f"{scores.frames} frames"]
    if scores.segment_frames:
        facts.append(f"segments of {scores.segment_frames} frames")
    for signal, seam in scores.seams:
        if signal == "detail" and seam.against == "block":
            word = "segment boundaries stand out" if seam.distinguishable else "no seam found"
            facts.append(f"{word} (detail x{seam.ratio:.2f}, p {max(seam.p, 0.001):.3f})")
    return facts


def _pictures(scores: Scores, photo: Tensor) -> list[Image.Image]:
    marks = [round(k * (scores.frames - 1) / (_STILLS - 1)) for k in range(_STILLS)] if scores.frames > 1 else [0]
    marks = list(dict.fromkeys(marks))
    first = scores.first_frame
    told = f"frame 0: {first.psnr:.1f} dB, SSIM {first.ssim:.3f}, dE {first.delta_e:.2f}"
    told += "" if first.st_lpips is None else f", ST-LPIPS {first.st_lpips:.3f}"
    sharp = scores.series.sharpness_db
    shown = [as_float(scores.stills[k]) for k in marks]
    close = [("photo, pixel by pixel", crop(photo, crop_corner(photo)))]
    for k in dict.fromkeys((0, scores.frames // 2, scores.frames - 1)):
        close.append((f"frame {k}: sharpness {sharp[k]:+.1f} dB", as_float(scores.crops[k])))
    return [
        _strip([("the photo", photo), (told, as_float(scores.first))]),
        _strip([(f"frame {k}", picture) for k, picture in zip(marks, shown, strict=True)]),
        _strip(close),
    ]


def _strip(pictures: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Pictures of one shape side by side, filling the width, each under its caption."""
    count, inner = len(pictures), WIDTH - 2 * MARGIN
    width = min((inner - GAP * (count - 1)) // count, inner // 2)
    source = pictures[0][1]
    height = max(1, round(width * source.shape[1] / source.shape[2]))
    row = Image.new("RGB", (inner, height + 28), "white")
    pen = ImageDraw.Draw(row)
    for index, (caption, picture) in enumerate(pictures):
        left = index * (width + GAP)
        pen.text((left, 0), caption, fill=_PALE, font=_font(18))
        row.paste(_image(resize(picture, Size(width, height))), (left, 28))
    return row


def _panel(panel: Panel, scores: Scores) -> Image.Image:
    """Curves over time at twice the size, then halved: smooth lines without a drawing library."""
    scale = 2
    width, height = (WIDTH - 2 * MARGIN) * scale, (_CURVE + 50) * scale
    row = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(row)
    left, right, top, bottom = 70 * scale, width - 10 * scale, 34 * scale, height - 22 * scale
    pen.text((0, 0), panel.title, fill=_INK, font=_font(18 * scale))
    low, high = _range([value for curve in panel.curves for value in curve.y])

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / max(1, scores.frames - 1)
        return left + across * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    for value in _ticks(low, high):
        y = place(0, value)[1]
        pen.line((left, y, right, y), fill=_LINE, width=scale)
        pen.text((left - 8 * scale, y), f"{value:g}", fill=_PALE, font=_font(14 * scale), anchor="rm")
    for frame in range(0, scores.frames, _every(scores.frames)):
        pen.text(
            (place(frame, low)[0], bottom + 4 * scale), str(frame), fill=_PALE, font=_font(14 * scale), anchor="mt"
        )
    for frame in range((scores.segment_frames or scores.frames) + 1, scores.frames, scores.segment_frames or 1):
        x = place(frame - 0.5, low)[0]
        pen.line((x, top, x, bottom), fill=_SEAM, width=scale)
    names = float(right)
    for curve, color in zip(panel.curves, _COLORS, strict=False):
        points = [place(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        pen.line(points, fill=color, width=3 * scale, joint="curve")
        names -= pen.textlength(curve.name, font=_font(16 * scale)) + 24 * scale
        pen.text((names, 2 * scale), curve.name, fill=color, font=_font(16 * scale))
    if scores.segment_frames:
        words = "segment boundary"
        names -= pen.textlength(words, font=_font(16 * scale)) + 24 * scale
        pen.text((names, 2 * scale), words, fill=_SEAM, font=_font(16 * scale))
    return row.resize((width // scale, height // scale), Image.Resampling.LANCZOS)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis spans: all values and zero, at least one unit, with a little room."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low < 1:
        high = low + 1
    room = 0.06 * (high - low)
    return low - (room if low < 0 else 0), high + room


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values inside an axis."""
    raw = (high - low) / 4
    power = 10 ** np.floor(np.log10(raw))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= raw)
    return [round(float(k * step), 6) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _every(frames: int) -> int:
    """Frames between two numbers under an axis: whole segments of the default size where that is legible."""
    return next((step for step in (1, 4, 12, 24, 48, 96) if frames / step <= 16), 192)


def _image(picture: Tensor) -> Image.Image:
    pixels: Tensor = as_bytes(picture).permute(1, 2, 0).contiguous()
    assert pixels.dtype == torch.uint8
    return Image.fromarray(pixels.numpy())


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
