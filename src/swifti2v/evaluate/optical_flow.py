"""Classical optical flow: how well frames follow each other, and how the camera moved.

OpenCV's DIS flow (extra ``evaluate``) on small gray pictures. Camera motion comes in the units of ``camera.Motion``, so
that what a prompt asked for can be set against what is seen. It knows nothing of prompts, files or learned flow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics, motion_score
from ..camera import AMPLITUDE_FRAMES, Motion, View, warp
from ..core import Size
from ..motion_score import dis_flow

WIDTH = 384  # pixels across at which flow is computed; a fast pan is 0.6 of them a frame
STEP = 4  # frames between two measurements of the camera
_GRID = 6  # pixels between the points a motion is fitted to
_INLIER = 0.75  # pixels a point may be off the common motion and still count
_SWAY = math.sqrt((0.65**2 + 0.35**2) / 2)  # root mean square of camera's own shake of amplitude 1


# --- flow -------------------------------------------------------------------------------------------------------


def gray(frame: Tensor, width: int = WIDTH) -> Tensor:
    """Luma of a picture (3, h, w) in [-1, 1] as bytes (h', w'), at most ``width`` pixels a side."""
    scale = min(1.0, width / max(frame.shape[1:]))
    rows, columns = (max(16, round(side * scale)) for side in frame.shape[1:])
    return motion_score.gray(frame, Size(columns, rows))


@dataclass(frozen=True)
class Warping:
    """One frame against the next brought back along the flow: ``error`` in 8-bit levels (RMS), over the share
    ``visible`` of pixels that both show."""

    error: float
    visible: float


def warping_error(a: Tensor, b: Tensor) -> Warping:
    """Of two gray pictures (``gray``). A pixel whose flow there and back does not cancel counts as hidden.

    The rule is Sundaram's (2010), as Lai's (2018) warping error has it. Error 0 if nothing is visible.
    """
    there, back = dis_flow(a, b), dis_flow(b, a)
    moved = _sampled(torch.cat([b[None].float(), back]), there)
    returned = there + moved[1:]
    limit = 0.01 * (there.square().sum(dim=0) + moved[1:].square().sum(dim=0)) + 0.5
    visible = (returned.square().sum(dim=0) < limit) & _inside(there)
    if not bool(visible.any()):
        return Warping(0.0, 0.0)
    error = (moved[0] - a.float())[visible].square().mean().sqrt()
    return Warping(float(error), float(visible.float().mean()))


# --- the camera -------------------------------------------------------------------------------------------------


def motion_of(frames: Tensor) -> Motion:
    """The camera's motion over a clip (3, t, h, w) in [-1, 1], in amplitudes after 80 frames (``camera.Motion``).

    What moves in front of a scene is outvoted as long as most of the textured picture belongs to the scene. Beyond
    81 frames, and without at least two, nothing is looked at.
    """
    return fitted_motion(camera_path([gray(frame) for frame in frames[:, : AMPLITUDE_FRAMES + 1].unbind(1)]))


def camera_path(grays: Sequence[Tensor], step: int = STEP) -> dict[int, View]:
    """The view at every ``step``-th frame and the last, relative to frame 0, chained from flow between them."""
    height, width = grays[0].shape
    marks = [*range(0, len(grays) - 1, step), len(grays) - 1]
    # Views as complex numbers about the picture's center: a point z of the frame shows turn * z + shift of frame 0.
    turn, shift = 1 + 0j, 0j
    path = {0: View(0.0, 0.0, 1.0, 0.0)}
    for before, now in itertools.pairwise(marks):
        by, offset = _similarity(grays[before], grays[now])
        turn, shift = turn / by, shift - turn * offset / by
        path[now] = View(shift.real / width, shift.imag / height, abs(turn), math.atan2(turn.imag, turn.real))
    return path


def fitted_motion(path: dict[int, View]) -> Motion:
    """The steady motion that fits the views best; what is left over, apart from speeding up, is shake."""
    frames = torch.tensor(list(path), dtype=torch.float64)
    if len(frames) < 2:
        return Motion()
    views = [(view.x, view.y, -math.log(view.scale), view.angle) for view in path.values()]
    values = torch.tensor(views, dtype=torch.float64)
    u = frames / AMPLITUDE_FRAMES
    x, y, zoom, angle = ((u[:, None] * values).sum(dim=0) / u.square().sum()).tolist()
    shake = 0.0
    if len(frames) > 6:
        basis = torch.stack([torch.ones_like(u), u, u * u], dim=1)
        left = values[:, :2] - basis @ torch.linalg.lstsq(basis, values[:, :2]).solution
        shake = float(left.square().mean().sqrt()) / _SWAY
    return Motion(x, -y, math.exp(zoom), math.degrees(angle), shake)


@dataclass(frozen=True)
class Agreement:
    """``right``: the camera went where it was told, on each axis; ``speed``: found against asked (1: as asked)."""

    right: bool
    speed: float


def agreement(found: Motion, asked: Motion) -> Agreement:
    """Is ``found`` the motion ``asked`` for? Pan, tilt, zoom and roll count, in units of each one's fast speed.

    Right: every axis asked for has the right sign and at least a third of the amount; every other one stays below
    half of the largest amount asked for, or below 0.15 (half of a slow motion) if that is more.
    """
    seen, told = found.code()[:4], asked.code()[:4]
    largest = max(map(abs, told))
    spare = max(0.15, largest / 2)
    right = all(
        (value * wish > 0 and abs(value) >= abs(wish) / 3) if abs(wish) >= 0.05 else abs(value) < spare
        for value, wish in zip(seen, told, strict=True)
    )
    along = sum(value * wish for value, wish in zip(seen, told, strict=True))
    return Agreement(right, along / sum(wish * wish for wish in told) if largest >= 0.05 else 1.0)


def followed_color_drift(frame: Tensor, photo: Tensor, view: View) -> float | None:
    """CIEDE2000 between ``frame`` and what the same camera would see of ``photo``, both (3, h, w), cells averaged.

    So a pan does not count as a change of color. None if less than a tenth of the photo is still in view.
    """
    window = (0, 0, *photo.shape[1:])
    seen = warp(photo, [view], window)[0]
    inside = warp(torch.ones_like(photo[:1]).expand(3, -1, -1), [view], window, "zeros")[0, 0] > 0.99
    if inside.float().mean() < 0.1:
        return None
    cell = metrics.CELL
    grid = (max(1, round(inside.shape[0] / cell)), max(1, round(inside.shape[1] / cell)))
    full = F.adaptive_avg_pool2d(inside[None, None].float(), grid)[0, 0] > 0.99
    if not bool(full.any()):
        return None
    difference = metrics.ciede2000(metrics.lab(frame, cell=cell), metrics.lab(seen, cell=cell))
    return float(difference[full].mean())


def _similarity(a: Tensor, b: Tensor) -> tuple[complex, complex]:
    """The turn-and-zoom (complex factor) and shift, about the center, that carry most of ``a``'s texture into ``b``."""
    import cv2

    height, width = a.shape
    moved = dis_flow(a, b)
    texture = torch.from_numpy(cv2.cornerMinEigenVal(a.numpy(), 5))
    rows, columns = torch.meshgrid(
        torch.arange(_GRID // 2, height, _GRID), torch.arange(_GRID // 2, width, _GRID), indexing="ij"
    )
    points = torch.stack([columns, rows], dim=-1).reshape(-1, 2)
    strength = texture[points[:, 1], points[:, 0]]
    points = points[strength >= strength.quantile(0.5)]
    begin = points.float() + 0.5 - torch.tensor([width / 2, height / 2])
    end = begin + moved[:, points[:, 1], points[:, 0]].T
    keep = (end.abs() < torch.tensor([width / 2, height / 2])).all(dim=1)
    matrix, _ = cv2.estimateAffinePartial2D(
        begin[keep].numpy(), end[keep].numpy(), method=cv2.RANSAC, ransacReprojThreshold=_INLIER
    )
    if matrix is None:  # a blank picture: nothing to follow
        return 1 + 0j, 0j
    return complex(matrix[0, 0], matrix[1, 0]), complex(matrix[0, 2], matrix[1, 2])


def _sampled(maps: Tensor, by: Tensor) -> Tensor:
    """(c, h, w) at each pixel moved ``by`` (2, h, w), bilinear."""
    height, width = by.shape[1:]
    x = (torch.arange(width) + 0.5 + by[0]) * (2 / width) - 1
    y = (torch.arange(height)[:, None] + 0.5 + by[1]) * (2 / height) - 1
    grid = torch.stack([x, y], dim=-1)[None]
    return F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)[0]


def _inside(by: Tensor) -> Tensor:
    """Which pixels are still in the picture once moved."""
    height, width = by.shape[1:]
    x, y = torch.arange(width) + by[0], torch.arange(height)[:, None] + by[1]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
