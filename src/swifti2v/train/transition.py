"""Stage transition (paper section 3.3): true clips made to look as if Stage I had generated them.

The clip is shrunk to Stage I's size, lightly corrupted to a sigma in (0, 1), denoised by Stage I, decoded and enlarged
with the photo as frame 0: Stage II then learns to repair what Stage I really gets wrong, knowing the true clip. The
paper gives no sigma. An offline job over clips (``shards.write_shards`` shards and resumes it). Works with either kind
of Stage I; it knows no manifests and no losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..camera import Motion
from ..core import Size, UsageError
from ..flow import unshifted
from ..models.causal_vae import StreamingVAE, decode_stream, encode_pairs, encode_stream, streaming
from ..reference import hybrid_reference
from ..stage_one import Conditions, MotionPlan, motion_latents
from .data import Clip, Pixels, ReferenceMaker, device_of, joined, rng_of, to_bytes

ABLATED = (0.25, 0.4, 0.625, 0.8333)  # what docs/ablations.md compares


class Teller(Protocol):
    """What Stage I is told about a clip: text, camera, CLIP states of ``image`` (1, 3, 1, h, w) at Stage I's size."""

    def __call__(self, pixels: Pixels, image: Tensor) -> Conditions: ...


@dataclass(frozen=True)
class StageOne:
    """Stage I as it is run in inference: network, VAE, its sizes, sampling, and who tells it what.

    ``steps`` are those of a whole run from noise; ``motion_size`` as ``core.Grid.motion_size``.
    """

    transformer: nn.Module
    vae: StreamingVAE
    motion_size: Callable[[Size], Size]
    tell: Teller
    steps: int = 4
    shift: float = 5.0
    trained_blocks: int = 21
    overlap_blocks: int = 5

    @classmethod
    def of(cls, pipeline: Any, steps: int = 4, shift: float = 5.0) -> StageOne:
        """Stage I of a ``SwiftI2VPipeline``, told the prompt, the photo, and the camera's motion where it is known.

        Where it is not, nano's camera head reads it from the prompt; a clip without a prompt has a camera at rest.
        """
        grid = pipeline.preset.grid

        def tell(pixels: Pixels, image: Tensor) -> Conditions:
            text = pipeline.encode_prompt(pixels.prompt)
            seen = pipeline.encode_image(pixels.image) if pipeline.image_encoder is not None else None
            camera = pixels.motion
            if camera is None and pipeline.camera is not None and pixels.prompt.strip():
                camera = Motion.from_code(pipeline.camera(text)[0].tolist())
            return Conditions(text, image_embeds=seen, camera=camera)

        vae, blocks = streaming(pipeline.vae), (grid.trained_blocks, pipeline.preset.overlap_blocks)
        return cls(pipeline.transformer, vae, grid.motion_size, tell, steps, shift, *blocks)

    def plan(self, blocks: int, sigma: float, seed: int) -> MotionPlan:
        return MotionPlan(
            num_blocks=blocks,
            steps=steps_from(sigma, self.steps, self.shift),
            shift=self.shift,
            seed=seed,
            trained_blocks=self.trained_blocks,
            overlap_blocks=self.overlap_blocks,
            strength=sigma,
        )


def checked_sigma(sigma: float) -> float:
    """``sigma`` itself; UsageError unless it lies in (0, 1)."""
    if not 0 < sigma < 1:
        nearest = ABLATED[0] if not sigma > 0 else ABLATED[-1]
        raise UsageError(f"sigma {sigma} is not between 0 and 1; light corruption is e.g. {nearest}")
    return sigma


def steps_from(sigma: float, steps: int, shift: float) -> int:
    """How many of ``steps`` steps from noise are left at ``sigma``: at least one, spaced no wider than they were."""
    return max(1, math.ceil(round(unshifted(sigma, shift) * steps, 3)))


def transition_pixels(pixels: Pixels, stage_one: StageOne, sigma: float, seed: int) -> Iterator[Tensor]:
    """The clip as Stage I would have it, (1, 3, t, h, w) in [-1, 1] at Stage I's size, in chunks; same length."""
    small = stage_one.motion_size(pixels.size)
    image = next(iter(pixels.shrunk(small)))
    plan = stage_one.plan(pixels.blocks, checked_sigma(sigma), seed)
    windows = motion_latents(
        stage_one.transformer,
        stage_one.vae,
        image,
        stage_one.tell(pixels, image),
        plan=plan,
        initial=encode_stream(stage_one.vae, pixels.shrunk(small)),
    )
    return decode_stream(stage_one.vae, windows, image)


@torch.no_grad()
def transition_latents(
    pixels: Pixels,
    stage_one: StageOne,
    vae: StreamingVAE,
    *,
    sigma: float,
    seed: int,
    make_reference: ReferenceMaker = hybrid_reference,
) -> Tensor:
    """Stage II's reference latents (c or 2c, T, h, w) made by stage transition. ``vae`` is Stage II's."""
    pixels = pixels.to(device_of(vae))
    motion = transition_pixels(pixels, stage_one, sigma, seed)
    return joined(encode_pairs(vae, make_reference(pixels.image, motion, pixels.size)))


@dataclass(frozen=True)
class Transition:
    """The job: ``clip(number)`` gives a clip of number ``number`` its ``transition``.

    ``sigmas``: of which each clip gets one by seeded choice. ``pixels``: the true pixels of clip ``number``; without it
    they are decoded from its clean latents by ``vae`` (Stage II's), which the shrinking mostly makes good.
    """

    stage_one: StageOne
    vae: StreamingVAE
    sigmas: tuple[float, ...]
    seed: int = 0
    make_reference: ReferenceMaker = hybrid_reference
    pixels: Callable[[int], Pixels] | None = None

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise UsageError(f"no sigma; give some of {', '.join(map(str, ABLATED))}")
        for sigma in self.sigmas:
            checked_sigma(sigma)

    def sigma(self, number: int) -> float:
        """The sigma of clip ``number``."""
        return rng_of(self.seed, number, "transition sigma").choice(self.sigmas)

    def clip(self, number: int, clip: Clip) -> Clip:
        """``clip`` with its transition; block 0 is the photo's latent itself, as in every reference."""
        pixels = self.pixels(number) if self.pixels is not None else decoded(clip, self.vae)
        latents = transition_latents(
            pixels,
            self.stage_one,
            self.vae,
            sigma=self.sigma(number),
            seed=rng_of(self.seed, number, "transition noise").getrandbits(62),
            make_reference=self.make_reference,
        )
        if latents.shape != clip.reference.shape:
            given, held = tuple(latents.shape), tuple(clip.reference.shape)
            raise UsageError(f"{clip.name}: a transition {given} for a reference {held}: other pixels or another maker")
        anchor = clip.clean[:, :1].repeat(len(latents) // len(clip.clean), 1, 1, 1)
        return replace(clip, transition=torch.cat([anchor, latents[:, 1:].to(anchor)], dim=1))

    def settings(self) -> dict[str, Any]:
        """What decides the result beside weights and clips, for ``shards.Plan.settings``."""
        one = self.stage_one
        return {"sigmas": list(self.sigmas), "seed": self.seed, "steps": one.steps, "shift": one.shift}


@torch.no_grad()
def decoded(clip: Clip, vae: StreamingVAE) -> Pixels:
    """The pixels that the clean latents stand for."""
    chunks = decode_stream(vae, clip.clean[None].split(1, dim=2))
    frames = torch.cat([to_bytes(chunk[0].cpu()) for chunk in chunks], dim=1)
    return Pixels(frames, clip.prompt, clip.name, clip.kind, clip.motion)
