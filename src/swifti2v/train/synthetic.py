"""Clips of a moving camera rendered from one photo: training data without video.

A scene is a photo scaled so that frame 0 is exactly one of its integer sub-windows, with enough
picture around it for the whole motion; any range of frames can then be rendered at any time.
Prompts and what they mean live in ``prompts``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..camera import Motion, warp
from ..core import Size

_MARGIN = 3  # pixels around every view for the bicubic taps


@dataclass(frozen=True)
class Scene:
    """``source`` (3, h, w) in [-1, 1]; frame 0 is its window of ``size`` at row ``top``, column ``left``."""

    source: Tensor
    top: int
    left: int
    size: Size
    motion: Motion

    @property
    def photo(self) -> Tensor:
        """Frame 0 (3, height, width), exactly."""
        return self.source[:, self.top : self.top + self.size.height, self.left : self.left + self.size.width]

    def at(self, size: Size) -> Scene:
        """The same scene ``size.width / self.size.width`` times as large (for low-resolution motion; whole ratios)."""
        ratio = self.size.width // size.width
        if size.width * ratio != self.size.width or size.height * ratio != self.size.height:
            raise ValueError(f"{size} is not a whole fraction of {self.size}")
        rows = (self.top % ratio, (self.source.shape[1] - self.top) // ratio * ratio + self.top)
        columns = (self.left % ratio, (self.source.shape[2] - self.left) // ratio * ratio + self.left)
        source = self.source[:, rows[0] : rows[1], columns[0] : columns[1]]
        small = shrink(source, ratio)
        return Scene(small, self.top // ratio, self.left // ratio, size, self.motion)


def shrink(pixels: Tensor, ratio: int) -> Tensor:
    """(..., 3, h, w) to 1/``ratio`` of the sides, antialiased."""
    *lead, c, h, w = pixels.shape
    flat = pixels.reshape(-1, c, h, w)
    small = F.interpolate(flat, size=(h // ratio, w // ratio), mode="bicubic", antialias=True, align_corners=False)
    return small.reshape(*lead, c, h // ratio, w // ratio).clamp(-1, 1)


def reach(motion: Motion, size: Size, last_frame: int) -> tuple[float, float, float, float]:
    """Pixels (left, right, up, down) that views up to ``last_frame`` go beyond frame 0's window, each >= 0."""
    out = [0.0, 0.0, 0.0, 0.0]
    frames = range(last_frame + 1) if motion.shake else [*range(0, last_frame, 8), last_frame]
    for frame in frames:
        view = motion.at(frame)
        cos, sin = abs(math.cos(view.angle)) * view.scale, abs(math.sin(view.angle)) * view.scale
        half_w = (cos * size.width + sin * size.height) / 2
        half_h = (sin * size.width + cos * size.height) / 2
        x, y = view.x * size.width, view.y * size.height
        beyond = (
            half_w - x - size.width / 2,
            half_w + x - size.width / 2,
            half_h - y - size.height / 2,
            half_h + y - size.height / 2,
        )
        out = [max(old, new) for old, new in zip(out, beyond, strict=True)]
    return out[0], out[1], out[2], out[3]


def make_scene(photo: Tensor, size: Size, motion: Motion, last_frame: int, rng: random.Random) -> Scene:
    """A random sub-window of ``photo`` (3, h, w) uint8 as frame 0, with room for ``motion`` up to ``last_frame``.

    Raises ValueError if the motion leaves any photo of this shape however small the window.
    """
    left, right, up, down = (math.ceil(value) + _MARGIN for value in reach(motion, size, last_frame))
    width, height = size.width + left + right, size.height + up + down
    limit = min(photo.shape[2] / width, photo.shape[1] / height)  # photo pixels per rendered pixel
    ratio = limit * rng.uniform(0.7, 1.0) if limit > 1.4 else limit
    crop_h, crop_w = min(photo.shape[1], round(height * ratio)), min(photo.shape[2], round(width * ratio))
    if min(crop_h, crop_w) < 16:
        raise ValueError(f"the motion needs {width}x{height} pixels: no window of {tuple(photo.shape)} has them")
    row, column = rng.randint(0, photo.shape[1] - crop_h), rng.randint(0, photo.shape[2] - crop_w)
    crop = photo[:, row : row + crop_h, column : column + crop_w]
    source = F.interpolate(crop[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    return Scene(source.float() / 127.5 - 1, up, left, size, motion)


def render(scene: Scene, frames: Sequence[int]) -> Tensor:
    """The clip's ``frames`` (3, t, height, width) in [-1, 1]; frame 0 is the photo itself, exactly."""
    moved = [frame for frame in frames if frame != 0]
    window = (scene.top, scene.left, scene.size.height, scene.size.width)
    warped = warp(scene.source, [scene.motion.at(frame) for frame in moved], window) if moved else None
    pictures, index = [], 0
    for frame in frames:
        if frame == 0 or warped is None:
            pictures.append(scene.photo)
        else:
            pictures.append(warped[index])
            index += 1
    return torch.stack(pictures, dim=1)
