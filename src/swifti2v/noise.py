"""The noise of a latent block, a function of where the block is and of nothing else.

Drawn on the CPU in float32, so that it does not depend on the device, on how the clip is cut into
segments, on what was generated before, or on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def block_noise(
    shape: Sequence[int], *, seed: int, block: int, stage: str = "stage_two", item: int = 0, step: int = 0
) -> Tensor:
    """Standard normal noise of ``shape`` (c, h, w) for one block.

    ``stage`` keeps the two stages' noise apart, ``item`` the clips of a batch, ``step`` the fresh
    noise of re-noising samplers.
    """
    key = f"swifti2v/{stage}/{seed}/{item}/{block}/{step}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number), dtype=torch.float32)


def blocks_noise(
    shape: Sequence[int], blocks: Sequence[int], *, seed: int, stage: str = "stage_two", step: int = 0
) -> Tensor:
    """Noise (b, c, t, h, w) of several blocks, from ``shape`` (b, c, h, w) of one."""
    batch, *rest = shape
    items = [
        torch.stack([block_noise(rest, seed=seed, block=k, stage=stage, item=i, step=step) for k in blocks], dim=1)
        for i in range(batch)
    ]
    return torch.stack(items)
