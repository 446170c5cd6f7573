"""Training windows and the teacher recipe of mobile-nano: a photo comes alive by as much as its motion score says.

Most windows are photos (or stills of film) into which a camera pushes at the speed of a drawn score, the rest film as
it was shot, under its own score. So the most likely answer to a photo alone is a push in: mobile-nano has 2.9 M
parameters and reads no text, and among many equally likely motions it would show their mean. The reference is the photo
held still: what the network learns is how the picture moves. ``mobile_distill`` makes few-step students of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..camera import Motion, View
from ..core import Size, UsageError
from ..models.mobile_dit import MobileTransformer3DModel
from ..models.nano_vae import NanoVAE
from ..motion_score import PAIRS, SCORE_SIZE, motion_score
from ..reference import resize
from ..segments import Window
from .film import Shot
from .nano import Photos, block_frames, encode_blocks
from .objective import Batch, FlowMatching, Levels
from .recipe import Parts, Recipe
from .recipes import Given, toy
from .recipes_nano import MadeUp, Passes, channel_weights, film_shots, load_vae, made_up, package
from .samples import WindowVideos
from .source import Source
from .synthetic import make_scene, render
from .windows import Frames, Kept, Material, shot_frames

SIZES = ((Size(160, 96), 0.45), (Size(320, 176), 0.2), (Size(96, 160), 0.15), (Size(128, 128), 0.2))
SEGMENT, NEIGHBORS = 4, 1
STARTS = ((1, 0.6), (5, 0.16), (9, 0.12), (13, 0.06), (17, 0.06))
FILM, STILL = 0.25, 0.3  # share of windows that are film; of pushes that go into a still of film
SCORES = (0.15, 5.0)  # drawn evenly by logarithm
LIVELIEST = 8.0  # film that moves more than this is left out
COUNT = 8  # windows a batch
PASSES = 220  # batches, gone through again and again
SHIFT = 3.0
NETWORK: dict[str, Any] = {
    "in_channels": 96,
    "out_channels": 96,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "attention_pattern": ("linear", "linear", "softmax", "linear", "linear"),
    "reference_channels": 96,
    "prediction": "residual",
    "absolute_positions": True,
}
TINY: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2, "attention_pattern": ("linear", "softmax")}


def push_of(score: float) -> Motion:
    """The camera's push in whose mean optical flow is ``score`` (``motion_score``)."""
    per_frame = score / push_flow(1.0)
    return Motion(zoom=math.exp(80 * per_frame))


def push_flow(rate: float) -> float:
    """Mean |flow| over a pair of measured frames, for a picture that grows by exp(``rate``) a frame, small rates.

    A point at (x, y) from the center moves by (x, y) times the growth; |x| is a quarter of the width on average.
    """
    first, second = PAIRS[0]
    width, height = SCORE_SIZE.width, SCORE_SIZE.height
    return rate * (second - first) * (width / 4 + height / 4) / 2


def view_flow(before: View, after: View) -> float:
    """Mean |flow| of two views of one photo (no roll), at the size at which scores are measured."""
    grid = torch.linspace(-0.5, 0.5, 65)
    moved = []
    for side, offset in ((SCORE_SIZE.width, (before.x, after.x)), (SCORE_SIZE.height, (before.y, after.y))):
        place = before.scale * grid + offset[0]
        moved.append(float(((place - offset[1]) / after.scale - grid).abs().mean()) * side)
    return sum(moved) / 2


