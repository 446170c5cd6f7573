"""LTX-Video's VAE (diffusers' ``AutoencoderKLLTXVideo``, the kind without timesteps) as MobileI2V uses it.

32x32 pixels and 8 frames a latent; sides need only be multiples of 4, since its convolutions pad: latents cover
ceil(side / 32), and what is decoded too much at the bottom and the right is cut. The encoder is causal, so block 0 of a
clip is the latent of its first frame. The decoder is not: every frame depends on the blocks within its reach, sixteen
and more on either side (conv_in, 4 + 3 residual blocks and an upsampler before the first doubling of time). Overlapping
windows would be exact only if they were longer than the clips made here, so a clip is decoded whole. The decoder may be
replaced by a small one (``turbo_decoder``).

This module knows neither files nor how latents are made.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .causal_vae import _enter

LatentNorm = Literal["raw", "per_channel"]


class LTXCodec:
    """Pixels <-> the latents that a DiT was trained on. Holds the networks, no state.

    ``latent_norm``: "raw" latents as they leave the encoder (MobileI2V's published network), or "per_channel" by the
    VAE's own mean and deviation (LTX-Video's way). ``decoder`` (``TurboDecoder``) replaces the VAE's own.
    Raises ValueError for a VAE or a norm that does not fit.
    """

    def __init__(self, vae: Any, decoder: Any = None, latent_norm: str = "raw") -> None:
        if latent_norm not in get_args(LatentNorm):
            raise ValueError(f"latent_norm {latent_norm!r} is neither 'raw' nor 'per_channel'")
        config = vae.config
        if config.timestep_conditioning or not config.encoder_causal:
            raise ValueError("the VAE is not of LTX-Video 0.9.0's kind: causal encoder, decoder without timesteps")
        if latent_norm == "raw" and config.scaling_factor != 1.0:
            raise ValueError(f"raw latents are not scaled, but this VAE has scaling_factor {config.scaling_factor}")
        if decoder is not None and decoder.config["latent_channels"] != config.latent_channels:
            channels = decoder.config["latent_channels"], config.latent_channels
            raise ValueError(f"the decoder takes {channels[0]} channels, the VAE makes {channels[1]}")
        self.vae, self.decoder, self.latent_norm = vae, decoder, latent_norm
        self.latent_channels: int = config.latent_channels
        self.spatial_stride: int = vae.spatial_compression_ratio
        self.temporal_stride: int = vae.temporal_compression_ratio

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Pixels (b, 3, 1+8k, H, W) in [-1, 1], H and W multiples of 4 -> latents (b, c, 1+k, ceil(H/32), ceil(W/32)).

        The posterior's mode, float32: the same photo gives the same latents. Raises ValueError for other shapes.
        """
        unit, s = self.vae.config.patch_size, self.temporal_stride
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[3] % unit or x.shape[4] % unit or (x.shape[2] - 1) % s:
            raise ValueError(f"pixels {tuple(x.shape)} are not (b, 3, {s}k+1, H, W), H and W multiples of {unit}")
        z = self.vae.encode(_enter(self.vae, x).to(self.vae.dtype)).latent_dist.mode().float()
        scale, mean = self._norm(z)
        return (z - mean) * scale

    @torch.no_grad()
    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """All latents of a clip (b, c, t, h, w) -> pixels (b, 3, 8(t-1)+1, height, width), float32 in [-1, 1]."""
        scale, mean = self._norm(z)
        raw = z.float() / scale + mean
        network = self.vae if self.decoder is None else self.decoder
        pixels = network.decode(_enter(network, raw).to(network.dtype)).sample
        return pixels[..., :height, :width].float().clamp_(-1, 1)

    def _norm(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.latent_norm == "raw":
            return torch.ones((), device=z.device), torch.zeros((), device=z.device)
        mean, std = (v.float().to(z.device).view(1, -1, 1, 1, 1) for v in (self.vae.latents_mean, self.vae.latents_std))
        return self.vae.config.scaling_factor / std, mean
