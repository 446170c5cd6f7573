"""Stage I: a photo and a sentence in, low-resolution motion latents out (paper section 3.1).

The same segment loop as Stage II, with windows as long as Stage I was trained on (docs/decisions/0003).
Two kinds of network speak through one interface:

- Wan2.1-I2V: channels are noise 16 + mask 4 + condition 16, the condition being the VAE latents of the photo
  followed by empty frames; CLIP image embeddings; one timestep for all blocks; block 0 is generated too.
- nano, in the TI2V manner: block 0 is the clean photo with timestep 0, and the reference channels hold the latents
  of the photo as a moving camera would see it (docs/decisions/0006); without a camera, of the motionless photo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import flow
from .camera import Motion, camera_video
from .models.causal_vae import StreamingVAE, encode_stream
from .models.mobile_dit import MobileTransformer3DModel
from .reference import static_video, zero_video
from .segments import CSG, Window, motion_windows
from .stage_two import Sampling, Velocity, Witness, dit_velocity, guided, model_dtype, refine

WAN_CSG = CSG(neighbor_reference="generated", renoised="context", rope_positions="window")
"""How Wan2.1-I2V continues a clip: finished blocks re-noised to the current level (it knows one timestep
for all blocks), and given clean in the condition channels, with the mask set."""


@dataclass(frozen=True)
class Conditions:
    """What Stage I is told: text (b, l, d), negative text for guidance, CLIP image embeddings (b, 257, 1280), and
    (nano) the camera's motion."""

    text: Tensor | None
    negative_text: Tensor | None = None
    image_embeds: Tensor | None = None
    guidance_scale: float = 1.0
    camera: Motion | None = None


def generates_anchor(transformer: nn.Module) -> bool:
    """Whether the network denoises block 0 too (Wan2.1-I2V), instead of being given it clean (nano, TI2V)."""
    return not isinstance(transformer, MobileTransformer3DModel)


def motion_velocity(transformer: nn.Module, conditions: Conditions, csg: CSG, trained_blocks: int) -> Velocity:
    """The velocity field of either kind of Stage I network."""
    if generates_anchor(transformer):
        return _wan_velocity(transformer, conditions, csg)
    return dit_velocity(
        transformer,
        conditions.text,
        csg,
        trained_blocks=trained_blocks,
        guidance_scale=conditions.guidance_scale,
        negative_text=conditions.negative_text,
    )


def motion_latents(
    transformer: nn.Module,
    vae: StreamingVAE,
    image: Tensor,
    conditions: Conditions,
    *,
    plan: MotionPlan,
    finished: Sequence[Tensor] = (),
    initial: Iterable[Tensor] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Yield the motion latents window by window; together they are blocks 0..T-1, float32.

    ``image``: the photo at Stage I's size, (b, 3, 1, h, w) in [-1, 1]. ``finished``: windows a journal holds
    (yielded first). ``initial``: latents (blocks 0..T-1) to start from when ``plan.strength`` is below 1: Stage I
    then denoises them instead of pure noise (SDEdit; stage-transition synthesis, paper section 3.3).
    ``on_step(window number, step)``.
    """
    wan = generates_anchor(transformer)
    num_frames = (plan.num_blocks - 1) * vae.temporal_stride + 1
    condition_video = _condition_video(image, num_frames, wan, conditions.camera)
    csg = WAN_CSG if wan else CSG(rope_positions="clamped")
    if plan.strength < 1 and initial is None:
        raise ValueError(f"strength {plan.strength} is below 1 but there are no initial latents to start from")
    sampling = Sampling(
        flow.sigmas(plan.steps, plan.shift, start=plan.strength),
        plan.seed,
        csg.model_copy(update={"round_timesteps_bf16": plan.round_timesteps_bf16}),
        stage="stage_one",
        witness=plan.witness,
    )
    velocity = motion_velocity(transformer, conditions, sampling.csg, plan.trained_blocks)
    anchors: list[Tensor] = []

    def reference() -> Iterator[Tensor]:
        for latents in encode_stream(vae, condition_video):
            if not anchors:
                anchors.append(latents[:, :, :1])
            yield latents

    # nano's windows start at block 1; what the journal and the decoder see starts at block 0
    done = [w if wan or number > 0 else w[:, :, 1:] for number, w in enumerate(finished)]
    segments = refine(
        velocity, reference(), plan.windows(wan), sampling, initial=initial, finished=done, on_step=on_step
    )
    for number, segment in enumerate(segments):
        if wan or number > 0:
            yield segment
        elif finished:
            yield finished[0].float()
        else:
            yield torch.cat([anchors[0], segment], dim=2)


@dataclass(frozen=True)
class MotionPlan:
    """The length and sampling of one Stage I run; ``witness`` as in ``stage_two.Sampling``."""

    num_blocks: int
    steps: int
    shift: float
    seed: int
    trained_blocks: int = 21
    overlap_blocks: int = 5
    strength: float = 1.0
    round_timesteps_bf16: bool = False
    witness: Witness | None = None

    @property
    def num_windows(self) -> int:
        return len(self.windows(generates_anchor=False))

    def windows(self, generates_anchor: bool) -> list[Window]:
        return list(
            motion_windows(
                self.num_blocks,
                trained_blocks=self.trained_blocks,
                overlap_blocks=self.overlap_blocks,
                generates_anchor=generates_anchor,
            )
        )


def _condition_video(image: Tensor, num_frames: int, wan: bool, camera: Motion | None) -> Iterator[Tensor]:
    if wan:
        return zero_video(image, num_frames)
    return static_video(image, num_frames) if camera is None else camera_video(image, camera, num_frames)


def _wan_velocity(transformer: nn.Module, conditions: Conditions, csg: CSG) -> Velocity:
    dtype = model_dtype(transformer)

    def velocity(x: Tensor, sigma: float, window: Window, condition: Tensor) -> Tensor:
        known = torch.tensor([float(block == 0 or block in window.context) for block in window.blocks])
        b, _, t, h, w = x.shape
        mask = known.to(x).view(1, 1, t, 1, 1).expand(b, 4, t, h, w)
        hidden = torch.cat([x, mask, condition], dim=1).to(dtype)
        timestep = torch.full((b,), 1000 * sigma, device=x.device)
        if csg.round_timesteps_bf16:
            timestep = timestep.bfloat16().float()
        image_embeds = None if conditions.image_embeds is None else conditions.image_embeds.to(x.device, dtype)

        def run(text: Tensor | None) -> Tensor:
            return transformer(
                hidden_states=hidden,
                timestep=timestep,
                encoder_hidden_states=None if text is None else text.to(x.device, dtype),
                encoder_hidden_states_image=image_embeds,
                return_dict=False,
            )[0].float()

        return guided(run, conditions.text, conditions.negative_text, conditions.guidance_scale)

    return velocity
