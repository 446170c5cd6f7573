"""The layers of Wan's VAEs priced one by one: bytes alive at once, causal caches and FLOPs of any part at any size.

A dry run: every function takes the feature map that its layer takes, allocates and frees bytes where diffusers' code
does, and gives the map that comes out. So parts of encoder and decoder can be priced that ``costs.WanVAECost``, whose
constants are per latent position of the whole, cannot tell apart: what tiles need. Always a later call of a stream,
whose caches are full: the first two take less. Kernel workspaces and allocator slack are not in it. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .costs import WAN21_VAE, WAN22_VAE, WanVAECost


@dataclass(frozen=True)
class WanVAEShape:
    """The configuration of an ``AutoencoderKLWan`` as far as costs depend on it; ``channels``: of patchified pixels."""

    base: int
    decoder_base: int
    latent_channels: int
    channels: int
    patch: int
    residual: bool
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    resnets: int = 2
    temporal: tuple[bool, ...] = (False, True, True)

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    @property
    def enlargement(self) -> int:
        """Of the decoder, without the patches."""
        return 2 ** (self.levels - 1)

    @property
    def frames(self) -> int:
        """Of a block that is not the first."""
        return 2 ** sum(self.temporal)


WAN21_SHAPE = WanVAEShape(96, 96, 16, 3, 1, residual=False)
WAN22_SHAPE = WanVAEShape(160, 256, 48, 12, 2, residual=True)


def shape_of(vae: WanVAECost) -> WanVAEShape:
    """The architecture that a cost of ``costs`` was counted on. KeyError if it is neither of Wan's."""
    return {WAN21_VAE: WAN21_SHAPE, WAN22_VAE: WAN22_SHAPE}[vae]


@dataclass(frozen=True)
class Map:
    """A feature map of one clip."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.frames * self.height * self.width

    @property
    def elements(self) -> int:
        return self.channels * self.positions

    def grown(self, channels: int, factor: int = 1, frames: int = 1) -> Map:
        return Map(channels, self.frames * frames, self.height * factor, self.width * factor)

    def shrunk(self, factor: int) -> Map:
        return replace(self, height=self.height // factor, width=self.width // factor)


@dataclass
class DryRun:
    """Counters of a walk through layers: bytes alive now and at most (its input, and caches, not among them; a new
    cache beside the old one is), bytes of caches, FLOPs."""

    itemsize: int
    live: int = 0
    peak: int = 0
    cache: int = 0
    flops: int = 0

    def bytes(self, x: Map) -> int:
        return x.elements * self.itemsize

    def take(self, count: int) -> int:
        self.live += count
        self.peak = max(self.peak, self.live)
        return count

    def drop(self, count: int) -> None:
        self.live -= count

    def touch(self, count: int) -> None:
        """Needed for a moment."""
        self.drop(self.take(count))


# -- layers: each leaves its result alive, and what it was given ------------------------------------------------------


def norm_silu(run: DryRun, x: Map, owned: bool) -> Map:
    """RMS norm, in float32 if the map is narrower, then SiLU. ``owned``: nobody else holds x, which goes."""
    size, scalars = run.bytes(x), 8 * x.positions
    run.touch(8 * x.elements + scalars if run.itemsize < 4 else 3 * size)
    run.take(size)
    run.drop(size if owned else 0)
    run.touch(size)
    return x


def causal_conv(run: DryRun, x: Map, channels: int, kernel: tuple[int, int] = (3, 3)) -> Map:
    """A convolution of ``kernel`` = (time, space) that remembers two frames; the padded input is a copy."""
    time, space = kernel
    out = replace(x, channels=channels)
    run.flops += 2 * out.elements * x.channels * time * space * space
    held = run.bytes(replace(x, frames=2))
    if time > 1:
        run.cache += held
        run.take(held)
        if x.frames == 1:
            run.touch(held // 2)
    joined = run.bytes(replace(x, frames=x.frames + time - 1)) if time > 1 else 0
    margin = space - 1
    padded = Map(x.channels, x.frames + time - 1, x.height + margin, x.width + margin)
    run.take(joined)
    run.take(run.bytes(padded))
    run.drop(joined)
    run.take(run.bytes(out))
    run.drop(run.bytes(padded) + (held if time > 1 else 0))
    return out


def resnet(run: DryRun, x: Map, channels: int) -> Map:
    """``WanResidualBlock``."""
    out = replace(x, channels=channels)
    shortcut = 0
    if x.channels != channels:
        causal_conv(run, x, channels, (1, 1))
        shortcut = run.bytes(out)
    norm_silu(run, x, owned=False)
    causal_conv(run, x, channels)
    run.drop(run.bytes(x))
    norm_silu(run, out, owned=True)
    causal_conv(run, out, channels)
    run.drop(run.bytes(out))
    run.take(run.bytes(out))
    run.drop(run.bytes(out) + shortcut)
    return out


def attention(run: DryRun, x: Map) -> Map:
    """``WanAttentionBlock`` with a fused kernel: no scores are kept."""
    size = run.bytes(x)
    run.touch(8 * x.elements + 8 * x.positions if run.itemsize < 4 else 3 * size)
    run.touch(size + 6 * size)  # the norm's result, and queries, keys and values in two orders
    run.take(size)
    frame = x.height * x.width
    run.flops += 8 * x.channels**2 * x.positions + 4 * x.channels * x.positions * frame
    return x


def upsample(run: DryRun, x: Map, channels: int, temporal: bool) -> Map:
    """``WanResample`` upwards; nearest neighbors by way of float32. Its input is its caller's."""
    mine = 0
    if temporal:
        causal_conv(run, x, 2 * x.channels, (3, 1))
        x = x.grown(x.channels, frames=2)
        mine = run.take(run.bytes(x))  # the frames in their order
        run.drop(mine)
    large, out = x.grown(x.channels, 2), x.grown(channels, 2)
    if run.itemsize < 4:
        run.touch(4 * (x.elements + large.elements))
        run.touch(4 * large.elements + run.bytes(large))
    run.take(run.bytes(large))
    run.take(run.bytes(out))
    run.drop(run.bytes(large) + mine)
    run.flops += 2 * out.elements * x.channels * 9
    return out


