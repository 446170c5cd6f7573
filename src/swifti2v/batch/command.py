"""``swifti2v batch``: from a jobs file to all its videos. Prints nothing: events go to ``emit``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core import UsageError
from ..options import BatchOptions
from .engine_local import LocalEngine
from .planning import Batch, plan_batch
from .scheduler import Tally, schedule
from .state import State
from .words import Capacity, Emit, Engine, LineEvent, Place

ENGINES = ("local", "ray")


def check(asked: BatchOptions) -> None:
    """UsageError for what cannot be meant."""
    if asked.engine not in ENGINES:
        raise UsageError(f"engine {asked.engine!r} is not known; use {' or '.join(ENGINES)}")
    if asked.engine == "local" and asked.address is not None:
        raise UsageError("--address is that of a Ray cluster; use it with --engine ray")
    if asked.engine == "ray" and asked.devices is not None:
        raise UsageError("--devices is for --engine local; Ray gives each worker its own device")
    if asked.workers is not None and not 1 <= asked.workers <= 1024:
        raise UsageError(f"workers {asked.workers} is not between 1 and 1024")
    if asked.workers is not None and asked.stage_workers is not None:
        raise UsageError("--workers and --stage-workers both say how many; give one of them")
    if not 1 <= asked.attempts <= 1000:
        raise UsageError(f"attempts {asked.attempts} is not between 1 and 1000")
    stages_of(asked)


def stages_of(asked: BatchOptions) -> tuple[int, int] | None:
    """How many workers make Stage I and how many the rest; None: all make whole clips."""
    if asked.stage_workers is None:
        return None
    first, comma, second = asked.stage_workers.partition(",")
    counts = [int(text) if text.strip().isdecimal() and len(text) < 5 else 0 for text in (first, second)]
    if not comma or min(counts) < 1:
        raise UsageError(f"stage workers {asked.stage_workers!r} are not two numbers from 1 on, e.g. 1,3")
    return counts[0], counts[1]


def run(asked: BatchOptions, emit: Emit) -> Tally:
    """Make every clip of the jobs file that is not there; what has been made before counts as made.

    Raises UsageError before any worker starts.
    """
    check(asked)
    file = Path(asked.jobs).expanduser()
    if not file.is_file():
        raise UsageError(f"jobs file {asked.jobs!r} does not exist")
    with State(file) as state:
        batch = plan_batch(file, state, asked.model)
        for line in batch.notices:
            emit(LineEvent("notice", "run", message=line))
        if not batch.clips:
            return Tally(batch.there, {})
        with _engine(asked) as engine:
            places = _needed(places_of(asked, engine.capacity()), batch)
            try:
                tally = schedule(batch.clips, places, engine, state, emit, asked.attempts)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted; run the same command again to go on") from None
    return Tally(tuple(sorted((*batch.there, *tally.made))), tally.failed)


@contextmanager
def _engine(asked: BatchOptions) -> Iterator[Engine]:
    if asked.engine == "ray":
        from .engine_ray import RayEngine

        engine: Engine = RayEngine(asked.address)
    else:
        engine = LocalEngine()
    try:
        yield engine
    finally:
        engine.close()


def places_of(asked: BatchOptions, there: Capacity) -> list[Place]:
    """Where workers are to be. CPU threads are shared out evenly: a clip's bits depend on how many it had."""
    stages = stages_of(asked)
    wanted = sum(stages) if stages is not None else asked.workers
    devices = _devices(asked, there)
    if devices is None:
        count = wanted or 1
        if count > there.cpus and asked.engine == "ray":
            raise UsageError(f"{count} workers are more than the {there.cpus} CPUs that Ray has; ask for {there.cpus}")
        devices = ["cpu"] * count
    count = wanted or len(devices)
    if count > len(devices):
        raise UsageError(f"{count} workers are more than the {len(devices)} devices; ask for {len(devices)}")
    first = stages[0] if stages is not None else 0
    threads = max(1, min(there.cpus // count, there.cpus_each))
    kinds = ["whole" if stages is None else "motion" if number < first else "rest" for number in range(count)]
    return [
        Place(number, kind, device, threads)  # type: ignore[arg-type]
        for number, (kind, device) in enumerate(zip(kinds, devices, strict=False))
    ]


def _devices(asked: BatchOptions, there: Capacity) -> list[str] | None:
    """One for each worker; None: the CPU for all."""
    if asked.devices is None:
        number = range(there.gpus)
        return [f"cuda:{index}" if asked.engine == "local" else "cuda" for index in number] or None
    from ..memory import choose_placement

    names = [name.strip() for name in asked.devices.split(",")]
    for name in names:
        choose_placement(name, "float32")
    return None if names == ["cpu"] else names


def _needed(places: list[Place], batch: Batch) -> list[Place]:
    """No more workers of a kind than clips."""
    kept: dict[str, int] = {}
    found = []
    for place in places:
        kept[place.stage] = kept.get(place.stage, 0) + 1
        if kept[place.stage] <= len(batch.clips):
            found.append(place)
    return found
