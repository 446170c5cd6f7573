"""Who does what next: one queue of clips, workers that may die at any time, and the journal as the only memory of work.

The same for every engine. A lost or failed clip goes back to the queue and is resumed from its journal, as often
as the journal has grown; ``attempts`` in a row that added nothing to it are too many.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import Event
from .state import Held, Record, State
from .words import Clip, Emit, Engine, Heard, LineEvent, Lost, Outcome, Place, Ready, Stage, Task

WAIT_SECONDS = 1.0
FAILED_STARTS = 3  # in a row: then a place is given up
_DENOISING = ("motion", "refine")


@dataclass(frozen=True)
class Tally:
    """How a batch ended: lines made, and lines failed with the reason."""

    made: tuple[int, ...]
    failed: dict[int, str]


@dataclass
class _Seat:
    """A place with its worker: ``task`` since ``begin`` with what the journal ``held`` then; ``worked`` on since."""

    place: Place
    ready: bool = False
    pid: int = 0
    failed_starts: int = 0
    task: Task | None = None
    begin: float = 0.0
    held: Held = Held()  # noqa: RUF009  # frozen
    worked: dict[str, set[int]] = field(default_factory=dict)


def schedule(
    clips: Sequence[Clip], places: Sequence[Place], engine: Engine, state: State, emit: Emit, attempts: int
) -> Tally:
    """Make all clips that can be made. A failed clip stops no other."""
    floor = _Floor(clips, places, engine, state, emit, attempts)
    for seat in floor.seats.values():
        engine.start(seat.place)
    while floor.unfinished:
        floor.assign()
        for heard in engine.heard(WAIT_SECONDS):
            floor.take(heard)
    return Tally(tuple(sorted(floor.made)), dict(sorted(floor.failed.items())))


class _Floor:
    """The clips and the seats while a batch runs."""

    def __init__(
        self,
        clips: Sequence[Clip],
        places: Sequence[Place],
        engine: Engine,
        state: State,
        emit: Emit,
        attempts: int,
    ) -> None:
        self._engine, self._state, self._emit, self._attempts = engine, state, emit, attempts
        self._begin = time.monotonic()
        self._clips = {clip.line: clip for clip in clips}
        self._idle: dict[int, int] = {}  # attempts in a row that added nothing
        self._staged = any(place.stage == "motion" for place in places)
        self.seats = {place.number: _Seat(place) for place in places}
        self.made: list[int] = []
        self.failed: dict[int, str] = {}
        self.queues: dict[Stage, deque[Clip]] = {"whole": deque(), "motion": deque(), "rest": deque()}
        for clip in clips:
            self.queues[self._stage(clip)].append(clip)

    @property
    def unfinished(self) -> bool:
        return len(self.made) + len(self.failed) < len(self._clips)

    def assign(self) -> None:
        """Give every free worker the next clip of its stage; fail those that no worker is left for."""
        self._strand()
        for seat in self.seats.values():
            queue = self.queues[seat.place.stage]
            if seat.ready and seat.task is None and queue:
                self._send(seat, queue.popleft())

    def take(self, heard: Heard) -> None:
        """React to what came from a worker."""
        seat, word = self.seats[heard.worker], heard.word
        if isinstance(word, Ready):
            seat.ready, seat.pid, seat.failed_starts = True, word.pid, 0
        elif isinstance(word, Event):
            self._told(seat, word)
        elif isinstance(word, Lost):
            self._lost(seat, word)
        else:
            self._ended(seat, word)

    def _stage(self, clip: Clip) -> Stage:
        if not self._staged:
            return "whole"
        return "motion" if clip.staged and clip.line not in self._state.moved else "rest"

    def _send(self, seat: _Seat, clip: Clip) -> None:
        line, stage = clip.line, seat.place.stage
        attempt = self._state.attempts.get(line, 0) + 1
        task = Task(clip, stage, attempt, ours=attempt > 1)
        seat.task, seat.begin, seat.held, seat.worked = task, time.monotonic(), Held.by(clip.folder), {}
        self._record(seat, "begun", held=seat.held)
        self._say(seat, "notice", f"{_what(stage)} {clip.target.name}, worker {seat.place.number}{_again(attempt)}")
        self._engine.send(seat.place.number, task)

    def _told(self, seat: _Seat, event: Event) -> None:
        if seat.task is None:
            return
        if event.type == "progress" and event.phase in _DENOISING and event.segment:
            seat.worked.setdefault(event.phase, set()).add(event.segment)
        self._emit(LineEvent.of(event, seat.task, seat.place.number, seat.pid))

    def _ended(self, seat: _Seat, outcome: Outcome) -> None:
        task = seat.task
        if task is None:
            return
        seconds = time.monotonic() - seat.begin
        if outcome.what == "failed":
            self._failed(seat, task.clip, outcome)
            return
        output = self._state.name_of(task.clip.target) if outcome.what == "made" else ""
        self._record(seat, outcome.what, output=output, seconds=seconds, message=outcome.message)
        if outcome.what == "made":
            self.made.append(task.clip.line)
            self._say(seat, "completed", f"made {task.clip.target.name} in {seconds:.1f} s")
        else:
            # Stage I's journal is handed on, or back if it was found damaged.
            self.queues[self._stage(task.clip)].append(task.clip)
        seat.task = None

    def _failed(self, seat: _Seat, clip: Clip, outcome: Outcome) -> None:
        if outcome.final:
            self._give_up(seat, clip, outcome.message)
            seat.task = None
            return
        # A CUDA error or a fragmented memory outlives its clip: the next one gets a new process.
        self._retry(seat, clip, outcome.message)
        self._engine.stop(seat.place.number)
        self._restart(seat)

    def _lost(self, seat: _Seat, word: Lost) -> None:
        if seat.task is not None:
            self._retry(seat, seat.task.clip, f"worker {seat.place.number} died ({word.reason})")
        if not seat.ready:
            seat.failed_starts += 1
        if seat.failed_starts < FAILED_STARTS:
            self._restart(seat)
            return
        number = seat.place.number
        del self.seats[number]
        self._notice(f"worker {number} is given up: it died {FAILED_STARTS} times before it was ready ({word.reason})")

    def _restart(self, seat: _Seat) -> None:
        seat.task, seat.ready = None, False
        self._engine.start(seat.place)

    def _retry(self, seat: _Seat, clip: Clip, reason: str) -> None:
        """Back to the front of the queue, unless too many attempts in a row have added nothing."""
        held = Held.by(clip.folder)
        self._idle[clip.line] = 0 if held.all > seat.held.all else self._idle.get(clip.line, 0) + 1
        if self._idle[clip.line] >= self._attempts:
            self._give_up(seat, clip, f"{reason}; {self._attempts} attempts in a row added nothing to its journal")
            return
        self._record(seat, "lost", held=held, message=reason, seconds=time.monotonic() - seat.begin)
        kept = f"{held.motion} windows and {held.segments} segments are kept" if held.all else "nothing was kept yet"
        self._say(seat, "notice", f"{reason}; {kept}, to be resumed")
        self.queues[self._stage(clip)].appendleft(clip)

    def _give_up(self, seat: _Seat, clip: Clip, reason: str) -> None:
        self.failed[clip.line] = reason
        held = Held.by(clip.folder)
        self._record(seat, "failed", held=held, message=reason, seconds=time.monotonic() - seat.begin)
        self._say(seat, "failed", reason)

    def _strand(self) -> None:
        stages = {seat.place.stage for seat in self.seats.values()}
        for queue in (queue for stage, queue in self.queues.items() if stage not in stages):
            while queue:
                line = queue.popleft().line
                self.failed[line] = "no worker is left to make it"
                self._state.append(Record(what="failed", line=line, message=self.failed[line]))
                self._tell(Event("failed", "run", message=f"line {line}: {self.failed[line]}"), line)

    def _record(self, seat: _Seat, what: Any, **more: Any) -> None:
        assert seat.task is not None
        worked = {phase: sorted(numbers) for phase, numbers in seat.worked.items()}
        line, attempt = seat.task.clip.line, seat.task.attempt
        more["seconds"] = round(more.get("seconds", 0.0), 3)
        self._state.append(
            Record(what=what, line=line, attempt=attempt, worker=seat.place.number, worked=worked, **more)
        )

    def _say(self, seat: _Seat, type: Any, message: str) -> None:
        assert seat.task is not None
        event = Event(type, "run", seconds=self._seconds(), message=f"line {seat.task.clip.line}: {message}")
        self._emit(LineEvent.of(event, seat.task, seat.place.number, seat.pid))

    def _notice(self, message: str) -> None:
        self._tell(Event("notice", "run", message=message), 0)

    def _tell(self, event: Event, line: int) -> None:
        self._emit(LineEvent(event.type, event.phase, seconds=self._seconds(), message=event.message, line=line))

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begin, 3)


def _what(stage: Stage) -> str:
    return {"whole": "making", "motion": "stage I of", "rest": "stage II of"}[stage]


def _again(attempt: int) -> str:
    return "" if attempt == 1 else f", attempt {attempt}"
