"""``carry`` for graphs: the photo's detail along the motion, in few operators that exporters have, at one fixed size.

At a fixed size all that is linear and separable (resampling, derivatives, boxes, blurs) is a product with two matrices,
read off ``carry``'s own functions by giving them unit impulses; the median of nine is a sorting network; and, where a
backend's grid sampling has no bicubic mode, a warp is sixteen gathered taps. tests/export/test_graphs.py compares.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import carry

Sides = tuple[int, int]
Warp = Literal["grid-sample", "gather"]
# Paeth's network: after these exchanges (smaller first), place 4 holds the median of nine.
_EXCHANGES = (
    (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3),
    (5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2),
)  # fmt: skip


class Separable(nn.Module):
    """A linear operator that acts on rows and columns alike: (b, c, h, w) -> rows @ x @ columns."""

    exact_rows: Tensor
    exact_columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("exact_rows", rows.T.contiguous(), persistent=False)
        self.register_buffer("exact_columns", columns.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.exact_rows @ x @ self.exact_columns


class Resize(Separable):
    """``F.interpolate`` (b, c, *source) -> (b, c, *target), with a factor for each channel."""

    exact_factor: Tensor | None

    def __init__(self, source: Sides, target: Sides, mode: str, antialias: bool, factors: Any = None) -> None:
        kind: dict[str, Any] = {"mode": mode, "antialias": antialias, "align_corners": False}

        def along(n: int, m: int) -> Tensor:
            # Not (1, n, n, 1) -> (1, n, m, 1): torch takes that for channels last and is wrong at the edges.
            return F.interpolate(torch.eye(n)[None, None], (n, m), **kind)[0, 0]

        super().__init__(along(source[0], target[0]), along(source[1], target[1]))
        factor = None if factors is None else torch.tensor(factors).view(1, -1, 1, 1)
        self.register_buffer("exact_factor", factor, persistent=False)

    @classmethod
    def picture(cls, source: Sides, target: Sides) -> Resize:
        """As ``carry.scaled``."""
        return cls(source, target, "bicubic", True)

    @classmethod
    def flow(cls, source: Sides, target: Sides) -> Resize:
        """As ``carry.resized_flow``."""
        factors = [target[1] / source[1], target[0] / source[0]]
        return cls(source, target, "bilinear", target[0] < source[0], factors)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.exact_factor is None else x * self.exact_factor


def _along(operator: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """(n, n): what an operator on pictures (1, n, 1, n) does along a row, from unit impulses."""
    return operator(torch.eye(n)[None, :, None])[0, :, 0]


def _separable(operator: Callable[[Tensor], Tensor], size: Sides) -> Separable:
    return Separable(_along(operator, size[0]), _along(operator, size[1]))


class Blur(Separable):
    """As ``carry.blur``."""

    def __init__(self, size: Sides) -> None:
        super().__init__(*(_along(carry.blur, n) for n in size))


class Sampler(nn.Module):
    """As ``carry.warp`` with a flow of ``size``."""

    exact_scale: Tensor
    exact_places: Tensor

    def __init__(self, size: Sides, warp: Warp = "grid-sample") -> None:
        super().__init__()
        h, w = size
        self.by_taps = warp == "gather"
        ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        scale = torch.tensor([2 / w, 2 / h])
        self.register_buffer("exact_scale", scale, persistent=False)
        self.register_buffer("exact_places", torch.stack([xs, ys], dim=-1)[None] * scale - 1, persistent=False)

    def forward(self, x: Tensor, flow: Tensor) -> Tensor:
        if self.by_taps:
            return warp_by_taps(x, flow)
        grid = flow.permute(0, 2, 3, 1) * self.exact_scale + self.exact_places
        return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)


class Level(nn.Module):
    """One size of the pyramid: ``carry.step`` on pictures (b, 3, *size)."""

    exact_dx: Tensor
    exact_dy: Tensor

    def __init__(self, size: Sides, warp: Warp) -> None:
        super().__init__()
        self.sampler = Sampler(size, warp)
        self.register_buffer("exact_dx", _along(lambda x: carry.gradients(x)[0], size[1]), persistent=False)
        self.register_buffer("exact_dy", _along(lambda x: carry.gradients(x)[0], size[0]).T, persistent=False)
        self.box = _separable(lambda x: carry.box(carry.box(x, carry.WINDOW), carry.WINDOW), size)

    def forward(self, picture: Tensor, target: Tensor, flow: Tensor) -> Tensor:
        """The flow (b, 2, *size) after one step."""
        moved = self.sampler(picture, flow)
        middle, error = (moved + target) / 2, target - moved
        gx, gy = middle @ self.exact_dx, self.exact_dy @ middle
        weight = 1 / (1 + error.square().mean(1, keepdim=True) / carry.ROBUST**2)
        products = [gx * gx, gx * gy, gy * gy, gx * error, gy * error]
        sums = torch.cat([product.sum(1, keepdim=True) for product in products], dim=1) * weight
        a, b, c, p, q = self.box(sums).split(1, dim=1)
        a, c = a + carry.DAMPING, c + carry.DAMPING
        return flow + (torch.cat([c * p - b * q, a * q - b * p], dim=1) / (a * c - b * b)).clamp(-1, 1)


class Carrier(nn.Module):
    """One photo of ``size`` (h, w) followed through soft frames of the same size."""

    def __init__(self, size: Sides, warp: Warp = "grid-sample") -> None:
        super().__init__()
        small = (max(1, size[0] // carry.RATIO), max(1, size[1] // carry.RATIO))
        sides = [small]
        while len(sides) < carry.LEVELS and min(sides[-1]) >= 2 * carry.COARSEST_SIDE:
            sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
        pairs = list(pairwise(sides))
        self.levels = nn.ModuleList(Level(side, warp) for side in sides)
        self.shrink = Resize.picture(size, small)
        self.halve = nn.ModuleList(Resize.picture(larger, smaller) for larger, smaller in pairs)
        self.shrink_flow = Resize.flow(small, sides[-1]) if pairs else nn.Identity()
        self.double_flow = nn.ModuleList(Resize.flow(smaller, larger) for larger, smaller in pairs)
        self.enlarge_flow, self.sampler = Resize.flow(small, size), Sampler(size, warp)

    def pyramid(self, picture: Tensor) -> list[Tensor]:
        """``picture`` (b, 3, h, w), its quarter and the halves of that."""
        levels = [self.shrink(picture)]
        for halve in self.halve:
            levels.append(halve(levels[-1]))
        return levels

    def follow(self, pictures: list[Tensor], targets: list[Tensor], flow: Tensor) -> Tensor:
        """As ``carry.follow``: the flow (b, 2, h/4, w/4) moved on."""
        flow = self.shrink_flow(flow)
        for number in range(len(targets) - 1, -1, -1):
            if number < len(targets) - 1:
                flow = self.double_flow[number](flow)
            for _ in range(carry.ITERATIONS[number]):
                flow = self.levels[number](pictures[number], targets[number], flow)
            flow = median(flow)
        return flow

    def carried(self, picture: Tensor, flow: Tensor) -> Tensor:
        """As ``carry.carried``."""
        return self.sampler(picture, self.enlarge_flow(flow))


class Trust(nn.Module):
    """What ``nano_vae`` does with the moved picture: its detail where it can be believed, at half the size."""

    def __init__(self, size: Sides) -> None:
        super().__init__()
        half = (size[0] // 2, size[1] // 2)
        self.to_half, self.from_half = Resize.picture(size, half), Resize(half, size, "bilinear", False)
        self.blur, self.box = Blur(half), _separable(lambda x: carry.box(x, 3), half)

    def forward(self, known: Tensor, claimed: Tensor, picture: Tensor) -> Tensor:
        """``known`` (b, 3, h, w) with the detail of ``picture`` that ``claimed``, its soft self, lacks."""
        small, claim = self.to_half(known), self.to_half(claimed)
        small, claim = small - self.blur(small), claim - self.blur(claim)
        pair = [(small - claim).square().sum(1, keepdim=True), claim.square().sum(1, keepdim=True)]
        error, energy = self.box(torch.cat(pair, dim=1)).split(1, dim=1)
        weight = (1 - error / (energy + carry.FLOOR)).clamp(0, 1)
        return known + self.from_half(weight) * (picture - claimed)


def median(flow: Tensor) -> Tensor:
    """As ``carry.median``, with minima and maxima alone."""
    h, w = flow.shape[-2:]
    wide = torch.cat([flow[..., :1], flow, flow[..., w - 1 :]], dim=3)
    wide = torch.cat([wide[:, :, :1], wide, wide[:, :, h - 1 :]], dim=2)
    nine = [wide[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]
    for i, j in _EXCHANGES:
        nine[i], nine[j] = torch.minimum(nine[i], nine[j]), torch.maximum(nine[i], nine[j])
    return nine[4]


def warp_by_taps(x: Tensor, flow: Tensor) -> Tensor:
    """As ``carry.warp`` (bicubic with a = -0.75, edges repeated), by gathering the sixteen neighbors of each place."""
    height, width = x.shape[-2:]
    h, w = flow.shape[-2:]
    ys, xs = torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype)
    px = (flow[:, :1] + xs + 0.5) * (width / w) - 0.5
    py = (flow[:, 1:] + ys[:, None] + 0.5) * (height / h) - 0.5
    left, top = px.floor(), py.floor()
    across, down = _cubic(px - left), _cubic(py - top)
    flat, out = x.flatten(2), torch.zeros((), dtype=x.dtype)
    for i in range(4):
        row = (top + (i - 1)).clamp(0, height - 1) * width
        line = torch.zeros((), dtype=x.dtype)
        for j in range(4):
            place = (row + (left + (j - 1)).clamp(0, width - 1)).long().flatten(2).expand(-1, x.shape[1], -1)
            line = line + across[j] * flat.gather(2, place).unflatten(2, (h, w))
        out = out + down[i] * line
    return out


def _cubic(t: Tensor, a: float = -0.75) -> list[Tensor]:
    """Weights of the taps at -1, 0, 1, 2 for a place ``t`` in [0, 1) behind tap 0; torch's grid_sample has this a."""

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
