"""mobile-nano's VAE as graphs: encode a photo, decode frame 0, decode four later frames carrying the photo's detail.

The latter are three graphs, so that the registration, which goes frame by frame, is in one of them once: ``NanoSoft``,
``NanoCarry`` for each frame, ``NanoFinish``. The transform is a convolution of stride 16, its inverse the transposed
one. The state of the stream, which ``NanoVAE`` holds in a ``DecoderState``, travels as tensors: the photo and where it
has moved. Latents are normalized, pixels in [-1, 1]. It knows tensors, not files or formats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.nano_vae import BLOCK, CELL, COLORS, GROUP, RESIDUAL, NanoVAE, Refiner
from .carrying import Carrier, Trust, Warp


class _Transform(nn.Module):
    """What the graphs share. Buffers named ``exact_*`` are never stored in fewer bits: rounded, the transform would not
    invert itself."""

    exact_mean: Tensor
    exact_std: Tensor

    def __init__(self, vae: NanoVAE) -> None:
        super().__init__()
        self.register_buffer("exact_mean", vae.latents_mean[None, :, None, None].clone(), persistent=False)
        self.register_buffer("exact_std", vae.latents_std[None, :, None, None].clone(), persistent=False)

    def constant(self, name: str, matrix: Tensor, frames: int) -> None:
        """A matrix (latents, colors * frames * 256) as the filter of a convolution."""
        filters = matrix.reshape(-1, COLORS * frames, BLOCK, BLOCK)
        self.register_buffer(f"exact_{name}", filters.contiguous(), persistent=False)

    def normalized(self, z: Tensor) -> Tensor:
        return (z - self.exact_mean) / self.exact_std

    def raw(self, z: Tensor) -> Tensor:
        return z * self.exact_std + self.exact_mean


class NanoEncoder(_Transform):
    """A photo (1, 3, h, w) -> the anchor and the block of a video that stands still, both (1, c, 1, h/16, w/16)."""

    exact_image: Tensor
    exact_still: Tensor

    def __init__(self, vae: NanoVAE) -> None:
        super().__init__(vae)
        still = vae.analysis_video.T.unflatten(1, (COLORS, GROUP, -1)).sum(2)  # four equal frames: one, four times
        self.constant("image", vae.analysis_image.T, 1)
        self.constant("still", still.flatten(1), 1)

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor]:
        anchor, still = (F.conv2d(photo, w, stride=BLOCK) for w in (self.exact_image, self.exact_still))
        return self.normalized(anchor)[:, :, None], self.normalized(still)[:, :, None]


class NanoFirst(_Transform):
    """Block 0 (1, c, 1, h, w) -> frame 0 (1, 3, 1, 16h, 16w)."""

    exact_synthesis: Tensor

    def __init__(self, vae: NanoVAE) -> None:
        super().__init__(vae)
        self.constant("synthesis", vae.synthesis_image, 1)
        self.refiner = vae.refine_image

    def forward(self, latents: Tensor) -> Tensor:
        z = latents[:, :, 0]
        linear = F.conv_transpose2d(self.raw(z), self.exact_synthesis, stride=BLOCK)
        x = linear + refined(self.refiner, F.pixel_unshuffle(linear, CELL), z)
        return x.clamp(-1, 1)[:, :, None]


class NanoSoft(_Transform):
    """A later block (1, c, 1, h, w) -> its four frames by the inverse transform alone, (1, 3, 4, 16h, 16w)."""

    exact_synthesis: Tensor

    def __init__(self, vae: NanoVAE) -> None:
        super().__init__(vae)
        self.constant("synthesis", vae.synthesis_video, GROUP)

    def forward(self, latents: Tensor) -> Tensor:
        soft = F.conv_transpose2d(self.raw(latents[:, :, 0]), self.exact_synthesis, stride=BLOCK)
        return soft.unflatten(1, (COLORS, GROUP))


class NanoCarry(nn.Module):
    """The photo and one soft frame (1, 3, 16h, 16w), the flow at the frame before (1, 2, 4h, 4w; zero at first)
    -> the photo as this frame shows it, and the flow there."""

    def __init__(self, size: tuple[int, int], warp: Warp = "grid-sample") -> None:
        super().__init__()
        self.carrier = Carrier(size, warp)

    def forward(self, photo: Tensor, soft: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        flow = self.carrier.follow(self.carrier.pyramid(photo), self.carrier.pyramid(soft), flow)
        return self.carrier.carried(photo, flow), flow


class NanoFinish(_Transform):
    """A later block, its soft frames and the photo moved to each (both (1, 3, 4, 16h, 16w)) -> the finished frames."""

    exact_synthesis: Tensor
    exact_analysis: Tensor

    def __init__(self, vae: NanoVAE, size: tuple[int, int]) -> None:
        super().__init__(vae)
        self.constant("synthesis", vae.synthesis_video, GROUP)
        self.constant("analysis", vae.analysis_video.T, GROUP)
        self.refiner, self.trust = vae.refine_video, Trust(size)

    def forward(self, latents: Tensor, soft: Tensor, moved: Tensor) -> Tensor:
        known_to_latents = F.conv2d(moved.flatten(1, 2), self.exact_analysis, stride=BLOCK)
        claims = F.conv_transpose2d(known_to_latents, self.exact_synthesis, stride=BLOCK)
        # Frames as a batch: they are trusted one by one.
        frames = [x.transpose(1, 2)[0] for x in (soft, claims.unflatten(1, (COLORS, GROUP)), moved)]
        fused = self.trust(*frames).transpose(0, 1)[None]
        seen = torch.cat([F.pixel_unshuffle(x.flatten(1, 2), CELL) for x in (fused, moved)], dim=1)
        x = fused.flatten(1, 2) + refined(self.refiner, seen, latents[:, :, 0])
        return x.clamp(-1, 1).unflatten(1, (COLORS, GROUP))


def refined(refiner: Refiner, seen: Tensor, z: Tensor) -> Tensor:
    """``Refiner.forward`` in pixels, no memory formats: (b, seen, 4h, 4w) -> (b, colors * frames, 16h, 16w)."""
    x: Any = refiner.head(seen) + F.pixel_shuffle(refiner.inject(z), BLOCK // CELL)
    for layer in refiner.layers:
        x = layer(x)
    return F.pixel_shuffle(RESIDUAL * refiner.tail(x), CELL)
