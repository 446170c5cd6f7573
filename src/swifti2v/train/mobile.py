"""MobileI2V's base model at true size: flow matching on shards of clips, the photo's block pinned and not learned.

What the published code does (arXiv 2511.21475) is kept where it helps: levels logit-normal without shift, one motion
score a clip. The conditioned block is masked out of the loss (its noise cannot be seen: a third of their loss was
variance), weights are averaged, and AdamW serves in CAME's place. ``mobile_distill`` makes few-step students.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core import UsageError
from ..models.mobile_dit import MobileTransformer3DModel
from ..motion_score import motion_score
from .csg_source import Weighted, Windows
from .data import Clip, Pixels, from_bytes
from .objective import Batch, FlowMatching, Levels
from .recipe import Parts, Recipe
from .recipes import Given, shards, toy
from .recipes_nano import MadeUp, made_up
from .source import Source

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "attention_pattern": ("linear", "softmax"),
}
SEGMENT: Weighted = ((2, 1.0),)  # 17 frames are the photo's block and two more: one segment
NEIGHBORS: Weighted = ((1, 1.0),)  # of longer clips
TRAINED_BLOCKS = 3


def parts(tiny: bool, base: str | None = None) -> Parts:
    """A new network of the published size, or the one in folder ``base``; float32."""
    if base:
        return Parts({"transformer": MobileTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32)})
    model = MobileTransformer3DModel(**(TINY if tiny else {}))
    if tiny:
        nn.init.normal_(model.proj_out.weight, std=0.02)  # zero at first: a toy teacher would say nothing
    return Parts({"transformer": model})


class Codec(Protocol):
    """``models.ltx_vae.LTXCodec``, as far as it is needed."""

    temporal_stride: int

    def encode(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClipEncoder:
    """Pixels -> the ``Clip`` that MobileI2V learns from, with its motion score: the clip's own, or measured.

    The reference is the photo's latent in every block: the network takes none, the log compares with it. UsageError if
    the frames are not 1 more than a multiple of the codec's stride, or if the score is not known and OpenCV not there.
    """

    codec: Codec

    def __call__(self, pixels: Pixels) -> Clip:
        stride, frames = self.codec.temporal_stride, pixels.frames.shape[1]
        if frames % stride != 1:
            raise UsageError(f"{pixels.name}: {frames} frames are not {stride}k+1, as MobileI2V's VAE needs them")
        clip = from_bytes(pixels.frames)
        clean = self.codec.encode(clip[None])[0].cpu()
        score = pixels.motion_score if pixels.motion_score is not None else motion_score(clip)
        held = clean[:, :1].expand_as(clean).contiguous()
        words = (pixels.prompt, pixels.name, pixels.kind)
        return Clip(clean, held, None, None, *words, motion=pixels.motion, motion_score=score)


@dataclass(frozen=True)
class MobileShards:
    """A recipe's ``source``: windows of one folder of shards made with MobileI2V's VAE, with their motion scores."""

    data: tuple[Path, ...]
    batch: int = 1
    segment_blocks: Weighted = SEGMENT
    neighbor_blocks: Weighted = NEIGHBORS
    seed: int = 0

    def __call__(self, parts: Parts) -> Source[Batch]:
        if len(self.data) != 1 or not self.data[0].is_dir():
            raise UsageError("mobile takes one --data: a folder of latent shards")
        clips = shards(self.data[0], self.seed, self.batch)
        return Windows(
            clips,
            self.batch,
            self.segment_blocks,
            self.neighbor_blocks,
            trained_blocks=TRAINED_BLOCKS,
            seed=self.seed,
        )


def source(given: Given) -> Any:
    """Shards, or what is made up at toy size."""
    return partial(made_up, source=MadeUp(blocks=3, scored=True)) if given.tiny else MobileShards(given.data)


def mobile(given: Given) -> Recipe:
    """MobileI2V (264,855,296 parameters) on latent shards of clips of 17 frames, from nothing or from --base FOLDER."""
    recipe = Recipe(
        "mobile",
        partial(parts, given.tiny, given.base),
        source(given),
        FlowMatching(Levels(shift=1.0, low=0.001, law="logit-normal")),
        steps=100_000,
        lr=3.5e-5,  # 1e-4 times the root of 32 / 256 items, as the published code scales it
        warmup=2000,
        decay=10_000,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        ema_decay=0.9999,
        accumulation=4,
        gradient_checkpointing=True,
        save_every=500,
    )
    return toy(recipe, lr=1e-2) if given.tiny else recipe
