"""From a checked order to a finished file, and the way on after a failure.

``start`` makes an ``Order`` (checked by ``order``), ``resume`` continues a job; both through a job directory,
so that a failure at any time leaves either nothing or a job to resume. Prints nothing: events go to ``emit``.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from . import media, presets
from .arrangement import Arrangement
from .checkpoints import sha256
from .core import Chunk, Event, RunError, UsageError
from .journal import Job, Manifest
from .order import Order, check_recorded, location, split_lora
from .origin import Origin, record_of
from .overlap import IN_TURN, Lanes
from .trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

    from .mobile import MobileI2VPipeline
    from .parallel import Ranks
    from .pipeline import SwiftI2VPipeline

    Pipeline = SwiftI2VPipeline | MobileI2VPipeline

Emit = Callable[[Event], None]
Until = Literal["video", "preview", "motion"]
VIDEO_SUFFIXES = (".mp4", ".m4v")
_UNCOMPARED = ("dtype_reason",)  # holds measured speeds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line that says how to go on."""


class Unfinished(RunError):
    """A failure that leaves a job, with a line that says how to go on; its cause is what happened."""


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A pipeline, and what it was ``found`` to be when it was loaded: weights, versions and settings."""

    pipe: Any
    found: dict[str, dict[str, str]]


def load(manifest: Manifest, clock: _Clock, ranks: Ranks | None = None) -> Loaded:
    """What makes the videos of ``manifest``, loaded and named. Raises UsageError or RunError, one line."""
    from .embeddings import Embeddings

    loading = partial(_load, manifest, clock)
    pipe: Any = loading() if ranks is None else ranks.lead(manifest, loading)
    found = pipe.fingerprint()
    if manifest.inputs.cache is not None:
        pipe.embeddings = Embeddings(Path(manifest.inputs.cache), found, partial(clock.say, "notice", "text"))
    for lora, _ in map(split_lora, (*manifest.inputs.loras, *manifest.inputs.loras_2)):
        found["model_hashes"][f"lora/{Path(lora).name}"] = sha256(lora)
    return Loaded(pipe, found)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Who does the work, and how far: ``lanes``, its stages at once or in turn; ``ranks``, the processes that share it,
    of which this is the first (``parallel``); ``load``, who has the pipeline (one that is kept, maybe); ``until``
    motion, Stage I alone, into the job, whose folder is then the result."""

    lanes: Lanes = IN_TURN
    ranks: Ranks | None = None
    load: Loader = load
    until: Until = "video"


def start(order: Order, emit: Emit, execution: Execution = Execution(), *, exact: bool = False) -> Path:
    """Make the video of an order; returns the path of the file (of the preview, if that was asked for).

    ``exact``: refuse a name that is taken instead of numbering it.
    """
    if order.preview:
        execution = dataclasses.replace(execution, until="preview")
    target = media.unique_path(order.wanted)
    if exact and target != order.wanted:
        media.release(target)
        raise UsageError(f"{order.wanted} is taken by another run; choose another output")
    try:
        manifest = order.manifest.model_copy(update={"output": target.name})
        job = Job.create(target.with_name(f"{target.stem}.job"), manifest, order.photo)
    except BaseException:
        media.release(target)
        raise
    clock = _Clock(emit)
    with job, _accountable(job, fresh=True):
        for line in order.notices:
            clock.say("notice", "image", line)
        path = _make(job, job.manifest, clock, execution, before=order.before)
    clock.say("completed", "write", str(path))
    return path


def resume(
    folder: Path, emit: Emit, *, model: str | None = None, force: bool = False, execution: Execution = Execution()
) -> Path:
    """Continue an interrupted job under the settings it began with; ``model``: where its weights are now.

    Raises UsageError, and leaves the job alone, if weights, libraries or settings differ (unless ``force``).
    """
    clock = _Clock(emit)
    with Job.open(folder) as job:
        manifest = job.manifest
        begun = bool(manifest.model_hashes or manifest.versions)
        if model is not None:
            inputs = manifest.inputs.model_copy(update={"model": location(model)})
            manifest = manifest.model_copy(update={"inputs": inputs})
        check_recorded(manifest.request, manifest.write, manifest.inputs)
        _clear_leftovers(job)
        with _accountable(job, fresh=False):
            before = job.manifest if begun else None
            path = _make(job, manifest, clock, execution, before=before, refuse=not force)
    clock.say("completed", "write", str(path))
    return path


