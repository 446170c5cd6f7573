"""Causal video VAEs as streams: encode and decode chunk by chunk, the causal cache held by the caller.

Pixels are (b, 3, t, h, w) in [-1, 1]; latents (b, c, t, h, w), one block for frame 0 and one for every
``temporal_stride`` frames after it. Outside this module latents are always normalized float32.
This module knows neither files nor segments, and never decides where a network lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, patchify, unpatchify
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from .tiled_decoder import Tiling, decode_tiled
from .tiled_encoder import EncoderTiling, encode_tiled
from .tiles import TileCaches

FeatureCache = list[Any]  # one entry per causal convolution: None, a tensor, or diffusers' marker "Rep"


@runtime_checkable
class StreamingVAE(Protocol):
    """A causal VAE whose state travels in arguments; None starts a stream.

    ``encode_chunk`` takes one frame at the start of a stream, then multiples of ``temporal_stride``, and gives
    raw latents (the posterior's mode); ``decode_chunk`` takes any number of raw latent blocks and gives pixels,
    not yet clamped, which the caller may overwrite. Both see to their own dtype. A state may be passed on only once:
    a call consumes the state that it is given. ``decoder_state`` begins a stream whose frame 0 is known to show a photo
    (b, 3, 1, h, w); None for a VAE that has no use for knowing.
    ``latents_mean`` and ``latents_std`` are (c,), float32.
    """

    latent_channels: int
    spatial_stride: int
    temporal_stride: int
    latents_mean: Tensor
    latents_std: Tensor

    def encode_chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]: ...

    def decode_chunk(self, z: Tensor, state: Any) -> tuple[Tensor, Any]: ...

    def decoder_state(self, photo: Tensor) -> Any: ...


@dataclass
class WanStreamState:
    """The causal cache of one stream. Mutable, so that old entries are freed one by one as new ones replace
    them (12 GiB of them in a 2K decode); it belongs to one stream and is worthless after an error inside it."""

    cache: FeatureCache
    first: bool = True
    tiles: TileCaches = field(default_factory=dict)


class WanStreamingVAE:
    """``AutoencoderKLWan`` (Wan2.1 and Wan2.2) as a ``StreamingVAE``. Holds the VAE, no state of any stream.

    ``tiles`` = (rows, columns): decode the last layers tile by tile with a halo, exactly (tiled_decoder.py), for
    less memory; None decodes whole. ``split``: how many up-blocks run whole before the tiles. ``cache_device``: where
    what waits for its tile is parked (caches, what the front gave); None: it stays. ``encoder_*``: the same for the
    encoder's first ``encoder_split`` levels (tiled_encoder.py). ``costs_tiles`` knows what each arrangement takes.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        tiles: tuple[int, int] | None = None,
        split: int = 2,
        cache_device: torch.device | str | None = None,
        encoder_tiles: tuple[int, int] | None = None,
        encoder_split: int = 1,
        encoder_cache_device: torch.device | str | None = None,
    ) -> None:
        config: Any = vae.config
        self.vae: Any = vae
        self.latent_channels: int = config.z_dim
        self.spatial_stride: int = 2 ** len(config.temperal_downsample) * (config.patch_size or 1)
        self.temporal_stride: int = 2 ** sum(config.temperal_downsample)
        self.latents_mean = torch.tensor(config.latents_mean, dtype=torch.float32)
        self.latents_std = torch.tensor(config.latents_std, dtype=torch.float32)
        self.tiling, self.encoder_tiling = None, None
        if tiles is not None:
            self.tiling = Tiling.of(vae.decoder, *tiles, split=split, cache_device=cache_device)
        if encoder_tiles is not None:
            self.encoder_tiling = EncoderTiling.of(
                vae.encoder, *encoder_tiles, split=encoder_split, cache_device=encoder_cache_device
            )

    @torch.no_grad()
    def encode_chunk(
        self, x: Float[Tensor, "b 3 t h w"], state: WanStreamState | None
    ) -> tuple[Float[Tensor, "b c k h2 w2"], WanStreamState]:
        """Raw latents (the posterior's mode) of 1 + 4k frames at the start of a stream, of 4k frames later."""
        state = state or _fresh(self.vae.encoder)
        x = patchify(_enter(self.vae, x).to(self.vae.dtype), self.vae.config.patch_size or 1)
        head = 1 if state.first else 0
        groups, rest = divmod(x.shape[2] - head, self.temporal_stride)
        if rest or x.shape[2] == 0:
            raise ValueError(f"{x.shape[2]} frames are not {head} + a multiple of {self.temporal_stride}")
        # One group per call, also through quant_conv: the arithmetic then cannot depend on the chunking.
        parts = list(x.split([1] * head + [self.temporal_stride] * groups, dim=2))
        if self.encoder_tiling is not None:
            encoded = encode_tiled(self.vae.encoder, parts, (state.cache, state.tiles), self.encoder_tiling)
        else:
            encoded = [self.vae.encoder(part, feat_cache=state.cache, feat_idx=[0]) for part in parts]
        state.first = False
        return torch.cat([self.vae.quant_conv(moments).chunk(2, dim=1)[0] for moments in encoded], dim=2), state

    @torch.no_grad()
    def decode_chunk(
        self, z: Float[Tensor, "b c k h2 w2"], state: WanStreamState | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], WanStreamState]:
        """Pixels, not clamped, of any positive number of raw latent blocks."""
        state = state or _fresh(self.vae.decoder)
        if z.shape[2] == 0:
            raise ValueError("a chunk of 0 latent blocks cannot be decoded")
        blocks = [self.vae.post_quant_conv(block) for block in _enter(self.vae, z).to(self.vae.dtype).split(1, dim=2)]
        firsts = [state.first] + [False] * (len(blocks) - 1)
        if self.tiling is not None:
            x = decode_tiled(self.vae.decoder, blocks, firsts, (state.cache, state.tiles), self.tiling)
        else:
            decoder = self.vae.decoder
            x = torch.cat(
                [
                    decoder(block, feat_cache=state.cache, feat_idx=[0], first_chunk=first)
                    for block, first in zip(blocks, firsts, strict=True)
                ],
                dim=2,
            )
        state.first = False
        return unpatchify(x, self.vae.config.patch_size or 1), state

    def decoder_state(self, photo: Tensor) -> None:
        """Nothing: Wan's decoder has no use for the photo."""
        return None


