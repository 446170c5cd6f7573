"""Full-size networks on the meta device have the published parameter counts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from swifti2v.models.wan import SwiftI2VTransformer3DModel

I2V_14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
TI2V_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}


def parameters(module: torch.nn.Module) -> int:
    assert all(p.is_meta for p in module.parameters())
    return sum(p.numel() for p in module.parameters())


def test_stage_one_is_wan_14b() -> None:
    with torch.device("meta"):
        stock, ours = WanTransformer3DModel(**I2V_14B), SwiftI2VTransformer3DModel(**I2V_14B)
    assert parameters(ours) == parameters(stock)
    assert round(parameters(ours) / 1e9, 3) == 16.395
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


def test_stage_two_is_wan_5b_with_48_more_channels() -> None:
    with torch.device("meta"):
        base, default = WanTransformer3DModel(**TI2V_5B), SwiftI2VTransformer3DModel()
        widened = SwiftI2VTransformer3DModel.from_wan(base)
    assert round(parameters(base) / 1e9, 4) == 4.9998
    assert round(parameters(widened) / 1e9, 4) == 5.0004
    assert parameters(widened) - parameters(base) == 589_824 == 48 * 4 * 3072
    assert {k: v.shape for k, v in default.state_dict().items()} == {
        k: v.shape for k, v in widened.state_dict().items()
    }


def test_vae_of_wan_2_2() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )
    assert round(parameters(vae) / 1e6, 1) == 704.7
