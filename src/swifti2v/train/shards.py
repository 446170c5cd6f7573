"""Latents made once and kept: tar shards in webdataset's convention, read back by number.

A sample is ``KEY.safetensors`` (clean, reference, and transition and text where there are any) and ``KEY.json`` (what
it is of). Shards are written one by one under temporary names, with fixed tar headers; beside each lies an index of
where its samples are. So a job killed at any time goes on where it was, and ends with the same bytes.

Written with ``tarfile``, not with the webdataset library: reading a sample by number needs its offset in the file,
which the library neither gives nor uses (its readers only stream). Any webdataset reader reads these shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..camera import Motion
from ..core import RunError, UsageError
from .data import Clip
from .files import write_json, written
from .manifest import Report, Skip
from .source import seeded

PLAN, REPORT = "plan.json", "report.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TENSORS = ("clean", "reference", "transition", "text", "image")


@dataclass(frozen=True)
class Plan:
    """What a folder of shards holds: ``count`` samples asked for, ``per_shard`` of them in each, latents stored as
    ``dtype``. ``settings``: everything else that decides the bytes, in words (weights, sizes, seed): a job that goes on
    in the folder must say the same."""

    count: int
    per_shard: int = 64
    dtype: str = "float16"
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.per_shard < 1:
            raise UsageError(f"{self.count} samples, {self.per_shard} a shard: both are 1 or more")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def shards(self) -> int:
        return -(-self.count // self.per_shard)

    def numbers(self, shard: int) -> range:
        """The samples of ``shard``."""
        return range(shard * self.per_shard, min(self.count, (shard + 1) * self.per_shard))


@dataclass(frozen=True)
class Place:
    """Where a sample lies: file of latents at ``offset``, ``size`` bytes with ``sha256``; ``meta`` is its JSON."""

    key: str
    shard: str
    offset: int
    size: int
    sha256: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Worker:
    """Worker ``number`` of ``count`` makes every ``count``-th shard, from its own number on."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise UsageError(f"worker {self.number} of {self.count}: workers are numbered from 0 to {self.count - 1}")


