"""Who worked when: spans of time by thread, written in Chrome's trace format (chrome://tracing, ui.perfetto.dev).

A span inside another of the same thread is part of it. Knows nothing of what is timed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Span:
    """``name`` ran in ``lane`` (a thread's name) from ``start`` for ``seconds`` (since the trace began)."""

    name: str
    lane: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Trace:
    """Collects spans; all of its methods may be called from any thread."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._spans: list[Span] = []

    @property
    def spans(self) -> list[Span]:
        """All finished spans, those that ended first first."""
        return list(self._spans)

    @contextmanager
    def span(self, name: str, lane: str | None = None) -> Iterator[None]:
        """Time what happens inside; it belongs to the thread that it happens in, or to a ``lane`` by name."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end, where = time.perf_counter(), lane or threading.current_thread().name
            self._spans.append(Span(name, where, begin - self._begin, end - begin))

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """``items``, a span for the making of each: ``name`` and its number from 0."""
        number = 0
        while True:
            with self.span(f"{name} {number}"):
                held = list(_up_to_one(items))
            if not held:
                return
            yield held.pop()  # bears no name here: it may be large, and the next is about to be made
            number += 1

    def write(self, path: Path) -> None:
        """One JSON object, times in microseconds, a row for every lane."""
        lanes = list(dict.fromkeys(span.lane for span in sorted(self._spans, key=lambda span: span.start)))
        events: list[dict[str, Any]] = []
        for number, lane in enumerate(lanes):
            place = {"pid": 1, "tid": number}
            events.append({"ph": "M", "name": "thread_name", "args": {"name": lane}, **place})
            events.append({"ph": "M", "name": "thread_sort_index", "args": {"sort_index": number}, **place})
        for span in self._spans:
            times = {"ts": round(span.start * 1e6, 1), "dur": round(span.seconds * 1e6, 1)}
            events.append({"ph": "X", "name": span.name, "pid": 1, "tid": lanes.index(span.lane), **times})
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def own_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by the first word of a span's name, what its inner spans took not counted."""
    totals: dict[str, float] = {}
    for lane in {span.lane for span in spans}:
        open_spans: list[Span] = []
        for span in sorted((s for s in spans if s.lane == lane), key=lambda s: (s.start, -s.seconds)):
            while open_spans and open_spans[-1].end < span.end:
                open_spans.pop()
            word = span.name.split()[0]
            totals[word] = totals.get(word, 0.0) + span.seconds
            if open_spans:
                totals[open_spans[-1].name.split()[0]] -= span.seconds
            open_spans.append(span)
    return totals


def _up_to_one(items: Iterator[Item]) -> Iterator[Item]:
    """The next item, if there is one."""
    for item in items:
        yield item
        return