def downsample(run: DryRun, x: Map, temporal: bool) -> Map:
    """``WanResample`` downwards: padded below and on the right, then every second pixel, then every second frame."""
    out = x.shrunk(2)
    padded = run.take(run.bytes(Map(x.channels, x.frames, x.height + 1, x.width + 1)))
    run.take(run.bytes(out))
    run.drop(padded)
    run.flops += 2 * out.elements * x.channels * 9
    if not temporal:
        return out
    half = replace(out, frames=max(out.frames // 2, 1))
    held = run.bytes(replace(out, frames=1))
    run.cache += held
    run.take(held)
    longer = run.bytes(replace(out, frames=out.frames + 1))
    run.take(2 * longer)  # with the frame before it, and the copy that padding makes
    run.take(run.bytes(half))
    run.drop(2 * longer + run.bytes(out) + held)
    run.flops += 2 * half.elements * x.channels * 3
    return half


def averaged(run: DryRun, x: Map, out: Map) -> None:
    """``AvgDown3D``: the shortcut around a level of Wan2.2's encoder."""
    size = run.bytes(x)
    run.touch(2 * size)
    run.touch(size + run.bytes(out))
    run.take(run.bytes(out))


# -- levels and ends --------------------------------------------------------------------------------------------------


def _resnets(run: DryRun, x: Map, channels: int, count: int) -> Map:
    """Residual blocks in a row; their input stays its caller's."""
    for number in range(count):
        y = resnet(run, x, channels)
        run.drop(run.bytes(x) if number else 0)
        x = y
    return x


def up_level(run: DryRun, shape: WanVAEShape, x: Map, level: int) -> Map:
    """One of the decoder's ``up_blocks``. Its input is its caller's until it ends."""
    widths = [shape.decoder_base * m for m in (shape.multipliers[-1], *reversed(shape.multipliers))]
    channels, last = widths[level + 1], level == shape.levels - 1
    temporal = not last and tuple(reversed(shape.temporal))[level]
    copy = run.take(run.bytes(x)) if shape.residual else 0
    y = _resnets(run, x, channels, shape.resnets + 1)
    if not last:
        mine = run.bytes(y)
        y = upsample(run, y, channels if shape.residual else channels // 2, temporal)
        run.drop(mine)
        if shape.residual:
            run.touch(2 * run.bytes(y))  # each value repeated, then set in its place; then the sum beside both
    run.drop(copy)
    return y


def down_level(run: DryRun, shape: WanVAEShape, x: Map, level: int) -> Map:
    """One level of the encoder: a block of Wan2.2's, or residual blocks and a resampling in Wan2.1's flat list.

    Its input is alive on entry and gone at the end; from the flat list, after the first residual block.
    """
    channels, last = shape.base * shape.multipliers[level], level == shape.levels - 1
    given = run.bytes(x)
    copy = run.take(given) if shape.residual else 0
    y = resnet(run, x, channels)
    run.drop(0 if shape.residual else given)
    for _ in range(shape.resnets - 1):
        y = resnet(run, y, channels)
        run.drop(run.bytes(y))
    if not last:
        mine = run.bytes(y)
        y = downsample(run, y, shape.temporal[level])
        run.drop(mine)
    if shape.residual:
        averaged(run, x, y)
        run.touch(run.bytes(y))
        run.drop(run.bytes(y) + copy + given)
    return y


def middle(run: DryRun, x: Map) -> Map:
    """``WanMidBlock``: residual, attention, residual. Its input is gone at the end."""
    resnet(run, x, x.channels)
    for layer in (attention(run, x), resnet(run, x, x.channels)):
        run.drop(run.bytes(layer))
    run.drop(run.bytes(x))
    return x


def head(run: DryRun, x: Map, channels: int, owned: bool) -> Map:
    """Norm, SiLU and the last convolution. What it is given goes if it is ``owned``."""
    norm_silu(run, x, owned)
    out = causal_conv(run, x, channels)
    run.drop(run.bytes(x))
    return out


# -- parts of a coder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a coder at one size: bytes at its peak (result in it, input and old caches not), of its caches, of
    its result; FLOPs; and what comes out."""

    peak: int
    cache: int
    flops: int
    out: Map
    out_bytes: int


def _part(run: DryRun, out: Map) -> Part:
    return Part(run.peak, run.cache, run.flops, out, run.bytes(out))


def _up(run: DryRun, shape: WanVAEShape, x: Map, levels: range, owned: bool) -> Map:
    """Up-blocks in a row; x goes after the first if it is ``owned``."""
    for level in levels:
        y = up_level(run, shape, x, level)
        run.drop(run.bytes(x) if owned else 0)
        x, owned = y, True
    return x


def _down(run: DryRun, shape: WanVAEShape, x: Map, levels: range) -> Map:
    for level in levels:
        x = down_level(run, shape, x, level)
    return x


def decoder_front(shape: WanVAEShape, height: int, width: int, split: int, itemsize: int) -> Part:
    """conv_in, the middle and ``split`` up-blocks of one block of ``height`` x ``width`` latents."""
    run = DryRun(itemsize)
    x = causal_conv(run, Map(shape.latent_channels, 1, height, width), shape.decoder_base * shape.multipliers[-1])
    return _part(run, _up(run, shape, middle(run, x), range(split), owned=True))


def decoder_tail(shape: WanVAEShape, x: Map, split: int, itemsize: int, owned: bool = False) -> Part:
    """The up-blocks from ``split`` on, and the head, of a tile of the front's result.

    ``owned``: the tile is a copy of its own, which counts and goes when it is done with; else a view.
    """
    run = DryRun(itemsize)
    run.take(run.bytes(x) if owned else 0)
    y = _up(run, shape, x, range(split, shape.levels), owned)
    return _part(run, head(run, y, shape.channels, owned or split < shape.levels))


def encoder_head(shape: WanVAEShape, x: Map, split: int, itemsize: int) -> Part:
    """conv_in and the first ``split`` levels, of a tile of (patchified) frames."""
    run = DryRun(itemsize)
    x = causal_conv(run, x, shape.base)
    return _part(run, _down(run, shape, x, range(split)))


def encoder_rest(shape: WanVAEShape, x: Map, split: int, itemsize: int) -> Part:
    """The levels from ``split`` on, the middle and the head; x is theirs, and counted."""
    run = DryRun(itemsize)
    run.take(run.bytes(x))
    y = middle(run, _down(run, shape, x, range(split, shape.levels)))
    return _part(run, head(run, y, 2 * shape.latent_channels, owned=True))
