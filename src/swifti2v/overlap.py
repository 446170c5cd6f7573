"""The stages of a stream at once: each in a thread of its own, one item ahead of who pulls it.

A stage is an iterator that pulls from the stage before it. In turn, only one of them works at a time; with ``Lanes``
on, segment k+1 is denoised while segment k is decoded and k-1 written. A stage begins its next item when its last one
has been taken, so at most one finished item waits behind each: that is the back-pressure, and the bound on memory.
The numbers do not change: the same calls in the same order, on the same tensors, with as many threads each.
On CUDA every stage has its own stream (never run on a GPU). This module knows nothing of what the stages do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .outputs import publish
from .trace import Trace


class Stopped(RuntimeError):
    """Raised inside a stage whose consumer has gone: the run ends between two steps."""


@dataclass(frozen=True)
class Lanes:
    """How a stream's stages run. ``overlap``: at once, each in its thread; ``trace``: is told when each worked."""

    overlap: bool = False
    trace: Trace | None = None

    @contextmanager
    def running(self) -> Iterator[Running]:
        """The stages of one stream. At the end, however it comes, all of them have ended."""
        running = Running(self)
        try:
            yield running
        finally:
            running.end()


IN_TURN = Lanes()


@contextmanager
def recorded(*, overlap: bool, trace: Path | None) -> Iterator[Lanes]:
    """Lanes whose trace, if a file for it is named, is written at the end, however that comes."""
    kept = None if trace is None else Trace()
    try:
        yield Lanes(overlap, kept)
    except BaseException:
        with suppress(OSError):  # the run's own error is what matters
            _publish(kept, trace)
        raise
    _publish(kept, trace)


def _publish(kept: Trace | None, path: Path | None) -> None:
    if kept is not None and path is not None:
        made = path.with_name(f".{path.name}.tmp")
        kept.write(made)
        publish(made, path)


class Running:
    """The open lanes of one stream."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes, self._stop = lanes, threading.Event()
        self._threads: list[ThreadPoolExecutor] = []

    def stopped(self) -> bool:
        """Whether the stream has ended: a stage that is still in the middle of something should not go on."""
        return self._stop.is_set()

    def span(self, name: str) -> AbstractContextManager[None]:
        """Tells the trace, if there is one, that what happens inside bears ``name``."""
        return nullcontext() if self._lanes.trace is None else self._lanes.trace.span(name)

    def stage(self, name: str, items: Iterator[Tensor], device: torch.device | None = None) -> Iterator[Tensor]:
        """``items``, made one ahead in a thread called ``name`` if lanes overlap; computed on ``device``."""
        traced = items if self._lanes.trace is None else self._lanes.trace.each(name, items)
        return self._ahead(name, traced, device) if self._lanes.overlap else traced

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    def _ahead(self, name: str, items: Iterator[Tensor], device: torch.device | None) -> Iterator[Tensor]:
        thread = ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=_begin, initargs=(name, torch.get_num_threads())
        )
        self._threads.append(thread)
        make = _Maker(items, torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None)
        coming: Future[list[_Made]] = thread.submit(make)
        while True:
            with self.span(f"wait for {name}"):
                made = coming.result()
            if self._stop.is_set():
                raise Stopped(f"{name}: the run has ended")
            if not made:
                return
            coming = thread.submit(make)
            yield made.pop().taken()  # bears no name here: it is large, and the next is being made


class _Maker:
    """Makes the next item of a stage, in its thread and on its CUDA stream; an empty list after the last."""

    def __init__(self, items: Iterator[Tensor], stream: Any) -> None:
        self.items, self.stream = items, stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    @torch.no_grad()  # gradients are a matter of the thread: the stream's own no_grad does not reach here
    def __call__(self) -> list[_Made]:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for item in self.items:
                return [_Made(item, None if self.stream is None else self.stream.record_event())]
        return []


@dataclass(frozen=True, eq=False)
class _Made:
    item: Tensor
    done: Any

    def taken(self) -> Tensor:
        """The item, for the caller's own CUDA stream to use."""
        if self.done is not None and self.item.is_cuda:
            stream = torch.cuda.current_stream(self.item.device)
            stream.wait_event(self.done)
            self.item.record_stream(stream)
        return self.item


def _begin(name: str, threads: int) -> None:
    """What a thread of ours begins with. torch's number of threads is each thread's own, and holds for matrix products
    only once something else has set it: by default a thread's first product is cut otherwise, and rounds otherwise."""
    threading.current_thread().name = name
    torch.set_num_threads(threads)
