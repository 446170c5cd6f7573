"""The scheduler's decisions, by an engine that says what it is told to; and one task done in this process."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import SAID, denoised, furnish, latents, write_jobs

from swifti2v import media, order, produce
from swifti2v.batch.planning import plan_batch
from swifti2v.batch.scheduler import FAILED_STARTS, Tally, schedule
from swifti2v.batch.state import State
from swifti2v.batch.words import Capacity, Clip, Heard, LineEvent, Lost, Outcome, Place, Ready, Task
from swifti2v.batch.worker import Keeper, work
from swifti2v.core import Event
from swifti2v.journal import Job


class Script:
    """An engine whose workers answer at once, by a function of the task; ``fails``: starts that die."""

    def __init__(self, answer: Callable[[int, Task], Outcome | Lost], fails: int = 0) -> None:
        self._answer, self._fails = answer, fails
        self._said: deque[Heard] = deque()
        self.log: list[str] = []

    def capacity(self) -> Capacity:
        return Capacity(1, 0, 1)

    def start(self, place: Place) -> None:
        self.log.append(f"start {place.number}")
        self._fails -= 1
        self._said.append(Heard(place.number, Lost("no memory") if self._fails >= 0 else Ready(1)))

    def send(self, worker: int, task: Task) -> None:
        self.log.append(f"{worker}: {task.stage} {task.clip.line} #{task.attempt}{' ours' if task.ours else ''}")
        self._said.append(Heard(worker, self._answer(worker, task)))

    def heard(self, seconds: float) -> Iterable[Heard]:
        if self._said:
            yield self._said.popleft()

    def stop(self, worker: int) -> None:
        self.log.append(f"stop {worker}")

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("scheduler"))


def clips(here: Path, name: str, count: int, **said: Any) -> tuple[State, tuple[Clip, ...]]:
    lines = [{"seed": n, "output": f"{name}{n}.mp4", "num_frames": 9, **said} for n in range(1, count + 1)]
    state = State(write_jobs(here, *lines, name=f"{name}.jsonl"))
    return state, plan_batch(here / f"{name}.jsonl", state, str(here / "weights")).clips


def scheduled(here: Path, name: str, count: int, script: Script, places: list[Place], attempts: int = 4) -> Tally:
    state, made_of = clips(here, name, count)
    events: list[LineEvent] = []
    with state:
        tally = schedule(made_of, places, script, state, events.append, attempts)
    assert {event.line for event in events if event.type == "failed"} == set(tally.failed)
    return tally


def test_a_final_failure_is_not_tried_again_and_stops_no_other(here: Path) -> None:
    script = Script(lambda _, task: Outcome("failed", "", "NaN", True) if task.clip.line == 1 else Outcome("made"))
    tally = scheduled(here, "final", 3, script, [Place(0)])
    assert tally == Tally((2, 3), {1: "NaN"})
    assert script.log == ["start 0", "0: whole 1 #1", "0: whole 2 #1", "0: whole 3 #1"]


def test_attempts_without_progress_are_counted_and_only_they(here: Path) -> None:
    def grows(_: int, task: Task) -> Outcome | Lost:
        if task.attempt > 9:
            return Outcome("made")
        folder = task.clip.folder / "segments"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{task.attempt:04d}.safetensors").touch()
        return Lost("signal SIGKILL")

    script = Script(grows)
    assert scheduled(here, "grows", 1, script, [Place(0)], attempts=2).made == (1,)
    assert script.log.count("start 0") == 10 and script.log[-1] == "0: whole 1 #10 ours"
    script = Script(lambda _, task: Lost("signal SIGKILL"))
    tally = scheduled(here, "stuck", 1, script, [Place(0)], attempts=3)
    assert "3 attempts in a row added nothing to its journal" in tally.failed[1]
    assert script.log.count("start 0") == 4


def test_a_failure_that_may_pass_costs_its_worker(here: Path) -> None:
    script = Script(lambda _, task: Outcome("failed", "", "CUDA error") if task.attempt == 1 else Outcome("made"))
    assert scheduled(here, "cuda", 1, script, [Place(0)]).made == (1,)
    assert script.log == ["start 0", "0: whole 1 #1", "stop 0", "start 0", "0: whole 1 #2 ours"]


def test_a_place_that_never_gets_ready_is_given_up(here: Path) -> None:
    script = Script(lambda _, task: Outcome("made"), fails=FAILED_STARTS)
    tally = scheduled(here, "dead", 2, script, [Place(0)])
    assert tally == Tally((), dict.fromkeys((1, 2), "no worker is left to make it"))


def test_stages_are_handed_on_and_back(here: Path) -> None:
    seen: list[int] = []

    def answer(_: int, task: Task) -> Outcome:
        if task.stage == "motion":
            return Outcome("motion")
        seen.append(task.clip.line)
        return Outcome("unready") if seen == [1] else Outcome("made")

    script = Script(answer)
    places = [Place(0, "motion"), Place(1, "rest")]
    assert scheduled(here, "staged", 2, script, places).made == (1, 2)
    assert [text for text in script.log if " 1 #" in text] == [
        "0: motion 1 #1", "1: rest 1 #2 ours", "0: motion 1 #3 ours", "1: rest 1 #4 ours",
    ]  # fmt: skip


def test_a_clip_without_a_stage_of_its_own_goes_to_the_second_kind(here: Path) -> None:
    state, (clip,) = clips(here, "single", 1)
    script = Script(lambda _, task: Outcome("made"))
    with state:
        single = dataclasses.replace(clip, staged=False)
        schedule([single], [Place(0, "motion"), Place(1, "rest")], script, state, lambda event: None, 4)
    assert script.log[2:] == ["1: rest 1 #1"]


# --- one task -----------------------------------------------------------------------------------------------------


def silent(event: Event) -> None:
    return None


def test_what_a_dead_worker_left_is_known_as_its_own(here: Path) -> None:
    state, (clip,) = clips(here, "left", 1, keep_job=False)
    state.close()
    place, task = Place(0, "whole", "cpu", 1), Task(clip, "whole", 2, ours=True)
    keeper = Keeper(place)
    # Killed between the reservation and the job's manifest.
    media.part_path(clip.target).touch()
    (clip.folder / "motion").mkdir(parents=True)
    (clip.folder / "lock").touch()
    assert work(task, place, keeper, silent) == Outcome("made", str(clip.target))
    assert not clip.folder.exists() and not media.part_path(clip.target).exists()
    # Killed between publishing the video and saying so.
    steps: list[Event] = []
    clip.folder.mkdir()
    (clip.folder / "lock").touch()
    assert work(task, place, keeper, steps.append) == Outcome("made", str(clip.target))
    assert steps == [] and not clip.folder.exists()
    # Somebody else's video of that name.
    other = dataclasses.replace(clip, request=clip.request.model_copy(update={"seed": 99}))
    refused = work(dataclasses.replace(task, clip=other), place, keeper, silent)
    assert refused.what == "failed" and refused.final and "is not what line 1 makes" in refused.message
    assert clip.target.exists()
    first = work(dataclasses.replace(task, ours=False), place, keeper, silent)
    assert first.final and "is taken by another run" in first.message


def test_stages_by_two_keepers_make_the_same_clip_and_load_once(here: Path) -> None:
    state, pair = clips(here, "two", 2, keep_job=True)
    state.close()
    one, two = Place(0, "motion", "cpu", 1), Place(1, "rest", "cpu", 1)
    keepers = {place: Keeper(place) for place in (one, two)}
    events: list[Event] = []
    for clip in pair:
        assert work(Task(clip, "rest", 1, False), two, keepers[two], silent).what == "unready"
        assert work(Task(clip, "motion", 1, False), one, keepers[one], events.append).what == "motion"
        assert {key[0] for event in events if (key := denoised(as_line(event)))} == {"motion"}
        assert work(Task(clip, "rest", 2, True), two, keepers[two], silent).what == "made"
    assert sum(event.phase == "load" for event in events) == 1
    words = {**SAID, "seed": 2, "num_frames": 9, "image": str(here / "photo.png"), "output": str(here / "alone.mp4")}
    options = dataclasses.replace(clip.options, output=words["output"], device="cpu", threads=1)
    produce.start(order.prepare(options), silent)
    assert latents(here / "alone.job") == latents(pair[1].folder)
    with Job.open(pair[1].folder) as job:
        assert job.manifest.settings["threads"] == "1"
    frames = [torch.cat(list(media.read_video(path)), dim=2) for path in (here / "alone.mp4", pair[1].target)]
    assert torch.equal(*frames)


def as_line(event: Event) -> LineEvent:
    return LineEvent(**dataclasses.asdict(event))
