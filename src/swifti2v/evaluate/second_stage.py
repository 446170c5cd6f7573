"""Stage II alone, on a low-resolution clip whose truth is known, with any of CSG's choices changed: what ablations and
comparisons run. The same functions as ``pipeline.stream``, without a journal. It scores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import flow
from ..core import Size
from ..models.causal_vae import decode_stream, encode_pairs, encode_stream, streaming
from ..reference import carried_reference, hybrid_reference, resize
from ..segments import CSG, Window, windows
from ..stage_two import Sampling, dit_velocity, refine

SHIFT = 5.0
NONE = "none"
SHIPPED = CSG()


@dataclass(frozen=True)
class Settings:
    """How Stage II runs. ``anchor``: windows hold block 0. ``photo_first``: the photo replaces the motion's frame 0 in
    the reference, and the decoder takes detail from it. ``segmented`` False: one window over the whole clip.
    ``carries``: the photo's detail is carried along the motion. ``seed``: of the noise."""

    csg: CSG = SHIPPED
    steps: int = 1
    anchor: bool = True
    photo_first: bool = True
    segmented: bool = True
    carries: bool = True
    seed: int = 0


@torch.no_grad()
def second_stage(pipeline: Any, low: Tensor, photo: Tensor, settings: Settings, transformer: Any = None) -> Tensor:
    """Frames (3, t, H, W) in [-1, 1] of a low-resolution clip (3, t, h, w) and the photo (3, H, W).

    ``transformer``: another Stage II than the pipeline's; "none" leaves the reference as it is.
    """
    reference = reference_latents(pipeline, low, photo, settings)
    return decoded(pipeline, refined(pipeline, reference, settings, transformer), photo, settings)


@torch.no_grad()
def reference_latents(pipeline: Any, low: Tensor, photo: Tensor, settings: Settings) -> Tensor:
    """What Stage II starts from, (1, 2c, blocks, h/16, w/16): the reference, then the photo carried along (or the
    reference again). Of ``settings`` only ``photo_first`` and ``carries`` matter here."""
    return torch.cat(list(_reference(streaming(pipeline.vae), low, photo, settings)), dim=2)


@torch.no_grad()
def refined(pipeline: Any, reference: Tensor, settings: Settings, transformer: Any = None) -> Tensor:
    """Stage II's latents (1, c, blocks, h/16, w/16), block 0 the anchor, from ``reference_latents``."""
    channels = streaming(pipeline.vae).latent_channels
    if transformer == NONE:
        return reference[:, :channels]
    network = pipeline.transformer_2 if transformer is None else transformer
    velocity = dit_velocity(network, None, settings.csg, trained_blocks=pipeline.preset.grid.trained_blocks)
    sampling = Sampling(flow.sigmas(settings.steps, SHIFT), settings.seed, settings.csg)
    segments = refine(velocity, [reference], plan(reference.shape[2], settings), sampling, channels=channels)
    return torch.cat([reference[:, :channels, :1], *segments], dim=2)


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor, photo: Tensor, settings: Settings) -> Tensor:
    """Frames (3, t, H, W) in [-1, 1] of Stage II's latents; the decoder knows the photo if ``settings`` let it."""
    known = photo[None, :, None] if settings.photo_first else None
    return torch.cat(list(decode_stream(streaming(pipeline.vae), [latents], known)), dim=2)[0]


def plan(blocks: int, settings: Settings) -> list[Window]:
    """The windows of a clip of ``blocks`` latent blocks."""
    csg = settings.csg
    cut = [Window(0, (), tuple(range(1, blocks)))]
    if settings.segmented:
        cut = list(windows(blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks))
    return cut if settings.anchor else [Window(None, window.neighbors, window.segment) for window in cut]


def _reference(vae: Any, low: Tensor, photo: Tensor, settings: Settings) -> Iterator[Tensor]:
    size = Size(photo.shape[2], photo.shape[1])
    image = photo[None, :, None]
    if not settings.photo_first:
        image = resize(low[:, 0], size)[None, :, None]
    if settings.carries:
        return encode_pairs(vae, carried_reference(image, [low[None]], size))
    return (latents.repeat(1, 2, 1, 1, 1) for latents in encode_stream(vae, hybrid_reference(image, [low[None]], size)))