def streaming(vae: Any) -> StreamingVAE:
    """``vae`` as a ``StreamingVAE``: itself if it already streams, else the adapter of a Wan VAE."""
    if isinstance(vae, AutoencoderKLWan):
        return WanStreamingVAE(vae)
    if isinstance(vae, StreamingVAE):
        return vae
    raise TypeError(f"{type(vae).__name__} has no encode_chunk/decode_chunk and is not an AutoencoderKLWan")


def encode_stream(
    vae: StreamingVAE, chunks: Iterable[Float[Tensor, "b 3 t h w"]]
) -> Iterator[Float[Tensor, "b c k h2 w2"]]:
    """Normalized float32 latents of a clip that arrives in chunks of any number of frames.

    The first latent to come is block 0 alone, which depends on frame 0 only (so it is the anchor); then whole
    blocks as soon as their frames are there. Concatenated, the same bits for any chunking. Closing the iterator
    frees the state. Raises ValueError at the end if the frames seen are not 4k + 1.
    """
    state: Any = None
    waiting: Tensor | None = None
    seen = 0
    for chunk in chunks:
        seen += chunk.shape[2]
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
        del chunk
        if state is None and waiting.shape[2]:
            z, state = _encode_group(vae, waiting[:, :, :1], None)
            waiting = waiting[:, :, 1:]
            yield z
        latents = []
        while waiting.shape[2] >= vae.temporal_stride:
            z, state = _encode_group(vae, waiting[:, :, : vae.temporal_stride], state)
            waiting = waiting[:, :, vae.temporal_stride :]
            latents.append(z)
        waiting = waiting.clone()  # not a view that keeps the whole chunk alive
        if latents:
            yield torch.cat(latents, dim=2)
    if waiting is not None and waiting.shape[2]:
        nearest = (seen - 1 + vae.temporal_stride // 2) // vae.temporal_stride * vae.temporal_stride + 1
        raise ValueError(
            f"{seen} frames do not fill whole latent blocks: a clip has a multiple of {vae.temporal_stride} frames "
            f"and 1; nearest legal count: {nearest}"
        )


def encode_pairs(
    vae: StreamingVAE, pairs: Iterable[Float[Tensor, "2 3 t h w"]]
) -> Iterator[Float[Tensor, "1 c k h2 w2"]]:
    """Two clips at once, as a batch of two: the latents of both behind each other along channels."""
    for latents in encode_stream(vae, pairs):
        yield torch.cat(latents.split(1), dim=1)


def decode_stream(
    vae: StreamingVAE,
    latents: Iterable[Float[Tensor, "b c k h2 w2"]],
    photo: Float[Tensor, "b 3 1 h w"] | None = None,
) -> Iterator[Float[Tensor, "b 3 t h w"]]:
    """Pixels, float32 clamped to [-1, 1], of normalized latents in chunks of any number of blocks.

    ``photo``: what frame 0 is known to show; nano's decoder takes the detail of later frames from it. One output per
    non-empty input; concatenated, the same bits for any chunking. Closing the iterator frees the state.
    """
    state: Any = None if photo is None else vae.decoder_state(_enter(vae, photo))
    for chunk in latents:
        if chunk.shape[2] == 0:
            continue
        with torch.no_grad():
            z = chunk.float() * _per_channel(vae.latents_std, chunk) + _per_channel(vae.latents_mean, chunk)
            x, state = vae.decode_chunk(_enter(vae, z), state)
            x = x.float().clamp_(-1, 1)
        yield x
        del x  # large, and the next is about to be made


def _encode_group(vae: StreamingVAE, frames: Tensor, state: Any) -> tuple[Tensor, Any]:
    with torch.no_grad():
        z, state = vae.encode_chunk(_enter(vae, frames), state)
        z = z.float()
        return (z - _per_channel(vae.latents_mean, z)) / _per_channel(vae.latents_std, z), state


def _enter(vae: object, x: Tensor) -> Tensor:
    """Wake a module's offload hooks, which fire by themselves only on forward, and bring x to where it computes.

    Objects that are not diffusers modules (the adapter, which enters its own VAE) take x as it is. The dtype is left
    to ``encode_chunk`` and ``decode_chunk``: a VAE may want its first layers in float32.
    """
    if not isinstance(vae, ModelMixin):
        return x
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vae)
    device = getattr(hook, "execution_device", None)
    return x.to(vae.device if device is None else device)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=torch.float32).view(1, -1, 1, 1, 1)


def _fresh(coder: nn.Module) -> WanStreamState:
    return WanStreamState([None] * sum(isinstance(m, WanCausalConv3d) for m in coder.modules()))
