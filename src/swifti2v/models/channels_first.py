"""MobileI2V's layouts for phones (arXiv 2511.21475): one network, two graphs with the same weights and the same result.

``exportable`` makes the module that exporters see: the window's grid, block positions and count of finished blocks are
constants, the rest are tensors. "reference" computes as ``MobileTransformer3DModel`` does, tokens first. In
"channels-first" activations are (b, channels, 1, tokens), every Linear is a 1x1 convolution, and heads come one after
another as einsum equations that the backend has natively, which is what Apple's neural engine wants (it is Apple's
published recipe for transformers): the same formula in another letter order costs dozens of transposes.
Weights are views of the network's own, not copies (one exception: ChannelsFirstFFN), and are not trained through.
It knows tensors: no files, formats or sigma lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .mobile_dit import (
    SMALLEST_SIGMA,
    GLUMBConv,
    MobileTransformer3DModel,
    MobileTransformerBlock,
    SelfAttention,
    linear_attention_heads,
    modulate,
    rms_norm,
    softmax_attention,
)
from .positions import half_turn, position_features, rope_axes, rope_tables

Layout = Literal["reference", "channels-first"]
Equations = Literal["coreml", "onnx"]
LAYOUTS: tuple[Layout, ...] = ("reference", "channels-first")
EPSILON, HALF_EPSILON = 1e-8, 1e-6  # of linear attention's denominator; 1e-8 is zero in half precision


def exportable(
    model: MobileTransformer3DModel,
    grid: tuple[int, int, int],
    *,
    layout: Layout = "channels-first",
    frames: Sequence[int] | None = None,
    context: int = 1,
    equations: Equations = "coreml",
    half: bool = False,
) -> nn.Module:
    """A module (latents, sigma, motion_score[, reference]) -> velocity for one window, in either layout.

    ``grid``: latent blocks, rows and columns (t, h, w) of the window; ``frames``: the blocks' temporal positions,
    0..t-1 if not given; ``context``: how many blocks at the front are finished (anchor and neighbors), seen at level 0.
    Tensors: latents (b, in_channels, t, h, w), sigma (b,) in [0, 1] of the other blocks, motion_score (b,), reference
    (b, reference_channels, t, h, w) -> velocity (b, out_channels, t - context, h, w).
    ``equations`` and ``half`` are for channels-first: whose native einsum, and whether activations will be float16.
    Raises ValueError for a network with text, with patches larger than 1 (channels-first), or a grid that does not fit.
    """
    t = grid[0]
    frames = tuple(range(t)) if frames is None else tuple(frames)
    if len(frames) != t or not 0 <= context < t:
        raise ValueError(f"{len(frames)} positions and {context} finished blocks do not fit a window of {t} blocks")
    if model.text_embed is not None:
        raise ValueError("a network with text cross-attention has no mobile form")
    if layout == "reference":
        return ReferenceLayout(model, grid, frames, context)
    if layout != "channels-first":
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    return ChannelsFirst(model, grid, frames, context, equations, half)


class ReferenceLayout(nn.Module):
    """``MobileTransformer3DModel``, tokens first, behind the signature of ``exportable``.

    Its own parts in its own order; only what depends on the grid alone, positions and the half turn, is a constant here
    instead of being made in every call, which exporters would have to follow.
    """

    features: Tensor
    noisy: Tensor
    cos: Tensor
    sin: Tensor
    turn: Tensor

    def __init__(
        self, model: MobileTransformer3DModel, grid: tuple[int, int, int], frames: Sequence[int], context: int
    ) -> None:
        super().__init__()
        p = model.patch_size
        self.model, self.context, self.size, self.cells = model, context, grid[1:], (-(-grid[1] // p), -(-grid[2] // p))
        order = torch.tensor(frames)
        self.register_buffer("features", position_features(order, self.cells))
        self.register_buffer("noisy", (torch.arange(grid[0]) >= context).float() * 1000)
        cos, sin = rope_tables(order, self.cells, model.head_dim, model.rope_grid)
        self.register_buffer("cos", cos[:, None])
        self.register_buffer("sin", sin[:, None])
        self.register_buffer("turn", half_turn(model.head_dim, cos))

    def forward(self, latents: Tensor, sigma: Tensor, motion_score: Tensor, reference: Tensor | None = None) -> Tensor:
        """See ``exportable``."""
        model, timestep = self.model, sigma[:, None] * self.noisy
        score = motion_score if model.motion_embed is not None else None
        time, modulation, _ = model._condition(timestep, None, score)
        x = self._tokens(latents if reference is None else torch.cat([latents, reference], dim=1))
        for block in cast("list[MobileTransformerBlock]", list(model.blocks)):
            table = (block.scale_shift_table + modulation).to(x.dtype)
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.split(1, dim=2)
            x = x + gate_a * self._attended(block.attn, modulate(x, shift_a, scale_a))
            x = x + gate_f * block.ffn(modulate(x, shift_f, scale_f), self.cells)
        shift, scale = (model.final_table + time[:, :, None]).to(x.dtype).split(1, dim=2)
        x = model.proj_out(modulate(x, shift, scale)[:, self.context :])
        x = F.pixel_shuffle(rearrange(x, "b t (h w) c -> (b t) c h w", h=self.cells[0]), model.patch_size)
        x = rearrange(x, "(b t) c h w -> b c t h w", t=self.noisy.shape[0] - self.context)
        x = x[..., : self.size[0], : self.size[1]]
        if model.prediction != "velocity" and reference is not None:
            level = sigma.clamp(SMALLEST_SIGMA, 1)[:, None, None, None, None]
            x = (latents[:, :, self.context :] - model._clean(x, reference[:, :, self.context :])) / level
        return x

    def _tokens(self, x: Tensor) -> Tensor:
        """As the network's, but frame by frame: XNNPACK has no tensors of seven axes."""
        model, p, t = self.model, self.model.patch_size, x.shape[2]
        x = rearrange(x, "b c t h w -> (b t) c h w")
        down, right = (cells * p - side for cells, side in zip(self.cells, self.size, strict=True))
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode="replicate")
        x = model.patch_embed(rearrange(F.pixel_unshuffle(x, p), "(b t) c h w -> b t (h w) c", t=t))
        return x if model.position_embed is None else x + model.position_embed(self.features)

    def _attended(self, attention: SelfAttention, x: Tensor) -> Tensor:
        b, t, n, d = x.shape
        q, k, v = attention.to_qkv(x.reshape(b, t * n, d)).chunk(3, dim=-1)
        if attention.norm_q is not None and attention.norm_k is not None:
            q, k = rms_norm(q, attention.norm_q), rms_norm(k, attention.norm_k)
        q, k, v = (y.reshape(b, t * n, attention.heads, -1) for y in (q, k, v))
        q, k = (y * self.cos + (y @ self.turn) * self.sin for y in (q, k))
        out = linear_attention_heads(F.relu(q), F.relu(k), v) if attention.linear else softmax_attention(q, k, v)
        return attention.to_out(out.reshape(b, t, n, d))


