"""How long does nano take for a clip, where does the time go, how much memory, and how soon can it be watched?

    python benchmarks/nano_clip.py --record                              # 2560x1408x81
    python benchmarks/nano_clip.py --size 1280x704 --record
    python benchmarks/nano_clip.py --tiny                                # a quarter of a minute

Runs the real command line in a fresh process and watches its part file. Wanted on two CPU cores: 2560x1408x81 in
under 10 minutes and under 6 GB; 1280x704x81 in under 2 minutes; and the part file plays frame 0 and the first
segment before the last segment starts. All seconds count from the start of the process, imports included.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import common

MOST_SECONDS = {"2560x1408": 600.0, "1280x704": 120.0}
MOST_BYTES = 6e9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.add_clip_options(parser)
    parser.add_argument("--size", default="2560x1408")
    parser.add_argument("--num-frames", type=int, default=81)
    asked = common.parsed(parser, arguments)
    if asked.tiny:
        asked.size, asked.num_frames = "128x64", 33
    record = common.Record("time, memory and first pictures of a nano clip", asked, __file__)
    with common.workplace(asked) as (folder, model):
        told = ["--image", str(asked.image.resolve())]
        told += common.clip_arguments(asked, model, asked.size, asked.num_frames)
        watcher = PartWatcher()
        run = common.generate(folder, told, watcher)
        settings = {"size": asked.size, "num_frames": asked.num_frames, "command": common.shown(told)}
        settings |= settings_of(run.output)
        size = run.output.stat().st_size
    results: dict[str, Any] = {
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_mb": common.megabytes(run.peak_rss),
        "file_mb": common.megabytes(size),
        "phases": phases(run),
        **watcher.seen(),
        **last_segment(run, watcher),
    }
    if asked.num_frames == 81 and asked.size in MOST_SECONDS:
        results["met"] = run.seconds < MOST_SECONDS[asked.size] and 0 < run.peak_rss < MOST_BYTES
    record.finish(settings, results)


class PartWatcher:
    """Looks at the part file whenever it grew by a fragment: opens a copy as a player would, decodes every frame.

    It stops after the second fragment (frame 0, then the first segment), so that it hardly disturbs the run.
    """

    def __init__(self) -> None:
        self.first_frame: float | None = None
        self.first_segment: float | None = None
        self.frames = 0
        self._size = 0

    def __call__(self, seconds: float, events: Sequence[common.TimedEvent], part: Path) -> None:
        if self.first_segment is not None or not part.is_file() or part.stat().st_size == self._size:
            return
        data = part.read_bytes()
        frames = playable_frames(data)
        if frames > self.frames:
            self.first_frame = self.first_frame or seconds
            if frames > 1:
                self.first_segment = seconds
            self.frames = frames
        self._size = len(data)

    def seen(self) -> dict[str, Any]:
        return {
            "first_frame_seconds": _rounded(self.first_frame),
            "first_segment_seconds": _rounded(self.first_segment),
            "first_segment_frames": self.frames,
        }


def playable_frames(data: bytes) -> int:
    """Frames that a player gets out of these bytes; 0 if they are no video yet."""
    try:
        with av.open(io.BytesIO(data)) as container:
            return sum(1 for _ in container.decode(video=0)) if container.streams.video else 0
    except av.FFmpegError:
        return 0


def last_segment(run: common.CliRun, watcher: PartWatcher) -> dict[str, Any]:
    """When the last segment began at the earliest, and whether the first was playable before that."""
    done = [timed.at for timed in run.events if timed.is_a("segment", "refine")]
    if len(done) < 2:
        return {}
    playable = watcher.first_segment is not None and watcher.first_segment < done[-2]
    return {"segments": len(done), "last_segment_starts": round(done[-2], 1), "playable_before_last": playable}


def phases(run: common.CliRun) -> dict[str, float]:
    """Seconds by phase. Denoising is the steps; what lies between segments is reference, decoding and encoding.

    The first step of a segment also waits for its reference, so a segment's steps are all taken to last as long as
    its later ones; with one step a segment the two cannot be told apart and are given together.
    """
    times = {name: [t.at for t in run.events if t.is_a(*name)] for name in _MARKS}
    started, text = times["started", "run"][0], times["progress", "text"]
    motion, ends = times["progress", "motion"], times["segment", "refine"]
    steps = [timed for timed in run.events if timed.is_a("progress", "refine")]
    refining = sum(_segment_seconds(steps, number + 1) for number in range(len(ends)))
    rest = run.seconds - motion[-1] - refining
    parts = {
        "imports, checks and loading": started,
        "frame 0": text[0] - started,
        "text": text[-1] - text[0],
        "motion (stage I)": motion[-1] - text[-1],
        "refine (stage II)": refining,
        "reference, decoding and encoding": rest - (run.seconds - ends[-1]),
        "last chunk and finishing the file": run.seconds - ends[-1],
    }
    return {name: round(seconds, 1) for name, seconds in parts.items()}


_MARKS = (("started", "run"), ("progress", "text"), ("progress", "motion"), ("segment", "refine"))


def _segment_seconds(steps: Sequence[common.TimedEvent], number: int) -> float:
    """Denoising time of one segment, its first step taken as long as the mean of the others."""
    at = [timed.at for timed in steps if timed.event["segment"] == number]
    return (at[-1] - at[0]) * len(at) / (len(at) - 1) if len(at) > 1 else 0.0


def settings_of(video: Path) -> dict[str, Any]:
    """What the run used, as the file itself says: dtype, threads, device and steps."""
    with av.open(str(video)) as container:
        told = json.loads(container.metadata.get("comment", "{}")).get("swifti2v", {})
    request = told.get("request", {})
    names = ("num_inference_steps", "num_inference_steps_2")
    return {**told.get("settings", {}), **{name: request.get(name) for name in names}}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


if __name__ == "__main__":
    main()
