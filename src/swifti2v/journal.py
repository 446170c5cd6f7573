"""The job directory: everything needed to continue an interrupted clip, and nothing that can be recomputed cheaply.

``NAME.job/`` holds ``manifest.json`` (what is being made, by which weights, how), ``photo.safetensors``
(the fitted photo, exactly), ``motion/NNNN.safetensors`` (Stage I windows), ``segments/NNNN.safetensors`` (finished
Stage II segments) and ``lock``. Every file appears whole, under its name, or not at all; the manifest
is written last at birth and deleted first at death, so a folder with a manifest is always a whole job.

Only latents are durable. This module knows files and locks; it does not know what latents mean, how
windows are cut, or how to compare the settings of two runs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .core import Request, RunError, UsageError

SCHEMA_VERSION = 1
MANIFEST, PHOTO, LOCK = "manifest.json", "photo.safetensors", "lock"
Kind = Literal["motion", "segments"]
KINDS: tuple[Kind, Kind] = ("motion", "segments")
_STORED = re.compile(r"\d{4,}\.safetensors")
_TEMPORARY = re.compile(r"\..+\.tmp")


class WriteOptions(BaseModel):
    """How the finished video is written: the arguments of ``media.write_video`` that are not the picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codec: str = "h264"
    bit_depth: int = 8
    crf: int | None = None
    metadata: bool = True


