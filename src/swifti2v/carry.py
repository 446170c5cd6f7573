"""Detail carried along the motion: where a sharp picture's pixels went in a soft video, and what they look like there.

A soft frame (enlarged from a low resolution, or decoded from few coefficients) keeps the large and loses the small; a
sharp picture of the same scene, the user's photo, has the small but stands still. ``follow`` registers the picture to
every soft frame by dense Lucas-Kanade least squares, coarse to fine, always against the picture itself, so that errors
do not add up over time; ``carried`` moves the picture there; ``trust`` says where the move can be believed.
Pure arithmetic on tensors, batched, no randomness: it knows neither files, models nor latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 4  # the registration works on pictures this many times smaller than what is carried
LEVELS = 5
COARSEST_SIDE = 8  # pyramids stop before a side gets smaller than this
ITERATIONS = (2, 3, 4, 4, 4)  # by level, finest first
WINDOW = 3  # radius of the box, applied twice, within which the motion is taken as one
ROBUST = 0.05  # a difference of this much (of pixels in [-1, 1]) halves a pixel's say
DAMPING = 1e-4  # in units of squared gradients: what has no texture stays where the coarser level put it
FLOOR = 1e-5  # energy below which there is no detail to speak of


@dataclass(frozen=True)
class Trail:
    """A picture (b, 3, H, W), itself ``RATIO`` times smaller, and where each place of the present frame lies in it.

    ``flow`` (b, 2, h, w), in pixels of the small picture, x then y: the frame shows at p what the picture shows at
    p + flow(p).
    """

    picture: Tensor
    pyramid: tuple[Tensor, ...]
    flow: Tensor


def start(picture: Tensor, size: tuple[int, int] | None = None) -> Trail:
    """A trail at the picture itself. ``size`` (h, w): where to register, H/4 and W/4 if not given."""
    height, width = picture.shape[-2:]
    h, w = size or (max(1, height // RATIO), max(1, width // RATIO))
    levels = pyramid(scaled(picture, (h, w)))
    return Trail(picture, levels, picture.new_zeros(picture.shape[0], 2, h, w))


def follow(trail: Trail, frame: Tensor) -> Trail:
    """The trail moved on to ``frame`` (b, 3, h, w), beginning the search where the frame before left it."""
    targets = pyramid(frame)
    flow = resized_flow(trail.flow, targets[-1])
    for level in range(len(targets) - 1, -1, -1):
        flow = resized_flow(flow, targets[level])
        for _ in range(ITERATIONS[level]):
            flow = flow + step(trail.pyramid[level], targets[level], flow)
        flow = median(flow)
    return replace(trail, flow=flow)


def carried(trail: Trail) -> Tensor:
    """The picture as the present frame would show it, (b, 3, H, W), bicubic."""
    return warp(trail.picture, resized_flow(trail.flow, trail.picture))


def trust(known: Tensor, claimed: Tensor, radius: int) -> Tensor:
    """How far to believe carried detail, (b, 1, h, w) in [0, 1].

    ``known`` and ``claimed`` (b, 3, h, w): the band of detail just below the missing one, as the soft frame has it and
    as the carried picture has it. Their local squared difference over the claimed energy: 1 where they agree, 0 where
    the claim is no better than silence. One halves a least-squares weight this way because the missing band, being
    finer, is hurt more by the same misplacement.
    """
    stack = torch.cat([(known - claimed).square().sum(1, keepdim=True), claimed.square().sum(1, keepdim=True)], dim=1)
    error, energy = box(stack, radius).split(1, dim=1)
    return (1 - error / (energy + FLOOR)).clamp(0, 1)


def detailed(soft: Tensor, small: Tensor, trail: Trail) -> tuple[Tensor, Tensor]:
    """``soft`` (b, 3, H, W), enlarged from ``small`` (b, 3, h, w), with the detail that ``trail`` carries there: as far
    as it can be trusted, and all of it."""
    moved = carried(trail)
    shrunk = scaled(moved, small.shape[-2:])
    weight = trust(small - blur(small), shrunk - blur(shrunk), 2)
    weight = F.interpolate(weight, soft.shape[-2:], mode="bilinear", align_corners=False)
    fine = moved - scaled(shrunk, soft.shape[-2:])
    return torch.addcmul(soft, weight, fine), soft + fine


# -- registration -----------------------------------------------------------------------------------------------------


def step(picture: Tensor, target: Tensor, flow: Tensor) -> Tensor:
    """One Gauss-Newton step of windowed least squares, at most a pixel either way."""
    moved = warp(picture, flow)
    gx, gy = gradients((moved + target) / 2)
    error = target - moved
    weight = 1 / (1 + error.square().mean(1, keepdim=True) / ROBUST**2)
    products = [gx * gx, gx * gy, gy * gy, gx * error, gy * error]
    sums = torch.cat([(weight * product).sum(1, keepdim=True) for product in products], dim=1)
    a, b, c, p, q = box(box(sums, WINDOW), WINDOW).split(1, dim=1)
    a, c = a + DAMPING, c + DAMPING
    determinant = a * c - b * b
    return (torch.cat([c * p - b * q, a * q - b * p], dim=1) / determinant).clamp_(-1, 1)


def pyramid(x: Tensor) -> tuple[Tensor, ...]:
    """``x`` and its halves, down to a side of COARSEST_SIDE."""
    levels = [x]
    while len(levels) < LEVELS and min(levels[-1].shape[-2:]) >= 2 * COARSEST_SIDE:
        levels.append(scaled(levels[-1], [side // 2 for side in levels[-1].shape[-2:]]))
    return tuple(levels)


def scaled(x: Tensor, size: tuple[int, int] | list[int] | torch.Size) -> Tensor:
    """(b, c, h, w) at ``size``: antialiased bicubic, not clamped."""
    return F.interpolate(x, tuple(size), mode="bicubic", antialias=True, align_corners=False)


def resized_flow(flow: Tensor, like: Tensor) -> Tensor:
    """The flow at the size of ``like``, its values in that size's pixels."""
    h, w = like.shape[-2:]
    if flow.shape[-2:] == (h, w):
        return flow
    ratio = flow.new_tensor([w / flow.shape[-1], h / flow.shape[-2]]).view(1, 2, 1, 1)
    smaller = h < flow.shape[-2]
    return F.interpolate(flow, (h, w), mode="bilinear", antialias=smaller, align_corners=False) * ratio


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """``x`` (b, c, h, w) read at p + flow(p): bicubic, edges repeated."""
    h, w = flow.shape[-2:]
    ys, xs = torch.arange(h, device=x.device, dtype=x.dtype), torch.arange(w, device=x.device, dtype=x.dtype)
    gx = (flow[:, 0] + xs + 0.5) * (2 / w) - 1
    gy = (flow[:, 1] + ys[:, None] + 0.5) * (2 / h) - 1
    grid = torch.stack([gx, gy], dim=-1)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivatives a pixel, of fourth order."""
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    rows, columns = padded[:, :, 2:-2], padded[:, :, :, 2:-2]
    gx = (8 * (rows[..., 3:-1] - rows[..., 1:-3]) - (rows[..., 4:] - rows[..., :-4])) / 12
    gy = (8 * (columns[:, :, 3:-1] - columns[:, :, 1:-3]) - (columns[:, :, 4:] - columns[:, :, :-4])) / 12
    return gx, gy


def box(x: Tensor, radius: int) -> Tensor:
    """Mean over (2r+1)^2, edges repeated."""
    x = F.avg_pool2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), (1, 2 * radius + 1), 1)
    return F.avg_pool2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), (2 * radius + 1, 1), 1)


def blur(x: Tensor, spread: int = 1) -> Tensor:
    """The 1 4 6 4 1 binomial both ways, taps ``spread`` pixels apart."""
    for dim in (-1, -2):
        pad = (2 * spread, 2 * spread, 0, 0) if dim == -1 else (0, 0, 2 * spread, 2 * spread)
        padded, n = F.pad(x, pad, mode="replicate"), x.shape[dim]
        a, b, c, d, e = (padded.narrow(dim, i * spread, n) for i in range(5))
        x = (a + e) / 16 + (b + d) / 4 + c * 0.375
    return x


def median(flow: Tensor) -> Tensor:
    """3x3 median of each component: a window astride an edge must not vote for neither side."""
    h, w = flow.shape[-2:]
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    shifts = [padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(shifts).median(dim=0).values
