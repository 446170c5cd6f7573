"""MobileI2V's hybrid linear/softmax DiT (arXiv 2511.21475), also the network of both stages of nano.

Time is mixed by attention only; every latent block carries its own noise level and its own temporal position,
both given as data. It knows tensors: no schedules, windows, files or devices. The defaults are MobileI2V's
published size (264,855,296 parameters without its unused text path); all that nano adds is off by default.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from einops import rearrange
from torch import Tensor, nn

from .positions import POSITION_FEATURES, frequencies, position_features, rope_tables, rotate

MOBILE_PATTERN = ("linear",) * 7 + ("softmax",) + ("linear",) * 7 + ("softmax",)
DEFAULT_MOTION_SCORE = 1.0
TIMESTEP_FEATURES = 256
SMALLEST_SIGMA = 0.02  # residual prediction divides by sigma; context blocks carry 0 and their output is not used


class MobileTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity noise - clean of latents (b, c, t, h, w); any t, h, w.

    ``attention_pattern``: "linear" or "softmax" per layer. ``qk_norm``: the layers whose queries and keys are
    RMS-normalised. ``timestep_scale``: the incoming 1000 * sigma is divided by it before the sinusoid.
    ``rope_reference_grid``: spatial positions are squeezed onto a grid of this many tokens a side (None: as they are).
    ``reference_channels``: of latents concatenated to the input. ``cross_attention_dim``: width of the text states
    (None: the network has no text). ``absolute_positions``: adds Fourier features of where a token is.
    ``prediction``: "residual" makes the network predict what the reference lacks, so that an untrained one
    denoises to exactly its reference; it needs ``reference_channels`` == ``out_channels``. "gated" has twice as many,
    the reference and the photo carried along the motion, and also predicts how far to go from one to the other.
    Raises ValueError for contradictory settings.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = _repeated_blocks = ["MobileTransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int = 128,
        hidden_size: int = 1152,
        num_attention_heads: int = 16,
        ffn_ratio: float = 2.5,
        attention_pattern: tuple[str, ...] = MOBILE_PATTERN,
        qk_norm: Literal["linear", "all", "none"] = "linear",
        patch_size: int = 1,
        rope_reference_grid: int | None = 16,
        timestep_scale: float = 1000.0,
        motion_embedding: bool = True,
        reference_channels: int = 0,
        cross_attention_dim: int | None = None,
        absolute_positions: bool = False,
        prediction: Literal["velocity", "residual", "gated"] = "velocity",
    ) -> None:
        super().__init__()
        needed = {"velocity": reference_channels, "residual": out_channels, "gated": 2 * out_channels}
        if prediction not in needed:
            raise ValueError(f"prediction {prediction!r} is not 'velocity', 'residual' or 'gated'")
        if needed[prediction] != reference_channels:
            raise ValueError(
                f"{prediction} prediction needs {needed[prediction]} reference channels, not {reference_channels}"
            )
        self.patch_size, self.timestep_scale, self.rope_grid = patch_size, timestep_scale, rope_reference_grid
        self.reference_channels, self.prediction = reference_channels, prediction
        d, heads, cells, text = hidden_size, num_attention_heads, patch_size**2, cross_attention_dim
        self.head_dim = d // heads
        self.patch_embed = nn.Linear((in_channels + reference_channels) * cells, d)
        self.position_embed = nn.Linear(POSITION_FEATURES, d) if absolute_positions else None
        self.time_embed = ScalarEmbedding(d)
        self.time_modulation = nn.Linear(d, 6 * d)
        self.motion_embed = ScalarEmbedding(d) if motion_embedding else None
        self.motion_modulation = nn.Linear(d, 6 * d) if motion_embedding else None
        self.text_embed = TextEmbedding(text, d) if text is not None else None
        self.blocks = nn.ModuleList(
            MobileTransformerBlock(d, heads, ffn_ratio, kind, qk_norm in ("all", kind), text is not None)
            for kind in attention_pattern
        )
        self.final_table = nn.Parameter(torch.randn(2, d) / math.sqrt(d))
        self.proj_out = nn.Linear(d, (2 if prediction == "gated" else 1) * out_channels * cells)
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for part in (self.time_embed, self.time_modulation, self.motion_embed, self.motion_modulation, self.text_embed):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.to_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        reference_hidden_states: Tensor | None = None,
        frame_indices: Tensor | None = None,
        motion_score: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity (b, out_channels, t, h, w), in the dtype of ``hidden_states`` (float32 keeps residuals exact).

        ``timestep`` (b, t): 1000 * sigma of every block. ``frame_indices`` (t,): temporal positions, 0..t-1 if None.
        ``encoder_hidden_states`` (b, l, cross_attention_dim), zero after the prompt's end; ignored by a network
        without text. ``reference_hidden_states`` (b, reference_channels, t, h, w). ``motion_score`` (b,): mean
        optical flow, 1 if None. Raises ValueError if an input the configuration needs is missing, or has no use.
        """
        self._check(encoder_hidden_states, encoder_hidden_states_image, reference_hidden_states, motion_score)
        b, _, t, h, w = hidden_states.shape
        if timestep.shape != (b, t):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; every block needs its own: {(b, t)}")
        grid = (math.ceil(h / (p := self.patch_size)), math.ceil(w / p))
        if frame_indices is None:
            frame_indices = torch.arange(t, device=hidden_states.device)
        x = self._tokens(hidden_states, reference_hidden_states, frame_indices, grid)
        time, modulation, text = self._condition(timestep, encoder_hidden_states, motion_score)
        cos, sin = (y.to(x.dtype) for y in rope_tables(frame_indices, grid, self.head_dim, self.rope_grid))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, modulation, cos, sin, text, grid)
            else:
                x = block(x, modulation, cos, sin, text, grid)
        shift, scale = (self.final_table + time[:, :, None]).to(x.dtype).split(1, dim=2)
        x = self.proj_out(modulate(x, shift, scale))
        x = rearrange(x, "b t (h w) (c p q) -> b c t (h p) (w q)", h=grid[0], p=p, q=p)[..., :h, :w]
        if self.prediction != "velocity" and reference_hidden_states is not None:
            sigma = (timestep.float() / 1000).clamp(min=SMALLEST_SIGMA)[:, None, :, None, None]
            x = (hidden_states.float() - self._clean(x.float(), reference_hidden_states.float())) / sigma
        output = (x.to(hidden_states.dtype),)
        return Transformer2DModelOutput(*output) if return_dict else output

    def _clean(self, x: Tensor, reference: Tensor) -> Tensor:
        if self.prediction == "residual":
            return reference + x
        (residual, gate), (reference, carried) = x.chunk(2, dim=1), reference.chunk(2, dim=1)
        return reference + residual + gate * (carried - reference)

    def _check(
        self, text: Tensor | None, image: Tensor | None, reference: Tensor | None, motion: Tensor | None
    ) -> None:
        if text is None and self.text_embed:
            raise ValueError("encoder_hidden_states is missing: this network was built with cross_attention_dim")
        if (reference is None) != (self.reference_channels == 0):
            given = "missing" if reference is None else "given"
            raise ValueError(f"reference_hidden_states is {given}: reference_channels={self.reference_channels}")
        if image is not None:
            raise ValueError("encoder_hidden_states_image is given: this network has no image cross-attention")
        if motion is not None and not self.motion_embed:
            raise ValueError("motion_score is given: this network was built with motion_embedding=False")

    def _tokens(self, latents: Tensor, reference: Tensor | None, frames: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (b, c, t, h, w) -> tokens (b, t, n, d); the last row and column are repeated up to the patch."""
        x = latents.to(self.dtype)
        if reference is not None:
            x = torch.cat([x, reference.to(self.dtype)], dim=1)
        p = self.patch_size
        down, right = grid[0] * p - x.shape[3], grid[1] * p - x.shape[4]
        if down or right:
            x = F.pad(x.flatten(1, 2), (0, right, 0, down), mode="replicate").unflatten(1, (-1, len(frames)))
        x = self.patch_embed(rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p))
        if self.position_embed is not None:
            x = x + self.position_embed(position_features(frames, grid).to(self.dtype))
        return x

    def _condition(
        self, timestep: Tensor, text: Tensor | None, motion_score: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Time embedding (b, t, d), modulation (b, t, 6, d) per latent block, projected text (b, l, d) or None."""
        time = self.time_embed(timestep / self.timestep_scale, self.dtype)
        pooled = None
        if self.text_embed is not None and text is not None:
            text, pooled = self.text_embed(text.to(self.dtype))
        modulation = self.time_modulation(F.silu(time if pooled is None else time + pooled[:, None]))
        if self.motion_embed is not None and self.motion_modulation is not None:
            if motion_score is None:
                motion_score = timestep.new_full(timestep.shape[:1], DEFAULT_MOTION_SCORE, dtype=torch.float32)
            motion = self.motion_modulation(F.silu(self.motion_embed(motion_score, self.dtype)))
            modulation = modulation + motion[:, None]
        return time, modulation.unflatten(-1, (6, -1)), None if pooled is None else text


class MobileTransformerBlock(nn.Module):
    """One layer: self-attention over all tokens, cross-attention to text if there is any, a convolutional FFN."""

    def __init__(self, d: int, heads: int, ffn_ratio: float, kind: str, qk_norm: bool, text: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / math.sqrt(d))
        self.attn = SelfAttention(d, heads, kind, qk_norm)
        self.cross_attn = CrossAttention(d, heads) if text else None
        self.ffn = GLUMBConv(d, int(d * ffn_ratio))

    def forward(
        self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, text: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """Tokens (b, t, n, d), modulation (b, t, 6, d), rotary tables (t * n, head) -> tokens."""
        table = (self.scale_shift_table + modulation).to(x.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.split(1, dim=2)
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a), cos, sin))
        if self.cross_attn is not None and text is not None:
            x = x + self.cross_attn(x, text)
        return torch.addcmul(x, gate_f, self.ffn(modulate(x, shift_f, scale_f), grid))