class ChannelsFirst(nn.Module):
    """The network with activations (b, channels, 1, tokens); tokens in the order t, row, column."""

    features: Tensor

    def __init__(
        self,
        model: MobileTransformer3DModel,
        grid: tuple[int, int, int],
        frames: Sequence[int],
        context: int,
        equations: Equations = "coreml",
        half: bool = False,
    ) -> None:
        super().__init__()
        if model.patch_size != 1:
            raise ValueError(f"the channels-first layout needs patches of 1, not {model.patch_size}")
        self.grid, self.context, self.out_channels = grid, context, model.config.out_channels
        # The small parts that see vectors, not tokens, are the network's own modules.
        self.time_embed, self.time_modulation = model.time_embed, model.time_modulation
        self.motion_embed, self.motion_modulation = model.motion_embed, model.motion_modulation
        self.clean, self.prediction, self.timestep_scale = model._clean, model.prediction, model.timestep_scale
        self.final_table = model.final_table
        self.patch_embed, self.proj_out = Pointwise(model.patch_embed), Pointwise(model.proj_out)
        self.position_embed = None if model.position_embed is None else Pointwise(model.position_embed)
        order, cells = torch.tensor(frames), (grid[1], grid[2])
        if self.position_embed is not None:
            features = position_features(order, cells).flatten(0, 1).T[None, :, None]
            self.register_buffer("features", features.contiguous())
        tables = rope_tables(order, cells, model.head_dim, model.rope_grid)
        layers = cast("list[MobileTransformerBlock]", list(model.blocks))
        self.blocks = nn.ModuleList(ChannelsFirstBlock(layer, tables, grid, equations, half) for layer in layers)

    def forward(self, latents: Tensor, sigma: Tensor, motion_score: Tensor, reference: Tensor | None = None) -> Tensor:
        """See ``exportable``."""
        x = latents.flatten(2)[:, :, None]
        given = None if reference is None else reference.flatten(2)[:, :, None]
        y = self.patch_embed(x if given is None else torch.cat([x, given], dim=1))
        if self.position_embed is not None:
            y = y + self.position_embed(self.features)
        time, modulation = self._condition(sigma, motion_score, y.dtype)
        cut = self.context * self.grid[1] * self.grid[2]
        for block in self.blocks:
            y = block(y, modulation, cut)
        shift, scale = (self.final_table + time[:, 1:]).to(y.dtype)[..., None, None].unbind(1)
        y = self.proj_out(layer_norm(y[..., cut:]) * (1 + scale) + shift)
        if self.prediction != "velocity" and given is not None:
            # Bounded above as well: Core ML takes no bound for float32's largest, which is no number in float16.
            level = sigma.clamp(SMALLEST_SIGMA, 1)[:, None, None, None].to(y.dtype)
            y = (x[..., cut:] - self.clean(y, given[..., cut:])) / level
        t, h, w = self.grid
        return y.reshape(-1, self.out_channels, t - self.context, h, w)

    def _condition(self, sigma: Tensor, motion_score: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Time (b, 2, d) and modulation (b, 2, 6, d): a window knows two noise levels, 0 and sigma."""
        levels = torch.stack([torch.zeros_like(sigma), sigma], dim=1) * (1000 / self.timestep_scale)
        time = self.time_embed(levels, dtype)
        modulation = self.time_modulation(F.silu(time))
        if self.motion_embed is not None and self.motion_modulation is not None:
            motion = self.motion_modulation(F.silu(self.motion_embed(motion_score, dtype)))
            modulation = modulation + motion[:, None]
        return time, modulation.unflatten(-1, (6, -1))


class ChannelsFirstBlock(nn.Module):
    """One layer of the network."""

    def __init__(
        self,
        block: MobileTransformerBlock,
        tables: tuple[Tensor, Tensor],
        grid: tuple[int, int, int],
        equations: Equations,
        half: bool,
    ) -> None:
        super().__init__()
        self.scale_shift_table = block.scale_shift_table
        self.attn = ChannelsFirstAttention(block.attn, tables, equations, half)
        self.ffn = ChannelsFirstFFN(block.ffn, grid)

    def forward(self, x: Tensor, modulation: Tensor, cut: int) -> Tensor:
        """x (b, d, 1, s), its first ``cut`` tokens at noise level 0; modulation (b, 2, 6, d)."""
        table = (self.scale_shift_table + modulation).to(x.dtype).unbind(2)
        # Each (b, 2, d, 1, 1); unbound first, since Core ML knows no tensors of six axes.
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (part[..., None, None] for part in table)
        x = x + _by_level(self.attn(_modulate(x, shift_a, scale_a, cut)), gate_a, None, cut)
        return x + _by_level(self.ffn(_modulate(x, shift_f, scale_f, cut)), gate_f, None, cut)


class ChannelsFirstAttention(nn.Module):
    """``SelfAttention`` on (b, d, 1, s), head by head.

    ``equations``: "coreml" transposes K once, so that every product is the einsum that MIL has natively, and takes the
    softmax over axis 1. "onnx" transposes nothing and takes it over the last axis: ONNX Runtime's Einsum reads any
    letter order, and its softmax over another axis is an order of magnitude slower on a CPU.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        attention: SelfAttention,
        tables: tuple[Tensor, Tensor],
        equations: Equations = "coreml",
        half: bool = False,
    ) -> None:
        super().__init__()
        if equations not in ("coreml", "onnx"):
            raise ValueError(f"equations {equations!r} are neither 'coreml' nor 'onnx'")
        self.heads, self.linear, self.native = attention.heads, attention.linear, equations == "coreml"
        self.half_precision, self.share = half, 1 / len(tables[0])
        self.to_qkv, self.to_out = Pointwise(attention.to_qkv), Pointwise(attention.to_out)
        self.norm_q = None if attention.norm_q is None else ChannelNorm(attention.norm_q)
        self.norm_k = None if attention.norm_k is None else ChannelNorm(attention.norm_k)
        cos, sin = (table.T[None, :, None].contiguous() for table in tables)  # (1, head, 1, s)
        # Rotation takes (-second, first) of each axis; with the sign in the table it is a swap of slices.
        self.widths = [width // 2 for width in rope_axes(cos.shape[1]) for _ in range(2)]
        signs = torch.cat([torch.full((w,), -1.0 if i % 2 == 0 else 1.0) for i, w in enumerate(self.widths)])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin * signs[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, 1, s) -> the same shape."""
        q, k, v = self.to_qkv(x).chunk(3, dim=1)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = self._rotated(q), self._rotated(k)
        if not self.linear:
            q = q * (q.shape[1] // self.heads) ** -0.5
        elif self.half_precision:  # sums over thousands of tokens overflow half precision: take means
            q, k = F.relu(q), F.relu(k) * self.share
        else:
            q, k = F.relu(q), F.relu(k)
        attend = self._linear if self.linear else self._softmax
        keys = k.transpose(1, 3).chunk(self.heads, dim=3) if self.native else k.chunk(self.heads, dim=1)
        heads = zip(q.chunk(self.heads, dim=1), keys, v.chunk(self.heads, dim=1), strict=True)
        return self.to_out(torch.cat([attend(*head) for head in heads], dim=1))

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([head * cos + self._swapped(head) * sin for head in x.chunk(self.heads, dim=1)], dim=1)

    def _swapped(self, head: Tensor) -> Tensor:
        halves = head.split(self.widths, dim=1)
        return torch.cat([halves[i ^ 1] for i in range(len(halves))], dim=1)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, v (b, c, 1, s), k (b, s, 1, c) or as q; q is scaled already."""
        if self.native:
            weights = torch.einsum("bchq,bkhc->bkhq", q, k).softmax(dim=1)
            return torch.einsum("bkhq,bchk->bchq", weights, v)
        weights = torch.einsum("bchq,bchk->bqhk", q, k).softmax(dim=3)
        return torch.einsum("bqhk,bchk->bchq", weights, v)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, total, axis = ("bshc", "bdhc", 1) if self.native else ("bchs", "bchd", 3)
        state = torch.einsum(f"bdhs,{keys}->bdhc", v, k)
        weight = torch.einsum(f"{total},bchs->bdhs", k.sum(dim=axis, keepdim=True), q)
        weight = weight + (HALF_EPSILON if self.half_precision else EPSILON)
        return torch.einsum("bdhc,bchs->bdhs", state, q) / weight


class ChannelsFirstFFN(nn.Module):
    """``GLUMBConv`` on (b, d, 1, s). The frames of the depthwise convolution are channels of their own.

    (b, c, 1, t*h*w) read as (b, c*t, h, w) is no copy, and a depthwise convolution with the filter of every channel
    repeated t times is then exact in one 2-D call; the repeated filters are a copy (t * 9 numbers a channel).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, ffn: GLUMBConv, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid, self.channels = grid, ffn.depthwise.in_channels  # whole numbers: a traced shape is a tensor
        self.expand, self.project = Pointwise(ffn.expand), Pointwise(ffn.project)
        bias = ffn.depthwise.bias
        assert bias is not None
        self.register_buffer("weight", ffn.depthwise.weight.detach().repeat_interleave(grid[0], 0))
        self.register_buffer("bias", bias.detach().repeat_interleave(grid[0], 0))

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, 1, s) -> the same shape."""
        y = F.silu(self.expand(x))
        t, h, w = self.grid
        frames = y.reshape(-1, self.channels * t, h, w)
        frames = F.conv2d(frames, self.weight, self.bias, padding=1, groups=self.channels * t)
        value, gate = frames.reshape(-1, self.channels, 1, t * h * w).chunk(2, dim=1)
        return self.project(value * F.silu(gate))


class Pointwise(nn.Module):
    """A Linear as a 1x1 convolution whose weight is a view of the Linear's."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias
        self.register_buffer("weight", linear.weight.detach()[..., None, None])
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, 1, s) -> (b, out, 1, s)."""
        return F.conv2d(x, self.weight, self.bias)


class ChannelNorm(nn.Module):
    """An RMSNorm over axis 1, whose weight is a view of the original's."""

    weight: Tensor

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach()[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, 1, s) -> the same shape."""
        return x * (_mean_square(x) + self.eps).rsqrt() * self.weight


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without weights over axis 1 of (b, d, 1, s), eps 1e-6."""
    x = x - x.mean(dim=1, keepdim=True)
    return x * (_mean_square(x) + 1e-6).rsqrt()


def _mean_square(x: Tensor) -> Tensor:
    # Scaled before it is squared: the sum of a thousand squares overflows half precision.
    return (x * x.shape[1] ** -0.5).square().sum(dim=1, keepdim=True)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, cut: int) -> Tensor:
    return _by_level(layer_norm(x), 1 + scale, shift, cut)


def _by_level(x: Tensor, factor: Tensor, term: Tensor | None, cut: int) -> Tensor:
    """x (b, d, 1, s) times ``factor`` plus ``term``, both (b, 2, d, 1, 1): one for the first ``cut`` tokens, one for
    the others."""
    parts = []
    for i, part in enumerate((x[..., :cut], x[..., cut:])):
        if part.shape[3]:
            scaled = part * factor[:, i]
            parts.append(scaled if term is None else scaled + term[:, i])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
