"""Film for training nano: the training shots of ``data/clips.jsonl`` as memory-mapped frames, cut ready once.

A shot is kept twice: whole at 640x352, and as a 512x288 window at the film's own size, where its finest detail is. It
knows nothing of latents.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Size
from ..models.nano_vae import GROUP
from ..reference import fit_pixels
from .shots import read_frames, scan
from .vae import Clips, MovingPhotos

WHOLE, WINDOW = Size(640, 352), Size(512, 288)
SHORTEST = 9  # frames


@dataclass(frozen=True)
class Shot:
    """One kept shot: ``frames`` (t, h, w, 3) uint8, memory-mapped."""

    name: str
    frames: np.ndarray

    def clip(self, start: int, indices: list[int]) -> Tensor:
        """Frames ``start`` + each index, (3, t, h, w) in [-1, 1]."""
        taken = np.ascontiguousarray(self.frames[[start + index for index in indices]])
        return torch.from_numpy(taken).permute(3, 0, 1, 2).float() / 127.5 - 1


def prepare(listing: Path, split: str, folder: Path, seed: int = 0) -> list[Path]:
    """Decode every shot of ``split`` longer than 8 frames into ``folder``; what lies there whole is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == split and row["end"] - row["start"] >= SHORTEST]
    files: list[Path] = []
    for path in sorted({row["path"] for row in rows}):
        shots = sorted((row for row in rows if row["path"] == path), key=lambda row: int(row["start"]))
        files += _decode(listing.parent / path, shots, folder, seed)
    return files


def load(folder: Path) -> list[Shot]:
    """The shots that ``prepare`` left, by name."""
    return [Shot(path.stem, np.load(path, mmap_mode="r")) for path in sorted(folder.glob("*.npy"))]


def _decode(video: Path, shots: list[dict[str, Any]], folder: Path, seed: int) -> list[Path]:
    names = [f"{video.stem}_{row['start']:06d}" for row in shots]
    files = [folder / f"{name}_{kind}.npy" for name in names for kind in ("whole", "window")]
    if all(file.exists() for file in files):
        return files
    times = scan(video, kept_in=folder.parent).times
    for row, name in zip(shots, names, strict=True):
        rng = random.Random(f"{seed}/{name}")
        whole: list[np.ndarray] = []
        window: list[np.ndarray] = []
        for picture in read_frames(video, row["start"], row["end"] - row["start"], times=times):
            for pictures, view in zip((whole, window), _views(picture, rng), strict=True):
                pictures.append(((view + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
        _save(folder / f"{name}_whole.npy", np.stack(whole))
        _save(folder / f"{name}_window.npy", np.stack(window))
    return files


def _views(picture: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    top = rng.randint(0, max(0, picture.shape[1] - WINDOW.height))
    left = rng.randint(0, max(0, picture.shape[2] - WINDOW.width))
    return fit_pixels(picture, WHOLE), picture[:, top : top + WINDOW.height, left : left + WINDOW.width]


def _save(path: Path, frames: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, frames)
    os.replace(temporary, path)


class FilmAndPhotos:
    """What nano's VAE learns from: crops of film shots (``share`` of the moving clips, half as many of the single
    frames) and cameras over photos."""

    def __init__(self, photos: MovingPhotos, shots: list[Shot], seed: int, share: float = 0.5) -> None:
        self.photos, self.shots, self.seed, self.share = photos, shots, seed, share

    def at(self, index: int) -> Clips:
        rng = random.Random(f"film and photos/{self.seed}/{index}")
        groups = []
        for count, blocks, side in self.photos.groups:
            share = self.share / 2 if blocks == 0 else self.share
            clips = [
                crop(self.shots, rng, 1 + GROUP * blocks, side)
                if rng.random() < share
                else self.photos.clip(rng, 1 + GROUP * blocks, side)
                for _ in range(count)
            ]
            groups.append(torch.stack(clips))
        return Clips(tuple(groups))


def crop(shots: list[Shot], rng: random.Random, frames: int, side: int) -> Tensor:
    """Consecutive frames of a random shot, a random square window: (3, frames, side, side), mirrored at random."""
    shot = rng.choice([shot for shot in shots if len(shot.frames) >= frames])
    height, width = shot.frames.shape[1:3]
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    window = Shot(shot.name, shot.frames[:, top : top + side, left : left + side])
    taken = window.clip(rng.randint(0, len(shot.frames) - frames), list(range(frames)))
    return taken.flip(3) if rng.random() < 0.5 else taken
