"""The Wan decoder's costly last layers, tile by tile, exactly.

The front (conv_in, mid block with its global attention, the first up-blocks) runs whole; the tail runs per
tile with a halo as wide as its receptive field, cropped afterwards. Unlike ``AutoencoderKLWan.enable_tiling``,
which blends overlaps and cuts the attention, the result equals the untiled decoder up to float rounding; the
untiled path is the witness. 2560x1408 in bf16: 36 GiB whole, 12 GiB with 2x4 tiles and caches on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn

from ..core import RunError

TileCaches = dict[tuple[int, int], list[Any]]


@dataclass(frozen=True)
class Tiling:
    """How the tail is cut: ``rows`` x ``columns`` tiles after ``split`` up-blocks.

    ``halo``: margin of a tile, in pixels of the tail's input; ``scale``: the tail's enlargement.
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
        if rows < 1 or columns < 1:
            raise ValueError(f"{rows}x{columns} tiles: there must be at least 1x1")
        if not 0 <= split <= len(decoder.up_blocks):
            raise ValueError(f"split {split} is not in 0..{len(decoder.up_blocks)}, the decoder's up-blocks")
        halo, scale = reach([*decoder.up_blocks[split:], decoder.conv_out])
        return cls(rows, columns, split, halo, scale, None if cache_device is None else torch.device(cache_device))


def reach(layers: list[nn.Module]) -> tuple[int, int]:
    """(radius of the receptive field in input pixels, enlargement) of layers run one after another.

    Follows how far the zero padding at a tile's edge creeps inwards: every convolution adds its radius, every
    upsampling doubles what has accumulated. Relies on submodules being registered in the order they run;
    parallel 1x1 shortcuts add nothing.
    """
    depth, scale = 0, 1
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, WanAttentionBlock):
                raise ValueError("attention sees the whole frame: it cannot run in tiles")
            if isinstance(module, nn.Upsample):
                factor = int(torch.as_tensor(module.scale_factor).max())
                depth, scale = depth * factor, scale * factor
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                depth += max(module.kernel_size[-2:]) // 2
    return math.ceil(depth / scale), scale


def decode_tiled(
    decoder: Any, blocks: list[Tensor], firsts: list[bool], caches: tuple[list[Any], TileCaches], tiling: Tiling
) -> Tensor:
    """``decoder`` on consecutive single latent blocks, (b, c, 1, h, w) each; ``firsts``: which one starts the clip.

    ``caches`` = (the front's, the tiles'), updated in place. The tile is the outer loop, so that a tile's cache
    travels from and to ``cache_device`` once per call however many blocks there are.
    """
    front, tiles = caches
    _refuse_block_offload(decoder)
    features = [
        _run_front(decoder, block, front, first, tiling.split) for block, first in zip(blocks, firsts, strict=True)
    ]
    height, width = features[0].shape[-2:]
    pixels: Tensor | None = None
    for key, y, x in _tiles(height, width, tiling):
        cache = [_moved(entry, features[0].device) for entry in tiles.get(key, [None] * len(front))]
        start = 0
        for feature, first in zip(features, firsts, strict=True):
            part = feature[..., y.outer, x.outer]
            out = _run_tail(decoder, part, cache, first, tiling.split)[..., y.crop(tiling.scale), x.crop(tiling.scale)]
            if pixels is None:
                frames = out.shape[2] + (len(features) - 1) * _later_frames(decoder)
                pixels = out.new_empty(*out.shape[:2], frames, height * tiling.scale, width * tiling.scale)
            pixels[:, :, start : start + out.shape[2], y.paste(tiling.scale), x.paste(tiling.scale)] = out
            start += out.shape[2]
        tiles[key] = cache if tiling.cache_device is None else [_moved(e, tiling.cache_device) for e in cache]
    assert pixels is not None
    return pixels


@dataclass(frozen=True)
class _Span:
    """One tile along one axis: pixels start..stop of the tail's input, seen through low..high."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def outer(self) -> slice:
        return slice(self.low, self.high)

    def crop(self, scale: int) -> slice:
        return slice((self.start - self.low) * scale, (self.stop - self.low) * scale)

    def paste(self, scale: int) -> slice:
        return slice(self.start * scale, self.stop * scale)


def _spans(length: int, count: int, halo: int) -> list[_Span]:
    count = min(count, length)
    cuts = [length * i // count for i in range(count + 1)]
    return [_Span(a, b, max(a - halo, 0), min(b + halo, length)) for a, b in pairwise(cuts)]


def _tiles(height: int, width: int, tiling: Tiling) -> list[tuple[tuple[int, int], _Span, _Span]]:
    rows = enumerate(_spans(height, tiling.rows, tiling.halo))
    columns = list(enumerate(_spans(width, tiling.columns, tiling.halo)))
    return [((i, j), y, x) for i, y in rows for j, x in columns]


def _run_front(decoder: Any, x: Tensor, cache: list[Any], first: bool, split: int) -> Tensor:
    index = [0]
    x = _cached_conv(decoder.conv_in, x, cache, index)
    x = decoder.mid_block(x, feat_cache=cache, feat_idx=index)
    for block in decoder.up_blocks[:split]:
        x = block(x, feat_cache=cache, feat_idx=index, first_chunk=first)
    return x


def _run_tail(decoder: Any, x: Tensor, cache: list[Any], first: bool, split: int) -> Tensor:
    index = [0]
    for block in decoder.up_blocks[split:]:
        x = block(x, feat_cache=cache, feat_idx=index, first_chunk=first)
    return _cached_conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), cache, index)


def _cached_conv(conv: WanCausalConv3d, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """A causal convolution that keeps its last two input frames, as ``WanDecoder3d.forward`` does inline."""
    previous, last = cache[index[0]], x[:, :, -2:].clone()
    if last.shape[2] < 2 and previous is not None:
        last = torch.cat([previous[:, :, -1:], last], dim=2)
    out = conv(x, previous)
    cache[index[0]] = last
    index[0] += 1
    return out


def _later_frames(decoder: Any) -> int:
    return int(2 ** sum(decoder.temperal_upsample))


def _moved(entry: Any, device: torch.device) -> Any:
    return entry.to(device) if isinstance(entry, Tensor) else entry


def _refuse_block_offload(decoder: Any) -> None:
    """Block-level group offload loads weights when ``decoder`` itself is called, which tiles never do."""
    registry = getattr(decoder, "_diffusers_hook", None)
    if registry is not None and registry.get_hook("group_offloading") is not None:
        raise RunError("exact VAE tiles do not work with block-level group offload; use leaf_level or no tiles")
