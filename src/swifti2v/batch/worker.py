"""What a worker does with a task, whoever runs it: load once, make or continue one clip, say how it ended.

It knows nothing of queues, of other workers, or of how its words travel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import media, mobile, pipeline, presets, produce  # noqa: F401  # a worker that is ready has all it needs
from ..core import Event, Request, RunError, UsageError
from ..journal import KINDS, LOCK, MANIFEST, PHOTO, Job, Manifest, lock_folder
from ..memory import FastPaths, choose_placement, place, release_cached
from ..order import prepare
from ..origin import origin_of
from ..produce import VIDEO_SUFFIXES, Loaded
from .words import Clip, Outcome, Place, Task

Emit = Callable[[Event], None]
WAIT_SECONDS = 30.0  # for the lock of a worker that is dying


def settle(where: Place) -> None:
    """Make this process a worker of that place. CUDA workers all call their own GPU "cuda", so that any may resume."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if where.device is not None and where.device.startswith("cuda:"):
        torch.cuda.set_device(where.device)


class Keeper:
    """The pipeline of the last task, kept for the next one: weights load once for many clips.

    A worker of one stage keeps the other's transformer without its numbers.
    """

    def __init__(self, where: Place) -> None:
        self._where = where
        self._key: object = None
        self._fast: set[FastPaths] = set()
        self._kept: Loaded | None = None

    def __call__(self, manifest: Manifest, clock: Any, ranks: object = None) -> Loaded:
        """What ``produce.load`` would return, loaded now or before. What is arranged to fit is loaded every time."""
        settings, inputs = manifest.settings, manifest.inputs
        threads = int(settings["threads"]) if "threads" in settings else None
        placement = choose_placement(settings.get("device"), settings.get("dtype", "auto"), threads)
        weights = (manifest.request.preset, inputs.model, inputs.loras, inputs.loras_2, inputs.cache)
        key = (weights, str(placement.device), placement.dtype, placement.threads)
        fast = FastPaths.from_settings(settings)
        if self._kept is None or key != self._key or fast not in self._fast or inputs.arrangement is not None:
            self._kept = self._key = None  # let go before the next is loaded
            self._kept = produce.load(manifest, clock)
            if inputs.arrangement is None:
                self._lighten(self._kept)
                self._key = key
            # A new job says "auto" where a begun one says what that was.
            self._fast = {fast, FastPaths.from_settings(self._kept.found["settings"])}
        return self._kept

    def make_room(self) -> None:
        """Let go of what was arranged to fit, before what is free is asked for anew."""
        if self._kept is not None and self._key is None:
            device = self._kept.pipe.placement.device
            self._kept = None
            release_cached(device)

    def _lighten(self, loaded: Loaded) -> None:
        spare = {"motion": "transformer_2", "rest": "transformer"}.get(self._where.stage)
        if spare is not None and loaded.pipe.preset.stages == 2:
            place(getattr(loaded.pipe, spare), torch.device("meta"))


def work(task: Task, where: Place, keeper: Keeper, emit: Emit) -> Outcome:
    """Do a task; a failure that this process survives is an outcome too."""
    try:
        return _made(task, where, keeper, emit)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, produce.Unfinished) else error
        message = str(error) or type(error).__name__
        return Outcome("failed", message=message, final=isinstance(cause, (UsageError, RunError, ValueError)))


def _made(task: Task, where: Place, keeper: Keeper, emit: Emit) -> Outcome:
    clip = task.clip
    if task.ours:
        _wait_for_lock(clip.folder)
        if os.path.lexists(clip.target):
            return _adopted(clip)
        if not (clip.folder / MANIFEST).is_file():
            _sweep(clip)
    begun = (clip.folder / MANIFEST).is_file()
    if task.stage == "rest" and clip.staged and not (begun and _has_motion(clip)):
        return Outcome("unready", message="the journal lacks windows of Stage I")
    keeper.make_room()
    execution = produce.Execution(load=keeper, until="motion" if task.stage == "motion" else "video")
    if begun:
        path = produce.resume(clip.folder, emit, model=clip.options.model, execution=execution)
    else:
        path = _started(clip, where, emit, execution)
    return Outcome("motion" if task.stage == "motion" else "made", path=str(path))


def _started(clip: Clip, where: Place, emit: Emit, execution: produce.Execution) -> Path:
    device = "cuda" if where.device is not None and where.device.startswith("cuda") else where.device
    options = dataclasses.replace(clip.options, device=device, threads=where.threads)
    order = dataclasses.replace(prepare(options), wanted=clip.target)
    if not _alike(order.manifest.request, clip.request):
        raise UsageError(
            f"line {clip.line}: a file that it names has changed since it was checked; run the batch again"
        )
    return produce.start(order, emit, execution, exact=True)


def _alike(one: Request, other: Request) -> bool:
    """The same clip. When the reference is encoded may depend on a worker's memory, and changes nothing."""
    return one == other.model_copy(update={"encode": one.encode})


def _has_motion(clip: Clip) -> bool:
    """Whether all of Stage I can be read back from the journal."""
    blocks = presets.get(clip.request.preset).grid.blocks(clip.request.num_frames)
    with Job.open(clip.folder) as job:
        return sum(window.shape[2] for window in job.stream("motion")) >= blocks


def _wait_for_lock(folder: Path) -> None:
    """A worker given up for lost may take a moment to die; its lock ends with it."""
    end = time.monotonic() + WAIT_SECONDS
    while folder.is_dir():
        try:
            os.close(lock_folder(folder))
            return
        except UsageError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _adopted(clip: Clip) -> Outcome:
    """The video is there: its worker died between publishing it and saying so. Nothing but the remains is removed."""
    if not _is_this(clip):
        raise UsageError(
            f"{clip.target} exists and is not what line {clip.line} makes; remove it or choose another name"
        )
    whole = (clip.folder / MANIFEST).is_file()
    if whole and not clip.options.keep_job:
        with Job.open(clip.folder) as job:
            job.remove()
    _sweep(clip, keep=whole)
    return Outcome("made", path=str(clip.target))


def _is_this(clip: Clip) -> bool:
    """Whether the target is the clip: by its own record or, where it has none, by its length."""
    if clip.target.suffix.lower() not in VIDEO_SUFFIXES:
        return sum(1 for _ in clip.target.glob("*.png")) == clip.request.num_frames
    if clip.options.no_metadata:
        return media.probe(clip.target).frames == clip.request.num_frames
    return _alike(origin_of(clip.target).request, clip.request)


def _sweep(clip: Clip, *, keep: bool = False) -> None:
    """Remove what a dead worker left of ``clip``: a reservation, parts and, unless ``keep``, what was a job folder."""
    part = media.part_path(clip.target)
    if part.is_dir():
        shutil.rmtree(part)
    for path in (part, part.with_name(f"{part.stem}.remux{part.suffix}")):
        path.unlink(missing_ok=True)
    if keep:
        return
    for kind in KINDS:
        shutil.rmtree(clip.folder / kind, ignore_errors=True)
    for name in (PHOTO, LOCK, f".{MANIFEST}.tmp", f".{PHOTO}.tmp"):
        (clip.folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # absent, or holding what is not ours
        clip.folder.rmdir()
