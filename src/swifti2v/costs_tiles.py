"""Tiles sized to memory: what every way to cut Wan's VAE into exact tiles costs, and the cheapest that fits.

The cuts are those of ``models/tiled_decoder`` and ``models/tiled_encoder``, their parts priced by ``costs_wan_vae``,
in the middle of a stream. Bytes are of tensors: the VAE's weights, what it is given and its result's later conversions
are not in them, nor kernel workspaces and allocator slack. This module knows no device and loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from .costs_wan_vae import Map, Part, WanVAEShape, decoder_front, decoder_tail, encoder_head, encoder_rest
from .models.spans import grid

COUNTS = (1, 2, 3, 4, 6, 8)  # of rows and of columns that are tried


@dataclass(frozen=True)
class TilePlan:
    """One way to run a coder: ``rows`` x ``columns`` tiles (1x1: whole) cut at ``split``, as ``WanStreamingVAE`` takes
    them; ``parked``: what waits lies on the host.

    ``device_bytes``: the peak, ``resident_bytes`` of it caches that stay between calls. ``host_bytes``: what waits
    there at most; ``traffic_bytes``: what one call moves there and back. ``flops`` of one call, ``flops_factor`` over
    those untiled.
    """

    rows: int
    columns: int
    split: int
    parked: bool
    device_bytes: int
    resident_bytes: int
    host_bytes: int
    traffic_bytes: int
    flops: int
    flops_factor: float

    @property
    def tiles(self) -> tuple[int, int] | None:
        """As ``WanStreamingVAE`` wants to be told: None for no tiles."""
        return None if self.rows == self.columns == 1 else (self.rows, self.columns)


class DecodePlan(TilePlan):
    """Of the decoder: ``split`` up-blocks run whole before the tiles."""


class EncodePlan(TilePlan):
    """Of the encoder: the first ``split`` levels run in tiles."""


@dataclass(frozen=True)
class Job:
    """What passes the VAE: ``blocks`` of ``height`` x ``width`` latents in one call, ``itemsize`` bytes a value."""

    shape: WanVAEShape
    height: int
    width: int
    blocks: int = 3
    itemsize: int = 2


@dataclass(frozen=True)
class Cut:
    rows: int
    columns: int
    split: int
    parked: bool = False


Plan = TypeVar("Plan", bound=TilePlan)


# -- choosing ---------------------------------------------------------------------------------------------------------


def decode_plans(job: Job, flops_per_byte: float = 0) -> list[DecodePlan]:
    """Every way to decode, the cheapest first: least FLOPs, then fewest tiles, then unparked before parked.

    ``flops_per_byte``: the work that would have been done while a byte travels to the host or back. 0: transfers are
    hidden behind work; where work waits for them, the rate of the work over that of the link.
    """
    tiles: _Prices = {}
    cuts = _cuts(job, range(1, job.shape.levels))
    return _sorted([whole_decode(job), *(decode_plan(job, cut, tiles) for cut in cuts)], flops_per_byte)


def encode_plans(job: Job, flops_per_byte: float = 0) -> list[EncodePlan]:
    """Every way to encode, in the same order."""
    tiles: _Prices = {}
    cuts = _cuts(job, range(1, job.shape.levels))
    return _sorted([whole_encode(job), *(encode_plan(job, cut, tiles) for cut in cuts)], flops_per_byte)


def tiles_for(plans: Sequence[Plan], device_bytes: int, host_bytes: int | None = None) -> Plan | None:
    """The first of ``plans`` that needs no more than that; None if none does: ``least_memory`` says what would.

    ``host_bytes`` None: as much as it takes.
    """
    fits = (p for p in plans if p.device_bytes <= device_bytes and (host_bytes is None or p.host_bytes <= host_bytes))
    return next(fits, None)


def least_memory(plans: Sequence[Plan]) -> Plan:
    """The arrangement with the smallest peak on the device."""
    return min(plans, key=lambda plan: plan.device_bytes)


def _sorted(plans: Sequence[Plan], flops_per_byte: float) -> list[Plan]:
    def cost(plan: Plan) -> tuple[float, int, bool, int]:
        work = plan.flops + flops_per_byte * plan.traffic_bytes
        return work, plan.rows * plan.columns, plan.parked, plan.device_bytes

    return sorted(plans, key=cost)


def _cuts(job: Job, splits: range) -> Iterator[Cut]:
    for split, rows, columns in product(splits, COUNTS, COUNTS):
        if rows * columns > 1 and rows <= job.height and columns <= job.width:
            yield from (Cut(rows, columns, split, parked) for parked in (False, True))


# -- pricing ----------------------------------------------------------------------------------------------------------


def decoder_halo(shape: WanVAEShape, split: int) -> int:
    """Pixels of the tail's input that a tile must see beyond its own; what ``models.tiles`` reads off the modules."""
    depth, scale = 0, 1
    for level in range(split, shape.levels):
        depth += 2 * (shape.resnets + 1)
        if level < shape.levels - 1:
            depth, scale = 2 * depth + 1, 2 * scale
    return -(-(depth + 1) // scale)


def encoder_halo(shape: WanVAEShape, split: int) -> int:
    """Pixels of the head's output that a tile must compute beyond its own."""
    depth = 1
    for level in range(split):
        depth += 2 * shape.resnets
        if level < shape.levels - 1:
            depth = depth // 2 + 1
    return depth


@dataclass(frozen=True)
class _Tile:
    """One tile's part, and the bytes of what it is cut from."""

    part: Part
    seen: int


_Prices = dict[tuple[int, bool, int, int], _Tile]  # of tiles by split, parked, height and width


def _tiles(cut: Cut, frame: Map, halo: int, price: Callable[[int, int], _Tile], known: _Prices) -> list[_Tile]:
    """Every tile of a frame, priced by its height and width; those of a size once."""
    found = []
    for _, y, x in grid(frame.height, frame.width, cut.rows, cut.columns, halo):
        key = cut.split, cut.parked, y.length, x.length
        if key not in known:
            known[key] = price(y.length, x.length)
        found.append(known[key])
    return found


def whole_decode(job: Job) -> DecodePlan:
    """Without tiles."""
    front = decoder_front(job.shape, job.height, job.width, 0, job.itemsize)
    tail = decoder_tail(job.shape, front.out, 0, job.itemsize)
    resident = front.cache + tail.cache
    out = job.blocks * tail.out_bytes
    peak = max(front.peak, front.out_bytes + tail.peak + out - tail.out_bytes, 2 * out)
    flops = job.blocks * (front.flops + tail.flops + _latent_conv(job, job.shape.latent_channels))
    return DecodePlan(1, 1, 0, False, resident + peak, resident, 0, 0, flops, 1.0)


def decode_plan(job: Job, cut: Cut, known: _Prices | None = None) -> DecodePlan:
    """The tail in tiles, as ``decode_tiled`` runs it: the fronts of all blocks of a call first, then tile after tile.

    ``known``: prices of this job's tiles, to be kept from cut to cut.
    """
    shape, size = job.shape, job.itemsize
    front = decoder_front(shape, job.height, job.width, cut.split, size)

    def price(height: int, width: int) -> _Tile:
        seen = Map(front.out.channels, front.out.frames, height, width)
        return _Tile(decoder_tail(shape, seen, cut.split, size, owned=cut.parked), seen.elements * size)

    tiles = _tiles(cut, front.out, decoder_halo(shape, cut.split), price, {} if known is None else known)
    caches, features = sum(tile.part.cache for tile in tiles), job.blocks * front.out_bytes
    pixels = job.blocks * _pixels(job).elements * size
    copies = (2 if shape.patch > 1 else 1) * pixels  # patches are put in their places in a second tensor
    traffic = 2 * caches + features + job.blocks * sum(tile.seen for tile in tiles)
    if cut.parked:
        largest = max(tile.part.peak + tile.part.cache for tile in tiles)
        peak, waiting, host = max(front.peak, pixels + largest, copies), 0, caches + features
    else:
        largest = features + max(tile.part.peak for tile in tiles)
        peak = max(features - front.out_bytes + front.peak, pixels + largest, copies)
        waiting, host, traffic = caches, 0, 0
    flops = front.flops + sum(tile.part.flops for tile in tiles) + _latent_conv(job, shape.latent_channels)
    flops *= job.blocks
    return DecodePlan(
        *(cut.rows, cut.columns, cut.split, cut.parked),
        device_bytes=front.cache + waiting + peak,
        resident_bytes=front.cache + waiting,
        host_bytes=host,
        traffic_bytes=traffic,
        flops=flops,
        flops_factor=flops / whole_decode(job).flops,
    )


def whole_encode(job: Job) -> EncodePlan:
    """Without tiles."""
    pixels = _pixels(job)
    head = encoder_head(job.shape, pixels, 0, job.itemsize)
    rest = encoder_rest(job.shape, head.out, 0, job.itemsize)
    resident = head.cache + rest.cache
    peak = job.blocks * pixels.elements * job.itemsize + max(head.peak, rest.peak)
    flops = job.blocks * (head.flops + rest.flops + _latent_conv(job, 2 * job.shape.latent_channels))
    return EncodePlan(1, 1, 0, False, resident + peak, resident, 0, 0, flops, 1.0)


def encode_plan(job: Job, cut: Cut, known: _Prices | None = None) -> EncodePlan:
    """The head in tiles, as ``encode_tiled`` runs it: tile after tile, then the rest for one block after another.

    ``encode_stream`` gives one block a call. ``known``: prices of this job's tiles, to be kept from cut to cut.
    """
    shape, size, pixels = job.shape, job.itemsize, _pixels(job)
    scale = 2 ** min(cut.split, shape.levels - 1)

    def price(height: int, width: int) -> _Tile:
        seen = Map(pixels.channels, pixels.frames, height * scale, width * scale)
        return _Tile(encoder_head(shape, seen, cut.split, size), seen.elements * size)

    tiles = _tiles(cut, pixels.shrunk(scale), encoder_halo(shape, cut.split), price, {} if known is None else known)
    out = tiles[0].part.out
    feature = Map(out.channels, out.frames, pixels.height // scale, pixels.width // scale)
    rest = encoder_rest(shape, feature, cut.split, size)
    caches, features = sum(tile.part.cache for tile in tiles), job.blocks * feature.elements * size
    head = features + max(tile.part.peak + (tile.part.cache if cut.parked else 0) for tile in tiles)
    peak = job.blocks * pixels.elements * size + max(head, features - feature.elements * size + rest.peak)
    waiting, host = (0, caches) if cut.parked else (caches, 0)
    flops = rest.flops + sum(tile.part.flops for tile in tiles) + _latent_conv(job, 2 * shape.latent_channels)
    flops *= job.blocks
    return EncodePlan(
        *(cut.rows, cut.columns, cut.split, cut.parked),
        device_bytes=rest.cache + waiting + peak,
        resident_bytes=rest.cache + waiting,
        host_bytes=host,
        traffic_bytes=2 * host,
        flops=flops,
        flops_factor=flops / whole_encode(job).flops,
    )


def _pixels(job: Job) -> Map:
    """Of one block that is not the first, patchified."""
    fine = job.shape.enlargement
    return Map(job.shape.channels, job.shape.frames, job.height * fine, job.width * fine)


def _latent_conv(job: Job, channels: int) -> int:
    """FLOPs of the 1x1 convolution between coder and latents, of one block."""
    return 2 * job.height * job.width * channels**2
