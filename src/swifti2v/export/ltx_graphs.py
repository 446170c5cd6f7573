"""MobileI2V's VAE as two graphs: a photo to its latent, latents to all frames. The decoder may be a small one."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.ltx_vae import LTXCodec


class LatentEncoder(nn.Module):
    """A photo (1, 3, H, W) in [-1, 1] -> its latent (1, c, 1, h, w), the posterior's mode."""

    def __init__(self, codec: LTXCodec) -> None:
        super().__init__()
        self.vae, self.codec = codec.vae, codec

    def forward(self, photo: Tensor) -> Tensor:
        return self.codec.encode(photo[:, :, None])


class LatentDecoder(nn.Module):
    """Latents (1, c, t, h, w) -> frames (1, 3, 8(t-1)+1, *size) in [-1, 1]."""

    def __init__(self, codec: LTXCodec, size: tuple[int, int]) -> None:
        super().__init__()
        self.vae, self.decoder = codec.vae, codec.decoder
        self.codec, self.size = codec, size

    def forward(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents, *self.size)
