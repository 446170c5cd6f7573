"""Both stages against diffusers' own WanImageToVideoPipeline: same weights, text, image embedding and noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from torch import Tensor

from swifti2v import flow
from swifti2v.models.causal_vae import encode_stream, streaming
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.noise import blocks_noise
from swifti2v.reference import static_video
from swifti2v.segments import CSG, windows
from swifti2v.stage_one import Conditions, MotionPlan, motion_latents
from swifti2v.stage_two import Sampling, dit_velocity, refine
from swifti2v.tiny import wan_base_dit, wan_stage_one_dit, wan_vae_one, wan_vae_two

FRAMES, HEIGHT, WIDTH, SEED, STEPS = 17, 64, 96, 3, 4


class FewStepScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler given the levels explicitly: its own ``set_timesteps(4)`` is another grid."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)], device=device)


def stock(transformer: Any, vae: Any, **kwargs: Any) -> WanImageToVideoPipeline:
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FewStepScheduler(shift=5.0),
        transformer=transformer,
        **kwargs,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photo() -> Tensor:
    return torch.rand(1, 3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5)) * 2 - 1


def call(pipeline: WanImageToVideoPipeline, noise: Tensor, text: Tensor) -> Tensor:
    return pipeline(
        image=(photo()[:, :, 0] + 1) / 2,
        prompt_embeds=text,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
    ).frames


def test_stage_two_in_one_window_equals_ti2v() -> None:
    """A freshly widened Stage II with one window over all blocks is the TI2V-5B pipeline."""
    torch.manual_seed(0)
    base, vae = wan_base_dit(), wan_vae_two()
    text = torch.randn(1, 512, 16)
    blocks = (FRAMES - 1) // 4 + 1
    noise = blocks_noise((1, 4, HEIGHT // 16, WIDTH // 16), range(blocks), seed=SEED)
    expected = call(stock(base, vae, expand_timesteps=True), noise, text)
    widened = SwiftI2VTransformer3DModel.from_wan(base, reference_channels=4)
    csg = CSG(segment_blocks=blocks, neighbor_blocks=0, rope_positions="absolute")
    with torch.no_grad():
        reference = encode_stream(streaming(vae), static_video(photo(), FRAMES))
        velocity = dit_velocity(widened, text, csg, trained_blocks=21)
        cut = windows(blocks, segment_blocks=blocks, neighbor_blocks=0)
        (segment,) = refine(velocity, reference, cut, Sampling(flow.sigmas(STEPS, 5.0), SEED, csg))
    torch.testing.assert_close(segment, expected[:, :, 1:], atol=1e-5, rtol=1e-5)


def test_stage_one_equals_wan21() -> None:
    torch.manual_seed(0)
    dit, vae = wan_stage_one_dit(), wan_vae_one()
    text, clip = torch.randn(1, 512, 16), torch.randn(1, 257, 20)
    blocks = (FRAMES - 1) // 4 + 1
    noise = blocks_noise((1, 16, HEIGHT // 8, WIDTH // 8), range(blocks), seed=SEED, stage="stage_one")
    pipeline = stock(dit, vae)
    pipeline.encode_image = lambda image, device=None: clip  # the stock call cannot take embeddings with an image
    expected = call(pipeline, noise, text)
    with torch.no_grad():
        plan = MotionPlan(blocks, STEPS, 5.0, SEED)
        told = Conditions(text, None, clip)
        latents = torch.cat(list(motion_latents(dit, streaming(vae), photo(), told, plan=plan)), dim=2)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
