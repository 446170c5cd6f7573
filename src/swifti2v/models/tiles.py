"""What the tiled encoder and decoder of Wan's VAE share: receptive fields, causal caches, and where they wait.

This module knows no order of layers and never decides where a network lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn

from ..core import RunError

TileCaches = dict[tuple[int, int], list[Any]]


def creep(layers: Sequence[nn.Module]) -> tuple[int, Fraction]:
    """(how deep a tile's cut edge spoils the output, in output pixels; enlargement) of layers run one after another.

    Every convolution carries the spoiled margin on by its radius, every upsampling doubles it. A convolution of stride
    s that is padded below and on the right only (Wan's downsampling) leaves (margin + kernel - 1) / s of it. Relies on
    submodules being registered in the order they run; parallel 1x1 shortcuts and averages add nothing.
    """
    depth, scale = 0, Fraction(1)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, WanAttentionBlock):
                raise ValueError("attention sees the whole frame: it cannot run in tiles")
            if isinstance(module, nn.Upsample):
                factor = int(torch.as_tensor(module.scale_factor).max())
                depth, scale = depth * factor, scale * factor
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                kernel, stride = max(module.kernel_size[-2:]), max(module.stride[-2:])
                depth = (depth + kernel - 1) // stride if stride > 1 else depth + kernel // 2
                scale /= stride
    return depth, scale


def cached_conv(conv: WanCausalConv3d, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """A causal convolution that keeps its last two input frames, as diffusers' coders do inline."""
    previous, last = cache[index[0]], x[:, :, -2:].clone()
    if last.shape[2] < 2 and previous is not None:
        last = torch.cat([previous[:, :, -1:], last], dim=2)
    out = conv(x, previous)
    cache[index[0]] = last
    index[0] += 1
    return out


def unparked(entries: list[Any], device: torch.device) -> list[Any]:
    """A tile's cache where it computes. The list that is given empties, so that nothing lies in both places."""
    found = []
    while entries:
        entry = entries.pop(0)
        found.append(entry.to(device) if isinstance(entry, Tensor) else entry)
    return found


def parked(entries: list[Any], device: torch.device | None) -> list[Any]:
    """A tile's cache where it waits: on ``device``, or where it is if that is None. Empties what is given, too."""
    return entries if device is None else unparked(entries, device)


def checked(rows: int, columns: int, split: int, most: int) -> None:
    """ValueError if there is no such cut of a coder of ``most`` blocks."""
    if rows < 1 or columns < 1:
        raise ValueError(f"{rows}x{columns} tiles: there must be at least 1x1")
    if not 0 <= split <= most:
        raise ValueError(f"split {split} is not in 0..{most}, the blocks there are")


def refuse_block_offload(coder: Any) -> None:
    """Block-level group offload loads weights when ``coder`` itself is called, which tiles never do."""
    registry = getattr(coder, "_diffusers_hook", None)
    if registry is not None and registry.get_hook("group_offloading") is not None:
        raise RunError("exact VAE tiles do not work with block-level group offload; use leaf_level or no tiles")
