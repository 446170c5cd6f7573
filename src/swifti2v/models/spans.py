"""Tiles as arithmetic: where a frame is cut, and how far a tile must see beyond its own pixels.

Shared by the tiled encoder and decoder, which cut tensors by it, and by ``costs_tiles``, which prices the cuts before
torch is loaded. This module knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """One tile along one axis: pixels start..stop, seen through low..high."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def length(self) -> int:
        """Pixels that the tile computes, its margins included."""
        return self.high - self.low

    def outer(self, scale: int = 1) -> slice:
        """What the tile sees, on a grid ``scale`` times finer."""
        return slice(self.low * scale, self.high * scale)

    def crop(self, scale: int = 1) -> slice:
        """The tile's own pixels inside what it computed."""
        return slice((self.start - self.low) * scale, (self.stop - self.low) * scale)

    def paste(self, scale: int = 1) -> slice:
        """The tile's own pixels inside the frame."""
        return slice(self.start * scale, self.stop * scale)


def spans(length: int, count: int, halo: int) -> list[Span]:
    """``count`` tiles, as even as can be (no more than there are pixels), each with ``halo`` on its inner sides."""
    count = min(count, length)
    cuts = [length * i // count for i in range(count + 1)]
    return [Span(a, b, max(a - halo, 0), min(b + halo, length)) for a, b in pairwise(cuts)]


def grid(height: int, width: int, rows: int, columns: int, halo: int) -> list[tuple[tuple[int, int], Span, Span]]:
    """All tiles of a frame, row by row: (row, column), and the spans of both axes."""
    across = list(enumerate(spans(width, columns, halo)))
    return [((i, j), y, x) for i, y in enumerate(spans(height, rows, halo)) for j, x in across]
