"""What a run says while it runs: a line of JSON every so often, a bar with the time left, trackers if asked.

It knows numbers and where to write them, not where they come from.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Window:
    """Sums since the last line of the log; part of a checkpoint, so that a resumed run writes the same lines."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0) -> None:
        self.sums, self.count = dict(sums or {}), count

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """The means, and ``ratio`` of error to base; starts the next window."""
        means = {name: total / self.count for name, total in self.sums.items()}
        if means.get("base"):
            means["ratio"] = means["error"] / means["base"]
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}


def rewind(path: Path, step: int) -> None:
    """Take the lines after ``step`` off a log: a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [(line, _step_of(line)) for line in lines]
    kept = [line for line, at in rows if at is not None and at <= step]  # a line cut off by a kill has no step
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class Reporter:
    """JSON lines into ``path``; a live bar on a terminal, else plain lines, both on stderr. ``quiet``: silent."""

    def __init__(self, path: Path, title: str, steps: int, *, quiet: bool = False) -> None:
        self.path, self.title, self.steps, self.quiet = path, title, steps, quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
            timing = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim"))
            self.bar = Progress(*columns, *timing, console=self.console)
            self.task = self.bar.add_task(title, total=steps, detail="")

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def at(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def row(self, row: dict[str, Any]) -> None:
        """One line of the log, flushed; and shown."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        detail = " ".join(f"{name} {row[name]:.4g}" for name in ("loss", "error", "ratio", "norm") if name in row)
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], detail=detail)
        else:
            pace = row.get("seconds", 0.0)
            left = (self.steps - row["step"]) * pace
            self.say(f"{self.title} {row['step']}/{self.steps} {detail} {pace:.3g} s/step, {left:.0f} s left")
