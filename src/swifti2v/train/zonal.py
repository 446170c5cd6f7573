"""The zonal DCT: nano's VAE starts from it (``choose``), and every VAE is measured against it (``Yardstick``).

A clip is cut as the VAE cuts it: frame 0 alone, then groups of four, in blocks of 16x16 pixels. Kept are the
coefficients of largest variance over training clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..models.nano_vae import BLOCK, COLORS, GROUP, dct, opponent_colors

BT601 = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

Draw = Callable[[int, int], Tensor]
"""(index, frames) -> a training clip (3, frames, h, w) in [-1, 1], always the same for the same index."""


def to_coefficients(x: Tensor, colors: Tensor) -> Tensor:
    """Pixels (3, t, h, w) -> DCT coefficients (blocks, 3*t*256), flat (color, t, v, u), after a 3x3 color matrix."""
    y = torch.einsum("cr,rthw->cthw", colors, x)
    blocks = rearrange(y, "c t (h p) (w q) -> h w c t p q", p=BLOCK, q=BLOCK)
    spatial, temporal = dct(BLOCK).float(), dct(x.shape[1]).float()
    return torch.einsum("hwcfyx,tf,vy,ux->hwctvu", blocks, temporal, spatial, spatial).flatten(2).flatten(0, 1)


def to_pixels(coefficients: Tensor, colors: Tensor, frames: int, height: int) -> Tensor:
    """The inverse of ``to_coefficients`` for orthonormal DCTs and any invertible color matrix."""
    shape = {"h": height // BLOCK, "c": COLORS, "t": frames, "v": BLOCK}
    blocks = rearrange(coefficients, "(h w) (c t v u) -> h w c t v u", **shape)
    spatial, temporal = dct(BLOCK).float(), dct(frames).float()
    y = torch.einsum("hwctvu,tf,vy,ux->hwcfyx", blocks, temporal, spatial, spatial)
    return torch.einsum("rc,cthw->rthw", colors.inverse(), rearrange(y, "h w c t p q -> c t (h p) (w q)"))


def energies(draw: Draw, frames: int, clips: int, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every DCT coefficient (3*frames*256,) over clips: frame 0, or the four frames after it."""
    kinds = COLORS * frames * BLOCK**2
    total, squares, count = torch.zeros(kinds), torch.zeros(kinds), 0
    for index in range(clips):
        x = draw(index, 1 if frames == 1 else 1 + GROUP)[:, -frames:]
        values = to_coefficients(x, colors)
        total, squares, count = total + values.sum(0), squares + values.square().sum(0), count + len(values)
    mean = total / count
    return mean, squares / count - mean.square()


def choose(draw: Draw, channels: int, clips: int) -> dict[str, Any]:
    """NanoVAE's lists: kept coefficients, channel by channel alike where possible, and half-whitening scales."""
    (mean_image, image), (_, video) = (
        energies(draw, frames, clips, opponent_colors().float()) for frames in (1, GROUP)
    )
    kept_image, kept_video = (set(v.topk(channels).indices.tolist()) for v in (image, video))
    still = {i: i // 256 * 256 * GROUP + i % 256 for i in kept_image}  # (color, v, u) at temporal frequency 0
    shared = sorted((i for i in kept_image if still[i] in kept_video), key=lambda i: -float(image[i]))
    lone_image = sorted(kept_image - set(shared), key=lambda i: -float(image[i]))
    lone_video = sorted(kept_video - {still[i] for i in shared}, key=lambda i: -float(video[i]))
    images, videos = shared + lone_image, [still[i] for i in shared] + lone_video
    # A motionless clip's coefficient at temporal frequency 0 is sqrt(GROUP) times the photo's: undo that everywhere.
    gain = math.sqrt(GROUP)
    std_image, std_video = image[images].sqrt(), video[videos].sqrt() / gain
    common = torch.cat([std_image[: len(shared)], torch.zeros(len(lone_image))])
    halves = [torch.where(common > 0, common, std).rsqrt() for std in (std_image, std_video)]
    rms = math.sqrt(float((std_image * halves[0]).square().mean() + (std_video * halves[1]).square().mean()) / 2)
    scale_image, scale_video = halves[0] / rms, halves[1] / rms / gain
    mean = torch.where(common > 0, mean_image[images] * scale_image, torch.zeros(channels))
    return {
        "kept_image": images,
        "kept_video": videos,
        "scale_image": [round(s, 6) for s in scale_image.tolist()],
        "scale_video": [round(s, 6) for s in scale_video.tolist()],
        "latents_mean": [round(m, 4) if i < 3 or abs(m) > 0.05 else 0.0 for i, m in enumerate(mean.tolist())],
        "latents_std": [1.0] * channels,
    }


class Yardstick:
    """Zonal DCT in BT.601 YCbCr: the ``channels`` coefficients of largest variance over training clips."""

    def __init__(self, draw: Draw, channels: int, clips: int = 300) -> None:
        self.colors = torch.tensor(BT601)
        self.kept: dict[int, Tensor] = {}
        for frames in (1, GROUP):
            variance = energies(draw, frames, clips, self.colors)[1]
            self.kept[frames] = torch.zeros(len(variance)).index_fill_(0, variance.topk(channels).indices, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Code and decode (3, 1+4k, h, w) with the VAE's causal split."""
        groups = [x[:, :1], *(group for group in x[:, 1:].split(GROUP, dim=1) if group.shape[1])]
        return torch.cat([self._block(group) for group in groups], dim=1)

    def _block(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        return to_pixels(to_coefficients(x, self.colors) * self.kept[frames], self.colors, frames, x.shape[2])
