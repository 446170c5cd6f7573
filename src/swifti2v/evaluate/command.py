"""``swifti2v evaluate``: what was asked, refused in one line before torch is loaded; then ``judge`` does the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import Event, RunError, UsageError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_BLOCK_FRAMES = 4


@dataclass(frozen=True)
class Asked:
    """The verb's options. ``target``: a clip or a folder of clips; ``image`` None: found by the checksum in the clip;
    ``json`` and ``picture``: files to write, for a folder of clips ``picture`` is a folder too."""

    target: str
    image: str | None = None
    reference: str | None = None
    json: str | None = None
    picture: str | None = None
    segment_frames: int | None = None
    overwrite: bool = False


def run(asked: Asked, emit: Callable[[Event], None]) -> list[tuple[str, str, str]]:
    """Check, measure, write what was asked for; the rows of the table. Raises ``UsageError``, then ``RunError``."""
    files = _files(Path(asked.target))
    pictures = _pictures(asked, files)
    _check(asked, files, pictures)
    from . import judge

    image = None if asked.image is None else Path(asked.image)
    subjects = [
        judge.subject(file, image=image, segment_frames=asked.segment_frames, picture=picture)
        for file, picture in zip(files, pictures, strict=True)
    ]
    record = judge.judge(subjects, None if asked.reference is None else Path(asked.reference), emit)
    if asked.json is not None:
        _write(Path(asked.json), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return judge.table(record)


def _files(target: Path) -> list[Path]:
    if not target.is_dir():
        _check_input(target, "video")
        return [target]
    found = [path for path in sorted(target.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
    found = [path for path in found if not path.stem.endswith(".part")]
    if not found:
        raise UsageError(f"{target} holds no video; give a clip or a folder of {', '.join(SUFFIXES)} files")
    return found


def _pictures(asked: Asked, files: Sequence[Path]) -> list[Path | None]:
    if asked.picture is None:
        return [None] * len(files)
    picture = Path(asked.picture)
    if not Path(asked.target).is_dir():
        return [picture]
    if picture.suffix or (picture.exists() and not picture.is_dir()) or not picture.parent.is_dir():
        raise UsageError(f"--picture {picture} is no folder; a folder of clips needs one, which is made if missing")
    return [picture / f"{file.stem}.png" for file in files]


def _check(asked: Asked, files: Sequence[Path], pictures: Sequence[Path | None]) -> None:
    count = asked.segment_frames
    if count is not None and (count < _BLOCK_FRAMES or count % _BLOCK_FRAMES):
        near = max(_BLOCK_FRAMES, round(count / _BLOCK_FRAMES) * _BLOCK_FRAMES)
        raise UsageError(f"--segment-frames {count} is not a multiple of {_BLOCK_FRAMES}; nearest legal value: {near}")
    if asked.reference is not None and len(files) > 1:
        raise UsageError(f"--reference goes with one clip; {asked.target} holds {len(files)}")
    for given, kind in ((asked.image, "image"), (asked.reference, "video")):
        if given is not None:
            _check_input(Path(given), kind)
    if asked.json is not None:
        _check_output(Path(asked.json), ".json", asked)
    for picture in pictures:
        if picture is not None:
            _check_output(picture, ".png", asked)


def _check_input(path: Path, kind: str) -> None:
    """Only what needs no torch; ``media`` looks closer."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give one {kind} file")
    if not path.exists():
        raise UsageError(f"{path}: no such {kind} file")


def _check_output(path: Path, suffix: str, asked: Asked) -> None:
    if path.suffix.lower() != suffix:
        raise UsageError(f"{path} does not end in {suffix}; name it so")
    made_later = asked.picture is not None and path.parent == Path(asked.picture)
    if not path.parent.is_dir() and not made_later:
        raise UsageError(f"output folder {path.parent} does not exist; create it or choose another")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; choose another name")
    if os.path.lexists(path) and not asked.overwrite:
        raise UsageError(f"{path} exists and is not overwritten; choose another name or pass --overwrite")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
