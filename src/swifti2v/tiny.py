"""A tiny random twin of every preset: the real classes at toy size, for tests and for trying an installation.

``tiny_pipeline("wan")`` runs in a second what ``wan`` runs on a GPU, through the same code.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import presets
from .mobile import MobileI2VPipeline
from .models.camera_head import CameraHead
from .models.mobile_dit import MobileTransformer3DModel
from .models.nano_vae import NanoVAE
from .models.text import nano_tokenizer
from .models.turbo_decoder import TurboDecoder
from .models.wan import SwiftI2VTransformer3DModel
from .motion_field import CHANNELS
from .pipeline import SwiftI2VPipeline

TEXT_DIM = 16
WAN_DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def tiny_pipeline(family: str, seed: int = 0, trained: bool = True) -> SwiftI2VPipeline:
    """The twin of "nano", "wan" or "wan-refine", with random weights drawn from ``seed``.

    ``trained`` False leaves wan's Stage II as ``from_wan`` makes it: widened by zeros and marked untrained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = _nano() if family == "nano" else _wan(widen=family == "wan", trained=trained)
        return _frozen(SwiftI2VPipeline(**components, preset=f"tiny-{family}"))


def tiny_mobile(family: str = "mobile", seed: int = 0, turbo: bool = False) -> MobileI2VPipeline:
    """The twin of "mobile" (with a Turbo decoder if ``turbo``) or of "mobile-nano", random weights from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = ltx_vae() if family == "mobile" else _nano_vae()
        channels = vae.config.latent_channels if family == "mobile" else CHANNELS
        photo = presets.get("nano").grid.stage_two.channels
        nano: dict[str, Any] = {"reference_channels": CHANNELS + photo, "absolute_positions": True}
        transformer = MobileTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            hidden_size=48,
            num_attention_heads=2,
            attention_pattern=("linear", "softmax"),
            **(nano if family == "mobile-nano" else {}),
        )
        nn.init.normal_(transformer.proj_out.weight, std=0.02)
        small: dict[str, Any] = {"widths": (16, 16, 16, 16), "layers": (1, 1, 1, 1, 1), "depthwise_kernel": 3}
        decoder = TurboDecoder(latent_channels=channels, **small) if turbo else None
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        return _frozen(MobileI2VPipeline(transformer, vae, scheduler, decoder, preset=f"tiny-{family}"))


Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def _frozen(pipeline: Pipeline) -> Pipeline:
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ltx_vae() -> AutoencoderKLLTXVideo:
    """LTX's VAE shape: stride 32, 8 frames a block, causal encoder and non-causal decoder."""
    thin = (16, 16, 16, 16)
    ones = (1, 1, 1, 1, 1)
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=thin,
        decoder_block_out_channels=thin,
        layers_per_block=ones,
        decoder_layers_per_block=ones,
    ).eval()


def wan_vae_one() -> AutoencoderKLWan:
    """Wan2.1's VAE shape: stride 8, 16 channels."""
    return AutoencoderKLWan(base_dim=8, z_dim=16).eval()


def wan_vae_two() -> AutoencoderKLWan:
    """Wan2.2's VAE shape: residual, patchified, stride 16."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def wan_stage_one_dit() -> WanTransformer3DModel:
    return WanTransformer3DModel(in_channels=36, out_channels=16, image_dim=20, added_kv_proj_dim=48, **WAN_DIT).eval()


def wan_base_dit() -> WanTransformer3DModel:
    """TI2V-5B's shape, before widening."""
    return WanTransformer3DModel(in_channels=4, out_channels=4, **WAN_DIT).eval()


def _nano() -> dict[str, Any]:
    vae = _nano_vae()
    common: dict[str, Any] = {
        "in_channels": vae.latent_channels,
        "out_channels": vae.latent_channels,
        "hidden_size": 48,
        "num_attention_heads": 2,
        "attention_pattern": ("linear", "linear"),
        "patch_size": 2,
        "reference_channels": vae.latent_channels,
        "prediction": "residual",
        "motion_embedding": False,
    }
    components = {
        "transformer": MobileTransformer3DModel(cross_attention_dim=TEXT_DIM, absolute_positions=True, **common),
        "transformer_2": MobileTransformer3DModel(
            **{**common, "reference_channels": 2 * vae.latent_channels, "prediction": "gated"}
        ),
        "camera": CameraHead(TEXT_DIM),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        **_text(),
    }
    for name in ("transformer", "transformer_2"):
        nn.init.normal_(components[name].proj_out.weight, std=0.02)  # zero by default: nothing would be tested
    return components


def _nano_vae() -> NanoVAE:
    """The shipped transform (it is part of the configuration) with a thin random refiner."""
    config = NanoVAE.load_config(str(presets.package_folder() / "nano" / "vae"))
    thin = {"image_width": 16, "image_layers": 1, "video_width": 16, "video_layers": 1}
    return NanoVAE.from_config({**config, **thin})


def _wan(widen: bool, trained: bool) -> dict[str, Any]:
    base = wan_base_dit()
    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    widened = SwiftI2VTransformer3DModel.from_wan(base, reference_channels=4) if widen else base
    if widen and trained:
        nn.init.normal_(widened.patch_embedding.weight, std=0.1)
        widened.register_to_config(reference_is_untrained=False)
    return {
        "transformer": wan_stage_one_dit(),
        "transformer_2": widened,
        "vae": wan_vae_one(),
        "vae_2": wan_vae_two(),
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessorPil(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        **_text(),
    }


def _text() -> dict[str, Any]:
    config = T5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return {"tokenizer": nano_tokenizer(), "text_encoder": T5EncoderModel(config)}
