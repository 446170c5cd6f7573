"""The Wan encoder's costly first layers, tile by tile, exactly: the mirror of ``tiled_decoder``.

The head (conv_in and the first levels of resolution) runs per tile with a halo as wide as its receptive field; the
rest (deep levels, mid block with its global attention, the output) runs whole. Tiles are cut on the grid of the head's
*output*, so that every stride and every one-sided padding of the downsampling falls on the pixels it falls on in the
whole frame. The result equals the untiled encoder up to float rounding; the untiled path is the witness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualDownBlock
from torch import Tensor, nn

from .spans import grid
from .tiles import TileCaches, cached_conv, checked, creep, parked, refuse_block_offload, unparked


@dataclass(frozen=True)
class EncoderTiling:
    """How the head is cut: ``rows`` x ``columns`` tiles of its first ``split`` levels, which are ``layers`` layers.

    ``halo``: margin of a tile, in pixels of the head's output; ``scale``: how much smaller that is than its input.
    ``cache_device``: where the tiles' caches wait; None: where they were made.
    """

    rows: int
    columns: int
    layers: int
    halo: int
    scale: int
    cache_device: torch.device | None = None

    @classmethod
    def of(
        cls,
        encoder: Any,
        rows: int,
        columns: int,
        *,
        split: int = 1,
        cache_device: torch.device | str | None = None,
    ) -> EncoderTiling:
        """Tiling of a ``WanEncoder3d``, with the halo that its modules need."""
        ends = level_ends(encoder)
        checked(rows, columns, split, len(ends))
        layers = ends[split - 1] if split else 0
        depth, scale = creep([encoder.conv_in, *encoder.down_blocks[:layers]])
        device = None if cache_device is None else torch.device(cache_device)
        return cls(rows, columns, layers, depth, int(1 / scale), device)


def level_ends(encoder: Any) -> list[int]:
    """How many of ``down_blocks`` there are up to the end of each level of resolution.

    Wan2.2 has one block a level, Wan2.1 a flat list of residual blocks with a resampling at each level's end.
    """
    blocks: list[nn.Module] = list(encoder.down_blocks)
    ends = [i + 1 for i, block in enumerate(blocks) if isinstance(block, (WanResample, WanResidualDownBlock))]
    return ends if ends and ends[-1] == len(blocks) else [*ends, len(blocks)]


def encode_tiled(
    encoder: Any, groups: list[Tensor], caches: tuple[list[Any], TileCaches], tiling: EncoderTiling
) -> list[Tensor]:
    """``encoder`` on consecutive groups of patchified frames, (b, c, t, h, w) each: one frame, or what makes a block.

    ``caches`` = (the rest's, the tiles'), updated in place. The tile is the outer loop, so that a tile's cache
    travels from and to ``cache_device`` once per call however many groups there are.
    """
    rest, tiles = caches
    refuse_block_offload(encoder)
    height, width = (length // tiling.scale for length in groups[0].shape[-2:])
    features: list[Tensor] = []
    for key, y, x in grid(height, width, tiling.rows, tiling.columns, tiling.halo):
        cache = unparked(tiles.pop(key, [None] * len(rest)), groups[0].device)
        for i, group in enumerate(groups):
            out = _run_head(encoder, group[..., y.outer(tiling.scale), x.outer(tiling.scale)], cache, tiling.layers)
            if len(features) == i:
                features.append(out.new_empty(*out.shape[:3], height, width))
            features[i][..., y.paste(), x.paste()] = out[..., y.crop(), x.crop()]
            del out  # not beside the next one
        tiles[key] = parked(cache, tiling.cache_device)
        del cache
    moments = []
    while features:
        moments.append(_run_rest(encoder, features.pop(0), rest, tiling.layers))
    return moments


def _run_head(encoder: Any, x: Tensor, cache: list[Any], layers: int) -> Tensor:
    index = [0]
    x = cached_conv(encoder.conv_in, x, cache, index)
    for layer in encoder.down_blocks[:layers]:
        x = layer(x, feat_cache=cache, feat_idx=index)
    return x


def _run_rest(encoder: Any, x: Tensor, cache: list[Any], layers: int) -> Tensor:
    index = [0]
    for layer in encoder.down_blocks[layers:]:
        x = layer(x, feat_cache=cache, feat_idx=index)
    x = encoder.mid_block(x, feat_cache=cache, feat_idx=index)
    x = encoder.norm_out(x)
    x = encoder.nonlinearity(x)
    return cached_conv(encoder.conv_out, x, cache, index)