def follow(ranks: Ranks) -> None:
    """What every process but the first does: load what that one loads, and compute with it until it is done."""
    silent = _Clock(lambda event: None)
    ranks.follow(lambda manifest: _load(manifest, silent))


def _make(
    job: Job,
    manifest: Manifest,
    clock: _Clock,
    execution: Execution,
    *,
    before: Origin | Manifest | None = None,
    refuse: bool = False,
) -> Path:
    """Load, compare with what was used ``before`` (and ``refuse`` differences), make, publish, remove the job.

    ``manifest`` becomes the job's only once its weights have passed: a refused run changes nothing.
    """
    loaded = execution.load(manifest, clock, execution.ranks)
    pipe, found, until = loaded.pipe, loaded.found, execution.until
    changes = list(differences(before, found)) if before is not None else []
    if changes and refuse:
        raise UsageError(f"this is not what the job began with: {'; '.join(changes)}; use --force to go on regardless")
    for line in changes:
        clock.say("notice", "load", f"not as before: {line}")
    job.replace_manifest(manifest.model_copy(update=found))
    if until == "motion":
        return _motion_alone(pipe, job, clock)
    path = _preview(pipe, job, clock) if until == "preview" else _video(pipe, job, clock, execution.lanes)
    for line in job.notices:
        clock.say("notice", "write", line)
    if until == "preview":
        clock.say("notice", "write", f"to make the video: swifti2v resume {_shown(job.folder)}")
    elif not job.manifest.keep_job:
        job.remove()
    return path


