"""Training windows for nano's Stage II: true clips, film or a camera over a photo, beside references as Stage I's
output will give them. A window is a pure function of (seed, index); ``Kept`` remembers windows on disk, since making
one costs more than learning from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import carry
from ..camera import AMPLITUDE_FRAMES
from ..core import Size
from ..models.nano_vae import NanoVAE
from ..reference import resize
from ..segments import RopePositions, Window
from .files import written
from .film import Shot
from .nano import TRAINED_BLOCKS, Photos, block_frames, encode_blocks
from .objective import Batch
from .prompts import caption
from .synthetic import make_scene, render

SCALE = 4  # Stage I is this many times smaller
SIZES = ((Size(512, 256), 0.6), (Size(320, 320), 0.25), (Size(256, 512), 0.15))
FILM = 0.6
COUNT = 3  # windows a batch
STRIDE = 8  # frames skipped while the trail is followed up to the window

Frames = Callable[[list[int]], Tensor]
"""Frame numbers of a clip, 0 among them, to pixels (3, t, h, w) in [-1, 1]."""


@dataclass(frozen=True)
class Material:
    """What windows are cut from."""

    vae: NanoVAE
    photos: Photos
    shots: list[Shot]


def window_pair(
    vae: NanoVAE, frames: Frames, window: Window, soften: float | None, through_vae: bool
) -> tuple[Tensor, Tensor]:
    """Clean latents (1, c, len(window.blocks), h, w) of a window that begins with the anchor; references (1, 2c, ...).

    The reference is the clip shrunk to a quarter and enlarged with the photo's detail carried along. On the way it may
    be softened (to ``soften`` of its size and back) and sent through the VAE at its small size, as Stage I's output is.
    """
    wanted = [frame for block in window.blocks[1:] for frame in block_frames(block)]
    path = list(range(0, wanted[0], STRIDE))
    video = frames([*path, *wanted])
    photo, true = video[:, :1], video[:, len(path) :]
    size = Size(video.shape[3], video.shape[2])
    small = Size(size.width // SCALE, size.height // SCALE)
    low = torch.stack([resize(frame, small) for frame in video.unbind(1)], dim=1)
    if soften is not None:
        less = Size(max(8, round(small.width * soften)), max(8, round(small.height * soften)))
        low = torch.stack([low[:, 0], *(resize(resize(f, less), small) for f in low[:, 1:].unbind(1))], dim=1)
    if through_vae:
        low = torch.cat([low[:, : len(path)], _recoded(vae, low[:, :1], low[:, len(path) :])], dim=1)
    trail, reference = carry.start(photo[:, 0][None]), []
    for number, frame in enumerate(low.unbind(1)):
        if number:
            trail = carry.follow(trail, frame[None])
        if number >= len(path):
            enlarged = resize(frame, size)[None]
            reference.append(torch.cat(carry.detailed(enlarged, frame[None], trail)).clamp(-1, 1))
    both = [encode_blocks(vae, photo, clip) for clip in torch.stack(reference, dim=2).unbind(0)]
    return encode_blocks(vae, photo, true), torch.cat(both, dim=1)


def trained_window(rng: random.Random) -> Window:
    """A CSG window within the trained length: mostly one neighbor and three blocks."""
    length = 3 if rng.random() < 0.7 else rng.choice((1, 2, 4, 5))
    start = rng.randint(1, TRAINED_BLOCKS - length)
    neighbors = rng.choices((0, 1, 2), (0.15, 0.75, 0.1))[0]
    return Window(0, tuple(range(max(1, start - neighbors), start)), tuple(range(start, start + length)))


def _recoded(vae: NanoVAE, photo: Tensor, frames: Tensor) -> Tensor:
    """``frames`` (3, 4k, h, w) through the VAE at their own size, the decoder knowing ``photo`` (3, 1, h, w)."""
    z, state = vae.encode_chunk(photo[None], None)
    rest, _ = vae.encode_chunk(frames[None], state)
    decoded, _ = vae.decode_chunk(torch.cat([z, rest], dim=2), vae.decoder_state(photo[None]))
    return decoded[0, :, 1:].clamp(-1, 1)


def film_frames(shots: Sequence[Shot], size: Size, last: int, rng: random.Random) -> Frames | None:
    """A random window of ``size`` of a random shot that lasts beyond frame ``last``; None if there is none."""
    fitting = [s for s in shots if len(s.frames) > last and s.frames.shape[1] >= size.height]
    fitting = [s for s in fitting if s.frames.shape[2] >= size.width]
    if not fitting:
        return None
    return shot_frames(rng.choice(fitting), size, last, rng)


def shot_frames(shot: Shot, size: Size, last: int, rng: random.Random) -> Frames:
    """A random window of ``size``, in the shot's own pixels, from a random frame on; mirrored at random."""
    top = rng.randint(0, shot.frames.shape[1] - size.height)
    left = rng.randint(0, shot.frames.shape[2] - size.width)
    begin, mirrored = rng.randint(0, len(shot.frames) - last - 1), rng.random() < 0.5
    window = Shot(shot.name, shot.frames[:, top : top + size.height, left : left + size.width])

    def frames(indices: list[int]) -> Tensor:
        taken = window.clip(begin, indices)
        return taken.flip(3) if mirrored else taken

    return frames


