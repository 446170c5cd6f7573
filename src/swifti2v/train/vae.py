"""Training autoencoders: clips of moving photos, and what a decoder should get right.

NanoVAE's refiner learns block by block what its fixed transform leaves out; a Wan VAE's decoder can be tuned on the
same clips with its encoder frozen, so that latents stay what every DiT knows. Pixels are in [-1, 1].
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..core import Size, UsageError
from ..models.nano_vae import GROUP, NanoVAE
from .data import FilmShot, FilmSource, MixedSource, film_shots, from_bytes
from .objective import sole
from .recipe import Loss, Parts
from .source import Source

WIDTHS = (2560, 1810, 1280, 905, 640)  # the sizes nano works at: photos are learnt from as sharp as they will be used
SHARES = (3, 3, 3, 1, 1)
FLOOR = 4e-5
Groups = tuple[tuple[int, int, int], ...]
"""(clips, blocks after block 0, side in pixels) of the parts of an item."""


@dataclass(frozen=True)
class Clips:
    """What one step sees: groups of clips (b, 3, 1 + 4k, h, w) of one length each."""

    groups: tuple[Tensor, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Clips:
        return Clips(tuple(group.to(device, non_blocking=non_blocking) for group in self.groups))


class MovingPhotos:
    """Cameras over the photos of ``split`` listed in ``listing`` (photos.jsonl), which are kept in memory by width.

    ``groups``: the clips of every item.
    """

    def __init__(self, listing: Path, split: str, groups: Groups, seed: int, widths: tuple[int, ...]) -> None:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        paths = [listing.parent / row["path"] for row in rows if row["split"] == split]
        self.pictures = [[p for path in paths if (p := shrunk(path, width)) is not None] for width in widths]
        if not any(self.pictures):
            raise UsageError(f"{listing} lists no photo of split {split!r} at least {min(widths)} pixels wide")
        self.groups, self.seed = groups, seed

    def at(self, index: int) -> Clips:
        rng = random.Random(f"vae/{self.seed}/{index}")
        groups = (
            torch.stack([self.clip(rng, 1 + GROUP * blocks, side) for _ in range(count)])
            for count, blocks, side in self.groups
        )
        return Clips(tuple(groups))

    def clip(self, rng: random.Random, frames: int, side: int) -> Tensor:
        shares = [share if held else 0 for share, held in zip(SHARES, self.pictures, strict=False)]
        scale = rng.choices(range(len(self.pictures)), weights=shares)[0]
        return moving_crop(rng.choice(self.pictures[scale]), rng, frames, side)


class Films:
    """Crops of real shots (``data.film_shots``), in the same ``groups`` as ``MovingPhotos``."""

    def __init__(self, shots: tuple[FilmShot, ...], groups: Groups, seed: int, times: Path | None = None) -> None:
        self.sources = tuple(
            (count, FilmSource(shots, 1 + GROUP * blocks, ((Size(side, side), 1.0),), seed + place, times=times))
            for place, (count, blocks, side) in enumerate(groups)
        )

    def at(self, index: int) -> Clips:
        groups = (
            torch.stack([from_bytes(source.at(index * count + i).frames) for i in range(count)])
            for count, source in self.sources
        )
        return Clips(tuple(groups))


def pixel_source(data: tuple[Path, ...], groups: Groups, widths: tuple[int, ...], seed: int = 0) -> Source[Clips]:
    """Clips of pixels from listings, equal shares of each: shots (clips.jsonl), or photos under moving cameras
    (photos.jsonl). UsageError without any."""
    if not data:
        raise UsageError("give --data: a photos.jsonl, a clips.jsonl, or both")
    sources: list[Source[Clips]] = []
    for listing in data:
        with listing.open(encoding="utf-8") as lines:
            film = "start" in json.loads(lines.readline())
        if film:
            sources.append(Films(film_shots(listing), groups, seed, listing.parent / "cache" / "times"))
        else:
            sources.append(MovingPhotos(listing, "train", groups, seed, widths))
    return MixedSource(tuple(sources), (1.0,) * len(sources), seed) if len(sources) > 1 else sources[0]


def shrunk(path: Path, width: int) -> Tensor | None:
    """A photo (3, h, w) uint8 scaled down to ``width`` over its longer side's share of 16:9; None if too small."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = max(width / image.width, width * 0.55 / image.height)
    if scale > 1.0:
        return None
    size = (max(width, round(image.width * scale)), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def moving_crop(picture: Tensor, rng: random.Random, frames: int, side: int) -> Tensor:
    """One clip (3, frames, side, side): a camera moving over a crop of ``picture`` (3, h, w) uint8."""
    margin = min(64, (min(picture.shape[1:]) - side) // 2)
    if margin < 0:
        raise UsageError(f"a picture of {picture.shape[2]}x{picture.shape[1]} has no crop of {side} pixels a side")
    whole = side + 2 * margin
    top, left = rng.randint(0, picture.shape[1] - whole), rng.randint(0, picture.shape[2] - whole)
    window = picture[:, top : top + whole, left : left + whole].float() / 127.5 - 1
    if rng.random() < 0.5:
        window = window.flip(2)
    if rng.random() < 0.25:
        window = window.transpose(1, 2)
    if frames == 1:
        return window[:, None, margin : margin + side, margin : margin + side]
    grid = F.affine_grid(camera_path(rng, frames, side), [frames, 3, side, side], align_corners=False) * (side / whole)
    wide = window.expand(frames, -1, -1, -1)
    moved = F.grid_sample(wide, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved.clamp(-1, 1).transpose(0, 1)


def camera_path(rng: random.Random, frames: int, side: int) -> Tensor:
    """A camera path for ``affine_grid``, (frames, 2, 3): frame 0 is the identity, one path in five stands still."""
    kind = rng.random()
    speed = 0.0 if kind < 0.2 else 2 * math.exp(rng.uniform(math.log(0.2), math.log(6.0))) / side
    angle = rng.uniform(0, 2 * math.pi)
    zoom = rng.gauss(0, 0.004) if kind > 0.5 else 0.0
    turn = rng.gauss(0, 0.004) if kind > 0.8 else 0.0
    steps = torch.arange(frames, dtype=torch.float32)
    scale, theta = torch.exp(zoom * steps), turn * steps
    rows = [scale * theta.cos(), -scale * theta.sin(), speed * math.cos(angle) * steps]
    rows += [scale * theta.sin(), scale * theta.cos(), speed * math.sin(angle) * steps]
    return torch.stack(rows, dim=-1).reshape(frames, 2, 3)


def log_mse(x: Tensor, target: Tensor) -> Tensor:
    """Mean over (clip, frame) of log MSE: what PSNR averages, so that easy and hard crops count alike.

    Crops beyond 50 dB hardly count: their gradients, 1/MSE, would drown all others and teach a refiner to be silent.
    """
    return ((x.float() - target).square().mean(dim=(1, 3, 4)) + FLOOR).log().mean()


@dataclass(frozen=True)
class Refinement:
    """NanoVAE: log MSE of every block over that of the fixed transform alone; decoded in turn, memory is one block's.

    ``noise``: a quarter of the items gets up to this much noise on the latents, as a DiT will deliver them. Half of the
    items give the decoder the true frame 0, as the pipeline gives it the photo.
    """

    noise: float = 0.08

    def __call__(self, parts: Parts, item: Clips, generator: torch.Generator) -> Loss:
        vae: Any = sole(parts, "")
        gains, errors, bases = [], [], []
        for x in item.groups:
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
            drawn, amount, known = torch.rand(3, generator=generator).tolist()
            if drawn < 0.25:
                z = z + amount * self.noise * torch.randn(z.shape, generator=generator).to(z)
            for decoded, alone, frames in _blocks(vae, z, x, known < 0.5):
                gains.append(log_mse(decoded, frames) - log_mse(alone, frames))
                errors.append((decoded.detach() - frames).square().mean())
                bases.append((alone - frames).square().mean())
        return Loss(torch.stack(gains).mean(), torch.stack(errors).mean(), torch.stack(bases).mean())


def _blocks(vae: NanoVAE, z: Tensor, x: Tensor, known: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each block decoded, decoded by the transform alone, and its frames; no gradient crosses blocks."""
    start, out = 0, []
    state = vae.decoder_state(x[:, :, :1]) if known else None
    for block in z.split(1, dim=2):
        decoded, state = vae.decode_chunk(block, state)
        with torch.no_grad():
            alone = vae.decode_linear(block[:, :, 0], first=start == 0)
        out.append((decoded, alone, x[:, :, start : start + decoded.shape[2]]))
        start += decoded.shape[2]
    return out


@dataclass(frozen=True)
class Reconstruction:
    """A diffusers video VAE with a frozen encoder: absolute error and log MSE of the decoded clip."""

    absolute: float = 1.0
    logarithmic: float = 0.1

    def __call__(self, parts: Parts, item: Clips, generator: torch.Generator) -> Loss:
        vae: Any = sole(parts, "")
        losses, errors = [], []
        for x in item.groups:
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
            decoded = vae.decode(z, return_dict=False)[0].float()
            losses.append(self.absolute * (decoded - x).abs().mean() + self.logarithmic * log_mse(decoded, x))
            errors.append((decoded.detach() - x).square().mean())
        base = torch.stack([x.float().var() for x in item.groups]).mean()
        return Loss(torch.stack(losses).mean(), torch.stack(errors).mean(), base)
