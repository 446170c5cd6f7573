"""Training clips for nano: photos in, latents out, as a pure function of (seed, step).

Stage I learns what the camera uncovers: the reference is the photo moved by the camera, mirrored at its edges. Finished
blocks come first, and a batch says how many. Stage II's windows are made in ``windows``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..camera import AMPLITUDE_FRAMES, camera_video
from ..core import Size
from ..models.nano_vae import NanoVAE
from .objective import Batch
from .prompts import caption
from .synthetic import Scene, make_scene, render

TRAINED_BLOCKS = 21
PHOTO_SIDE = 2048  # photos are kept in memory at most this wide
STAGE_ONE_SIZES = (
    (Size(640, 352), 0.45),
    (Size(352, 640), 0.1),
    (Size(480, 480), 0.1),
    (Size(320, 176), 0.25),
    (Size(176, 320), 0.1),
)


class Photos:
    """The photos of one split as uint8 tensors (3, h, w), in memory; mirrored at random."""

    def __init__(self, listing: Path, split: str) -> None:
        rows = [json.loads(line) for line in listing.read_text().splitlines()]
        names = sorted((row["sha256"], row["path"]) for row in rows if row["split"] == split)
        self.names = [Path(path).name for _, path in names]
        self._pictures = [_load(listing.parent / path, listing.parent / "cache" / f"{sha}.npy") for sha, path in names]
        if not self._pictures:
            raise ValueError(f"{listing} lists no photo of split {split!r}")

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._pictures[index]).permute(2, 0, 1)

    def pick(self, rng: random.Random) -> Tensor:
        photo = self[rng.randrange(len(self))]
        return photo.flip(2) if rng.random() < 0.5 else photo


def _load(path: Path, cache: Path) -> np.ndarray:
    """(h, w, 3) uint8, decoded once."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        np.save(cache, np.asarray(picture))
    return np.load(cache)


def block_frames(block: int) -> range:
    return range(0, 1) if block == 0 else range(4 * block - 3, 4 * block + 1)


@torch.no_grad()
def encode_blocks(vae: NanoVAE, first: Tensor, rest: Tensor | None) -> Tensor:
    """Normalized latents (1, c, t, h, w) of frame 0 (3, 1, h, w) and of later groups of four (3, 4k, h, w)."""
    z, state = vae.encode_chunk(first[None], None)
    parts = [z]
    if rest is not None:
        parts.append(vae.encode_chunk(rest[None], state)[0])
    shape = (1, -1, 1, 1, 1)
    return (torch.cat(parts, dim=2).float() - vae.latents_mean.view(shape)) / vae.latents_std.view(shape)


def stage_one_latents(vae: NanoVAE, scene: Scene, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Clean latents and those of the photo so moved (1, c, 1 + len(blocks), h, w): block 0, then ``blocks`` (>= 1).

    The reference knows the photo alone, mirrored where the camera leaves it; the clean clip saw what is there.
    """
    photo = scene.photo[:, None]
    clean = encode_blocks(vae, photo, render(scene, [frame for block in blocks for frame in block_frames(block)]))
    groups = list(camera_video(photo[None], scene.motion, 4 * max(blocks) + 1))
    moved = torch.cat([groups[block][0] for block in blocks], dim=1)
    return clean, encode_blocks(vae, photo, moved)


def stage_one_batch(vae: NanoVAE, photos: Photos, rng: random.Random, amplitude: float = 1.0) -> Batch:
    """The anchor and 3 to 5 of blocks 1..20 (any, or consecutive), or all 20; one size and blocks for the batch.

    ``amplitude`` multiplies the motions that the prompts name.
    """
    size = _weighted(rng, STAGE_ONE_SIZES)
    small = size.area < 100_000
    some, count = (5, 4) if small else (3, 2)
    kind = rng.random()
    if kind < (0.25 if small else 0.05):
        blocks, count = list(range(1, TRAINED_BLOCKS)), 1
    elif kind < 0.5:
        start = rng.randint(1, TRAINED_BLOCKS - some)
        blocks = list(range(start, start + some))
    else:
        blocks = sorted(rng.sample(range(1, TRAINED_BLOCKS), some))
    items, prompts = [], []
    for _ in range(count):
        asked = caption(rng)
        scene = make_scene(photos.pick(rng), size, asked.motion.scaled(amplitude), AMPLITUDE_FRAMES, rng)
        items.append(stage_one_latents(vae, scene, blocks))
        prompts.append(asked.prompt)
    clean, reference = (torch.cat(parts) for parts in zip(*items, strict=True))
    return Batch(clean, reference, torch.tensor([0, *blocks]), 1, prompts=tuple(prompts))


def _weighted(rng: random.Random, options: Sequence[tuple[Size, float]]) -> Size:
    return rng.choices([size for size, _ in options], [weight for _, weight in options])[0]
