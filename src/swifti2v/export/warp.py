"""A picture looked up elsewhere, at one fixed size, as ``motion_field.moved`` does: bicubic, mirrored at its edges.

Two ways to say it. "grid-sample" is one operator: ONNX Runtime has torch's (a = -0.75, mirrored alike) and is fastest
so. "taps" gathers the sixteen neighbors of each place: Core ML has no bicubic sampling, and XNNPACK takes the
arithmetic, where ExecuTorch's own grid sampling is several times slower.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Warp = Literal["grid-sample", "taps"]
CUBIC = -0.75  # torch's a
MARGIN = 2  # pixels that the taps of a place inside the picture reach out of it


class Sampler(nn.Module):
    """(1, 3, h, w) pixels, (1, 2, h, w) x and y to go -> (1, 3, h, w) in [-1, 1]."""

    exact_columns: Tensor
    exact_rows: Tensor

    def __init__(self, size: tuple[int, int], warp: Warp) -> None:
        super().__init__()
        self.size, self.find = size, by_grid if warp == "grid-sample" else by_taps
        height, width = size
        self.register_buffer("exact_columns", torch.arange(width) + 0.5)
        self.register_buffer("exact_rows", (torch.arange(height) + 0.5)[:, None])

    def forward(self, picture: Tensor, dense: Tensor) -> Tensor:
        x, y = self.exact_columns + dense[:, 0], self.exact_rows + dense[:, 1]
        return self.find(picture, x, y, self.size).clamp(-1, 1)


def by_grid(picture: Tensor, x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """``picture`` (1, 3, h, w) at x and y (1, h, w), in pixels from the corner."""
    grid = torch.stack([x * (2 / size[1]) - 1, y * (2 / size[0]) - 1], dim=-1)
    return F.grid_sample(picture, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def by_taps(picture: Tensor, x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """The same with a gather for every tap.

    The picture's mirror images repeat, and a cubic spline is symmetric: a place beyond the edge looks like the place
    that it mirrors. Only the taps of places near the edge leave the picture, by ``MARGIN`` pixels at most.
    """
    height, width = size
    x, y = (_folded(p.flatten(1), n) + (MARGIN - 0.5) for p, n in ((x, width), (y, height)))
    left, top = x.floor(), y.floor()
    across, down = _cubic(x - left), _cubic(y - top)
    # Whole numbers before they are multiplied: places of large pictures are no exact float32.
    stride = width + 2 * MARGIN
    first = ((top.to(torch.int32) - 1) * stride + (left.to(torch.int32) - 1)).flatten()
    pixels = _framed(picture).flatten(2)
    lines = []
    for i in range(4):
        taps = [across[j] * pixels.index_select(2, first + (i * stride + j)) for j in range(4)]
        lines.append(down[i] * (taps[0] + taps[1] + taps[2] + taps[3]))
    return (lines[0] + lines[1] + lines[2] + lines[3]).unflatten(2, size)


def _folded(place: Tensor, pixels: int) -> Tensor:
    """Places along an axis to [0, ``pixels``], by mirrors at both ends."""
    place = place - 2 * pixels * torch.floor(place / (2 * pixels))
    return torch.minimum(place, 2 * pixels - place)


def _framed(picture: Tensor) -> Tensor:
    """(b, c, h, w) with ``MARGIN`` mirrored pixels on each side."""
    wide = torch.cat([picture[..., 1:2], picture[..., :1], picture, picture[..., -1:], picture[..., -2:-1]], dim=3)
    return torch.cat([wide[:, :, 1:2], wide[:, :, :1], wide, wide[:, :, -1:], wide[:, :, -2:-1]], dim=2)


def _cubic(t: Tensor) -> list[Tensor]:
    """Weights of the taps at -1, 0, 1, 2 for a place ``t`` in [0, 1) behind tap 0."""

    def near(d: Tensor) -> Tensor:
        return ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
