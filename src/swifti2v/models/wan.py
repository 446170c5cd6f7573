"""Wan's video DiT for windows: positions and noise levels are data, the reference joins along channels.

``SwiftI2VTransformer3DModel`` is diffusers' ``WanTransformer3DModel`` with four more things to say in a forward
pass; weights, names, hooks, LoRA, quantization and attention dispatch are inherited, and checkpoints are
interchangeable. It serves Stage II (TI2V-5B widened by ``from_wan``) and, with the image arguments, Stage I
(Wan2.1-I2V). ``rope_frames`` gives positions to the unmodified stock class. This module knows no schedules,
no segments and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

# DiffusionPipeline.from_pretrained looks ModelMixin up in the module that defines a component.
__all__ = ["ModelMixin", "ReferenceTokens", "SwiftI2VTransformer3DModel", "SwiftI2VTransformerBlock", "rope_frames"]


class SwiftI2VTransformer3DModel(WanTransformer3DModel):
    """Wan's DiT over the blocks of one window. Defaults: Stage II (TI2V-5B with 48 more input channels).

    ``in_channels`` counts noise and reference channels together. ``reference_is_untrained``: the reference
    channels have never been trained (``from_wan`` sets it), so the output does not depend on the reference;
    a pipeline refuses such weights and a trainer clears the field:
    ``model.register_to_config(reference_is_untrained=False)``. Other arguments as in ``WanTransformer3DModel``.

    Load with ``from_pretrained(torch_dtype=torch.bfloat16)``: it keeps rope, time embedder, norms and modulation
    in float32, which ``.to(torch.bfloat16)`` does not.
    """

    _no_split_modules = ["SwiftI2VTransformerBlock"]  # noqa: RUF012 (diffusers' protocol)
    _repeated_blocks = ["SwiftI2VTransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 96,
        out_channels: int = 48,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        reference_is_untrained: bool = False,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,  # the layers are ours, made below
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        self.register_to_config(num_layers=num_layers)  # the parent has just registered its own 0
        time, height, width = patch_size
        self.patch_embedding: nn.Conv3d = PatchEmbedding.of(self.patch_embedding)
        self.rope = SwiftI2VRotaryPosEmbed(attention_head_dim, (time, height, width), rope_max_seq_len)
        inner = num_attention_heads * attention_head_dim
        layer: Any = (inner, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
        self.blocks = nn.ModuleList([SwiftI2VTransformerBlock(*layer) for _ in range(num_layers)])

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Float[Tensor, "b c t h w"],
        timestep: Float[Tensor, "b t"] | Float[Tensor, " b"],
        encoder_hidden_states: Float[Tensor, "b l d"],
        encoder_hidden_states_image: Float[Tensor, "b i e"] | None = None,
        reference_hidden_states: Float[Tensor, "b r t h w"] | None = None,
        frame_indices: Int64[Tensor, " t"] | None = None,
        reference_tokens: ReferenceTokens | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Float[Tensor, "b o t h w"]]:
        """Velocity of every block of a window.

        ``timestep`` = 1000 * sigma: one per block (b, t), or one per item (b,); one per token (b, tokens) is
        taken too and needed under context parallelism unless the ranks divide the blocks.
        ``frame_indices``: temporal position of every block, in [0, rope_max_seq_len); None means 0, 1, 2...
        ``reference_tokens``: keeps the reference's half of the patch embedding between passes with the same
        ``reference_hidden_states``; without it both halves are embedded together, every time.
        Raises ValueError if latent and reference channels do not add up to ``in_channels``.
        """
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.rope.patch_size, strict=True)]
        rotary_emb = self.rope(hidden_states, frame_indices)
        tokens = self._embedded(hidden_states, reference_hidden_states, reference_tokens)
        temb, modulation, context, image_context = self.condition_embedder(
            timestep.flatten(),
            encoder_hidden_states,
            encoder_hidden_states_image,
            timestep_seq_len=timestep.shape[1] if timestep.ndim == 2 else None,
        )
        modulation = modulation.unflatten(-1, (6, -1))
        if image_context is not None:
            context = torch.cat([image_context, context], dim=1)
        checkpoint: Any = self._gradient_checkpointing_func
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = checkpoint(block, tokens, context, modulation, rotary_emb)
            else:
                tokens = block(tokens, context, modulation, rotary_emb)
        velocity = self._unpatchify(self.proj_out(self._modulated_norm(tokens, temb)), grid)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @classmethod
    def from_wan(cls, base: WanTransformer3DModel, reference_channels: int = 48) -> SwiftI2VTransformer3DModel:
        """``base`` with ``reference_channels`` more input channels whose weights are zero: computes what base does.

        Zeros, because the outputs start at the base model's while the new weights get a gradient from the first
        step. All other weights are shared with ``base``, not copied (10 GB for TI2V-5B): training the result
        changes them in ``base`` too. 0 channels give the same network with positions and levels as data.
        """
        config = {key: value for key, value in base.config.items() if not key.startswith("_")}
        config["in_channels"] += reference_channels
        config["reference_is_untrained"] = reference_channels > 0 or config.get("reference_is_untrained", False)
        with torch.device("meta"):
            model = cls(**config)
        weights = base.state_dict()
        old = weights["patch_embedding.weight"]
        new = old.new_zeros(old.shape[0], reference_channels, *old.shape[2:])
        weights["patch_embedding.weight"] = torch.cat([old, new], dim=1)
        model.load_state_dict(weights, strict=True, assign=True)
        # Not in the state dict, and meta has no values. Copied rather than rebuilt: stays where base lives.
        rope: Any = base.rope
        model.rope.freqs_cos, model.rope.freqs_sin = rope.freqs_cos.clone(), rope.freqs_sin.clone()
        return model.train(base.training)

    @property
    def embeds_jointly(self) -> str | None:
        """Why latents and reference cannot be embedded apart; None if they can."""
        if self.config.in_channels == self.config.out_channels:
            return "no reference channels"
        kind = type(self.patch_embedding)
        return None if kind is PatchEmbedding else f"the patch embedding has become a {kind.__name__}"

    def _embedded(
        self, latents: Tensor, reference: Tensor | None, kept: ReferenceTokens | None
    ) -> Float[Tensor, "b n d"]:
        """Tokens of latents and reference. Together, or apart with the reference's half ``kept``."""
        channels = latents.shape[1] + (0 if reference is None else reference.shape[1])
        config: Any = self.config
        if channels != config.in_channels:
            raise ValueError(
                f"{channels} latent and reference channels together; this model takes "
                f"{config.in_channels} (are the reference latents missing?)"
            )
        if reference is None:
            whole = latents
        elif kept is None or self.embeds_jointly:
            whole = torch.cat([latents, reference.to(latents.dtype)], dim=1)
        else:
            half = kept.of(reference, lambda: self.patch_embedding(reference.to(latents.dtype), latents.shape[1]))
            return self.patch_embedding(latents, 0, half)
        return self.patch_embedding(whole).flatten(2).transpose(1, 2).contiguous()

    def _modulated_norm(self, tokens: Float[Tensor, "b n d"], temb: Tensor) -> Float[Tensor, "b n d"]:
        """The head's norm, scaled and shifted per item (temb (b, d)), per block or per token ((b, t, d))."""
        levels = temb.unsqueeze(1) if temb.ndim == 2 else temb
        # Tables may sit on another device than the last layer when accelerate spreads a model.
        table = self.scale_shift_table.to(temb.device)
        shift, scale = (table + levels.unsqueeze(-2)).to(tokens.device).unbind(dim=-2)
        return _modulate(self.norm_out(tokens.float()), scale, shift).type_as(tokens)

    def _unpatchify(self, tokens: Tensor, grid: list[int]) -> Float[Tensor, "b o t h w"]:
        t, h, w = grid
        p, q, r = self.rope.patch_size
        shape = "b (t h w) (p q r o) -> b o (t p) (h q) (w r)"
        return rearrange(tokens, shape, t=t, h=h, w=w, p=p, q=q, r=r)