class Inputs(BaseModel):
    """Where the run's files came from, for ``resume`` on this machine only: never written into a video."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    photo_name: str = ""
    model: str | None = None
    loras: tuple[str, ...] = ()
    loras_2: tuple[str, ...] = ()
    motion: str | None = None
    cache: str | None = None
    arrangement: str | None = None


class Manifest(BaseModel):
    """What a job makes, from what and how.

    ``model``: the preset's name and where its weights come from, in words. ``output``: the name of the
    video, relative to the folder that holds the job. ``model_hashes``: SHA-256 by file, ``versions`` by
    library, ``settings``: dtype, device, threads, fast paths. The last three are empty until the
    weights are loaded: a job without them holds no latents yet. ``photo_sha256``: of the
    stored fitted photo (``request.image_sha256`` is the user's own file).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
    request: Request
    model: str = ""
    model_hashes: dict[str, str] = {}
    versions: dict[str, str] = {}
    settings: dict[str, str] = {}
    inputs: Inputs = Inputs()
    output: str
    write: WriteOptions = WriteOptions()
    keep_job: bool = False
    photo_sha256: str = ""

    @property
    def request_sha256(self) -> str:
        """Names the clip: stored in every latent file, so that files of two jobs cannot be mixed up."""
        return hashlib.sha256(self.request.model_dump_json().encode()).hexdigest()


class Job:
    """An open job directory, locked against every other process until ``close``; a context manager.

    ``manifest`` is what is on disk; ``notices`` collects one line for every stored file that could not
    be used. The lock is the kernel's (flock), so it ends with the process however that dies.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: int) -> None:
        """Use ``Job.create`` or ``Job.open``; ``lock`` is the descriptor of the locked file."""
        self.folder = folder
        self.manifest = manifest
        self.notices: list[str] = []
        self._lock: int | None = lock

    @classmethod
    def create(cls, folder: Path | str, manifest: Manifest, photo: Tensor) -> Job:
        """A new job in ``folder``, which must be absent, empty, or hold a job that never came to life.

        ``photo``: the fitted photo (1, 3, 1, H, W), as the model is to see it.
        Raises UsageError if something is there or the folder cannot be written, RunError if the disk is full.
        """
        folder, data = Path(folder), to_safetensors({"photo": photo.detach().cpu().contiguous()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not _claimable(folder):
                raise UsageError(f"job folder {folder.name} exists; resume it, remove it, or choose another --output")
            lock = lock_folder(folder)
        except OSError as error:
            raise UsageError(f"cannot make the job folder {folder}: {error.strerror}") from None
        manifest = manifest.model_copy(update={"photo_sha256": hashlib.sha256(data).hexdigest()})
        job = cls(folder, manifest, lock)
        try:
            job._clear()
            for kind in KINDS:
                (folder / kind).mkdir(exist_ok=True)
            _write(folder / PHOTO, data)
            _write(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        except BaseException:
            job.remove()
            raise
        return job

    @classmethod
    def open(cls, folder: Path | str) -> Job:
        """Open and lock an existing job, cleaning up what a killed process left.

        Raises UsageError if it is missing, not a job, of a newer version, damaged, or in use.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"job {str(folder)!r} does not exist; jobs are folders named NAME.job")
        if not (folder / MANIFEST).is_file():
            raise UsageError(f"{str(folder)!r} is not a job: it has no {MANIFEST}")
        try:
            lock = lock_folder(folder)
        except OSError as error:
            raise UsageError(f"cannot lock the job {folder}: {error.strerror}") from None
        try:
            manifest = _read_manifest(folder)
            job = cls(folder, manifest, lock)
            job._check_photo()
            job._sweep()
            for kind in KINDS:
                (folder / kind).mkdir(exist_ok=True)
                job._refuse_foreign(kind)
        except BaseException:
            os.close(lock)
            raise
        return job

    def photo(self) -> Tensor:
        """The fitted photo (1, 3, 1, H, W), exactly as it was given."""
        return from_safetensors((self.folder / PHOTO).read_bytes())["photo"]

    @property
    def is_empty(self) -> bool:
        """Whether no latents are stored: nothing would be lost with this job."""
        return not any(_stored(self.folder / kind) for kind in KINDS)

    def replace_manifest(self, manifest: Manifest) -> None:
        """Put ``manifest`` in the old one's place (once weights are loaded and can be named). Same request only."""
        if manifest.request != self.manifest.request:
            raise ValueError("a job's request cannot change")
        manifest = manifest.model_copy(update={"photo_sha256": self.manifest.photo_sha256})
        _write(self.folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        self.manifest = manifest

    def motion(self) -> list[Tensor]:
        """Finished Stage I windows (b, c, t, h, w), in order, up to the first that is missing."""
        return list(self.stream("motion"))

    def segments(self) -> list[Tensor]:
        """Finished Stage II segments (b, c, t, h, w), in order, up to the first that is missing."""
        return list(self.stream("segments"))

    def stream(self, kind: Kind) -> Iterator[Tensor]:
        """``motion`` or ``segments``, read one by one: memory does not grow with the clip.

        A damaged file ends the stream and is reported in ``notices``; it will be made again.
        """
        following: int | None = None
        number = 0
        while (path := self._path(kind, number)).is_file():
            item = self._read(path, number, following)
            if item is None:
                return
            following = item.blocks[-1] + 1
            yield item.latents
            number += 1

    def save_motion(self, number: int, latents: Tensor, blocks: Sequence[int]) -> None:
        """Store Stage I window ``number`` (from 0): the latents (b, c, t, h, w) of its new ``blocks`` (t of them)."""
        self._save("motion", number, latents, blocks)

    def save_segment(self, number: int, latents: Tensor, blocks: Sequence[int]) -> None:
        """Store Stage II segment ``number`` (from 0): the latents (b, c, t, h, w) of its ``blocks`` (t of them)."""
        self._save("segments", number, latents, blocks)

    def close(self) -> None:
        """Give the lock back; the job stays on disk."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the job and close it. Files that are not ours stay, with their folder."""
        self._clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        self.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, kind: Kind, number: int) -> Path:
        return self.folder / kind / f"{number:04d}.safetensors"

    def _save(self, kind: Kind, number: int, latents: Tensor, blocks: Sequence[int]) -> None:
        if self._lock is None:
            raise ValueError(f"job {self.folder.name} is closed")
        if latents.ndim != 5 or latents.shape[2] != len(blocks):
            raise ValueError(f"latents {tuple(latents.shape)} are not (b, c, t, h, w) of {len(blocks)} blocks")
        if list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
            raise ValueError(f"blocks {list(blocks)} are not consecutive")
        if number < 0 or (number > 0 and not self._path(kind, number - 1).is_file()):
            raise ValueError(f"{kind} {number} cannot be stored before {number - 1}; numbers count from 0")
        tensor = latents.detach().cpu().contiguous()
        metadata = {
            "number": str(number),
            "blocks": ",".join(map(str, blocks)),
            "request_sha256": self.manifest.request_sha256,
            "latents_sha256": _digest(tensor),
        }
        _write(self._path(kind, number), to_safetensors({"latents": tensor}, metadata))

    def _read(self, path: Path, number: int, following: int | None) -> _Stored | None:
        """A stored file, or None (and a notice) unless it is exactly what was written at this place."""
        name = f"{path.parent.name}/{path.name}"
        try:
            item = _Stored.read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self.notices.append(f"{name} is damaged and will be made again ({error})")
            return None
        if item.number != number or (following is not None and item.blocks[0] != following):
            self.notices.append(f"{name} is out of place and will be made again")
            return None
        return item

    def _refuse_foreign(self, kind: Kind) -> None:
        """UsageError if a stored file belongs to another request. Reads headers only; damage shows when read."""
        for path in _stored(self.folder / kind):
            try:
                with safe_open(path, framework="pt") as file:
                    request = (file.metadata() or {}).get("request_sha256")
            except (SafetensorError, OSError):
                continue
            if request is not None and request != self.manifest.request_sha256:
                raise UsageError(
                    f"{kind}/{path.name} in {self.folder.name} belongs to another request; remove that file"
                )

    def _check_photo(self) -> None:
        try:
            digest = hashlib.sha256((self.folder / PHOTO).read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"job {self.folder.name} has lost its {PHOTO}: {error.strerror}") from None
        if digest != self.manifest.photo_sha256:
            raise UsageError(f"job {self.folder.name} is damaged: {PHOTO} is not the photo it was made with")

    def _sweep(self) -> None:
        """Delete temporary files of a process that was killed while writing."""
        for folder in (self.folder, *(self.folder / kind for kind in KINDS)):
            if folder.is_dir():
                for path in folder.iterdir():
                    if _TEMPORARY.fullmatch(path.name):
                        path.unlink()

    def _clear(self) -> None:
        """Delete all of ours but the lock, the manifest first: from then on this is no job."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self._sweep()
        (self.folder / PHOTO).unlink(missing_ok=True)
        for kind in KINDS:
            for path in _stored(self.folder / kind):
                path.unlink()
            if (self.folder / kind).is_dir() and not any((self.folder / kind).iterdir()):
                (self.folder / kind).rmdir()


@dataclass(frozen=True)
class _Stored:
    """One latent file: its place in the clip and its latents, whose hash has been checked."""

    number: int
    blocks: list[int]
    latents: Tensor

    @classmethod
    def read(cls, path: Path) -> _Stored:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A clone: the tensor must not stay tied to a file that may be replaced or removed.
            latents = file.get_tensor("latents").clone()
        blocks = [int(block) for block in metadata["blocks"].split(",")]
        if _digest(latents) != metadata["latents_sha256"]:
            raise ValueError("its contents do not match their checksum")
        if latents.ndim != 5 or latents.shape[2] != len(blocks):
            raise ValueError("its shape does not match its blocks")
        return cls(int(metadata["number"]), blocks, latents)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


def _stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _STORED.fullmatch(path.name)) if folder.is_dir() else []


def _claimable(folder: Path) -> bool:
    """Empty, or the remains of a job that was killed while being created or removed (a lock and no manifest)."""
    names = {path.name for path in folder.iterdir()}
    ours = {name for name in names if name in (LOCK, PHOTO, *KINDS) or _TEMPORARY.fullmatch(name)}
    return not names or (LOCK in names and names == ours)


def lock_folder(folder: Path, it: str = "job") -> int:
    """The descriptor of the folder's lock file, locked until closed. UsageError if a living process holds ``it``."""
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A job removed between our open and our lock leaves us holding a file that no name leads to.
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise BlockingIOError
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise UsageError(f"{it} {folder.name} is in use by another swifti2v process; wait for it or stop it") from None
    return descriptor


def _read_manifest(folder: Path) -> Manifest:
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        version = record.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UsageError(f"job {folder.name} has version {version}, this program knows {SCHEMA_VERSION}; update it")
        return Manifest.model_validate(record)
    except ValidationError as error:
        where, reason = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise UsageError(f"job {folder.name} is damaged: {MANIFEST}: {where}: {reason}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"job {folder.name} is damaged: {MANIFEST}: {error}") from None


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut. RunError if it cannot be."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # makes the rename itself durable
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"{error.strerror}"
        raise RunError(
            f"cannot write {path.name} ({len(data) / 1e6:.1f} MB): {reason}; what is finished is kept"
        ) from None
