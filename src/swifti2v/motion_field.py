"""Motion as latents: where every part of a photo has gone by the end of each block, and the frames that this makes.

mobile-nano denoises these fields in place of pixels (docs/decisions/0010). A field holds ``CELLS`` x ``CELLS`` vectors
a token, as multiples of the motion score, so that their size hardly depends on how much is to move; ``to_latents`` is a
Haar transform of a token's vectors, scaled to a standard deviation of about 1. A frame is the photo looked up where the
field says (backward): full sharpness at any size, and nothing that the photo does not hold.

It knows nano's encoder, no networks. ``export.nano_graphs`` has the same arithmetic at fixed sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .models.causal_vae import StreamingVAE, encode_stream
from .motion_score import PAIRS, SCORE_SIZE

CELLS = 2  # vectors a side of a token
CHANNELS = 2 * CELLS * CELLS
TOKEN = 64  # pixels a side of a token
SHRINK = 4  # the photo that the network sees is so many times smaller
FRAMES = 4  # a block
STEP = PAIRS[0][1] - PAIRS[0][0]  # frames in which the score is counted
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # over 2: orthonormal
SCALES = (3.0, 0.55, 0.55, 0.14)  # of the mean of a token, change along x, along y, and both, over training windows


# -- latents -------------------------------------------------------------------------------------------------------


def to_latents(motion: Tensor) -> Tensor:
    """Vectors (b, 2, t, 2h, 2w), in units of ``unit``, to latents (b, 8, t, h, w)."""
    cells = rearrange(motion, "b c t (h p) (w q) -> b c (p q) t h w", p=CELLS, q=CELLS)
    mixed = [_mixed(cells, [sign / 2 / scale for sign in row]) for row, scale in zip(HAAR, SCALES, strict=True)]
    return rearrange(torch.stack(mixed), "m b c t h w -> b (m c) t h w")


def to_motion(latents: Tensor) -> Tensor:
    """The inverse of ``to_latents``."""
    mixed = rearrange(latents, "b (m c) t h w -> b c m t h w", c=2)
    columns = zip(*HAAR, strict=True)
    cells = [_mixed(mixed, [sign / 2 * scale for sign, scale in zip(c, SCALES, strict=True)]) for c in columns]
    return rearrange(torch.stack(cells), "(p q) b c t h w -> b c t (h p) (w q)", p=CELLS, q=CELLS)


def _mixed(x: Tensor, factors: Sequence[float]) -> Tensor:
    """The sum over dimension 2 of (b, c, 4, t, h, w), weighed; term by term: the same bits for any t, h and w."""
    first, *others = (factor * part for factor, part in zip(factors, x.unbind(2), strict=True))
    for other in others:
        first = first + other
    return first


def unit(width: int, height: int) -> float:
    """Pixels of a picture that a motion score of 1 means in ``STEP`` frames: the score is counted at 576x320."""
    return 2 / (SCORE_SIZE.width / width + SCORE_SIZE.height / height)


def reach(block: int, score: float, width: int, height: int) -> float:
    """Pixels that a vector of length 1 stands for at the last frame of ``block``."""
    return unit(width, height) * score * FRAMES * block / STEP


# -- frames --------------------------------------------------------------------------------------------------------


def reference(vae: StreamingVAE, photo: Tensor) -> Tensor:
    """What the network is told of a photo (b, 3, 1, 64h, 64w) in [-1, 1]: (b, 8 + c, 1, h, w), the same for all blocks.

    That nothing moves, and nano's latents of the photo at a quarter of its sides. ValueError for other sides.
    """
    for name, side in zip(("height", "width"), photo.shape[-2:], strict=True):
        if side % TOKEN or not side:
            raise ValueError(f"{name} {side} is not a positive multiple of {TOKEN}")
    return small_reference(vae, F.avg_pool2d(photo[:, :, 0], SHRINK)[:, :, None])


def small_reference(vae: StreamingVAE, photo: Tensor) -> Tensor:
    """``reference`` of a photo (b, 3, 1, 16h, 16w) that is already as small as the network sees it."""
    (latents,) = encode_stream(vae, [photo])
    return F.pad(latents, (0, 0, 0, 0, 0, 0, CHANNELS, 0))


def decode_stream(latents: Iterable[Tensor], photo: Tensor, score: float) -> Iterator[Tensor]:
    """Frames (1, 3, t, h, w) in [-1, 1] of ``photo`` (1, 3, 1, h, w): itself for block 0 (a chunk of its own), then 4 a
    block, a chunk for each that comes.

    ``latents`` (1, 8, k, h, w) in any chunking. Between the ends of blocks vectors grow evenly, so
    motion does not jump there.
    """
    picture = photo[:, :, 0].float()
    height, width = picture.shape[-2:]
    before: Tensor | None = None  # in pixels, at the last frame made
    block = 0
    for chunk in latents:
        motion = to_motion(chunk.float()).unbind(2)
        if before is None:
            yield photo.float()
            before, motion = torch.zeros_like(motion[0]), motion[1:]
        if not motion:
            continue
        frames = picture.new_empty(1, 3, FRAMES * len(motion), height, width)
        for number, field in enumerate(motion):
            block += 1
            after = field * reach(block, score, width, height)
            for k in range(FRAMES):
                frames[:, :, FRAMES * number + k] = moved(picture, torch.lerp(before, after, (k + 1) / FRAMES))
            before = after
        yield frames


def moved(picture: Tensor, field: Tensor) -> Tensor:
    """``picture`` (b, 3, h, w) looked up at every pixel's place plus ``field`` (b, 2, rows, columns) in pixels.

    Bicubic; beyond the edge is the picture's mirror image.
    """
    height, width = picture.shape[-2:]
    dense = upsampled(field, height, width)
    x = (torch.arange(width, device=picture.device) + 0.5 + dense[:, 0]) * (2 / width) - 1
    y = (torch.arange(height, device=picture.device)[:, None] + 0.5 + dense[:, 1]) * (2 / height) - 1
    grid = torch.stack([x, y], dim=-1)
    found = F.grid_sample(picture, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return found.clamp(-1, 1)


def upsampled(field: Tensor, height: int, width: int) -> Tensor:
    """A field (b, c, rows, columns) at every pixel, (b, c, height, width): linear fields stay exactly linear."""
    rows = interpolation(field.shape[-2], height).to(field)
    columns = interpolation(field.shape[-1], width).to(field)
    return rows @ field @ columns.T


@lru_cache(maxsize=64)
def interpolation(cells: int, pixels: int) -> Tensor:
    """(pixels, cells): values at the centers of cells to values at pixels, by smoothing cubic B-splines.

    Linear values stay exactly linear, also beyond the outermost centers, where the outermost two go on in a straight
    line. Values are weighed 1:2:1 with their neighbors first: what differs from cell to cell is mostly the network's
    noise, which grows with the length of a clip and would make the picture wobble. One cell is constant.
    """
    if cells == 1:
        return torch.ones(pixels, 1, device="cpu")
    cpu: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # kept, so never of the caller's default device
    places = torch.arange(-3, cells + 3, **cpu)
    inner = places.clamp(0, cells - 1)
    extended = torch.eye(cells, **cpu)[inner.long()]
    for end, slope in ((0, 1), (cells - 1, -1)):  # on a straight line: value + steps * (value - its neighbor)
        beyond = (inner - places) * slope * (inner == end)
        extended[:, end] += beyond
        extended[:, end + slope] -= beyond
    smooth = (extended[:-2] + 2 * extended[1:-1] + extended[2:]) / 4
    at = (torch.arange(pixels, **cpu) + 0.5) * cells / pixels - 0.5 + 2
    base = at.floor().clamp(1, cells + 1).long()
    t = at - base
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    taps = [weight[:, None] / 6 * smooth[base + k - 1] for k, weight in enumerate(weights)]
    return (taps[0] + taps[1] + taps[2] + taps[3]).float()
