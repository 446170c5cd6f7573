"""Conditional Segment-wise Generation: which latent blocks share a window (paper section 3.2).

Block 0 is the anchor, the latent of the user's image. The other blocks are cut into consecutive
segments; a window is the anchor, some finished neighbors and the segment denoised now.
Pure arithmetic: this module knows nothing of tensors, noise or networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RopePositions = Literal["clamped", "absolute", "window"]


class CSG(BaseModel):
    """How windows are cut and what their finished blocks look like to the network.

    ``segment_blocks`` (M) and ``neighbor_blocks`` (N): the project page's 3 and 1. The other fields
    are what the paper leaves open. ``rope_positions``: temporal positions are the blocks' own
    (``absolute``), 0, 1, 2... (``window``), or their own held within the trained length (``clamped``).
    ``neighbor_timestep``: finished neighbors carry sigma 0 (``zero``) or the segment's (``current``).
    ``neighbor_reference``: their reference channels hold the reference or the generated latents.
    ``renoised``: finished blocks enter noised to the segment's sigma instead of clean: none, the
    neighbors, or the whole context with the anchor. Re-noised blocks always carry the current sigma.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment_blocks: int = Field(default=3, ge=1)
    neighbor_blocks: int = Field(default=1, ge=0)
    rope_positions: RopePositions = "clamped"
    neighbor_timestep: Literal["zero", "current"] = "zero"
    neighbor_reference: Literal["reference", "generated"] = "reference"
    renoised: Literal["none", "neighbors", "context"] = "none"
    round_timesteps_bf16: bool = False


@dataclass(frozen=True)
class Window:
    """Blocks of one denoising: ``anchor`` (None while block 0 itself is generated), ``neighbors``, ``segment``."""

    anchor: int | None
    neighbors: tuple[int, ...]
    segment: tuple[int, ...]

    @property
    def context(self) -> tuple[int, ...]:
        """The finished blocks, in order."""
        return self.neighbors if self.anchor is None else (self.anchor, *self.neighbors)

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*self.context, *self.segment)

    def positions(self, rope_positions: RopePositions, trained_blocks: int) -> tuple[int, ...]:
        """Temporal position of every block, in the order of ``blocks`` (one rule for training and inference).

        ``clamped``: block 0 at 0, block k at k - max(0, last - (trained_blocks - 1)): absolute up to
        the trained length; beyond it the distances inside the window stay and only the anchor gap is clamped.
        """
        if rope_positions == "window":
            return tuple(range(len(self.blocks)))
        back = 0 if rope_positions == "absolute" else max(0, self.blocks[-1] - (trained_blocks - 1))
        return tuple(0 if block == 0 else block - back for block in self.blocks)

    def sigmas(self, sigma: float, csg: CSG) -> tuple[float, ...]:
        """Noise level that every block carries into the network, in the order of ``blocks``."""
        anchor = sigma if csg.renoised == "context" else 0.0
        neighbor = sigma if csg.renoised != "none" or csg.neighbor_timestep == "current" else 0.0
        levels = [anchor] if self.anchor is not None else []
        return (*levels, *[neighbor] * len(self.neighbors), *[sigma] * len(self.segment))


def windows(num_blocks: int, *, segment_blocks: int = 3, neighbor_blocks: int = 1) -> Iterator[Window]:
    """Stage II's windows: segments of M blocks over 1..T-1, each with the N blocks before it.

    The neighbors of a segment starting at a are blocks max(1, a-N)..a-1: none for the first segment.
    """
    if segment_blocks < 1 or neighbor_blocks < 0 or num_blocks < 1:
        raise ValueError(f"no windows of {segment_blocks} + {neighbor_blocks} blocks over {num_blocks}")
    for start in range(1, num_blocks, segment_blocks):
        segment = tuple(range(start, min(start + segment_blocks, num_blocks)))
        yield Window(0, tuple(range(max(1, start - neighbor_blocks), start)), segment)


def motion_windows(
    num_blocks: int, *, trained_blocks: int = 21, overlap_blocks: int = 5, generates_anchor: bool = False
) -> Iterator[Window]:
    """Stage I's windows (docs/decisions/0003): the trained length at once, then continuations of the same length.

    A continuation keeps the anchor and as many finished blocks before the segment as fill the window
    to exactly ``trained_blocks``, at least ``overlap_blocks``; so under ``clamped`` positions every
    window has the positions 0..trained_blocks-1 that Stage I was trained on.
    ``generates_anchor``: the network denoises block 0 too (Wan2.1-I2V), in the first window.
    """
    if not 1 <= overlap_blocks <= trained_blocks - 2:
        raise ValueError(f"overlap of {overlap_blocks} blocks does not fit windows of {trained_blocks}")
    first = 0 if generates_anchor else 1
    end = min(num_blocks, trained_blocks)
    if end > first:
        yield Window(None if generates_anchor else 0, (), tuple(range(first, end)))
    while end < num_blocks:
        start, end = end, min(num_blocks, end + trained_blocks - 1 - overlap_blocks)
        yield Window(0, tuple(range(end - trained_blocks + 1, start)), tuple(range(start, end)))
