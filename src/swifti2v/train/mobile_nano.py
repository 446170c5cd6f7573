"""The teacher recipe of mobile-nano: from a photo and a motion score to how the photo moves (docs/decisions/0010).

There are many right answers to one photo, which is what flow matching is for. ``mobile_distill`` makes few-step
students of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .. import motion_field
from ..core import UsageError
from ..flow import sigmas
from ..media import write_video
from ..models.causal_vae import decode_stream
from ..models.mobile_dit import MobileTransformer3DModel
from ..motion_field import CHANNELS
from .moving import SIZES, SMALL, MobileWindows
from .nano import Photos
from .objective import Batch, FlowMatching, Levels
from .recipe import Parts, Recipe
from .recipes import Given, toy
from .recipes_nano import MadeUp, Passes, film_shots, load_vae, made_up, package
from .samples import denoise
from .source import Source
from .windows import Kept, Material

PASSES = 800  # batches, gone through again and again
SHIFT = 3.0
NETWORK: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "attention_pattern": ("linear", "linear", "softmax", "linear", "linear"),
    "reference_channels": CHANNELS + 96,
    "absolute_positions": True,
}
TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "attention_pattern": ("linear", "softmax"),
    "reference_channels": 4,
}


def parts(tiny: bool, base: str | None = None) -> Parts:
    """A new network, or the one in ``base``."""
    if base is None:
        model = MobileTransformer3DModel(**NETWORK | (TINY if tiny else {}))
    else:
        model = MobileTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32)
    return Parts({"transformer": model})


def windows(parts: Parts, listing: Path, seed: int, small: bool = False) -> Source[Batch]:
    """Windows from a photos.jsonl and the film beside it, kept in ``cache/moving_HASH``, of both lists."""
    material = Material(load_vae(package("vae")), Photos(listing, "train"), film_shots(listing.parent))
    made = MobileWindows(material, seed, SMALL if small else SIZES)
    known = b"".join(path.read_bytes() for path in (listing, listing.parent / "clips.jsonl") if path.exists())
    name = f"moving{'_small' if small else ''}_{hashlib.sha256(known).hexdigest()[:8]}"
    return Passes(Kept(made, listing.parent / "cache" / name), PASSES)


def source(data: Sequence[Path], tiny: bool, small: bool = False) -> Any:
    """What a recipe of mobile-nano learns from; made up at toy size. ``small``: mostly small pictures."""
    if tiny:
        return partial(made_up, source=MadeUp(scored=True))
    if len(data) != 1 or data[0].suffix != ".jsonl":
        raise UsageError("mobile_nano takes one --data: a photos.jsonl (scripts/fetch_photos.py)")
    return partial(windows, listing=data[0], seed=int(small), small=small)


@dataclass(frozen=True)
class MotionVideos:
    """For a recipe's ``sample``: items ``indices`` as NNNN.mp4: what is made of the photo beside the truth; the
    first clip of each. The photo is shown as the network sees it, decoded."""

    indices: tuple[int, ...] = (0, 1, 2)
    steps: int = 30
    shift: float = SHIFT

    def __call__(self, parts: Parts, source: Source[Any], folder: Path | None) -> None:
        device = next(parts.modules["transformer"].parameters()).device
        for index in self.indices:
            batch = source.at(index)
            made = denoise(parts, batch.to(device), sigmas(self.steps, self.shift)).cpu()
            if folder is None or batch.clean.shape[1] != CHANNELS:
                continue
            score = 1.0 if batch.motion_score is None else float(batch.motion_score[0])
            photo = next(iter(decode_stream(_vae(), [batch.reference[:1, CHANNELS:, :1]])))
            # As if the window began with the clip.
            clips = [motion_field.decode_stream([z[:1]], photo, score) for z in (made, batch.clean)]
            shown = [torch.cat(list(clip), dim=2) for clip in clips]
            write_video(folder / f"{index:04d}.mp4", [torch.cat(shown, dim=4)], fps=15.0)


@cache
def _vae() -> Any:
    return load_vae(package("vae"))


def mobile_nano(given: Given) -> Recipe:
    """mobile-nano in many steps, MobileI2V's objective, from photos and the film beside them (photos.jsonl)."""
    recipe = Recipe(
        "mobile_nano",
        partial(parts, given.tiny, given.base),
        source(given.data, given.tiny),
        FlowMatching(Levels(SHIFT, low=0.02, one=0.1, law="logit-normal")),
        steps=2400,
        lr=1e-3 if given.base is None else 5e-4,
        decay=900,
        optimizer="muon",
        sample=MotionVideos(),
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe
