"""Little films for tests: shots of smooth random pictures that drift, with hard cuts between them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from swifti2v.media import write_video


@cache
def picture(seed: int, height: int, width: int) -> Tensor:
    """A smooth random picture (3, height, width) in [-1, 1], of a tint of its own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    tint = torch.rand(1, 3, 1, 1, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (0.5 * fine + 0.7 * tint - 0.2).clamp(0.05, 0.95)[0] * 2 - 1


def shot(seed: int, frames: int, height: int = 64, width: int = 96) -> Tensor:
    """(1, 3, frames, height, width): the picture drifting a pixel a frame."""
    wide = picture(seed, height, width + frames)
    return torch.stack([wide[:, :, i : i + width] for i in range(frames)], dim=1)[None]


def film(path: Path, lengths: tuple[int, ...], height: int = 64, width: int = 96, fps: float = 24) -> Path:
    """An MP4 of one shot a length; a length of 0 or less is that many black frames."""
    shots = [
        shot(seed, n, height, width) if n > 0 else torch.full((1, 3, -n, height, width), -1.0)
        for seed, n in enumerate(lengths)
    ]
    write_video(path, shots, fps=fps)
    return path