class PatchEmbedding(nn.Conv3d):
    """Wan's patch embedding, which can embed a part of its input channels by itself.

    The kernel is the stride: it is a matrix product over the numbers of a patch, and adds up over channels. A module of
    its own, because offloading hooks must see it called before its weights are read.
    """

    @classmethod
    def of(cls, conv: nn.Conv3d) -> PatchEmbedding:
        """With the weights of ``conv``, not copied."""
        with torch.device("meta"):  # draws no numbers
            made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)  # type: ignore[arg-type]
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Tensor, first: int | None = None, base: Float[Tensor, "b n d"] | None = None) -> Tensor:
        """All channels (b, c, t, h, w) -> (b, d, t, h', w'), as the convolution does it.

        With ``first``: the channels from there on, as many as ``input`` has -> tokens (b, n, d), by a matrix product
        (on a CPU many times faster) on top of ``base``: tokens of the other channels, or else the bias.
        """
        if first is None:
            return super().forward(input)
        p, q, r = self.kernel_size
        cells = rearrange(input, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)
        weight = self.weight[:, first : first + input.shape[1]].flatten(1)
        if base is None:
            return nn.functional.linear(cells, weight, self.bias)
        # Not addmm, whose result would be a view: a compiled layer's graph for views fits no other layer's tokens.
        return torch.baddbmm(base, cells, weight.t().expand(len(base), -1, -1))


class ReferenceTokens:
    """The reference's half of the patch embedding, kept by a caller for as long as its reference does not change."""

    def __init__(self) -> None:
        self._reference: Tensor | None = None
        self._tokens: Tensor | None = None

    def of(self, reference: Tensor, embed: Callable[[], Tensor]) -> Tensor:
        """What is kept if it is of this very tensor, else what ``embed`` gives, kept from now on."""
        if self._tokens is None or self._reference is not reference:
            self._reference, self._tokens = reference, embed()
        return self._tokens


