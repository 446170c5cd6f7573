"""Training windows of mobile-nano: photos, and how they move as ``motion_field`` latents.

Film as it was shot, measured by optical flow, and a camera over photos and stills of film, known exactly. A window is a
pure function of (seed, index).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics, motion_field
from ..camera import FAST_PAN, FAST_ROLL, FAST_ZOOM, Motion
from ..core import Size
from ..models.nano_vae import BLOCK
from ..motion_field import CELLS
from ..motion_score import PAIRS, SCORE_SIZE, dis_flow, gray
from ..reference import resize
from ..segments import Window
from .film import Shot
from .objective import Batch
from .synthetic import make_scene
from .windows import Frames, Material, shot_frames

Sizes = tuple[tuple[Size, float], ...]
"""Sizes of photos as the network sees them, and how often each is drawn."""
SIZES: Sizes = ((Size(320, 176), 0.5), (Size(176, 320), 0.12), (Size(224, 224), 0.13), (Size(160, 96), 0.25))
SMALL: Sizes = ((Size(160, 96), 0.55), (Size(96, 160), 0.15), (Size(128, 128), 0.2), (Size(320, 176), 0.1))
SEGMENT, NEIGHBORS = 4, 1
STARTS = ((1, 0.7), (5, 0.12), (9, 0.08), (13, 0.05), (17, 0.05))
FILM, STILL = 0.4, 0.5  # share of first windows that are film; of cameras that look at a still of film
SCORES = (0.3, 5.0)  # drawn evenly by logarithm
LIVELIEST = 8.0  # film that moves more than this is left out, and that which moves less than the least score
GAIN, LEAST = 1.0, 20.0  # dB by which the moved photo must be nearer to film than the photo is, and how near
TRIES = 4  # shots looked at for one that can be used
COUNT = 8  # windows a batch
LIMIT = 6.0  # of latents
SQUARE = Size(64, 64)
SLOW = 0.02  # of the fast speeds: so slow that flow is proportional to it


# -- cameras -------------------------------------------------------------------------------------------------------


def camera(score: float, rng: random.Random) -> Motion:
    """A random steady camera whose mean optical flow is ``score``: half of them move in, some while drifting."""
    kind = rng.choices(("in", "out", "pan", "tilt", "drift", "roll"), (0.25, 0.08, 0.18, 0.12, 0.27, 0.1))[0]
    side, up = rng.choice((-1, 1)), rng.choice((-1, 1))
    pan, tilt, zoom, roll = {
        "in": (0.0, 0.0, 1.0, 0.0),
        "out": (0.0, 0.0, -1.0, 0.0),
        "pan": (side, 0.2 * rng.uniform(-1, 1), rng.uniform(0, 0.5), 0.0),
        "tilt": (0.2 * rng.uniform(-1, 1), up, rng.uniform(0, 0.5), 0.0),
        "drift": (rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), 1.0, 0.0),
        "roll": (0.0, 0.0, rng.uniform(0.3, 1.0), side * rng.uniform(0.3, 1.0)),
    }[kind]
    unscaled = Motion(
        SLOW * FAST_PAN * pan, SLOW * FAST_PAN * tilt, FAST_ZOOM ** (SLOW * zoom), SLOW * FAST_ROLL * roll
    )
    return as_lively(unscaled, score)


def push_of(score: float) -> Motion:
    """The camera's push in whose mean optical flow is ``score`` (``motion_score``)."""
    return as_lively(Motion(zoom=1.001), score)


def as_lively(slow: Motion, score: float) -> Motion:
    """A slow motion sped up to a motion score, over a square photo."""
    return slow.scaled(score / view_score(slow, SQUARE))


def view_score(motion: Motion, size: Size) -> float:
    """The motion score of a camera over a photo of the aspect of ``size``."""
    frames = sorted({frame for pair in PAIRS for frame in pair})
    fields = dict(zip(frames, view_fields(motion, frames, (33, 33), size).unbind(1), strict=True))
    return sum(mean_flow(fields[b] - fields[a], size) for a, b in PAIRS) / len(PAIRS)


def view_fields(motion: Motion, frames: Sequence[int], cells: tuple[int, int], size: Size) -> Tensor:
    """Where the camera's frames show the photo: (2, t, rows, columns), pixels of ``size`` at centers of cells."""
    rows, columns = cells
    y, x = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows - 0.5, (torch.arange(columns) + 0.5) / columns - 0.5, indexing="ij"
    )
    x, y = x * size.width, y * size.height
    found = []
    for frame in frames:
        view = motion.at(frame)
        cos, sin = math.cos(view.angle) * view.scale, math.sin(view.angle) * view.scale
        found.append(
            torch.stack([cos * x - sin * y - x + view.x * size.width, sin * x + cos * y - y + view.y * size.height])
        )
    return torch.stack(found, dim=1)


# -- windows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moving:
    """A photo (3, 1, h, w) in [-1, 1], as small as the network sees it; its ``fields`` (2, k, rows, columns), in pixels
    of it, at the last frame of each block of a window; the motion score."""

    photo: Tensor
    fields: Tensor
    score: float


