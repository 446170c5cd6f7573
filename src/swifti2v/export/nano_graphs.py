"""mobile-nano around its network as two graphs: what the network is told of a photo, and the photo moved for a block.

``motion_field`` at one fixed size: Haar transform, shrinking and nano's transform are convolutions, splines two
matrices. The state of the stream, where every part of the photo has gone so far, travels as a tensor.
It knows tensors, not files or formats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import motion_field
from ..models.nano_vae import BLOCK, COLORS, NanoVAE
from ..motion_field import CELLS, CHANNELS, FRAMES, SHRINK, TOKEN
from .warp import Sampler, Warp


class NanoEncoder(nn.Module):
    """A photo (1, 3, H, W) in [-1, 1] -> the anchor (1, 8, 1, H/64, W/64), which is zero, and the reference (1, 8 + c,
    1, H/64, W/64) of every block.

    Buffers named ``exact_*`` are never stored in fewer bits.
    """

    exact_mean: Tensor
    exact_std: Tensor
    exact_image: Tensor

    def __init__(self, vae: NanoVAE) -> None:
        super().__init__()
        # That nothing moves: filters of zeros, so that every output comes of the photo, as converters expect.
        filters = vae.analysis_image.T.reshape(-1, COLORS, BLOCK, BLOCK)
        self._constant("image", filters, (0, 0, 0, 0, 0, 0, CHANNELS, 0), 0.0)
        self._constant("mean", vae.latents_mean[None, :, None, None], (0, 0, 0, 0, CHANNELS, 0), 0.0)
        self._constant("std", vae.latents_std[None, :, None, None], (0, 0, 0, 0, CHANNELS, 0), 1.0)

    def _constant(self, name: str, values: Tensor, pad: tuple[int, ...], value: float) -> None:
        self.register_buffer(f"exact_{name}", F.pad(values, pad, value=value))

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor]:
        found = F.conv2d(F.avg_pool2d(photo, SHRINK), self.exact_image, stride=BLOCK)
        reference = ((found - self.exact_mean) / self.exact_std)[:, :, None]
        return reference[:, :CHANNELS], reference


class NanoDecoder(nn.Module):
    """A photo (1, 3, H, W), one block (1, 8, 1, h, w), the field (1, 2, 2h, 2w) in pixels at the end of the block
    before, the pixels (1,) that a vector of length 1 stands for -> frames (1, 3, 4, H, W), the field at their end."""

    exact_haar: Tensor
    exact_rows: Tensor
    exact_columns: Tensor

    def __init__(self, size: tuple[int, int], warp: Warp = "grid-sample") -> None:
        super().__init__()
        height, width = size
        impulses = torch.eye(CHANNELS)[:, :, None, None, None]
        haar = motion_field.to_motion(impulses).reshape(CHANNELS, CHANNELS).T  # (x and y of each cell, latents)
        rows = motion_field.interpolation(height // TOKEN * CELLS, height)
        columns = motion_field.interpolation(width // TOKEN * CELLS, width)
        self.register_buffer("exact_haar", haar[..., None, None].contiguous())
        self.register_buffer("exact_rows", rows.clone())
        self.register_buffer("exact_columns", columns.T.contiguous())
        self.sampler = Sampler(size, warp)

    def forward(self, photo: Tensor, latents: Tensor, before: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        vectors = F.pixel_shuffle(F.conv2d(latents[:, :, 0], self.exact_haar), CELLS)
        after = vectors * reach[:, None, None, None]
        start, end = (self.exact_rows @ field @ self.exact_columns for field in (before, after))
        step = (end - start) / FRAMES
        frames = [self.sampler(photo, start + (k + 1) * step) for k in range(FRAMES)]
        return torch.stack(frames, dim=2), after
