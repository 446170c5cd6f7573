"""The jobs file: one JSON object a line, read and checked before any worker starts. Makes nothing on disk.

Keys are those fields of ``options.Options`` that say what to make; relative paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ..core import UsageError
from ..options import Options

MAX_BYTES, MAX_LINES, SHOWN = 64 * 2**20, 100_000, 20
_PATHS = ("image", "motion", "output", "cache")
# How the whole batch runs, or what makes no sense for one of many.
_NOT_A_LINES = {
    "device": "give --devices to the batch",
    "threads": "give --workers to the batch",
    "vae_device": "a worker has one device",
    "json": "give it to the batch",
    "quiet": "give it to the batch",
    "debug": "give it to the batch",
    "at_once": "a batch's stages always work in turn",
    "trace": "use swifti2v generate",
    "context_parallel": "a clip of a batch is made by one worker",
    "dry_run": "use swifti2v plan",
    "preview": "use swifti2v generate",
}


@dataclass(frozen=True)
class Line:
    """``said``: the object as written; ``options``: the same with absolute paths."""

    number: int
    said: dict[str, Any]
    options: Options


class Errors:
    """Collects what is wrong with a file, line by line, and says all of it at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, error: object) -> None:
        self._found.append((line, str(error)))

    def refuse(self) -> None:
        """UsageError if anything was added."""
        if not self._found:
            return
        told = [f"line {line}: {error if len(error) <= 300 else error[:297] + '...'}" for line, error in self._found]
        more = [f"and {len(told) - SHOWN} more lines"] if len(told) > SHOWN else []
        raise UsageError(f"{self._name}: {'; '.join([*sorted_by_line(self._found, told)[:SHOWN], *more])}")


def sorted_by_line(found: list[tuple[int, str]], told: list[str]) -> list[str]:
    return [text for _, text in sorted(zip((line for line, _ in found), told, strict=True), key=lambda pair: pair[0])]


def read_lines(file: Path, model: str | None, errors: Errors) -> list[Line]:
    """Every line that is an object of known keys and right types; the others go to ``errors``. Blank lines are none.

    ``model``: where the weights are, for lines that do not say. Raises UsageError for a file that cannot be read.
    """
    shape, found = _shape(), []
    for number, text in _texts(file):
        try:
            found.append(_line(number, text, file.absolute().parent, model, shape))
        except ValueError as error:
            errors.add(number, error)
    return found


def _texts(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(f"{file} is {size / 2**20:.0f} MiB; a jobs file has at most {MAX_BYTES // 2**20}")
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read the jobs file {str(file)[:160]!r}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f'{file} has no jobs; write one a line, e.g. {{"image": "photo.jpg", "prompt": "zoom in"}}')
    if len(numbered) > MAX_LINES:
        raise UsageError(f"{file} has {len(numbered):,} lines; at most {MAX_LINES:,} are taken, so cut it up")
    yield from numbered


def _line(number: int, text: bytes, folder: Path, model: str | None, shape: type[BaseModel]) -> Line:
    try:
        said = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise UsageError(
            f'is not a JSON object in braces, e.g. {{"image": "photo.jpg", "prompt": "zoom in"}}: {said!r}'
        )
    for key in said:
        _known(key)
    try:
        values = shape.model_validate(said).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{first['loc'][0]} {first.get('input')!r}: {first['msg']}") from None
    for key in _PATHS:
        if values[key] is not None:
            values[key] = _absolute(folder, values[key])
    for key in ("lora", "lora_2"):
        values[key] = values[key] and [_absolute(folder, path) for path in values[key]]
    values["model"] = model if values["model"] is None else _weights(folder, values["model"])
    return Line(number, said, Options(**values))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise UsageError(f"has a key twice: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def _known(key: str) -> None:
    """UsageError for a key that is none, or none of a line's."""
    if key in _NOT_A_LINES:
        raise UsageError(f"{key} is not a line's to say: {_NOT_A_LINES[key]}")
    names = [field.name for field in dataclasses.fields(Options) if field.name not in _NOT_A_LINES]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise UsageError(f"key {key[:60]!r} is not known; {hint}")


def _shape() -> type[BaseModel]:
    """``Options`` as a model that takes no value for another's type."""
    hints = get_type_hints(Options)
    fields: dict[str, Any] = {field.name: (hints[field.name], field.default) for field in dataclasses.fields(Options)}
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    # A field named json would hide BaseModel's old method of that name; a line may not say it anyway.
    return create_model("Line", __config__=strict, **{name: kind for name, kind in fields.items() if name != "json"})


def _absolute(folder: Path, text: str) -> str:
    return os.path.normpath(os.path.join(folder, os.path.expanduser(text)))


def _weights(folder: Path, text: str) -> str:
    """Folders absolutely, hub names as they are."""
    parts = (_absolute(folder, part) if "\x00" not in part else part for part in text.split(","))
    return ",".join(
        there if os.path.exists(there) else said for there, said in zip(parts, text.split(","), strict=True)
    )


def twice(names: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, str]]:
    """Lines whose names are another line's too: the later one, and what to say of it."""
    first: dict[str, int] = {}
    for line, path in names:
        # clip.mp4, clip.m4v and a folder clip share one job folder.
        key = os.path.join(os.path.realpath(path.parent), path.stem)
        if key in first:
            yield line, f"output {path.name} is that of line {first[key]} too; give each line its own"
        first.setdefault(key, line)