def photo_frames(photos: Photos, size: Size, last: int, rng: random.Random) -> Frames:
    """A camera over a random photo; late windows move less, so that the photo still holds them."""
    motion = caption(rng).motion.scaled(rng.uniform(0.2, 1.1) * min(1.0, AMPLITUDE_FRAMES / last))
    scene = make_scene(photos.pick(rng), size, motion, last, rng)
    return lambda indices: render(scene, indices)


@dataclass(frozen=True)
class StageTwoWindows:
    """Batches of Stage II windows of one size and shape each."""

    material: Material
    seed: int

    @torch.no_grad()
    def at(self, index: int) -> Batch:
        rng = random.Random(f"windows/{self.seed}/{index}")
        size = rng.choices([size for size, _ in SIZES], [share for _, share in SIZES])[0]
        window = trained_window(rng)
        last = 4 * window.blocks[-1]
        pairs = []
        for _ in range(COUNT):
            chosen = film_frames(self.material.shots, size, last, rng) if rng.random() < FILM else None
            frames = chosen or photo_frames(self.material.photos, size, last, rng)
            soften = rng.uniform(0.5, 0.9) if rng.random() < 0.25 else None
            pairs.append(window_pair(self.material.vae, frames, window, soften, rng.random() < 0.4))
        clean, reference = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        rule: RopePositions = "absolute" if rng.random() < 0.25 else "clamped"
        positions = window.positions(rule, TRAINED_BLOCKS)
        return Batch(clean, reference, torch.tensor(positions), len(window.context))


@dataclass(frozen=True)
class Kept:
    """A source's batches, latents rounded to float16, remembered in ``folder``: other processes may run ahead."""

    source: Any
    folder: Path

    def at(self, index: int) -> Batch:
        path = self.folder / f"{index:06d}.npz"
        if not path.exists():
            self._keep(path, self.source.at(index))
        with np.load(path) as kept:
            clean, reference = (torch.from_numpy(kept[name]).float() for name in ("clean", "reference"))
            score = torch.from_numpy(kept["motion_score"]) if "motion_score" in kept else None
            places, context = torch.from_numpy(kept["frame_indices"]), int(kept["context"])
            return Batch(clean, reference, places, context, motion_score=score)

    def _keep(self, path: Path, batch: Batch) -> None:
        rounded = {name: getattr(batch, name).to(torch.float16).numpy() for name in ("clean", "reference")}
        if batch.motion_score is not None:
            rounded["motion_score"] = batch.motion_score.numpy()
        with written(path) as file:
            np.savez(file, **rounded, frame_indices=batch.frame_indices.numpy(), context=np.array(batch.context))
