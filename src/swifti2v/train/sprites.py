"""Clips with exact ground truth: cut-outs with alpha moving over photos that a moving camera films.

Every layer is a picture and a path: for each frame a 3x3 matrix from the frame's pixels to the layer's. So the pixels,
the flow between any two frames and what hides what all follow from the same matrices. The cut-outs move in the
background's world and the camera sees both. This module knows no latents.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..camera import AMPLITUDE_FRAMES
from ..core import Size, UsageError
from .data import Pixels, rng_of, to_bytes
from .prompts import caption
from .synthetic import Scene, make_scene, render

HELD = 0.5  # alpha above which a pixel belongs to a cut-out, for the ground truth
MAX_STEPS = 20  # times the motion is drawn again if it leaves the photo


class Pictures(Protocol):
    """Photos, uint8 (3, h, w), by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class Path2D:
    """Where a cut-out is in frame 0's picture: center in widths and heights, ``scale`` in frame pixels a cut-out pixel,
    ``angle`` in radians clockwise; then how far these go in 80 frames. ``sway`` in picture heights, ``period`` in
    frames.
    """

    x: float
    y: float
    scale: float
    angle: float = 0.0
    move_x: float = 0.0
    move_y: float = 0.0
    grow: float = 1.0
    turn: float = 0.0
    sway: float = 0.0
    period: float = 40.0

    def matrix(self, frame: float, size: Size, cutout: Size) -> np.ndarray:
        """3x3: cut-out pixels -> pixels of frame 0's picture of ``size``."""
        u = frame / AMPLITUDE_FRAMES
        scale, angle = self.scale * self.grow**u, self.angle + self.turn * u
        swing = self.sway * math.sin(math.tau * frame / self.period)
        x = (self.x + self.move_x * u) * size.width
        y = (self.y + self.move_y * u + swing) * size.height
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        half_w, half_h = cutout.width / 2, cutout.height / 2
        return np.array(
            [
                [cos, -sin, x - cos * half_w + sin * half_h],
                [sin, cos, y - sin * half_w - cos * half_h],
                [0.0, 0.0, 1.0],
            ]
        )


@dataclass(frozen=True, eq=False)
class Sprite:
    """A cut-out, ``rgba`` float (4, h, w): color in [-1, 1] times alpha, alpha in [0, 1]; and its path."""

    rgba: Tensor
    path: Path2D

    @property
    def size(self) -> Size:
        return Size(self.rgba.shape[2], self.rgba.shape[1])


@dataclass(frozen=True, eq=False)
class Truth:
    """Between two frames: ``flow`` (2, h, w), pixels right and down that every pixel of the first goes; ``visible``
    (h, w), whether it is there to be seen in the second; ``layer`` (h, w): 0 the background, then the sprites."""

    flow: Tensor
    visible: Tensor
    layer: Tensor


