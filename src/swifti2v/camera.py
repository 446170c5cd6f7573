"""A moving camera over one photo: where it looks at a frame, and the photo seen from there.

Pure tensors and arithmetic. Training renders its clips with it; nano's Stage I starts from the photo so moved
(docs/decisions/0006). It does not know what prompts say: ``models/camera_head`` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AMPLITUDE_FRAMES = 80  # amplitudes are reached this many frames after frame 0 (an 81-frame clip)
FAST_PAN, FAST_ZOOM, FAST_ROLL, FAST_SHAKE = 0.12, 1.18, 5.0, 0.006


@dataclass(frozen=True)
class View:
    """Where the camera looks: center offset (picture widths and heights, y down), view size ``scale``
    relative to frame 0's, and the camera's clockwise ``angle`` in radians."""

    x: float
    y: float
    scale: float
    angle: float


@dataclass(frozen=True)
class Motion:
    """Camera motion, amplitudes after 80 frames; it goes on at the same rate beyond.

    ``pan``: picture widths, positive right; ``tilt``: picture heights, positive up; ``zoom``: magnification
    (above 1 moves in); ``roll``: degrees, positive clockwise; ``shake``: picture widths.
    """

    pan: float = 0.0
    tilt: float = 0.0
    zoom: float = 1.0
    roll: float = 0.0
    shake: float = 0.0

    def __post_init__(self) -> None:
        if not self.zoom > 0:
            raise ValueError(f"zoom {self.zoom} is not positive")

    def at(self, frame: float) -> View:
        """The view at ``frame`` (may be fractional); frame 0 is exactly View(0, 0, 1, 0)."""
        u = frame / AMPLITUDE_FRAMES
        return View(
            x=self.pan * u + self.shake * (_sway(frame, 0.0) - _sway(0, 0.0)),
            y=-self.tilt * u + self.shake * (_sway(frame, 2.0) - _sway(0, 2.0)),
            scale=self.zoom**-u,
            angle=math.radians(self.roll) * u,
        )

    def scaled(self, factor: float) -> Motion:
        """The same motion with ``factor`` times the amplitude."""
        return Motion(self.pan * factor, self.tilt * factor, self.zoom**factor, self.roll * factor, self.shake * factor)

    def code(self) -> tuple[float, ...]:
        """The five amplitudes in units of the fast speed: what a prompt says, as numbers within [-1, 1]."""
        return (
            self.pan / FAST_PAN,
            self.tilt / FAST_PAN,
            math.log(self.zoom) / math.log(FAST_ZOOM),
            self.roll / FAST_ROLL,
            self.shake / FAST_SHAKE,
        )

    @classmethod
    def from_code(cls, code: Sequence[float]) -> Motion:
        """The inverse of ``code``; values are held within [-1.2, 1.2], shake at 0 or more."""
        pan, tilt, zoom, roll, shake = (min(1.2, max(-1.2, float(value))) for value in code)
        return cls(FAST_PAN * pan, FAST_PAN * tilt, FAST_ZOOM**zoom, FAST_ROLL * roll, FAST_SHAKE * max(0.0, shake))


def warp(source: Tensor, views: Sequence[View], window: tuple[int, int, int, int], padding: str = "border") -> Tensor:
    """``source`` (3, h, w) in [-1, 1] seen from each view: (n, 3, height, width), bicubic.

    ``window`` (top, left, height, width): the part of ``source`` that is frame 0. ``padding`` beyond the
    source: grid_sample's "border" or "reflection".
    """
    rows, columns = source.shape[1:]
    top, left, height, width = window
    theta = torch.empty(len(views), 2, 3)
    for index, view in enumerate(views):
        cos, sin = math.cos(view.angle) * view.scale, math.sin(view.angle) * view.scale
        center_x = left + width / 2 + view.x * width
        center_y = top + height / 2 + view.y * height
        # grid_sample wants source coordinates in [-1, 1] over pixel edges, as functions of the target's
        theta[index, 0] = torch.tensor([cos * width / columns, -sin * height / columns, 2 * center_x / columns - 1])
        theta[index, 1] = torch.tensor([sin * width / rows, cos * height / rows, 2 * center_y / rows - 1])
    grid = F.affine_grid(theta, [len(views), 3, height, width], align_corners=False).to(source)
    wide = source[None].expand(len(views), -1, -1, -1)
    return F.grid_sample(wide, grid, mode="bicubic", padding_mode=padding, align_corners=False).clamp(-1, 1)


def eased(frame: int) -> float:
    """Frames of motion by ``frame``: as they come within an 81-frame clip, then slowing down towards twice that.

    A longer clip must not leave the photo altogether.
    """
    beyond = max(0, frame - AMPLITUDE_FRAMES)
    return min(frame, AMPLITUDE_FRAMES) + AMPLITUDE_FRAMES * (1 - math.exp(-beyond / AMPLITUDE_FRAMES))


def camera_video(image: Tensor, motion: Motion, num_frames: int, *, group: int = 4) -> Iterator[Tensor]:
    """The photo (1, 3, 1, h, w) filmed by a moving camera: frame 0, exactly the photo, then groups of ``group`` frames.

    What the photo does not show is its mirror image at the edge.
    """
    yield image
    picture = image[0, :, 0]
    window = (0, 0, *picture.shape[1:])
    for start in range(1, num_frames, group):
        views = [motion.at(eased(frame)) for frame in range(start, min(start + group, num_frames))]
        yield warp(picture, views, window, "reflection").transpose(0, 1)[None]


def _sway(frame: float, phase: float) -> float:
    """A hand's unsteadiness: two fixed incommensurate waves, about 1.5 s and 0.8 s at 15 fps, within +-1."""
    return 0.65 * math.sin(frame * math.tau / 23 + phase) + 0.35 * math.sin(frame * math.tau / 12.6 + 2 * phase + 1)