def differences(before: Origin | Manifest, found: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is not as it was: one phrase for each library, setting and weight file."""
    for part in ("versions", "settings", "model_hashes"):
        then: dict[str, str] = getattr(before, part)
        now = found[part]
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name) and name not in _UNCOMPARED:
                short = 12 if part == "model_hashes" else 80
                old, new = (values.get(name, "absent")[:short] for values in (then, now))
                yield f"{name} was {old}, is {new}"


def _load(manifest: Manifest, clock: _Clock) -> Pipeline:
    """The pipeline, under the settings of the manifest. Raises UsageError or RunError, one line."""
    clock.say("progress", "load", manifest.model)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from . import parts, sources
    from .memory import FastPaths

    # Their bars would write over ours.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    settings, inputs, way = manifest.settings, manifest.inputs, arrangement(manifest)
    told = partial(clock.say, "progress", "load")
    load: Any = sources.load if way is None else partial(parts.load, arrangement=way, tell=told)
    try:
        return load(
            presets.get(manifest.request.preset),
            model=inputs.model,
            device=settings.get("device"),
            dtype=settings.get("dtype", "auto"),
            threads=int(settings["threads"]) if "threads" in settings else None,
            **({"vae_device": settings["vae_device"]} if "vae_device" in settings else {}),
            loras=[split_lora(text) for text in inputs.loras],
            loras_2=[split_lora(text) for text in inputs.loras_2],
            fast=FastPaths.from_settings(settings),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"cannot load the model ({manifest.model}): {reason}") from error


def arrangement(manifest: Manifest) -> Arrangement | None:
    """How the job is made to fit, if it is. UsageError for what another version wrote."""
    if manifest.inputs.arrangement is None:
        return None
    try:
        return Arrangement.from_json(manifest.inputs.arrangement)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the job's arrangement cannot be read ({error}); start the clip anew") from None


def _video(pipe: Pipeline, job: Job, clock: _Clock, lanes: Lanes) -> Path:
    manifest, request = job.manifest, job.manifest.request
    target = job.folder.parent / manifest.output
    if os.path.lexists(target):
        target = media.unique_path(target)
    low = _motion_pixels(pipe, manifest)
    way = arrangement(manifest)
    lanes = lanes if way is None or way.overlap else dataclasses.replace(lanes, overlap=False)
    stream = pipe.stream(job.photo(), request, job=job, motion=low, emit=clock.forward, lanes=lanes)
    frames = _frames(stream, lanes.trace)
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        media.write_png_sequence(target, frames)
        return target
    encoding = media.Encoding(manifest.write.codec, manifest.write.bit_depth, manifest.write.crf)
    tags = {"comment": record_of(manifest)} if manifest.write.metadata else {}
    media.write_video(
        target, frames, fps=request.fps, codec=encoding, metadata=tags, expected_frames=request.num_frames
    )
    return target


def _frames(chunks: Iterator[Chunk], trace: Trace | None) -> Iterator[Tensor]:
    """The pixels alone; a chunk is let go before the next is made. What happens to it in between is its writing."""
    for chunk in chunks:
        with nullcontext() if trace is None else trace.span(f"write {chunk.segment}", lane="write"):
            yield chunk.frames
        del chunk


def _preview(pipe: Any, job: Job, clock: _Clock) -> Path:
    target = job.folder.parent / job.manifest.output
    media.release(target)
    small = media.unique_path(target.with_name(f"{target.stem}_preview.mp4"))
    if pipe.preset.stages == 1:
        raise UsageError(f"{pipe.preset.name} has one stage; there is nothing to preview")
    frames = pipe.motion(job.photo(), job.manifest.request, job=job, emit=clock.forward)
    try:
        media.write_video(small, frames, fps=job.manifest.request.fps)
    except BaseException:
        media.part_path(small).unlink(missing_ok=True)
        raise
    return small


def _motion_alone(pipe: Any, job: Job, clock: _Clock) -> Path:
    """Stage I into the job and nothing else: all its windows are kept before the first pixels are decoded."""
    if pipe.preset.stages == 2 and job.manifest.inputs.motion is None:
        low = pipe.motion(job.photo(), job.manifest.request, job=job, emit=clock.forward)
        with closing(low) as frames:
            next(frames, None)
    return job.folder


def _motion_pixels(pipe: Pipeline, manifest: Manifest) -> Iterator[Tensor] | None:
    path, request = manifest.inputs.motion, manifest.request
    if path is None:
        return None
    frames = media.read_video(path, pipe.preset.grid.motion_size(request.size))
    return islice(frames, request.num_frames)


@contextmanager
def _accountable(job: Job, *, fresh: bool) -> Iterator[None]:
    """After a failure of a ``fresh`` job with nothing in it nothing is left; else the error says how to go on."""
    try:
        yield
    except BaseException as error:
        if fresh and job.is_empty:
            _discard(job)
            raise
        hint = f"resume with: swifti2v resume {_shown(job.folder)}"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {hint}") from error
        if isinstance(error, (OSError, MemoryError, RuntimeError)):
            raise Unfinished(f"{str(error) or type(error).__name__}; {hint}") from error
        raise


def _discard(job: Job) -> None:
    part = media.part_path(job.folder.parent / job.manifest.output)
    job.remove()
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _clear_leftovers(job: Job) -> None:
    """A folder of pictures that a killed run had begun is begun again; it is ours, since the job is."""
    part = media.part_path(job.folder.parent / job.manifest.output)
    if part.is_dir():
        shutil.rmtree(part)


class _Clock:
    """Passes events on with the seconds since the whole run began; the pipeline's own end is not the run's.

    One event at a time, whatever thread it comes from.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit, self._begin, self._one_at_a_time = emit, time.monotonic(), threading.Lock()

    def forward(self, event: Event) -> None:
        if event.type != "completed":
            self._pass(event)

    def say(self, type: Any, phase: str, message: str) -> None:
        self._pass(Event(type, phase, message=message))

    def _pass(self, event: Event) -> None:
        with self._one_at_a_time:
            self._emit(dataclasses.replace(event, seconds=round(time.monotonic() - self._begin, 3)))


def _shown(path: Path) -> str:
    """A path as it can be pasted from here."""
    return shlex.quote(os.path.relpath(path))
