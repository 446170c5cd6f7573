"""A folder with a photo, tiny weights and a jobs file; real workers, killed for real; what a batch must show."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from swifti2v import media, order, produce
from swifti2v.batch.command import run
from swifti2v.batch.scheduler import Tally
from swifti2v.batch.state import LEDGER, Record
from swifti2v.batch.words import LineEvent
from swifti2v.options import BatchOptions, Options
from swifti2v.tiny import tiny_pipeline

SAID = {"image": "photo.png", "prompt": "slow pan left", "preset": "tiny-nano", "size": "128x64", "num_frames": 25}
SAID |= {"segment_blocks": 1, "dtype": "float32", "keep_job": True}  # 2 windows, 6 segments
PLACES = {"motion": "motion", "refine": "segments"}  # phase -> folder of a job


def furnish(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(folder / "photo.png")
    tiny_pipeline("nano").save_pretrained(folder / "weights")
    return folder


def write_jobs(folder: Path, *lines: dict[str, Any] | str, name: str = "jobs.jsonl") -> Path:
    """Each line is ``SAID`` with what is given; None takes a key away."""
    told = []
    for line in lines:
        said = (
            {key: value for key, value in {**SAID, **line}.items() if value is not None} if type(line) is dict else {}
        )
        told.append(json.dumps(said) if said else str(line))
    path = folder / name
    path.write_text("\n".join(told) + "\n")
    return path


def ledger(jobs: Path) -> list[Record]:
    lines = (jobs.with_suffix(".state") / LEDGER).read_bytes().splitlines()
    return [Record.model_validate_json(line) for line in lines]


def batch(jobs: Path, emit: Any = None, **asked: Any) -> tuple[Tally, list[LineEvent]]:
    events: list[LineEvent] = []

    def hear(event: LineEvent) -> None:
        events.append(event)
        if emit is not None:
            emit(event)

    return run(BatchOptions(str(jobs), **{"model": str(jobs.parent / "weights"), **asked}), hear), events


def segments_in(job: Path) -> set[tuple[str, int]]:
    """What a journal holds, as (phase, number) of events."""
    return {
        (phase, int(path.stem) + 1)
        for phase, kind in PLACES.items()
        for path in (job / kind).glob("*.safetensors")
        if not path.name.startswith(".")
    }


def denoised(event: LineEvent) -> tuple[str, int] | None:
    if event.type == "progress" and event.phase in PLACES and event.segment:
        return event.phase, event.segment
    return None


class Killer:
    """Kills the worker of a denoising step, now and then, a moment after it was told of."""

    def __init__(self, folder: Path, kills: int, seed: int, gap: tuple[int, int]) -> None:
        self._folder, self.left, self._random, self._gap = folder, kills, random.Random(seed), gap
        self._wait = self._random.randint(*gap)
        self.killed: list[tuple[int, int, set[tuple[str, int]]]] = []  # line, attempt, what its journal held

    def __call__(self, event: LineEvent) -> None:
        if denoised(event) is None or self.left == 0:
            return
        self._wait -= 1
        late = event.phase == "refine" and event.step > 0.6 * event.total
        if self._wait > 0 or late or not alive(event.pid):  # what it said before it was killed comes later
            return
        time.sleep(self._random.uniform(0, 0.02))
        os.kill(event.pid, signal.SIGKILL)
        while alive(event.pid):
            time.sleep(0.001)
        self.killed.append((event.line, event.attempt, segments_in(self._folder / f"c{event.line}.job")))
        self.left, self._wait = self.left - 1, self._random.randint(*self._gap)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def assert_nothing_twice(killer: Killer, events: list[LineEvent], records: list[Record]) -> None:
    """What a journal held at a kill was not worked on in any later attempt; nor was what it held at any begin."""
    for line, attempt, held in killer.killed:
        later = {denoised(event) for event in events if event.line == line and event.attempt > attempt}
        assert not later & held, (line, attempt, later & held)
    begun = {(r.line, r.attempt): r.held for r in records if r.what == "begun"}
    for record in (r for r in records if r.what in ("made", "motion", "lost", "failed")):
        held = begun[record.line, record.attempt]
        assert held is not None
        assert all(number > held.motion for number in record.worked.get("motion", []))
        assert all(number > held.segments for number in record.worked.get("refine", []))


def latents(job: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(job.glob("*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[str(path.relative_to(job))] = file.get_tensor("latents").numpy().tobytes()
    return found


def assert_as_undisturbed(jobs: Path, said: dict[str, Any]) -> None:
    """The clip and its job, compared with what ``generate`` makes of the same words in this process."""
    folder = jobs.parent
    made = folder / said["output"]
    threads = json.loads((made.with_suffix(".job") / "manifest.json").read_text())["settings"]["threads"]
    alone = folder / "alone" / made.name
    alone.parent.mkdir(exist_ok=True)
    words = {**SAID, **said, "image": str(folder / "photo.png"), "output": str(alone)}
    options = Options(**words, model=str(folder / "weights"), device="cpu", threads=int(threads))
    produce.start(order.prepare(options), lambda event: None)
    assert len(latents(alone.with_suffix(".job"))) == 2 + 6
    assert latents(made.with_suffix(".job")) == latents(alone.with_suffix(".job"))
    assert torch.equal(*(torch.cat(list(media.read_video(path)), dim=2) for path in (made, alone)))