@dataclass(frozen=True)
class MobileWindows:
    """Batches of windows of one size: the anchor, at most one finished block, four blocks to make."""

    material: Material
    seed: int

    @torch.no_grad()
    def at(self, index: int) -> Batch:
        rng = random.Random(f"mobile/{self.seed}/{index}")
        size = rng.choices([size for size, _ in SIZES], [share for _, share in SIZES])[0]
        start = rng.choices([start for start, _ in STARTS], [share for _, share in STARTS])[0]
        window = Window(0, tuple(range(max(1, start - NEIGHBORS), start)), tuple(range(start, start + SEGMENT)))
        items = [self._item(size, window, rng) for _ in range(COUNT)]
        clean, reference, scores = zip(*items, strict=True)
        positions = torch.tensor(window.blocks)
        scored = torch.tensor(scores)
        return Batch(torch.cat(clean), torch.cat(reference), positions, len(window.context), motion_score=scored)

    def _item(self, size: Size, window: Window, rng: random.Random) -> tuple[Tensor, Tensor, float]:
        vae, last = self.material.vae, 4 * window.blocks[-1]
        frames = small_film(self.material.shots, size, last, rng) if rng.random() < FILM else None
        score = math.inf if frames is None else motion_score(frames(list(range(PAIRS[-1][1] + 1))))
        if frames is None or score > LIVELIEST:
            frames, score = self._push(size, last, rng)
        photo = frames([0])
        true = frames([frame for block in window.blocks[1:] for frame in block_frames(block)])
        clean = encode_blocks(vae, photo, true)
        held = encode_blocks(vae, photo, photo.expand(-1, 4, -1, -1))
        later = held[:, :, 1:].expand(-1, -1, len(window.blocks) - 1, -1, -1)
        return clean, torch.cat([held[:, :, :1], later], dim=2), score

    def _push(self, size: Size, last: int, rng: random.Random) -> tuple[Frames, float]:
        low, high = (math.log(score) for score in SCORES)
        motion = push_of(math.exp(rng.uniform(low, high)))
        picture = self._picture(rng)
        scene = make_scene(picture, size, motion, last, rng)
        flows = [view_flow(motion.at(first), motion.at(second)) for first, second in PAIRS]
        return lambda indices: render(scene, indices), sum(flows) / len(flows)

    def _picture(self, rng: random.Random) -> Tensor:
        """(3, h, w) uint8: a photo, or a still of film."""
        shots = self.material.shots
        if not shots or rng.random() >= STILL:
            return self.material.photos.pick(rng)
        shot = rng.choice(shots)
        return torch.from_numpy(shot.frames[rng.randrange(len(shot.frames))].copy()).permute(2, 0, 1)


def small_film(shots: Sequence[Shot], size: Size, last: int, rng: random.Random) -> Frames | None:
    """A random part of a random shot that lasts beyond frame ``last``, shrunk to ``size``; None if there is none."""
    fitting = [shot for shot in shots if len(shot.frames) > last]
    if not fitting:
        return None
    shot = rng.choice(fitting)
    rows, columns = shot.frames.shape[1:3]
    largest = min(rows / size.height, columns / size.width)
    ratio = largest * rng.uniform(0.6, 1.0)
    part = shot_frames(shot, Size(round(size.width * ratio), round(size.height * ratio)), last, rng)
    return lambda indices: torch.stack([resize(frame, size) for frame in part(indices).unbind(1)], dim=1)


def parts(tiny: bool, base: str | None = None) -> Parts:
    """A new network, or the one in ``base``; errors weigh as nano's do."""
    scale = [1.0, 2.0, 4.0, 8.0] if tiny else list(NanoVAE.load_config(str(package("vae")))["scale_video"])
    channels = dict.fromkeys(("in_channels", "out_channels", "reference_channels"), len(scale))
    if base is None:
        model = MobileTransformer3DModel(**NETWORK | channels | (TINY if tiny else {}))
    else:
        model = MobileTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32)
    return Parts({"transformer": model}, constants={"channel_weights": channel_weights(scale)})


def windows(parts: Parts, listing: Path, seed: int) -> Source[Batch]:
    """Windows from a photos.jsonl and the film beside it, kept in ``cache/mobile``."""
    material = Material(load_vae(package("vae")), Photos(listing, "train"), film_shots(listing.parent))
    return Passes(Kept(MobileWindows(material, seed), listing.parent / "cache" / "mobile"), PASSES)


def source(data: Sequence[Path], tiny: bool) -> Any:
    """What a recipe of mobile-nano learns from; made up at toy size."""
    if tiny:
        return partial(made_up, source=MadeUp(scored=True))
    if len(data) != 1 or data[0].suffix != ".jsonl":
        raise UsageError("mobile_nano takes one --data: a photos.jsonl (scripts/fetch_photos.py)")
    return partial(windows, listing=data[0], seed=0)


def mobile_nano(given: Given) -> Recipe:
    """mobile-nano in many steps, MobileI2V's objective, from photos and the film beside them (photos.jsonl)."""
    recipe = Recipe(
        "mobile_nano",
        partial(parts, given.tiny, given.base),
        source(given.data, given.tiny),
        FlowMatching(Levels(SHIFT, low=0.02, one=0.1, law="logit-normal"), "residual"),
        steps=1050,
        lr=1e-3 if given.base is None else 5e-4,
        decay=650,
        optimizer="muon",
        sample=WindowVideos(partial(load_vae, package("vae")), steps=30, shift=SHIFT),
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe
