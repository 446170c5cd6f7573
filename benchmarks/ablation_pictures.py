"""The figures of docs/ablations.md: crops of the same frame side by side, by variant, with truth and reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from ablation_clips import CASCADE, Clip, resized
from PIL import Image, ImageDraw
from torch import Tensor

from swifti2v.core import Size
from swifti2v.reference import resize

FOLDER = common.REPOSITORY / "docs" / "pictures"
LIMIT = 200_000  # bytes a picture
CROP, ZOOM, TITLE = Size(192, 128), 2, 22
TRUTH, ENLARGED = "truth", "low resolution, enlarged"
BRIDGE, CASTLE, FILM = "cincinnati-bridge", "castle-maintenon", "bbb_720p:4823"
# name of a figure: frame, clips, what is shown
FIGURES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "detail": (
        48,
        (FILM, f"{CASTLE}:plain"),
        (TRUTH, ENLARGED, "both off", "frame 0 not replaced", "stage II off", "default"),
    ),
    "segments": (48, (FILM,), (TRUTH, "default", "un-segmented", "N=0", "anchor off", "4 steps")),
    "read_only": (48, (FILM,), (TRUTH, "control", "read-only")),
    "transition": (
        40,
        (f"{BRIDGE}:cascade", f"{CASTLE}:cascade"),
        (TRUTH, ENLARGED, "stage II off", "default", "transition off", "transition 0.4"),
    ),
    "long": (320, (f"{BRIDGE}:long",), (TRUTH, ENLARGED, "default")),
}


def pictures(bench: Any, clips: Sequence[Clip], variants: Any, task: Any) -> None:
    """All of them; ``variants``: by use; ``task``: (clip, variant) to what ``bench`` makes latents of."""
    made: dict[tuple[str, str], Tensor] = {}
    for name, (number, names, titles) in FIGURES.items():
        rows = []
        for clip in (clip for clip in clips if clip.name in names):
            for title in titles:
                if (clip.name, title) not in made:
                    made[clip.name, title] = _frame(bench, clip, title, number, variants, task)
            rows.append([(title, made[clip.name, title]) for title in titles])
        path = FOLDER / f"ablation_{name}.jpg"
        save(sheet(rows), path)
        print(f"{path.name}: {path.stat().st_size} bytes", flush=True)


def _frame(bench: Any, clip: Clip, title: str, number: int, variants: Any, task: Any) -> Tensor:
    truth = bench.shelf.truth(clip)
    if title == TRUTH:
        return truth[:, number]
    if title == ENLARGED:
        low = bench.shelf.low(clip)[:, number] if clip.use == CASCADE else resized(truth[:, number, None])[:, 0]
        return resize(low, Size(truth.shape[3], truth.shape[2]))
    variant = next(variant for variant in variants[clip.use] if variant.name == title)
    asked = task(clip, variant)
    return bench.frames(asked, bench.latents(asked))[:, number]


def sheet(rows: Sequence[Sequence[tuple[str, Tensor]]]) -> Image.Image:
    """Rows of titled crops (of the middle of each frame), enlarged without smoothing."""
    width, height = CROP.width * ZOOM, CROP.height * ZOOM + TITLE
    columns = min(3, max(len(row) for row in rows))
    lines = [row[start : start + columns] for row in rows for start in range(0, len(row), columns)]
    canvas = Image.new("RGB", (columns * width, len(lines) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for y, line in enumerate(lines):
        for x, (title, frame) in enumerate(line):
            canvas.paste(_crop(frame), (x * width, y * height + TITLE))
            draw.text((x * width + 6, y * height + 5), title, fill="black")
    return canvas


def _crop(frame: Tensor) -> Image.Image:
    top, left = (frame.shape[1] - CROP.height) // 2, (frame.shape[2] - CROP.width) // 2
    part = frame[:, top : top + CROP.height, left : left + CROP.width]
    pixels: np.ndarray = ((part + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((CROP.width * ZOOM, CROP.height * ZOOM), Image.Resampling.NEAREST)


def save(picture: Image.Image, path: Path) -> None:
    """As a JPEG below ``LIMIT``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    for quality in (88, 80, 72, 64, 56):
        picture.save(part, "JPEG", quality=quality)
        if part.stat().st_size < LIMIT:
            break
    part.replace(path)
