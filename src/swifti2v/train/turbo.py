"""A small decoder for LTX-Video's latents, taught by the VAE's own (Turbo-VAED, arXiv 2508.09136).

The VAE's encoder and decoder are frozen. The small decoder learns the clips themselves and, stage by stage, what the
large one has inside: directly where both are equally wide, through a small projection that is thrown away where not.
The published recipe has a perceptual term (LPIPS on VGG features); those weights are not shipped here, so it is there
only if ``Parts.frozen["perceptual"]`` holds a module that compares two clips. It knows decoders, not where clips are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor, nn

from .. import tiny as twins
from ..core import UsageError
from ..models.turbo_decoder import FEATURES, TurboDecoder
from .hooks import listening
from .recipe import Loss, Parts, Recipe
from .recipes import Given, toy
from .recipes_nano import MadeUpClips, made_up
from .source import Source
from .vae import WIDTHS, Clips, pixel_source

LTX = "Lightricks/LTX-Video"
GROUPS = ((1, 4, 256),)  # one clip of 17 frames of 256x256
STAGES = ("mid_block", "up_block_0", "up_block_1")  # later ones are a quarter of the teacher's channels
TINY = {"widths": (16, 8, 8, 16), "layers": (1, 1, 1, 1, 1), "depthwise_kernel": 3}


class Projections(nn.Module):
    """From the student's widths to the teacher's, for the stages where they differ: two 1x1x1 convolutions each.

    ``widths``: stage -> (student's, teacher's) channels.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(
            {
                stage: nn.Sequential(nn.Conv3d(own, wanted, 1), nn.SiLU(), nn.Conv3d(wanted, wanted, 1))
                for stage, (own, wanted) in widths.items()
                if own != wanted
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features by stage, as wide as the teacher's."""
        return {stage: self.stages[stage](x) if stage in self.stages else x for stage, x in features.items()}


def teacher_stages(vae: Any) -> dict[str, nn.Module]:
    """The parts of LTX's decoder that the small decoder's stages follow, by the names of ``FEATURES``."""
    decoder = vae.decoder
    return {"mid_block": decoder.mid_block} | {f"up_block_{i}": block for i, block in enumerate(decoder.up_blocks)}


@dataclass(frozen=True)
class TurboDistillation:
    """Absolute error of the decoded clip, mean squared errors of the stages' features, and a perceptual term if any.

    Parts: ``decoder`` (``TurboDecoder``) and ``projections`` are trained; ``vae`` (LTX's) is frozen, and so is
    ``perceptual``, a module (decoded, clip) -> distances, if there is one.
    Error and base, for the log: mean squared error of the small decoder and of the VAE's own.
    """

    features: float = 1.0
    perceptual: float = 1.0
    stages: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        wrong = sorted(set(self.stages) - set(FEATURES))
        if wrong:
            raise UsageError(f"stages {', '.join(wrong)} are not among {', '.join(FEATURES)}")

    def __call__(self, parts: Parts, item: Clips, generator: torch.Generator) -> Loss:
        decoder: Any = parts.modules["decoder"]
        values, errors, bases = [], [], []
        for clip in item.groups:
            latents, taught, decoded = self._teacher(parts, clip)
            output = decoder.decode(latents, features=True)
            shown = output.sample.float()
            value = (shown - clip).abs().mean()
            if self.features:
                own = dict(zip(FEATURES, output.features, strict=True))
                seen = parts.modules["projections"]({stage: own[stage] for stage in self.stages})
                apart = [F.mse_loss(seen[stage].float(), taught[stage].float()) for stage in self.stages]
                value = value + self.features * torch.stack(apart).sum()
            judge = parts.frozen.get("perceptual")
            if judge is not None and self.perceptual:
                value = value + self.perceptual * judge(shown, clip).mean()
            values.append(value)
            errors.append((shown.detach() - clip).square().mean())
            bases.append((decoded - clip).square().mean())
        return Loss(*(torch.stack(numbers).mean() for numbers in (values, errors, bases)))

    @torch.no_grad()
    def _teacher(self, parts: Parts, clip: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Raw latents of the clip, what the VAE's decoder has inside, and what it makes of them."""
        vae: Any = parts.frozen["vae"]
        own = teacher_stages(vae)
        latents = vae.encode(clip).latent_dist.mode()
        with listening({stage: own[stage] for stage in self.stages if self.features}) as heard:
            decoded = vae.decode(latents, return_dict=False)[0].float()
        return latents, heard, decoded


# -- recipe -------------------------------------------------------------------------------------------------------


def turbo_parts(base: str, tiny: bool, stages: tuple[str, ...] = STAGES) -> Parts:
    """A new small decoder, its projections, and the frozen VAE: a folder with its config, or a repository with ``vae``
    in it."""
    vae: Any
    if tiny:
        vae = twins.ltx_vae()
        decoder = TurboDecoder(latent_channels=vae.config.latent_channels, **TINY)
    else:
        place = {} if (Path(base) / "config.json").exists() else {"subfolder": "vae"}
        vae = AutoencoderKLLTXVideo.from_pretrained(base, torch_dtype=torch.float32, **place)
        decoder = TurboDecoder(latent_channels=vae.config.latent_channels)
    widths = stage_widths(decoder, vae)
    projections = Projections({stage: widths[stage] for stage in stages})
    vae.eval().requires_grad_(False)
    return Parts({"decoder": decoder, "projections": projections}, {"vae": vae}, inner=("projections",))


@torch.no_grad()
def stage_widths(decoder: TurboDecoder, vae: Any) -> dict[str, tuple[int, int]]:
    """Stage -> channels that the small decoder and the VAE's give there, found by decoding one latent."""
    z = torch.zeros(1, vae.config.latent_channels, 1, 1, 1)
    own = dict(zip(FEATURES, decoder.decode(z, features=True).features, strict=True))
    with listening(teacher_stages(vae)) as heard:
        vae.decode(z)
    return {stage: (x.shape[1], heard[stage].shape[1]) for stage, x in own.items()}


def pixels(parts: Parts, data: tuple[Path, ...]) -> Source[Clips]:
    """Clips of 17 frames of 256x256, of film or of photos under moving cameras."""
    return pixel_source(data, GROUPS, WIDTHS)


def turbo(given: Given) -> Recipe:
    """Turbo-VAED's decoder for LTX-Video latents, from the VAE in --base (photos.jsonl, clips.jsonl, or both)."""
    recipe = Recipe(
        "turbo",
        partial(turbo_parts, given.base or LTX, given.tiny),
        partial(made_up, source=MadeUpClips(side=32, blocks=2)) if given.tiny else partial(pixels, data=given.data),
        TurboDistillation(),
        steps=50_000,
        lr=1e-4,
        weight_decay=1e-4,
        betas=(0.9, 0.95),
        ema_decay=0.999,
        accumulation=8,
        save_every=500,
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe
