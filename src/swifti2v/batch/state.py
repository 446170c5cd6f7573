"""What a batch has done, next to its jobs file: ``NAME.state/ledger.jsonl``, appended to and never rewritten.

Each record is on the disk before what follows from it happens. A torn last line (a power cut) is dropped.
The folder is locked while a batch runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core import Request, RunError, UsageError
from ..journal import KINDS, lock_folder

LEDGER = "ledger.jsonl"


class Held(BaseModel):
    """How many Stage I windows and Stage II segments a journal holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    motion: int = 0
    segments: int = 0

    @classmethod
    def by(cls, folder: Path) -> Held:
        """What lies in a job folder; 0 where there is none."""
        return cls(**{kind: sum(1 for _ in (folder / kind).glob("*.safetensors")) for kind in KINDS})

    @property
    def all(self) -> int:
        return self.motion + self.segments


class Record(BaseModel):
    """One thing that happened to a line. ``worked``: segments by phase on which a step was made in this attempt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Literal["planned", "begun", "motion", "unready", "made", "failed", "lost"]
    line: int
    time: float = 0.0
    worker: int = -1
    attempt: int = 0
    seconds: float = 0.0
    output: str = ""
    message: str = ""
    said: dict[str, Any] | None = None
    request: Request | None = None
    held: Held | None = None
    worked: dict[str, list[int]] = {}


class State:
    """The ledger of one jobs file, open and locked until ``close``.

    ``planned``: by line, what it was planned to be; ``last``: the last record of its work; ``attempts``: so far.
    """

    def __init__(self, jobs: Path) -> None:
        """Open, and begin if there is none. Raises UsageError: in use, damaged, or not writable."""
        self.folder = jobs.absolute().with_name(f"{jobs.stem}.state")
        self.planned: dict[int, Record] = {}
        self.last: dict[int, Record] = {}
        self.attempts: dict[int, int] = {}
        self.moved: set[int] = set()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = lock_folder(self.folder, "batch")
        except OSError as error:
            raise UsageError(f"cannot use the folder {self.folder}: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Keep a record: it is on the disk when this returns."""
        record = record.model_copy(update={"time": round(time.time(), 3)})
        line = record.model_dump_json(exclude_defaults=True).encode() + b"\n"
        try:
            with open(self.folder / LEDGER, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.folder / LEDGER}: {error.strerror}; run the batch again") from None
        self._take(record)

    def is_made(self, line: int) -> bool:
        """Whether the line's video has been made and is there."""
        record = self.last.get(line)
        return record is not None and record.what == "made" and os.path.lexists(self.path_of(record))

    def path_of(self, record: Record) -> Path:
        """Where a record's output is: kept relative to the jobs file, so that both may be moved together."""
        return Path(os.path.normpath(self.folder.parent / record.output))

    def name_of(self, path: Path) -> str:
        """The inverse of ``path_of``."""
        return os.path.relpath(path, self.folder.parent)

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, record: Record) -> None:
        if record.what == "planned":
            self.planned[record.line] = record
            return
        self.last[record.line] = record
        self.attempts[record.line] = max(self.attempts.get(record.line, 0), record.attempt)
        if record.what in ("motion", "unready"):
            (self.moved.add if record.what == "motion" else self.moved.discard)(record.line)

    def _read(self) -> None:
        path = self.folder / LEDGER
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(Record.model_validate_json(line))
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise UsageError(
                    f"{path} is damaged in line {number} ({reason}); remove {self.folder.name}/ to plan this batch anew"
                ) from None
        if len(whole) < len(data):
            os.truncate(path, len(whole))
