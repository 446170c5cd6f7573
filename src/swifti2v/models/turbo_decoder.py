"""A small decoder for LTX-Video latents, laid out as Turbo-VAED (arXiv 2508.09136): 41.9 M parameters for LTX's 239 M.

Depthwise-separable blocks where channels are many, plain 3-D convolutions where they are few, and upsampling in two
steps that phones know: time by a reshape, space by a 2-D pixel shuffle. Not causal: a clip is decoded whole. It takes
what ``AutoencoderKLLTXVideo.decode`` takes, raw latents, and does not know the encoder, files or cropping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

FEATURES = ("mid_block", "up_block_0", "up_block_1", "up_block_2", "up_block_3")
"""What ``TurboOutput.features`` holds, in order."""
RMS_EPS = 1e-8
SHORTCUT_EPS = 1e-6


@dataclass(frozen=True)
class TurboOutput:
    """``sample``: pixels (b, 3, 8t-7, 32h, 32w), not clamped. ``features``: those of ``FEATURES``, if asked for."""

    sample: Tensor
    features: tuple[Tensor, ...] = ()


class TurboDecoder(ModelMixin, ConfigMixin):
    """Raw LTX latents (b, latent_channels, t, h, w) -> pixels (b, 3, 8t-7, 32h, 32w), about [-1, 1].

    ``widths``: channels of the four stages; the first keeps its grid, each other doubles time, rows and columns.
    ``layers``: residual blocks of the middle and of each stage. ``depthwise_kernel``: of the separable blocks, which
    the middle and the first stage are made of. Raises ValueError for settings that do not fit together.
    """

    _supports_gradient_checkpointing = True
    spatial_stride = 32
    temporal_stride = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 128,
        out_channels: int = 3,
        widths: tuple[int, ...] = (512, 256, 128, 64),
        layers: tuple[int, ...] = (1, 1, 3, 2, 3),
        depthwise_kernel: int = 5,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or len(layers) != 5 or widths[-1] % 16 or depthwise_kernel % 2 == 0:
            raise ValueError(
                f"widths {tuple(widths)}, layers {tuple(layers)}, depthwise_kernel {depthwise_kernel}: needed are "
                "4 widths, the last a multiple of 16, 5 counts of layers, and an odd kernel"
            )
        first, last = widths[0], widths[-1]
        self.conv_in = Conv3d(latent_channels, first, 3)
        self.mid_block = nn.Sequential(*(ResidualBlock(first, first, depthwise_kernel) for _ in range(layers[0])))
        stages = [UpBlock(first, first, layers[1], depthwise_kernel, doubles=False)]
        for before, width, count in zip(widths, widths[1:], layers[2:], strict=False):
            stages.append(UpBlock(before, width, count, None, doubles=True))
        self.up_blocks = nn.ModuleList(stages)
        self.tail = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in (last, last // 4))
        self.conv_out = Conv3d(last // 16, out_channels, 3)
        self.gradient_checkpointing = False

    def decode(self, z: Tensor, features: bool = False) -> TurboOutput:
        """Decode a whole clip; with ``features`` also what every stage gives, for feature distillation.

        Raises ValueError unless ``z`` is (b, latent_channels, t >= 1, h, w).
        """
        channels = self.config["latent_channels"]
        if z.ndim != 5 or z.shape[1] != channels or not z.shape[2]:
            raise ValueError(f"latents of shape {tuple(z.shape)} are not (b, {channels}, blocks >= 1, h, w)")
        x, kept = self.conv_in(z.to(self.dtype)), []
        for stage in (self.mid_block, *self.up_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(stage, x)
            else:
                x = stage(x)
            if features:
                kept.append(x)
        b = x.shape[0]
        x = rearrange(x, "b c t h w -> (b t) c h w")
        for convolution in self.tail:
            x = F.pixel_shuffle(convolution(F.silu(rms_norm(x))), 2)
        x = rearrange(F.silu(rms_norm(x)), "(b t) c h w -> b c t h w", b=b)
        return TurboOutput(self.conv_out(x), tuple(kept))

    def forward(self, z: Tensor) -> Tensor:
        """``decode(z).sample``."""
        return self.decode(z).sample


class Conv3d(nn.Conv3d):
    """A 3-D convolution that keeps the grid: first and last frame are repeated in time, zeros surround the rest."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, padding=(0, kernel // 2, kernel // 2), groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0] // 2
        if side:
            x = torch.cat([x[:, :, :1].expand(-1, -1, side, -1, -1), x, x[:, :, -1:].expand(-1, -1, side, -1, -1)], 2)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """Norm, activation, convolution, twice. ``depthwise``: the kernel of separable convolutions, None for plain ones.

    ``relu``: the first activation, as Turbo-VAED has it in blocks that upsample; the second is always SiLU.
    """

    def __init__(self, channels: int, out: int, depthwise: int | None, relu: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = convolution(channels, out, depthwise), convolution(out, out, depthwise)
        self.relu = relu
        self.norm_shortcut = nn.LayerNorm(channels, eps=SHORTCUT_EPS) if channels != out else None
        self.shortcut = Conv3d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, t, h, w) -> (b, out, t, h, w)."""
        y = rms_norm(x)
        y = self.conv1(F.relu(y) if self.relu else F.silu(y))
        y = self.conv2(F.silu(rms_norm(y)))
        if self.norm_shortcut is not None and self.shortcut is not None:
            x = self.shortcut(self.norm_shortcut(x.movedim(1, -1)).movedim(-1, 1))
        return x + y


class UpBlock(nn.Module):
    """A stage: to its own width, then, if it ``doubles``, twice the frames, rows and columns, then residual blocks."""

    def __init__(self, channels: int, out: int, layers: int, depthwise: int | None, doubles: bool) -> None:
        super().__init__()
        self.entry = ResidualBlock(channels, out, depthwise) if channels != out else None
        self.upsample = Conv3d(out, 8 * out, 3) if doubles else None
        self.blocks = nn.Sequential(*(ResidualBlock(out, out, depthwise, relu=doubles) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, t, h, w) -> (b, out, 2t-1, 2h, 2w), or the same grid if it does not double."""
        if self.entry is not None:
            x = self.entry(x)
        if self.upsample is not None:
            x = unfold_double(self.upsample(x))
        return self.blocks(x)


def convolution(channels: int, out: int, depthwise: int | None) -> nn.Module:
    """A 3x3x3 convolution, or one a channel of that kernel and then a mix of channels."""
    if depthwise is None:
        return Conv3d(channels, out, 3)
    return nn.Sequential(Conv3d(channels, channels, depthwise, groups=channels), Conv3d(channels, out, 1))


def unfold_double(x: Tensor) -> Tensor:
    """(b, 8c, t, h, w) -> (b, c, 2t-1, 2h, 2w): channels to time, then to space; the first frame of time is dropped,
    since latent block 0 stands for one frame."""
    b = x.shape[0]
    x = rearrange(x, "b (c s) t h w -> (b t s) c h w", s=2)
    return rearrange(F.pixel_shuffle(x, 2), "(b t) c h w -> b c t h w", b=b)[:, :, 1:]


def rms_norm(x: Tensor) -> Tensor:
    """x over the root of its mean square over channels (axis 1), without weights; the mean in float32."""
    mean = x.float().square().mean(dim=1, keepdim=True)
    return x * (mean + RMS_EPS).rsqrt().to(x.dtype)
