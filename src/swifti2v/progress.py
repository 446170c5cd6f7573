"""Events made visible: a live view on a terminal, plain lines elsewhere, JSON lines for programs.

Everything for people goes to stderr, so that stdout holds the result (or the JSON) alone.
This module knows how events look, not what causes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from types import TracebackType
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from .core import Event

Mode = Literal["auto", "plain", "json", "quiet"]
PHASES = {
    "load": "loading the model",
    "text": "reading the prompt",
    "image": "reading the photo",
    "motion": "motion (stage I)",
    "refine": "video (stage II)",
    "decode": "decoding",
    "write": "writing the file",
}
_QUIET_SECONDS = 5.0


class View(Protocol):
    """Takes events as they happen."""

    def __call__(self, event: Event) -> None: ...


@contextmanager
def view(mode: Mode) -> Iterator[View]:
    """The view for ``mode``; ``auto`` is live if stderr is a terminal and plain otherwise."""
    if mode == "json":
        yield json_line
    elif mode == "quiet":
        yield silent
    elif mode == "auto" and sys.stderr.isatty():
        with LiveView(Console(stderr=True)) as live:
            yield live
    else:
        yield PlainView()


@contextmanager
def batch_view(mode: Mode) -> Iterator[View]:
    """The view of many clips at once: of each only how it began and ended, or as JSON all.

    Meanwhile stdout is stderr for all others: Ray prints of dead workers.
    """
    out, show = sys.stdout, silent if mode == "quiet" else PlainView()

    def seen(event: Event) -> None:
        if mode == "json":
            with redirect_stdout(out):
                json_line(event)
        elif event.phase == "run" and event.type in ("notice", "completed", "failed"):
            show(event)

    with redirect_stdout(sys.stderr):
        yield seen


def json_line(event: Event) -> None:
    """One event as one line of JSON on stdout, at once."""
    print(json.dumps(asdict(event), ensure_ascii=False), flush=True)


def silent(event: Event) -> None:
    """Nothing: ``--quiet``."""


def clock(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Estimate:
    """Seconds left in a phase, from its own pace; ``None`` until a step has been seen."""

    def __init__(self) -> None:
        self._phase = ""
        self._first: Event | None = None

    def left(self, event: Event) -> float | None:
        if event.phase != self._phase or self._first is None or event.step < self._first.step:
            self._phase, self._first = event.phase, event
            return None
        done = event.step - self._first.step
        if done == 0 or event.total <= event.step:
            return None
        return (event.seconds - self._first.seconds) / done * (event.total - event.step)


class PlainView:
    """Lines on stderr: every notice, phase and segment, and progress at most every five seconds."""

    def __init__(self) -> None:
        self._phase = ""
        self._spoken = float("-inf")
        self._estimate = Estimate()

    def __call__(self, event: Event) -> None:
        left = self._estimate.left(event)
        fresh = event.phase != self._phase
        due = event.seconds - self._spoken >= _QUIET_SECONDS
        if event.type == "progress" and not (fresh or due):
            return
        self._phase, self._spoken = event.phase, event.seconds
        print(f"[{clock(event.seconds):>5}] {describe(event, left)}", file=sys.stderr, flush=True)


def describe(event: Event, left: float | None = None) -> str:
    """An event in words."""
    if event.type in ("notice", "failed", "completed") and event.message:
        return event.message
    words = [PHASES.get(event.phase, event.phase)]
    if event.segment:
        words.append(f"segment {event.segment}")
    if event.total:
        words.append(f"{event.step}/{event.total}")
    if left is not None:
        words.append(f"about {clock(left)} left")
    if event.message:
        words.append(event.message)
    return ", ".join(words)


class LiveView:
    """A bar for every phase, with its steps and the time left; notices scroll above."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._estimate = Estimate()

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if event.type in ("notice", "failed"):
            self._progress.console.print(Text(event.message, style="yellow"))
            return
        if event.type == "completed":
            return
        if event.phase not in self._tasks:
            title = PHASES.get(event.phase, event.phase)
            self._tasks[event.phase] = self._progress.add_task(title, total=event.total or None, detail="")
        left = self._estimate.left(event)
        detail = [f"segment {event.segment}"] if event.segment else []
        detail += [f"{clock(left)} left"] if left is not None else []
        task = self._tasks[event.phase]
        self._progress.update(task, total=event.total or None, completed=event.step, detail=", ".join(detail))
