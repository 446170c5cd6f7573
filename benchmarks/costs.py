"""Count FLOPs and activation peaks of a preset's networks beside the closed form: Wan on meta, nano for real.

    python benchmarks/costs.py --preset wan            # full size, under a minute
    python benchmarks/costs.py --preset wan --tiny     # seconds
    python benchmarks/costs.py --preset nano [--folder DIR]

Peaks of the nano VAE are closed forms inside the pipeline (input chunk, and the output before), so larger.
One JSON line a network: counted and closed-form FLOPs and peak bytes, and their ratio. No weights are needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from swifti2v import costs
from swifti2v.costs import NanoVAECost, WanDiTCost, WanVAECost
from swifti2v.meters import measure
from swifti2v.models.causal_vae import streaming
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.models.wan import SwiftI2VTransformer3DModel

WAN22_VAE: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("wan", "nano"), required=True)
    parser.add_argument("--tiny", action="store_true", help="2 layers and a sixteenth of the pixels")
    parser.add_argument("--folder", type=Path, help="nano's weights in diffusers layout, if not the shipped ones")
    asked = parser.parse_args()
    rows = wan(asked.tiny) if asked.preset == "wan" else nano(asked.tiny, asked.folder)
    for row in rows:
        print(json.dumps(row), flush=True)


def line(network: str, call: Callable[[], object], closed: tuple[int, int], **where: Any) -> dict[str, Any]:
    """One measurement beside its closed form (FLOPs, peak bytes)."""
    cost = measure(call)
    return {
        "network": network,
        **where,
        "flops": cost.flops.total,
        "attention_share": round(cost.flops.attention / cost.flops.total, 4),
        "closed_flops": closed[0],
        "equal": cost.flops.total == closed[0],
        "peak_bytes": cost.peak_bytes,
        "closed_peak_bytes": closed[1],
        "peak_ratio": round(closed[1] / cost.peak_bytes, 4),
    }


def wan(tiny: bool) -> Iterator[dict[str, Any]]:
    """Stage I, Stage II's window, the stock 5B, and both VAEs, at 2560x1408 (or a sixteenth)."""
    small, large = ((12, 20), (22, 40)) if tiny else ((44, 80), (88, 160))
    yield wan_dit("Wan2.1-I2V-14B", costs.WAN21_I2V_14B, (21, *small), tiny)
    yield wan_dit("SwiftI2V Stage II", costs.SWIFTI2V_5B, (5, *large), tiny)
    yield wan_dit("Wan2.2-TI2V-5B, timestep per token", costs.WAN22_TI2V_5B, (5, *large), tiny)
    with torch.device("meta"):
        vaes = AutoencoderKLWan(), AutoencoderKLWan(**WAN22_VAE)
    yield from wan_vae("Wan2.1 VAE", vaes[0], costs.WAN21_VAE, small)
    yield from wan_vae("Wan2.2 VAE", vaes[1], costs.WAN22_VAE, large)


def dit_config(cost: WanDiTCost) -> dict[str, Any]:
    """diffusers' arguments of the Wan transformer that ``cost`` prices."""
    config: dict[str, Any] = {
        "num_attention_heads": cost.heads,
        "in_channels": cost.in_channels,
        "out_channels": cost.out_channels,
        "ffn_dim": cost.ffn,
        "num_layers": cost.layers,
    }
    if cost.image_dim:
        config |= {"image_dim": cost.image_dim, "added_kv_proj_dim": cost.width}
    return config


