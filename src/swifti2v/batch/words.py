"""What goes between the scheduler and its workers: frozen values that can be pickled, and what an engine must do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..core import Event, Request
from ..options import Options

Stage = Literal["whole", "motion", "rest"]


@dataclass(frozen=True)
class Clip:
    """One checked line: ``options`` complete (absolute paths, the seed drawn), ``target`` the file to be.

    ``staged``: its Stage I can be made apart from the rest.
    """

    line: int
    options: Options
    request: Request
    target: Path
    staged: bool

    @property
    def folder(self) -> Path:
        """Its job folder."""
        return self.target.with_name(f"{self.target.stem}.job")


@dataclass(frozen=True)
class Place:
    """Where a worker works and what it is for: ``whole`` clips, Stage I (``motion``) or the ``rest``."""

    number: int
    stage: Stage = "whole"
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Task:
    """``stage`` of a clip. ``ours``: it has been begun before, so what lies under its names is its own."""

    clip: Clip
    stage: Stage
    attempt: int
    ours: bool


@dataclass(frozen=True)
class Ready:
    """A worker is there and waits."""

    pid: int


@dataclass(frozen=True)
class Outcome:
    """How a task ended while its worker lived.

    ``made``: ``path`` is there; ``motion``: Stage I is in the journal; ``unready``: it is not, and this worker does
    not make it; ``failed``: for the reason in ``message``, and ``final`` if it would fail again.
    """

    what: Literal["made", "motion", "unready", "failed"]
    path: str = ""
    message: str = ""
    final: bool = False


@dataclass(frozen=True)
class Lost:
    """A worker died."""

    reason: str


@dataclass(frozen=True)
class Heard:
    """What came from a worker, by the number of its place."""

    worker: int
    word: Ready | Event | Outcome | Lost


@dataclass(frozen=True)
class LineEvent(Event):
    """An event of one line of the jobs file (0: of the batch), by one worker (-1: none), in one attempt at it."""

    line: int = 0
    attempt: int = 0
    worker: int = -1
    pid: int = 0

    @classmethod
    def of(cls, event: Event, task: Task, worker: int, pid: int) -> LineEvent:
        return cls(**asdict(event), line=task.clip.line, attempt=task.attempt, worker=worker, pid=pid)


Emit = Callable[[LineEvent], None]


@dataclass(frozen=True)
class Capacity:
    """CPU threads and GPUs that an engine can give to workers; ``cpus_each``: the most that one worker can have."""

    cpus: int
    gpus: int
    cpus_each: int


class Engine(Protocol):
    """How workers are started, sent a task and heard of. It decides nothing: the scheduler does."""

    def capacity(self) -> Capacity:
        """What there is."""

    def start(self, place: Place) -> None:
        """Begin a worker there (again). It says ``Ready`` when it can be sent a task."""

    def send(self, worker: int, task: Task) -> None:
        """Have a ready worker work; it says events and then an ``Outcome``."""

    def heard(self, seconds: float) -> Iterable[Heard]:
        """What has come from workers, waiting at most so long for the first; a ``Lost`` is the last of its worker."""

    def stop(self, worker: int) -> None:
        """End a worker now, whatever it does; nothing more is heard of it."""

    def close(self) -> None:
        """End all."""