class SwiftI2VTransformerBlock(WanTransformerBlock):
    """Wan's layer, taking one modulation per latent block and broadcasting it over the block's tokens.

    One per token, as the stock layer wants it, is a (b, tokens, 6, d) tensor: 650 MB in bf16 for a 2K window
    and twice that in float32 temporaries, in every layer, to say the same thing.
    """

    def forward(
        self,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b l d"],
        temb: Float[Tensor, "b t 6 d"] | Float[Tensor, "b 6 d"],
        rotary_emb: Any,
    ) -> Float[Tensor, "b n d"]:
        if temb.ndim != 4 or temb.shape[1] == hidden_states.shape[1]:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        levels = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(dim=2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = levels  # (b, t, d) each, float32

        normed = _modulate(self.norm1(hidden_states.float()), scale, shift).type_as(hidden_states)
        attended = self.attn1(normed, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + _scaled(attended, gate)).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = _modulate(self.norm3(hidden_states.float()), ffn_scale, ffn_shift).type_as(hidden_states)
        fed = self.ffn(normed)
        return (hidden_states.float() + _scaled(fed.float(), ffn_gate)).type_as(hidden_states)


# diffusers' caching hooks refuse layers that they do not know.
_outputs: Any = {"return_hidden_states_index": 0, "return_encoder_hidden_states_index": None}
TransformerBlockRegistry.register(SwiftI2VTransformerBlock, TransformerBlockMetadata(**_outputs))


class SwiftI2VRotaryPosEmbed(WanRotaryPosEmbed):
    """Wan's rotary tables with the temporal rows gathered at given positions instead of 0, 1, 2..."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def forward(  # the parent declares one tensor and returns two
        self, hidden_states: Float[Tensor, "b c t h w"], frame_indices: Int64[Tensor, " t"] | None = None
    ) -> tuple[Float[Tensor, "1 n 1 d"], Float[Tensor, "1 n 1 d"]]:
        if frame_indices is None:
            cos, sin = super().forward(hidden_states)
            return cos, sin
        t, h, w = (size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        if frame_indices.shape != (t,):
            raise ValueError(f"frame_indices of shape {tuple(frame_indices.shape)} for {t} latent blocks")
        rows = frame_indices.to(self.freqs_cos.device)
        return self._table(self.freqs_cos, rows, h, w), self._table(self.freqs_sin, rows, h, w)

    def _table(self, table: Tensor, rows: Tensor, height: int, width: int) -> Float[Tensor, "1 n 1 d"]:
        time, y, x = table.split([self.t_dim, self.h_dim, self.w_dim], dim=1)
        shape = (rows.shape[0], height, width, -1)
        axes = (
            time.index_select(0, rows).view(-1, 1, 1, self.t_dim).expand(shape),
            y[:height].view(1, -1, 1, self.h_dim).expand(shape),
            x[:width].view(1, 1, -1, self.w_dim).expand(shape),
        )
        # Flat before they are joined: a view of (t, h, w, d) would tie a compiled layer's graph to h and w.
        return torch.cat([axis.flatten(0, 2) for axis in axes], dim=-1)[None, :, None]


@contextmanager
def rope_frames(model: WanTransformer3DModel, frame_indices: Int64[Tensor, " t"]) -> Iterator[None]:
    """Give the blocks of a stock Wan DiT the temporal positions ``frame_indices`` while the context lasts.

    The stock forward always reads the first t rows of the table; so for the time being those are the rows
    wanted. Inside, forward passes must have exactly these blocks. Not for use from two threads at once.
    Raises ValueError for positions outside the table.
    """
    rope: Any = model.rope
    count = frame_indices.shape[0]
    length = rope.freqs_cos.shape[0]
    if count > length or (count and not 0 <= int(frame_indices.min()) <= int(frame_indices.max()) < length):
        raise ValueError(f"positions {frame_indices.tolist()} are not all in the rotary table, 0..{length - 1}")
    stock = rope.freqs_cos, rope.freqs_sin
    rope.freqs_cos, rope.freqs_sin = (_with_time_rows(table, frame_indices, rope.t_dim) for table in stock)
    try:
        yield
    finally:
        rope.freqs_cos, rope.freqs_sin = stock


def _with_time_rows(table: Tensor, rows: Tensor, time_columns: int) -> Tensor:
    gathered = table.clone()
    gathered[: rows.shape[0], :time_columns] = table[rows.to(table.device), :time_columns]
    return gathered


def _per_block(x: Float[Tensor, "b n d"], blocks: int) -> Float[Tensor, "b t s d"]:
    return x.unflatten(1, (blocks, -1))


def _modulate(x: Float[Tensor, "b n d"], scale: Tensor, shift: Tensor) -> Float[Tensor, "b n d"]:
    """x * (1 + scale) + shift; scale and shift (b, t, d) with t dividing the n tokens."""
    blocks = scale.shape[1]
    return (_per_block(x, blocks) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def _scaled(x: Float[Tensor, "b n d"], gate: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
    return (_per_block(x, gate.shape[1]) * gate.unsqueeze(2)).flatten(1, 2)
