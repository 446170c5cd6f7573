"""Where training items come from: pure functions of an integer, so that data position is a number and nothing else.

Any process may ask for any index in any order and gets the same item, bit for bit; a resumed or re-sharded run
therefore sees what an undisturbed one would have seen. This module knows no items, networks or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..core import UsageError

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Source(Protocol[Item_co]):
    """Items by index: the same index gives the same item, bit for bit, in any process and order."""

    def at(self, index: int) -> Item_co: ...


def item_index(step: int, micro: int, rank: int, accumulation: int, world: int) -> int:
    """The item of optimizer step ``step`` (from 0), micro-batch ``micro`` of ``accumulation``, ``rank`` of ``world``.

    One process with two micro-batches and two processes with one see the same items at the same step.
    """
    return (step * accumulation + micro) * world + rank


def seeded(seed: int, index: int, use: str = "") -> torch.Generator:
    """A CPU generator that depends on these three and on nothing else; ``use`` keeps draws for two purposes apart."""
    key = f"swifti2v/train/{use}/{seed}/{index}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(number)


class Echo(Generic[Item]):
    """Serves each item of ``source`` to ``times`` indices in a row: for items that cost as much as a step.

    The last item is kept; noise is drawn anew for every index.
    """

    def __init__(self, source: Source[Item], times: int) -> None:
        if times < 1:
            raise UsageError(f"echo of {times} times is not positive; 1 serves every item once")
        self.source, self.times = source, times
        self._kept: tuple[int, Item] | None = None

    def at(self, index: int) -> Item:
        key = index // self.times
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.source.at(key))
        return self._kept[1]


@dataclass(frozen=True)
class Curriculum(Generic[Item]):
    """One source after another: ``phases`` of (source, items), the last one without end whatever its number says.

    Counted in items (steps x micro-batches x processes), so that it does not depend on how many processes share them.
    Every phase counts its own items from 0.
    """

    phases: tuple[tuple[Source[Item], int], ...]

    def __post_init__(self) -> None:
        if not self.phases or any(items < 1 for _, items in self.phases[:-1]):
            raise UsageError("a curriculum needs phases of at least one item each")

    def at(self, index: int) -> Item:
        for source, items in self.phases[:-1]:
            if index < items:
                return source.at(index)
            index -= items
        return self.phases[-1][0].at(index)


@dataclass(frozen=True)
class Repeated(Generic[Item]):
    """The same few items over and over: a test that a recipe can learn at all."""

    source: Source[Item]
    count: int = 1

    def at(self, index: int) -> Item:
        return self.source.at(index % self.count)


def feed(source: Source[Any], indices: Sequence[int] | Iterable[int], workers: int = 0) -> Iterator[Any]:
    """The items of ``indices`` in order; ``workers`` processes prepare them ahead of time (the source is copied there).

    With workers every process has its own ``Echo``: items are then made several times, at no cost in time if there
    are cores to spare.
    """
    if workers == 0:
        return (source.at(index) for index in indices)
    loader = DataLoader(_Items(source), batch_size=None, sampler=indices, num_workers=workers, prefetch_factor=2)
    return iter(loader)


class _Items(Dataset[Any]):
    """A source in torch's words."""

    def __init__(self, source: Source[Any]) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Any:
        return self.source.at(index)
