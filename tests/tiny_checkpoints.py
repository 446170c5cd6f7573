"""Tiny transformers and their original (Wan) spelling, for the tests of loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swifti2v.models.wan import SwiftI2VTransformer3DModel

TINY: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=24,
    out_channels=12,
    text_dim=16,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
    rope_max_seq_len=32,
)
HEADS = dict(num_attention_heads=2, attention_head_dim=24, rope_max_seq_len=32)
# Original name <- diffusers name, written independently of the converter under test.
RENAMES = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("to_out.0", "o"),
    ("norm_added_k", "norm_k_img"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2.", "norm3."),
    ("proj_out", "head.head"),
]


def original(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        name = "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")
        for ours, theirs in RENAMES:
            if not (ours == "norm2." and "img_emb" in name):
                name = name.replace(ours, theirs)
        renamed[prefix + name] = value.clone()
    return renamed


def swift(**changes: Any) -> SwiftI2VTransformer3DModel:
    torch.manual_seed(0)
    return SwiftI2VTransformer3DModel(**{**TINY, **changes}).eval()


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    buffers = dict(other.named_buffers())
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[key], two[key]) for key in one)
        and all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    )
