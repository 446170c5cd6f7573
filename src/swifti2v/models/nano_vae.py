"""NanoVAE: a causal 16x16x4 video autoencoder built around a fixed zonal DCT.

The encoder is linear and never trained: orthonormal opponent colors, an orthonormal DCT over 16x16 pixels (block 0) or
4x16x16 (later blocks), and the coefficients that matter most (the config's lists). So latents stay the same however
long the decoder is trained, and encoding a 2K clip costs seconds on a CPU. The decoder inverts the transform and adds a
learned residual at quarter resolution, zero before training. What the few coefficients of later blocks leave out, it
takes from the sharp first frame, moved to where the soft frames show it (``carry``, docs/decisions/0008): only what the
kept coefficients say nothing about, so that they are never contradicted.

It does not know files, tiling, or how its lists were chosen (train/zonal.py does).
Measured against the zonal DCT of equal channels in nano/DATA.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from .. import carry

BLOCK, GROUP, COLORS, CELL = 16, 4, 3, 4  # pixels a side, frames, colors, pixels a side of one refiner position
# What the transform leaves out is about 0.02 of the range of pixels; at scale 1 every step of Adam would drown it.
RESIDUAL = 1 / 64
# Luma, then two opponent colors: close to the photos' principal colors (0.2 dB better than BT.601 YCbCr in this place).
_COLORS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))


@dataclass(frozen=True)
class EncoderState:
    """What the encoder carries between chunks: only that block 0 has been read."""


@dataclass(frozen=True)
class DecoderState:
    """What the decoder carries between chunks: the sharp ``picture`` (b, 3, h, w), float32, whose detail later frames
    take (the user's photo, or frame 0 as decoded), and where it has moved; no ``trail`` before block 0."""

    picture: Tensor
    trail: carry.Trail | None = None


@dataclass(frozen=True)
class PointDistribution:
    """A distribution without spread, in the place of diffusers' DiagonalGaussianDistribution."""

    mean: Tensor

    def mode(self) -> Tensor:
        """The latent."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latent: encoding is deterministic, ``generator`` is accepted and unused."""
        return self.mean


@dataclass(frozen=True)
class EncoderOutput:
    """``encode``'s result."""

    latent_dist: PointDistribution


@dataclass(frozen=True)
class DecoderOutput:
    """``decode``'s result: pixels (b, 3, 1+4k, h, w)."""

    sample: Tensor


class NanoVAE(ModelMixin, ConfigMixin):  # the bases' config_name differ in diffusers itself
    """Causal autoencoder: pixels (b, 3, 1+4k, h, w) in [-1, 1] <-> latents (b, c, 1+k, h/16, w/16).

    ``kept_image`` and ``kept_video`` are the kept DCT coefficients: flat indices of (color, v, u) and (color, t, v, u);
    ``scale_image`` and ``scale_video`` multiply them. Where both lists name the same (color, v, u) at temporal
    frequency 0 they agree in place and scale, so that a motionless video has (nearly) the same latents in every block.
    """

    spatial_stride = BLOCK
    temporal_stride = GROUP

    @register_to_config
    def __init__(
        self,
        kept_image: Sequence[int],
        kept_video: Sequence[int],
        scale_image: Sequence[float],
        scale_video: Sequence[float],
        latents_mean: Sequence[float],
        latents_std: Sequence[float],
        image_width: int = 96,
        image_layers: int = 5,
        video_width: int = 96,
        video_layers: int = 4,
    ) -> None:
        super().__init__()
        channels = len(kept_image)
        lists = (kept_video, scale_image, scale_video, latents_mean, latents_std)
        if any(len(values) != channels for values in lists):
            raise ValueError(f"every list must have kept_image's {channels} entries, not {[len(v) for v in lists]}")
        self.latent_channels = channels
        cell = COLORS * CELL * CELL
        self.refine_image = Refiner(cell, cell, channels, image_width, image_layers)
        self.refine_video = Refiner(2 * GROUP * cell, GROUP * cell, channels, video_width, video_layers)
        self._place_constants(torch.device("cpu"))

    def _place_constants(self, device: torch.device) -> None:
        config: Any = self.config
        for name, kept, frames, scale in (
            ("image", config.kept_image, 1, config.scale_image),
            ("video", config.kept_video, GROUP, config.scale_video),
        ):
            rows, factors = basis(kept, frames), torch.tensor(scale, dtype=torch.float64)[:, None]
            self._constant(f"analysis_{name}", (rows * factors).T, device)
            self._constant(f"synthesis_{name}", rows / factors, device)
        self._constant("mean", torch.tensor(config.latents_mean, dtype=torch.float64), device)
        self._constant("std", torch.tensor(config.latents_std, dtype=torch.float64), device)

    def _constant(self, name: str, value: Tensor, device: torch.device) -> None:
        self.register_buffer(name, value.to(device, torch.float32).contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NanoVAE:
        """Move with the parameters but stay float32: a transform rounded to bfloat16 would no longer invert itself."""
        super()._apply(fn, recurse)
        if self.get_buffer("mean").dtype != torch.float32:
            self._place_constants(self.get_buffer("mean").device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """float32: what goes in and comes out; the refiner's parameters may be bfloat16 inside."""
        return torch.float32

    @property
    def latents_mean(self) -> Tensor:
        """(c,) float32: what to subtract from raw latents."""
        return self.get_buffer("mean")

    @property
    def latents_std(self) -> Tensor:
        """(c,) float32: what to divide them by afterwards; all ones, since scaling is part of the transform."""
        return self.get_buffer("std")

    # -- streaming ------------------------------------------------------------------------------------------------

    def encode_chunk(self, x: Tensor, state: EncoderState | None = None) -> tuple[Tensor, EncoderState]:
        """Pixels (b, 3, t, h, w), t = 1+4k at first, then 4k (else ValueError) -> raw float32 latents by block."""
        _check_pixels(x, first=state is None)
        blocks = []
        if state is None:
            blocks.append(self._encode_block(x[:, :, :1]))
            x = x[:, :, 1:]
        blocks += [self._encode_block(group) for group in x.split(GROUP, dim=2) if group.shape[2]]
        return torch.cat(blocks, dim=2), EncoderState()

    def decode_chunk(self, z: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Raw latents (b, c, k, h, w) (else ValueError) -> float32 pixels, not clamped, 1+4(k-1) frames, later 4k."""
        if z.ndim != 5 or z.shape[1] != self.latent_channels or z.shape[2] < 1:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} are not (b, {self.latent_channels}, blocks >= 1, h, w)"
            )
        frames = []
        for block in z.unbind(dim=2):
            x, state = self._decode_block(block, state)
            frames.append(x)
        assert state is not None
        return torch.cat(frames, dim=2), state

    def _encode_block(self, x: Tensor) -> Tensor:
        analysis = self.analysis_image if x.shape[2] == 1 else self.analysis_video
        patches = rearrange(x.float(), "b c t (h p) (w q) -> b h w (c t p q)", p=BLOCK, q=BLOCK)
        return rearrange(_exact_product(patches, analysis), "b h w c -> b c 1 h w")

    def decoder_state(self, photo: Tensor) -> DecoderState:
        """A state that begins a stream whose first frame is known to show ``photo`` (b, 3, 1, h, w): later frames take
        their detail from it instead of from frame 0 as decoded."""
        return DecoderState(photo[:, :, 0].float())

    def _decode_block(self, z: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        if state is None or state.trail is None:
            linear = self.decode_linear(z, first=True)
            x = linear + unfold_cells(self.refine_image(fold_cells(linear), self.normalize(z)).float(), 1)
            picture = x[:, :, 0].detach().clone() if state is None else state.picture
            return x, DecoderState(picture, carry.start(picture))
        # Frames of 2K are large: what is not needed again goes before the next is made, here and in _carried.
        fused, moved, trail = self._carried(self.decode_linear(z, first=False), state.trail)
        seen = self._seen(fused, moved)
        del moved
        x = fused + unfold_cells(self.refine_video(seen, self.normalize(z)).float(), GROUP)
        return x, DecoderState(state.picture, trail)

    @torch.no_grad()
    def _carried(self, linear: Tensor, trail: carry.Trail) -> tuple[Tensor, Tensor, carry.Trail]:
        """``linear`` with the picture's detail where that can be trusted, the moved picture, the trail moved on."""
        with torch.autocast(linear.device.type, enabled=False):
            moved = torch.empty_like(linear)
            for frame, place in zip(linear.unbind(2), moved.unbind(2), strict=True):
                trail = carry.follow(trail, carry.scaled(frame, trail.flow.shape[-2:]))
                place.copy_(carry.carried(trail))
            fused = self.decode_linear(self._encode_block(moved)[:, :, 0], first=False)
            for known, claim, picture in zip(linear.unbind(2), fused.unbind(2), moved.unbind(2), strict=True):
                claim.copy_(torch.addcmul(known, _half_size_trust(known, claim), picture - claim))
        return fused, moved, trail

    @torch.no_grad()
    def _seen(self, fused: Tensor, moved: Tensor) -> Tensor:
        """Both as cells (b, 2*3*t*16, h/4, w/4), as the refiner wants them: in its dtype, channels last."""
        b, _, t, h, w = fused.shape
        half, dtype = COLORS * t * CELL * CELL, self.refine_video.head.weight.dtype
        size = (b, 2 * half, h // CELL, w // CELL)
        seen = torch.empty(size, dtype=dtype, device=fused.device, memory_format=torch.channels_last)
        for cells, x in zip(seen.split(half, dim=1), (fused, moved), strict=True):
            shape = {"c": COLORS, "t": t, "p": CELL, "q": CELL}
            rearrange(cells, "b (c t p q) h w -> b c t h p w q", **shape).copy_(
                rearrange(x, "b c t (h p) (w q) -> b c t h p w q", p=CELL, q=CELL)
            )
        return seen

    def decode_linear(self, z: Tensor, first: bool) -> Tensor:
        """One raw latent block (b, c, h, w) -> its frames (b, 3, 1 or 4, 16h, 16w) by the inverse DCT alone."""
        synthesis = self.synthesis_image if first else self.synthesis_video
        patches = _exact_product(rearrange(z.float(), "b c h w -> b h w c"), synthesis)
        shape = {"c": COLORS, "t": 1 if first else GROUP, "p": BLOCK, "q": BLOCK}
        return rearrange(patches, "b h w (c t p q) -> b c t (h p) (w q)", **shape)

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents (b, c, h, w) -> normalized, float32."""
        return (z.float() - self.latents_mean[:, None, None]) / self.latents_std[:, None, None]

    # -- whole clips, as diffusers has them -----------------------------------------------------------------------

    def encode(self, x: Tensor) -> EncoderOutput:
        """Pixels (b, 3, 1+4k, h, w) -> ``.latent_dist`` over raw latents; equal to any chunked encoding bit by bit."""
        return EncoderOutput(PointDistribution(self.encode_chunk(x)[0]))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Raw latents (b, c, 1+k, h, w) -> ``.sample``; equal to any chunked decoding bit by bit."""
        return DecoderOutput(self.decode_chunk(z)[0])

    def forward(self, x: Tensor) -> DecoderOutput:
        """Encode and decode."""
        return self.decode(self.encode(x).latent_dist.mode())


class Refiner(nn.Module):
    """Residual for one block of frames, at a quarter of the resolution, from its linear decoding and its latents.

    A plain residual stack without normalization (its statistics would depend on the frame's size); leaky, since with
    plain ReLUs a first run died within 1,000 steps, all positions negative before the last layer. The latents enter
    once, unfolded to the block's 4x4 positions: this also tells a position where in its DCT block it lies.
    """

    def __init__(self, seen: int, out: int, latents: int, width: int, layers: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(seen, width, 3, padding=1)
        self.inject = nn.Conv2d(latents, width * (BLOCK // CELL) ** 2, 1)
        self.layers = nn.ModuleList(ResidualLayer(width) for _ in range(layers))
        self.tail = nn.Conv2d(width, out, 3, padding=1)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)

    def forward(self, seen: Tensor, latents: Tensor) -> Tensor:
        """(b, seen, 4h, 4w) pixels in cells and (b, latents, h, w) -> residual (b, out, 4h, 4w)."""
        dtype = self.head.weight.dtype
        # Channels last is 2-5 times faster in CPU convolutions.
        x = self.head(seen.to(dtype, memory_format=torch.channels_last))
        x = x + F.pixel_shuffle(self.inject(latents.to(dtype)), BLOCK // CELL).contiguous(
            memory_format=torch.channels_last
        )
        for layer in self.layers:
            x = layer(x)
        return RESIDUAL * self.tail(x)


class ResidualLayer(nn.Module):
    """x + conv(act(conv(act(x)))), act a leaky ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.normal_(self.second.weight, std=0.1 / math.sqrt(9 * width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> the same shape."""
        return x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.1)), 0.1))


def _half_size_trust(known: Tensor, claimed: Tensor) -> Tensor:
    """``carry.trust`` of frames (b, 3, h, w) by what both show at half the size, where the kept coefficients end."""
    half = (known.shape[-2] // 2, known.shape[-1] // 2)
    small, claim = carry.scaled(known, half), carry.scaled(claimed, half)
    weight = carry.trust(small - carry.blur(small), claim - carry.blur(claim), 3)
    return F.interpolate(weight, known.shape[-2:], mode="bilinear", align_corners=False)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # the caller's autocast would round the transform to bfloat16
        return a @ b


def dct(size: int) -> Tensor:
    """Orthonormal DCT-II as a (size, size) float64 matrix; row k is frequency k."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi * (2 * x + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def opponent_colors() -> Tensor:
    """The orthonormal (3, 3) color matrix, rows luma and two opponent colors, columns RGB; float64."""
    return F.normalize(torch.tensor(_COLORS, dtype=torch.float64), dim=1)


def basis(kept: Sequence[int], frames: int) -> Tensor:
    """Orthonormal float64 rows (len(kept), 3*frames*256): ``kept`` flat (color, t, v, u), columns (rgb, t, y, x)."""
    index = torch.tensor(list(kept))
    u, v = index % BLOCK, index // BLOCK % BLOCK
    t, c = index // BLOCK**2 % frames, index // (BLOCK**2 * frames)
    colors = opponent_colors()[c]
    rows = torch.einsum("nr,nf,ny,nx->nrfyx", colors, dct(frames)[t], dct(BLOCK)[v], dct(BLOCK)[u])
    return rows.flatten(1)


def fold_cells(x: Tensor) -> Tensor:
    """Frames (b, 3, t, h, w) -> channels (b, 3*t*16, h/4, w/4)."""
    return rearrange(x, "b c t (h p) (w q) -> b (c t p q) h w", p=CELL, q=CELL)


def unfold_cells(x: Tensor, frames: int) -> Tensor:
    """Channels (b, 3*t*16, h/4, w/4) -> frames (b, 3, t, h, w)."""
    return rearrange(x, "b (c t p q) h w -> b c t (h p) (w q)", c=COLORS, t=frames, p=CELL, q=CELL)


def _check_pixels(x: Tensor, first: bool) -> None:
    if x.ndim != 5 or x.shape[1] != COLORS:
        raise ValueError(f"pixels of shape {tuple(x.shape)} are not (b, 3, frames, h, w)")
    for name, side in (("height", x.shape[3]), ("width", x.shape[4])):
        if side % BLOCK or not side:
            nearest = max(BLOCK, round(side / BLOCK) * BLOCK)
            raise ValueError(f"{name} {side} is not a positive multiple of {BLOCK}; the nearest is {nearest}")
    frames, extra = x.shape[2], 1 if first else 0
    if frames < 1 or (frames - extra) % GROUP:
        rule = f"{GROUP}k+1" if first else f"{GROUP}k"
        nearest = max(extra or GROUP, round((frames - extra) / GROUP) * GROUP + extra)
        raise ValueError(f"{frames} frames in a chunk are not {rule}; the nearest is {nearest}")