def write_shards(
    folder: Path,
    plan: Plan,
    make: Callable[[int], Clip],
    *,
    worker: Worker | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> Report:
    """Make this worker's shards that are not there yet; ``make(number)`` gives the clip of a sample.

    A sample whose making raises UsageError (a damaged file) is skipped and reported. ``on_shard(done, of)`` after each.
    Returns the report over all shards that exist by then, and writes it to ``report.json``. UsageError if the folder
    holds something else; RunError if the disk is full.
    """
    _claim(folder, plan)
    worker = worker or Worker()
    mine = range(worker.number, plan.shards, worker.count)
    for done, shard in enumerate(mine, start=1):
        if not _is_whole(folder, shard):
            _write_shard(folder, shard, plan, make)
        if on_shard is not None:
            on_shard(done, len(mine))
    report = report_of(folder)
    report.write(folder / REPORT)
    return report


def _claim(folder: Path, plan: Plan) -> None:
    """The folder is new, or of the same plan."""
    given = json.loads(json.dumps({**plan.__dict__, "settings": dict(plan.settings or {})}))
    path = folder / PLAN
    if not path.exists():
        if folder.exists() and any(not name.name.startswith(".") for name in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no {PLAN}; choose a new folder")
        write_json(path, given)
        return
    held = json.loads(path.read_bytes())
    differing = sorted(
        f"{key} {_at(held, key)!r}, now {_at(given, key)!r}"
        for key in {*held, *given, *held["settings"], *given["settings"]} - {"settings"}
        if _at(held, key) != _at(given, key)
    )
    if differing:
        raise UsageError(f"{folder} was begun with {'; '.join(differing)}; choose a new folder")


def _at(plan: Mapping[str, Any], key: str) -> Any:
    return plan[key] if key in plan else plan["settings"].get(key)


def _names(shard: int) -> tuple[str, str]:
    return f"shard-{shard:05d}.tar", f"shard-{shard:05d}.json"


def _is_whole(folder: Path, shard: int) -> bool:
    """The index is written last: with it the shard is whole."""
    tar, index = (folder / name for name in _names(shard))
    return tar.exists() and index.exists()


def _write_shard(folder: Path, shard: int, plan: Plan, make: Callable[[int], Clip]) -> None:
    tar_name, index_name = _names(shard)
    for left in folder.glob(f".{tar_name}.*.tmp"):  # of a process that was killed while writing this shard
        left.unlink()
    held: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with written(folder / tar_name) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in plan.numbers(shard):
            try:
                clip = make(number)
            except UsageError as error:
                skipped.append({"path": f"sample {number}", "reason": str(error)})
                continue
            data, meta = packed(clip, DTYPES[plan.dtype])
            key = f"{number:08d}"
            offset = _add(tar, file, f"{key}.safetensors", data)
            _add(tar, file, f"{key}.json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode())
            digest = hashlib.sha256(data).hexdigest()
            held.append({"key": key, "offset": offset, "size": len(data), "sha256": digest, "meta": meta})
    write_json(folder / index_name, {"samples": held, "skipped": skipped})


def _add(tar: tarfile.TarFile, file: IO[bytes], name: str, data: bytes) -> int:
    """Append one member without a trace of who wrote it when; returns where its data begins."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    tar.addfile(info, io.BytesIO(data))
    return file.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def packed(clip: Clip, dtype: torch.dtype) -> tuple[bytes, dict[str, Any]]:
    """A clip as the two files of a sample. RunError if a latent is not finite at ``dtype``."""
    given = {name: getattr(clip, name) for name in TENSORS}
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in given.items() if value is not None}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise RunError(f"{clip.name}: {name} is not finite as {dtype}; use bfloat16, or look at the VAE")
    meta: dict[str, Any] = {
        "name": clip.name,
        "prompt": clip.prompt,
        "kind": clip.kind,
        "shape": list(clip.clean.shape),
    }
    if clip.motion is not None:
        meta["motion"] = list(clip.motion.__dict__.values())
    if clip.motion_score is not None:
        meta["motion_score"] = clip.motion_score
    return to_safetensors(tensors), meta


def unpacked(data: bytes, meta: Mapping[str, Any]) -> Clip:
    """The inverse of ``packed``, latents as float32."""
    tensors = from_safetensors(data)
    values: dict[str, Tensor | None] = {
        name: tensors[name].float() if name in tensors else None for name in ("transition", "text", "image")
    }
    motion = Motion(*meta["motion"]) if "motion" in meta else None
    latents = (tensors["clean"].float(), tensors["reference"].float(), values["transition"])
    words = (meta["prompt"], meta["name"], meta["kind"])
    image, score = values["image"], meta.get("motion_score")
    return Clip(*latents, values["text"], *words, motion=motion, image=image, motion_score=score)


def report_of(folder: Path) -> Report:
    """Over the shards that are there."""
    count, skipped = 0, []
    for _, index in _indices(folder):
        count += len(index["samples"])
        skipped += [Skip(skip["path"], skip["reason"]) for skip in index["skipped"]]
    return Report(count, tuple(skipped))


def places(folder: Path) -> list[Place]:
    """Every sample in order. UsageError unless all shards of the plan are there."""
    if not (folder / PLAN).exists():
        raise UsageError(f"{folder} holds no shards (no {PLAN}); make them with scripts/prepare_data.py")
    held = json.loads((folder / PLAN).read_bytes())
    plan = Plan(**held)
    missing = [shard for shard in range(plan.shards) if not _is_whole(folder, shard)]
    if missing:
        raise UsageError(f"{folder}: {len(missing)} of {plan.shards} shards are not made yet; run the same job again")
    found = [Place(shard=tar, **sample) for tar, index in _indices(folder) for sample in index["samples"]]
    if not found:
        raise UsageError(f"{folder}: every sample was skipped; {REPORT} says why")
    return found


def _indices(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the shard, its index)."""
    for path in sorted(folder.glob("shard-*.json")):
        if path.with_suffix(".tar").exists():
            yield path.with_suffix(".tar").name, json.loads(path.read_bytes())


def read_clip(folder: Path, place: Place) -> Clip:
    """One sample. RunError if its bytes are not those that were written."""
    with open(folder / place.shard, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.size)
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise RunError(f"{folder / place.shard}: sample {place.key} is damaged; delete that shard and make it again")
    return unpacked(data, place.meta)


class ShardSource:
    """Clips of a folder of shards, each once an epoch, in an order that depends on ``seed`` and the epoch alone.

    ``batch`` above 1: every run of ``batch`` indices from a multiple of it holds clips of one shape, so that they can
    be stacked; the clips of a shape that fill no batch wait for another epoch, when others do. ``shape``: only clips
    whose latents have it. Pure: ``at(index)`` is the same clip in any process.
    """

    def __init__(
        self, folder: Path | str, seed: int = 0, *, batch: int = 1, shape: Sequence[int] | None = None
    ) -> None:
        self.folder, self.seed, self.batch = Path(folder), seed, batch
        held = places(self.folder)
        self.places = [place for place in held if shape is None or tuple(place.meta["shape"]) == tuple(shape)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, place in enumerate(self.places):
            groups.setdefault(tuple(place.meta["shape"]) if batch > 1 else (), []).append(number)
        self._groups = tuple(tuple(group) for _, group in sorted(groups.items()) if len(group) >= batch)
        if batch < 1 or not self._groups:
            raise UsageError(f"{folder}: no shape has {batch} clips for a batch; use a smaller one of 1 or more")
        self.epoch = sum(len(group) // batch * batch for group in self._groups)

    def __len__(self) -> int:
        """Items an epoch."""
        return self.epoch

    def at(self, index: int) -> Clip:
        epoch, place = divmod(index, self.epoch)
        return read_clip(self.folder, self.places[_order(self.seed, epoch, self._groups, self.batch)[place]])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, groups: tuple[tuple[int, ...], ...], batch: int) -> tuple[int, ...]:
    generator = seeded(seed, epoch, "shards")
    batches: list[tuple[int, ...]] = []
    for group in groups:
        order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        batches += [tuple(order[i : i + batch]) for i in range(0, len(order) - batch + 1, batch)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return tuple(number for i in shuffled for number in batches[i])
