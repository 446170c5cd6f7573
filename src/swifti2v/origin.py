"""What made a file: the record written into a video, read back, and the photo found again.

The record never holds a path: names without folders, checksums, and the request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from . import media
from .checkpoints import sha256
from .core import Request, UsageError
from .journal import Inputs, Manifest, WriteOptions
from .presets import Preset

PHOTO_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".avif", ".gif", ".bmp", ".jp2", ".ppm", ".tga", ".ico", ".mpo",
}  # fmt: skip
KEY = "swifti2v"
_MOST_PHOTOS = 2000


class Origin(BaseModel):
    """The record of a video. Files of later versions may say more, which is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    request: Request
    photo: str = ""
    model: str = ""
    loras: tuple[str, ...] = ()
    model_hashes: dict[str, str] = {}
    versions: dict[str, str] = {}
    settings: dict[str, str] = {}
    write: WriteOptions = WriteOptions()


def described(preset: Preset, inputs: Inputs) -> str:
    """The model in words, without folders: ``nano``, ``wan-refine from A,B``, ``nano from my-weights``."""
    if inputs.model is None:
        return preset.name
    return f"{preset.name} from {', '.join(PurePath(part).name for part in inputs.model.split(','))}"


def record_of(manifest: Manifest) -> str:
    """The JSON text for a video's metadata."""
    inputs = manifest.inputs
    origin = Origin(
        request=manifest.request,
        photo=inputs.photo_name,
        model=manifest.model,
        loras=tuple(PurePath(text).name for text in (*inputs.loras, *inputs.loras_2)),
        model_hashes=manifest.model_hashes,
        versions=manifest.versions,
        settings=manifest.settings,
        write=manifest.write,
    )
    return json.dumps({KEY: origin.model_dump(mode="json")}, ensure_ascii=False, separators=(",", ":"))


def metadata_of(file: Path) -> dict[str, Any]:
    """The record in a video, as written. Raises UsageError if it has none."""
    text = media.read_metadata(file).get("comment", "")
    try:
        record = json.loads(text)[KEY]
    except (ValueError, KeyError, TypeError):
        record = None
    if not isinstance(record, dict):
        raise UsageError(f"{file.name} does not say what made it: no swifti2v metadata in it")
    return record


def origin_of(file: Path) -> Origin:
    """The record in a video, checked. Raises UsageError."""
    try:
        return Origin.model_validate(metadata_of(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"the metadata of {file.name} cannot be used: {where}: {first['msg']}") from None


def find_photo(origin: Origin, folders: Iterable[Path]) -> Path:
    """The photo by its checksum: under its own name first, then any picture. UsageError if it is not there."""
    wanted = origin.request.image_sha256
    for path in _candidates(origin.photo, list(dict.fromkeys(folder.resolve() for folder in folders))):
        if path.is_file() and sha256(path) == wanted:
            return path
    name = f" {origin.photo!r}" if origin.photo else ""
    raise UsageError(f"the photo{name} is neither next to the file nor in this folder; give it with --image PHOTO")


def _candidates(name: str, folders: list[Path]) -> Iterator[Path]:
    if name:
        # A record may come from anywhere: its name must not lead out of the folders.
        yield from (folder / PurePath(name).name for folder in folders)
    for folder in folders:
        pictures = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in PHOTO_SUFFIXES)
        for _, path in zip(range(_MOST_PHOTOS), pictures, strict=False):
            yield path