class SelfAttention(nn.Module):
    """Bidirectional attention over the tokens of all blocks, in O(N) ("linear") or exact ("softmax")."""

    def __init__(self, d: int, heads: int, kind: str, qk_norm: bool) -> None:
        super().__init__()
        if kind not in ("linear", "softmax"):
            raise ValueError(f"attention {kind!r} is neither 'linear' nor 'softmax'")
        if d % heads or (d // heads) % 2:
            raise ValueError(f"hidden_size {d} does not split into {heads} heads of even width")
        self.heads, self.linear = heads, kind == "linear"
        self.to_qkv = nn.Linear(d, 3 * d, bias=not self.linear)
        self.to_out = nn.Linear(d, d)
        self.norm_q = nn.RMSNorm(d, eps=1e-5) if qk_norm else None
        self.norm_k = nn.RMSNorm(d, eps=1e-5) if qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, n, _ = x.shape
        q, k, v = self.to_qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.to_out(self.attend(q, k, v, n).reshape(b, t, n, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Every block, of ``tokens`` tokens each, to all: q, k, v and the result (b, t * tokens, heads, c)."""
        return linear_attention(F.relu(q), F.relu(k), v) if self.linear else softmax_attention(q, k, v)


class CrossAttention(nn.Module):
    """Softmax attention from tokens to text; its output projection starts at zero."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(d, d)
        self.to_kv = nn.Linear(d, 2 * d)
        self.to_out = nn.Linear(d, d)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.to_q(F.layer_norm(x, x.shape[-1:], eps=1e-6).flatten(1, 2))
        k, v = self.to_kv(text).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        return self.to_out(softmax_attention(q, k, v).reshape(x.shape))


class GLUMBConv(nn.Module):
    """SANA's feed-forward: expand, 3x3 depthwise within each frame, gate, project. No temporal convolution."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(d, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        inplace = not torch.is_grad_enabled()
        y = F.silu(self.expand(x), inplace=inplace).reshape(-1, *grid, self.depthwise.in_channels)
        # The permuted view is channels-last, as oneDNN's depthwise kernels want it: channels-first is 4 to 20 times
        # slower, nine shifted products too. Not einops: at batch 1 its strides are not recognized and cost a copy.
        value, gate = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(2, dim=-1)
        return self.project((value * F.silu(gate, inplace=inplace)).reshape(*x.shape[:3], -1))


class ScalarEmbedding(nn.Module):
    """A scalar as 128 cosines and 128 sines of periods up to 10,000, then an MLP: (...) -> (..., d)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_FEATURES, d)
        self.linear_2 = nn.Linear(d, d)

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        angle = value.float()[..., None] * frequencies(TIMESTEP_FEATURES // 2, value.device)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class TextEmbedding(nn.Module):
    """Text states (b, l, c) -> keys for cross-attention (b, l, d) and one vector (b, d) for the modulation."""

    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, d)
        self.linear_2 = nn.Linear(d, d)
        self.pool = nn.Linear(channels, d)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        # Padding is exact zeros (Wan's convention): it must not dilute the mean of a short prompt.
        length = (text != 0).any(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1)
        mean = (text.sum(dim=1, dtype=torch.float32) / length).to(text.dtype)
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh")), self.pool(mean)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then the shift and scale of each latent block: x (b, t, n, d), others (b, t, 1, d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype), 1 + scale)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """``norm`` in x's dtype, its sum of squares in float32. On a CPU torch's own first copies all of x to float32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).float().square() / x.shape[-1]
    return x * (mean + norm.eps).rsqrt().to(x.dtype) * norm.weight.to(x.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel q . k of non-negative features (b, n, heads, c), in O(n)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return linear_attention_dense(q, k, v)
    return linear_attention_heads(q, k, v)


def linear_attention_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head: fewest operations, the witness of the dense form and the form for GPUs and float32."""
    dtype = v.dtype
    if dtype == torch.float16:  # sums over thousands of tokens overflow half precision
        q, k, v = q.float(), k.float(), v.float()
    state = torch.einsum("bnhc,bnhe->bhce", k, v)
    total = k.sum(dim=1, dtype=torch.float32).to(q.dtype)
    weight = torch.einsum("bnhc,bhc->bnh", q, total).float() + 1e-8
    return (torch.einsum("bnhc,bhce->bnhe", q, state) / weight.to(q.dtype)[..., None]).to(dtype)


def linear_attention_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads in one matrix product with the cross-head terms masked out.

    ``heads`` times the arithmetic, yet 3 to 9 times faster in bfloat16 on a CPU at 17,600 tokens, where
    products are nearly free and batched products of strided heads spend their time in copies.
    """
    heads, c = q.shape[2:]
    q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
    same_head = torch.eye(heads, dtype=q.dtype, device=q.device).repeat_interleave(c, dim=0)
    state = torch.stack([one.t() @ other for one, other in zip(k, v, strict=True)])
    state = state * same_head.repeat_interleave(c, dim=1)
    total = k.sum(dim=1)[..., None] * same_head  # a CPU accumulates it in float32; asking so would copy k
    out, weight = (q @ torch.cat([state, total], dim=-1)).split([heads * c, heads], dim=-1)
    return out.unflatten(-1, (heads, c)) / (weight.float() + 1e-8).to(q.dtype)[..., None]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention (b, n, heads, c) x (b, m, heads, c) -> (b, n, heads, c)."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
