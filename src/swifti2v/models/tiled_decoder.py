"""The Wan decoder's costly last layers, tile by tile, exactly.

The front (conv_in, mid block with its global attention, the first up-blocks) runs whole; the tail runs per
tile with a halo as wide as its receptive field, cropped afterwards. Unlike ``AutoencoderKLWan.enable_tiling``,
which blends overlaps and cuts the attention, the result equals the untiled decoder up to float rounding; the
untiled path is the witness. 2560x1408 in bf16: 36 GiB whole, 8 GiB with 2x4 tiles and what waits on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .spans import Span, grid
from .tiles import TileCaches, cached_conv, checked, creep, parked, refuse_block_offload, unparked


@dataclass(frozen=True)
class Tiling:
    """How the tail is cut: ``rows`` x ``columns`` tiles after ``split`` up-blocks.

    ``halo``: margin of a tile, in pixels of the tail's input; ``scale``: the tail's enlargement.
    ``cache_device``: where the tiles' caches and the front's result wait; None: where they were made.
    """

    rows: int
    columns: int
    split: int
    halo: int
    scale: int
    cache_device: torch.device | None = None

    @classmethod
    def of(
        cls,
        decoder: Any,
        rows: int,
        columns: int,
        *,
        split: int = 2,
        cache_device: torch.device | str | None = None,
    ) -> Tiling:
        """Tiling of a ``WanDecoder3d``, with the halo that its modules need."""
        checked(rows, columns, split, len(decoder.up_blocks))
        halo, scale = reach([*decoder.up_blocks[split:], decoder.conv_out])
        return cls(rows, columns, split, halo, scale, None if cache_device is None else torch.device(cache_device))


def reach(layers: list[nn.Module]) -> tuple[int, int]:
    """(radius of the receptive field in input pixels, enlargement) of layers of a decoder."""
    depth, scale = creep(layers)
    return math.ceil(depth / scale), int(scale)


def decode_tiled(
    decoder: Any, blocks: list[Tensor], firsts: list[bool], caches: tuple[list[Any], TileCaches], tiling: Tiling
) -> Tensor:
    """``decoder`` on consecutive single latent blocks, (b, c, 1, h, w) each; ``firsts``: which one starts the clip.

    ``caches`` = (the front's, the tiles'), updated in place. The tile is the outer loop, so that a tile's cache
    travels from and to ``cache_device`` once per call however many blocks there are.
    """
    front, tiles = caches
    refuse_block_offload(decoder)
    device, features = blocks[0].device, []
    for block, first in zip(blocks, firsts, strict=True):
        features += parked([_run_front(decoder, block, front, first, tiling.split)], tiling.cache_device)
    height, width = features[0].shape[-2:]
    pixels: Tensor | None = None
    for key, y, x in grid(height, width, tiling.rows, tiling.columns, tiling.halo):
        cache = unparked(tiles.pop(key, [None] * len(front)), device)
        start = 0
        for feature, first in zip(features, firsts, strict=True):
            out = _run_tail(decoder, feature[..., y.outer(), x.outer()].to(device), cache, first, tiling.split)
            if pixels is None:
                frames = out.shape[2] + (len(features) - 1) * _later_frames(decoder)
                pixels = out.new_empty(*out.shape[:2], frames, height * tiling.scale, width * tiling.scale)
            start = _paste(pixels, start, out, (y, x), tiling.scale)
            del out  # not beside the next one
        tiles[key] = parked(cache, tiling.cache_device)
        del cache
    assert pixels is not None
    return pixels


def _paste(pixels: Tensor, start: int, out: Tensor, tile: tuple[Span, Span], scale: int) -> int:
    """Put a tile's own pixels in place from frame ``start`` on; the frame behind them."""
    y, x = tile
    stop = start + out.shape[2]
    pixels[:, :, start:stop, y.paste(scale), x.paste(scale)] = out[..., y.crop(scale), x.crop(scale)]
    return stop


def _run_front(decoder: Any, x: Tensor, cache: list[Any], first: bool, split: int) -> Tensor:
    index = [0]
    x = cached_conv(decoder.conv_in, x, cache, index)
    x = decoder.mid_block(x, feat_cache=cache, feat_idx=index)
    for block in decoder.up_blocks[:split]:
        x = block(x, feat_cache=cache, feat_idx=index, first_chunk=first)
    return x


def _run_tail(decoder: Any, x: Tensor, cache: list[Any], first: bool, split: int) -> Tensor:
    index = [0]
    for block in decoder.up_blocks[split:]:
        x = block(x, feat_cache=cache, feat_idx=index, first_chunk=first)
    x = decoder.norm_out(x)  # one name, so that what is done with is freed at once
    x = decoder.nonlinearity(x)
    return cached_conv(decoder.conv_out, x, cache, index)


def _later_frames(decoder: Any) -> int:
    return int(2 ** sum(decoder.temperal_upsample))
