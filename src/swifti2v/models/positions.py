"""Where a token is, as numbers: rotary tables and Fourier features of (block, row, column).

Positions are data: frame indices come from the caller, never from a tensor's shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POSITION_OCTAVES = 6
POSITION_FEATURES = 3 * (2 * POSITION_OCTAVES + 1)
BLOCKS_PER_UNIT = 20  # frame indices are divided by this before their Fourier features: 81 frames are blocks 0..20


def frequencies(count: int, device: torch.device) -> Tensor:
    """``count`` angular frequencies from 1 down towards 1/10,000."""
    return torch.exp(-math.log(10_000) * torch.arange(count, device=device, dtype=torch.float32) / count)


def rope_axes(head: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with t, y and x: thirds; what does not divide goes to t."""
    side = 2 * (head // 6)
    return head - 2 * side, side, side


def rope_tables(frames: Tensor, grid: tuple[int, int], head: int, squeeze: int | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (t * h * w, head), float32, of 3-D positions; ``squeeze``: rows and columns fit this length."""
    rows, columns = (torch.arange(n, device=frames.device) / (n / squeeze if squeeze else 1.0) for n in grid)
    place = torch.meshgrid(frames.float(), rows, columns, indexing="ij")
    axes = zip(place, rope_axes(head), strict=True)
    angles = [p[..., None] * frequencies(width // 2, p.device) for p, width in axes]
    angle = torch.cat([half for angle in angles for half in (angle, angle)], dim=-1).flatten(0, 2)
    return angle.cos(), angle.sin()


def half_turn(head: int, like: Tensor) -> Tensor:
    """The signed permutation (head, head) that turns each axis's (first, second) half into (-second, first)."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return torch.block_diag(*(torch.kron(turn, torch.eye(width // 2)) for width in rope_axes(head))).to(like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (b, n, heads, c), tables (n, c)."""
    turned = x @ half_turn(x.shape[-1], x)  # exact, and faster on a CPU than slices of a dozen channels
    return torch.addcmul(x * cos[:, None], turned, sin[:, None])


def position_features(frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """Value, sines and cosines (t, h * w, POSITION_FEATURES) of where a token is in the clip and in the frame."""
    rows, columns = ((torch.arange(n, device=frames.device) + 0.5) / n for n in grid)
    place = torch.stack(torch.meshgrid(frames / BLOCKS_PER_UNIT, rows, columns, indexing="ij"), dim=-1).flatten(1, 2)
    angle = place[..., None] * math.pi * 2.0 ** torch.arange(POSITION_OCTAVES, device=frames.device)
    return torch.cat([place, angle.sin().flatten(-2), angle.cos().flatten(-2)], dim=-1)