@dataclass(frozen=True, eq=False)
class World:
    """A scene, sprites from back to front, and the sentence about the camera."""

    scene: Scene
    sprites: tuple[Sprite, ...]
    prompt: str

    def frames(self, numbers: Sequence[int]) -> Tensor:
        """(3, t, h, w) in [-1, 1]."""
        return torch.stack([self._frame(number) for number in numbers], dim=1)

    def truth(self, first: int, second: int) -> Truth:
        """Exact flow and visibility from frame ``first`` to frame ``second``."""
        size = self.scene.size
        pixels = _centers(size)
        owner = self._owner(first, pixels)
        target = pixels.copy()
        for layer in np.unique(owner):
            there = owner == layer
            onto = self._to_layer(layer, second, inverse=True) @ self._to_layer(layer, first)
            target[:, there] = onto @ pixels[:, there]
        inside = (target[0] >= 0) & (target[0] < size.width) & (target[1] >= 0) & (target[1] < size.height)
        visible = inside & (self._owner(second, target) == owner)
        shape = (size.height, size.width)
        flow = torch.from_numpy((target - pixels)[:2].reshape(2, *shape)).float()
        return Truth(flow, torch.from_numpy(visible.reshape(shape)), torch.from_numpy(owner.reshape(shape)))

    def _frame(self, number: int) -> Tensor:
        picture = render(self.scene, [number])[:, 0]
        for layer, sprite in enumerate(self.sprites, start=1):
            seen = _sample(sprite, self._to_layer(layer, number), self.scene.size)
            picture = seen[:3] + (1 - seen[3:]) * picture
        return picture.clamp(-1, 1)

    def _to_layer(self, layer: int, frame: int, inverse: bool = False) -> np.ndarray:
        """Frame pixels -> pixels of a layer; of the background: of frame 0's picture."""
        matrix = camera_matrix(self.scene, frame)
        if layer:
            sprite = self.sprites[layer - 1]
            matrix = np.linalg.inv(sprite.path.matrix(frame, self.scene.size, sprite.size)) @ matrix
        return np.linalg.inv(matrix) if inverse else matrix

    def _owner(self, frame: int, points: np.ndarray) -> np.ndarray:
        """The frontmost layer at homogeneous frame pixels (3, n)."""
        owner = np.zeros(points.shape[1], dtype=np.int64)
        for layer, sprite in enumerate(self.sprites, start=1):
            at = self._to_layer(layer, frame) @ points
            owner[_alpha_at(sprite.rgba[3].numpy(), at[0], at[1]) > HELD] = layer
        return owner


def camera_matrix(scene: Scene, frame: int) -> np.ndarray:
    """3x3: pixels of ``frame`` -> pixels of frame 0's picture (the same mapping that ``camera.warp`` samples)."""
    view, size = scene.motion.at(frame), scene.size
    cos, sin = math.cos(view.angle) * view.scale, math.sin(view.angle) * view.scale
    half_w, half_h = size.width / 2, size.height / 2
    x, y = half_w + view.x * size.width, half_h + view.y * size.height
    return np.array(
        [
            [cos, -sin, x - cos * half_w + sin * half_h],
            [sin, cos, y - sin * half_w - cos * half_h],
            [0.0, 0.0, 1.0],
        ]
    )


def _centers(size: Size) -> np.ndarray:
    """Pixel centers of a frame, row by row, homogeneous (3, h * w)."""
    y, x = np.mgrid[0 : size.height, 0 : size.width]
    return np.stack([x.ravel() + 0.5, y.ravel() + 0.5, np.ones(size.area)])