@dataclass(frozen=True)
class MobileWindows:
    """Batches of windows of one size: the anchor, at most one finished block, four blocks to make."""

    material: Material
    seed: int
    sizes: Sizes = SIZES

    @torch.no_grad()
    def at(self, index: int) -> Batch:
        rng = random.Random(f"mobile/{self.seed}/{index}")
        size = rng.choices([size for size, _ in self.sizes], [share for _, share in self.sizes])[0]
        start = rng.choices([start for start, _ in STARTS], [share for _, share in STARTS])[0]
        window = Window(0, tuple(range(max(1, start - NEIGHBORS), start)), tuple(range(start, start + SEGMENT)))
        items = [self._item(size, window, rng) for _ in range(COUNT)]
        clean = torch.stack([latents_of(item, window.blocks) for item in items])
        reference = torch.cat([motion_field.small_reference(self.material.vae, item.photo[None]) for item in items])
        reference = reference.expand(-1, -1, len(window.blocks), -1, -1).contiguous()
        scores = torch.tensor([item.score for item in items])
        return Batch(clean, reference, torch.tensor(window.blocks), len(window.context), motion_score=scores)

    def _item(self, size: Size, window: Window, rng: random.Random) -> Moving:
        if window.segment[0] == 1 and rng.random() < FILM:
            for _ in range(TRIES):
                found = filmed(self.material.shots, size, window.blocks[1:], rng)
                if found is not None:
                    return found
        score = math.exp(rng.uniform(*map(math.log, SCORES)))
        motion = camera(score, rng)
        photo = make_scene(self._picture(rng), size, Motion(), 0, rng).photo
        ends = [motion_field.FRAMES * block for block in window.blocks[1:]]
        cells = (size.height // BLOCK * CELLS, size.width // BLOCK * CELLS)
        return Moving(photo[:, None], view_fields(motion, ends, cells, size), view_score(motion, size))

    def _picture(self, rng: random.Random) -> Tensor:
        """(3, h, w) uint8: a photo, or a still of film."""
        shots = self.material.shots
        if not shots or rng.random() >= STILL:
            return self.material.photos.pick(rng)
        shot = rng.choice(shots)
        return torch.from_numpy(shot.frames[rng.randrange(len(shot.frames))].copy()).permute(2, 0, 1)


def filmed(shots: Sequence[Shot], size: Size, blocks: Sequence[int], rng: random.Random) -> Moving | None:
    """A random part of a random shot with its optical flow; None if its motion cannot be told from its frames."""
    ends = [motion_field.FRAMES * block for block in blocks]
    frames = small_film(shots, size, ends[-1], rng)
    if frames is None:
        return None
    score = quick_score(frames, size)
    if not SCORES[0] <= score <= LIVELIEST:
        return None
    photo, *later = frames([0, *ends]).unbind(1)
    seen = gray(photo, size)
    fields = torch.cat([smooth_flow(dis_flow(gray(frame, size), seen), size) for frame in later])
    near, still = (
        float(metrics.psnr(picture[:, None], later[-1][:, None]).mean())
        for picture in (motion_field.moved(photo[None], fields[-1:])[0], photo)
    )
    if near < max(LEAST, still + GAIN):
        return None
    return Moving(photo[:, None], fields.transpose(0, 1), score)


def quick_score(frames: Frames, size: Size) -> float:
    """``motion_score`` of a clip, with flow at ``size`` rather than at 576x320."""
    numbers = sorted({frame for pair in PAIRS for frame in pair})
    seen = dict(zip(numbers, (gray(frame, size) for frame in frames(numbers).unbind(1)), strict=True))
    return sum(mean_flow(dis_flow(seen[a], seen[b]), size) for a, b in PAIRS) / len(PAIRS)


def mean_flow(flow: Tensor, size: Size) -> float:
    """Mean of both components of a flow (2, h, w), in pixels of ``size``, as at 576x320."""
    scale = torch.tensor([SCORE_SIZE.width / size.width, SCORE_SIZE.height / size.height])[:, None, None]
    return float((flow * scale).abs().mean())


def smooth_flow(flow: Tensor, size: Size) -> Tensor:
    """A flow (2, h, w) at cells, (1, 2, rows, columns): the mean over each, then weighed with its neighbors."""
    cells = F.adaptive_avg_pool2d(flow[None], (size.height // BLOCK * CELLS, size.width // BLOCK * CELLS))
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(2, 1, 3, 3)
    return F.conv2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), kernel, groups=2)


def latents_of(item: Moving, blocks: Sequence[int]) -> Tensor:
    """(8, t, h, w) of a window's blocks, the anchor first: it does not move."""
    height, width = item.photo.shape[-2:]
    units = [motion_field.reach(block, item.score, width, height) for block in blocks[1:]]
    motion = item.fields / torch.tensor(units)[:, None, None]
    latents = motion_field.to_latents(torch.cat([torch.zeros_like(motion[:, :1]), motion], dim=1)[None])[0]
    return latents.clamp(-LIMIT, LIMIT)


def small_film(shots: Sequence[Shot], size: Size, last: int, rng: random.Random) -> Frames | None:
    """A random part of a random shot that lasts beyond frame ``last``, shrunk to ``size``; None if there is none."""
    fitting = [shot for shot in shots if len(shot.frames) > last]
    if not fitting:
        return None
    shot = rng.choice(fitting)
    rows, columns = shot.frames.shape[1:3]
    largest = min(rows / size.height, columns / size.width)
    ratio = largest * rng.uniform(0.6, 1.0)
    part = shot_frames(shot, Size(round(size.width * ratio), round(size.height * ratio)), last, rng)
    return lambda indices: torch.stack([resize(frame, size) for frame in part(indices).unbind(1)], dim=1)
