"""Make nano's VAE: choose its fixed basis, train its refiner, measure it against the zonal DCT.

    python scripts/train_nano_vae.py basis    --out src/swifti2v/nano/vae      # once: latents are frozen from here on
    python scripts/train_nano_vae.py train    --minutes 18                     # resumes from --run if it exists
    python scripts/train_nano_vae.py evaluate

Reads data/photos.jsonl (scripts/fetch_photos.py). Motion is synthetic: pans, zooms and turns of photos.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from swifti2v.models.nano_vae import BLOCK, COLORS, GROUP, DecoderState, NanoVAE, basis, dct

WIDTHS = (2560, 1810, 1280, 905, 640)  # the sizes nano works at: photos are learnt from as sharp as they will be used
PEAK_SQUARED = 4.0  # pixels are in [-1, 1]
BT601 = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Picture:
    """One photo at one size: ``pixels`` (3, h, w) uint8."""

    name: str
    pixels: Tensor


def photos(data: Path, split: str) -> list[Path]:
    """Paths of a split, in the order of photos.jsonl."""
    lines = [json.loads(line) for line in (data / "photos.jsonl").read_text(encoding="utf-8").splitlines()]
    return [data / line["path"] for line in lines if line["split"] == split]


def load(path: Path, width: int) -> Picture | None:
    """A photo scaled down to ``width`` over its longer side's share of 16:9, never up; None if it is too small."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = max(width / image.width, width * 0.55 / image.height)
    if scale > 1.0:
        return None
    size = (max(width, round(image.width * scale)), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return Picture(path.stem, torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())


def fitted(path: Path, width: int, height: int, enlarge: bool = False) -> Tensor | None:
    """A photo covering (3, height, width), center crop, in [-1, 1]; None if that needs enlarging and it may not."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = max(width / image.width, height / image.height)
    if scale > 1.0 and not enlarge:
        return None
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def library(data: Path) -> list[list[Picture]]:
    """Training photos by width, in WIDTHS' order."""
    paths = photos(data, "train")
    return [[p for path in paths if (p := load(path, width)) is not None] for width in WIDTHS]


def motion(rng: random.Random, frames: int, size: int) -> Tensor:
    """Camera paths as affine matrices (frames, 2, 3) for ``affine_grid``; frame 0 is the identity, a fifth stand still."""
    kind = rng.random()
    speed = 0.0 if kind < 0.2 else 2 * math.exp(rng.uniform(math.log(0.2), math.log(6.0))) / size
    angle = rng.uniform(0, 2 * math.pi)
    zoom = rng.gauss(0, 0.004) if kind > 0.5 else 0.0
    turn = rng.gauss(0, 0.004) if kind > 0.8 else 0.0
    steps = torch.arange(frames, dtype=torch.float32)
    scale, theta = torch.exp(zoom * steps), turn * steps
    rows = [scale * theta.cos(), -scale * theta.sin(), speed * math.cos(angle) * steps]
    rows += [scale * theta.sin(), scale * theta.cos(), speed * math.sin(angle) * steps]
    return torch.stack(rows, dim=-1).reshape(frames, 2, 3)


def clip(pictures: list[list[Picture]], rng: random.Random, frames: int, size: int) -> Tensor:
    """One synthetic clip (3, frames, size, size) in [-1, 1]: a camera moving over a random photo at a random scale."""
    scale = rng.choices(range(len(WIDTHS)), weights=(3, 3, 3, 1, 1))[0]
    picture = rng.choice(pictures[scale]).pixels
    margin = min(64, (min(picture.shape[1:]) - size) // 2)
    side = size + 2 * margin
    top, left = rng.randint(0, picture.shape[1] - side), rng.randint(0, picture.shape[2] - side)
    window = picture[:, top : top + side, left : left + side].float() / 127.5 - 1
    if rng.random() < 0.5:
        window = window.flip(2)
    if rng.random() < 0.25:
        window = window.transpose(1, 2)
    if frames == 1:
        return window[:, None, margin : margin + size, margin : margin + size]
    grid = F.affine_grid(motion(rng, frames, size), [frames, 3, size, size], align_corners=False)
    grid = grid * (size / side)
    moved = F.grid_sample(window.expand(frames, -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved.clamp(-1, 1).transpose(0, 1)


# -- the fixed basis ------------------------------------------------------------------------------------------------


def energies(pictures: list[list[Picture]], frames: int, clips: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every DCT coefficient (3*frames*256,) over clips: frame 0, or the four frames after it."""
    rng, size = random.Random(frames), 128
    everything = basis(range(COLORS * frames * BLOCK**2), frames).float()
    total, squares, count = torch.zeros(len(everything)), torch.zeros(len(everything)), 0
    for _ in range(clips):
        x = clip(pictures, rng, 1 if frames == 1 else 1 + GROUP, size)[:, -frames:]
        patches = x.reshape(3, frames, size // 16, 16, size // 16, 16).permute(2, 4, 0, 1, 3, 5).reshape(-1, len(everything))
        coefficients = patches @ everything.T
        total, squares, count = total + coefficients.sum(0), squares + coefficients.square().sum(0), count + len(patches)
    mean = total / count
    return mean, squares / count - mean.square()


def choose(pictures: list[list[Picture]], channels: int, clips: int) -> dict[str, list[int] | list[float]]:
    """The VAE's lists: kept coefficients, channel by channel alike where possible, and half-whitening scales."""
    (mean_image, image), (mean_video, video) = (energies(pictures, frames, clips) for frames in (1, GROUP))
    kept_image, kept_video = (set(v.topk(channels).indices.tolist()) for v in (image, video))
    still = {i: i // 256 * 256 * GROUP + i % 256 for i in kept_image}  # (color, v, u) at temporal frequency 0
    shared = sorted((i for i in kept_image if still[i] in kept_video), key=lambda i: -float(image[i]))
    lone_image = sorted(kept_image - set(shared), key=lambda i: -float(image[i]))
    lone_video = sorted(kept_video - {still[i] for i in shared}, key=lambda i: -float(video[i]))
    kept_image, kept_video = shared + lone_image, [still[i] for i in shared] + lone_video
    # A motionless clip's coefficient at temporal frequency 0 is sqrt(GROUP) times the photo's: undo that everywhere.
    gain = math.sqrt(GROUP)
    std_image, std_video = image[kept_image].sqrt(), video[kept_video].sqrt() / gain
    common = torch.cat([std_image[: len(shared)], torch.zeros(len(lone_image))])
    halves = [torch.where(common > 0, common, std).rsqrt() for std in (std_image, std_video)]
    rms = math.sqrt(float((std_image * halves[0]).square().mean() + (std_video * halves[1]).square().mean()) / 2)
    scale_image, scale_video = halves[0] / rms, halves[1] / rms / gain
    mean = torch.where(common > 0, mean_image[kept_image] * scale_image, torch.zeros(channels))
    print(f"{len(shared)} of {channels} coefficients are common to block 0 and later blocks")
    return {
        "kept_image": kept_image,
        "kept_video": kept_video,
        "scale_image": [round(s, 6) for s in scale_image.tolist()],
        "scale_video": [round(s, 6) for s in scale_video.tolist()],
        "latents_mean": [round(m, 4) if i < 3 or abs(m) > 0.05 else 0.0 for i, m in enumerate(mean.tolist())],
        "latents_std": [1.0] * channels,
    }