def _sample(sprite: Sprite, matrix: np.ndarray, size: Size) -> Tensor:
    """The sprite in a frame, (4, h, w), bilinear; nothing outside it."""
    x, y, _ = matrix @ _centers(size)
    grid = np.stack([2 * x / sprite.size.width - 1, 2 * y / sprite.size.height - 1], axis=-1)
    places = torch.from_numpy(grid.reshape(1, size.height, size.width, 2)).float()
    return F.grid_sample(sprite.rgba[None], places, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def _alpha_at(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Alpha of the nearest pixel, 0 outside."""
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    inside = (column >= 0) & (column < alpha.shape[1]) & (row >= 0) & (row < alpha.shape[0])
    found = np.zeros(len(x), dtype=alpha.dtype)
    found[inside] = alpha[row[inside], column[inside]]
    return found


class Cutouts:
    """The cut-outs of one split of ``cutouts.jsonl`` (scripts/fetch_clips.py), uint8 (4, h, w), in memory."""

    def __init__(self, listing: Path, split: str = "train") -> None:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        paths = sorted(row["path"] for row in rows if row["split"] == split)
        if not paths:
            raise UsageError(f"{listing} lists no cut-out of split {split!r}")
        self._pictures = [_load(listing.parent / path) for path in paths]

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self._pictures[index]


def _load(path: Path) -> Tensor:
    with Image.open(path) as opened:
        return torch.from_numpy(np.asarray(opened.convert("RGBA")).copy()).permute(2, 0, 1).contiguous()


def prepared(cutout: Tensor, scale: float) -> Tensor:
    """uint8 (4, h, w) -> a sprite's ``rgba`` at ``scale`` times the sides, antialiased, on a transparent border."""
    values = cutout.float() / 255
    alpha = values[3:]
    premultiplied = torch.cat([(2 * values[:3] - 1) * alpha, alpha])
    height, width = (max(4, round(side * scale)) for side in cutout.shape[1:])
    small = F.interpolate(premultiplied[None], (height, width), mode="bilinear", antialias=True, align_corners=False)
    return F.pad(small[0], (2, 2, 2, 2))


def draw_sprite(cutout: Tensor, size: Size, rng: random.Random) -> Sprite:
    """A random path for a cut-out of a fifth to half of the picture's height, enlarged at most twice."""
    height = rng.uniform(0.2, 0.5) * size.height
    scale = min(2.0, height / cutout.shape[1], 0.6 * size.width / cutout.shape[2])
    picture = cutout.flip(2) if rng.random() < 0.5 else cutout
    speed, heading = rng.uniform(0.0, 0.5), rng.uniform(0, math.tau)
    path = Path2D(
        x=rng.uniform(0.15, 0.85),
        y=rng.uniform(0.2, 0.8),
        scale=1.0,
        angle=rng.gauss(0, 0.15),
        move_x=speed * math.cos(heading),
        move_y=0.5 * speed * math.sin(heading),
        grow=math.exp(rng.gauss(0, 0.25)),
        turn=rng.gauss(0, 0.4),
        sway=rng.choice((0.0, rng.uniform(0.0, 0.03))),
        period=rng.uniform(16, 60),
    )
    return Sprite(prepared(picture, scale), path)


@dataclass(frozen=True)
class SyntheticSource:
    """A prompted camera over a random photo, with up to ``most`` cut-outs moving in it; ``frames`` (4k+1) a clip.

    ``sizes``: (size, weight) to draw from. ``share``: of the clips that have cut-outs at all. ``amplitude``: multiplies
    the motions that the prompts name. ``world`` gives the ground truth of what ``at`` shows.
    """

    photos: Pictures
    cutouts: Pictures | None
    frames: int
    sizes: tuple[tuple[Size, float], ...]
    seed: int = 0
    most: int = 3
    share: float = 0.7
    amplitude: float = 1.0

    def at(self, index: int) -> Pixels:
        world = self.world(index)
        frames = [to_bytes(world.frames([number])) for number in range(self.frames)]
        name = f"synthetic@{self.seed}/{index}"
        return Pixels(torch.cat(frames, dim=1), world.prompt, name, "synthetic", world.scene.motion)

    def world(self, index: int) -> World:
        """What is filmed, and how. Raises UsageError if no motion drawn fits any photo."""
        rng = rng_of(self.seed, index, "synthetic")
        size = rng.choices([size for size, _ in self.sizes], [weight for _, weight in self.sizes])[0]
        for _ in range(MAX_STEPS):
            asked, photo = caption(rng), self.photos[rng.randrange(len(self.photos))]
            photo = photo.flip(2) if rng.random() < 0.5 else photo
            last = max(self.frames - 1, 1)
            try:
                scene = make_scene(photo, size, asked.motion.scaled(self.amplitude), last, rng)
            except ValueError:
                continue
            return World(scene, self._sprites(size, rng), asked.prompt)
        raise UsageError(f"{MAX_STEPS} motions drawn for {size} all leave their photos; give larger photos")

    def _sprites(self, size: Size, rng: random.Random) -> tuple[Sprite, ...]:
        if self.cutouts is None or rng.random() >= self.share:
            return ()
        count = rng.randint(1, self.most)
        return tuple(draw_sprite(self.cutouts[rng.randrange(len(self.cutouts))], size, rng) for _ in range(count))