def wan_dit(name: str, cost: WanDiTCost, shape: tuple[int, int, int], tiny: bool) -> dict[str, Any]:
    cost = replace(cost, layers=2) if tiny else cost
    t, h, w = shape
    ours = cost.timesteps == "block"
    with torch.device("meta"):
        net = (SwiftI2VTransformer3DModel if ours else WanTransformer3DModel)(**dit_config(cost)).to(torch.bfloat16)
        inputs: dict[str, Any] = {
            "hidden_states": _half(1, cost.out_channels if ours else cost.in_channels, t, h, w),
            "encoder_hidden_states": _half(1, cost.text_tokens, cost.text_dim),
            "timestep": torch.empty({"clip": (1,), "block": (1, t), "token": (1, t * h * w // 4)}[cost.timesteps]),
        }
        if ours:
            inputs["reference_hidden_states"] = _half(1, cost.in_channels - cost.out_channels, t, h, w)
            inputs["frame_indices"] = torch.arange(t)
        if cost.image_dim:
            inputs["encoder_hidden_states_image"] = _half(1, cost.image_tokens, cost.image_dim)
    tokens = h * w // 4
    closed = cost.flops(t, tokens), cost.activation_bytes(t, tokens, 2)
    return line(name, lambda: net(**inputs, return_dict=False), closed, blocks=t, tokens=t * tokens)


def wan_vae(name: str, vae: Any, cost: WanVAECost, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    stream, (h, w) = streaming(vae.to(torch.bfloat16)), size
    n, s, blocks = h * w, cost.stride, 3
    with torch.device("meta"):
        pixels, latents = _half(1, 3, 4 * blocks - 3, h * s, w * s), _half(1, cost.latent_channels, blocks, h, w)
    where = {"blocks": blocks, "positions": n}
    closed = cost.encode_flops(n, blocks), cost.encode_bytes(n, 1, 2)
    yield line(f"{name} encode", lambda: stream.encode_chunk(pixels, None), closed, **where)
    closed = cost.decode_flops(n, blocks), cost.decode_bytes(n, 1, 2)
    yield line(f"{name} decode", lambda: stream.decode_chunk(latents, None), closed, **where)


def nano(tiny: bool, folder: Path | None) -> Iterator[dict[str, Any]]:
    """Both DiTs and the VAE of the shipped (or given) weights' architecture, at 2560x1408 (or a sixteenth)."""
    networks = costs.networks_of("nano", folder, 128)
    folder = folder or Path(costs.__file__).parent / "nano"
    h, w = (22, 40) if tiny else (88, 160)
    for component, cost, (t, y, x) in (
        ("transformer", networks.stage_one, (21, -(-h // 4), w // 4)),
        ("transformer_2", networks.stage_two, (5, h, w)),
    ):
        net = MobileTransformer3DModel(**_config(folder, component)).eval()
        channels = net.config.in_channels, net.config.reference_channels, net.config.cross_attention_dim
        z, r = torch.zeros(1, channels[0], t, y, x), torch.zeros(1, channels[1], t, y, x)
        given = {"reference_hidden_states": r if channels[1] else None}
        given["encoder_hidden_states"] = torch.zeros(1, 128, channels[2]) if channels[2] else None
        times = torch.ones(1, t)
        tokens = -(-y // net.config.patch_size) * -(-x // net.config.patch_size)
        closed = cost.flops(t, tokens), cost.activation_bytes(t, tokens, 4)
        forward = _bound(net, z, times, given)
        yield line(f"nano {component}", forward, closed, blocks=t, tokens=t * tokens)
    yield from nano_vae(NanoVAE(**_config(folder, "vae")), NanoVAECost.from_config(_config(folder, "vae")), h, w)


def nano_vae(vae: NanoVAE, cost: NanoVAECost, h: int, w: int) -> Iterator[dict[str, Any]]:
    pixels = torch.zeros(1, 3, 13, 16 * h, 16 * w)
    latents = torch.zeros(1, cost.latent_channels, 4, h, w)
    where = {"blocks": 4, "positions": h * w}
    closed = cost.encode_flops(h * w, 4), cost.encode_bytes(h * w, 4, 4)
    yield line("nano VAE encode", lambda: vae.encode_chunk(pixels), closed, **where)
    closed = cost.decode_flops(h * w, 4), cost.decode_bytes(h * w, 4, 4)
    yield line("nano VAE decode", lambda: vae.decode_chunk(latents), closed, **where)


def _bound(net: Any, z: torch.Tensor, times: torch.Tensor, given: dict[str, Any]) -> Callable[[], object]:
    return lambda: net(z, times, **given, return_dict=False)


def _config(folder: Path, component: str) -> dict[str, Any]:
    values = json.loads((folder / component / "config.json").read_text())
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
