"""What an exported bundle promises, as frozen values: its graphs, their tensors, noise levels, sizes and hashes.

Written as ``manifest.json`` beside the graphs; the runner reads nothing else. Knows no framework.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core import Size, UsageError

MANIFEST = "manifest.json"
SCHEMA_VERSION: Final = 1
Format = Literal["onnx", "coreml", "executorch"]
Precision = Literal["float32", "float16", "int8"]
Layout = Literal["reference", "channels-first"]
Role = Literal["encoder", "denoiser", "decoder"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorContract(_Frozen):
    """One input or output: fixed ``shape`` and ``dtype``; ``range``: what values to expect, in words."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16"] = "float32"
    range: str


class Parity(_Frozen):
    """How far a graph's outputs are from torch's: ``error`` = |graph - torch| / |torch| (L2, the worst output) and the
    ``limit`` above which the graph would not have been published. ``error`` None: it cannot run where it was made."""

    error: float | None
    limit: float


class GraphContract(_Frozen):
    """One file. ``weights``: how they are stored (arithmetic is float32 but where Core ML's weights are float16);
    ``window``: which of the manifest's windows a denoiser is for; ``operators``: how many of each kind, once optimized.
    """

    file: str
    role: Role
    format: Format
    weights: Precision
    layout: Layout | None = None
    window: int | None = None
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    parity: Parity
    operators: dict[str, int] = Field(default_factory=dict)
    sha256: str


class WindowContract(_Frozen):
    """Blocks denoised together: ``context`` are finished (they go in clean), ``segment`` are made; ``positions`` as the
    graph has them built in."""

    context: tuple[int, ...]
    segment: tuple[int, ...]
    positions: tuple[int, ...]


class Manifest(_Frozen):
    """A bundle. ``levels``: the explicit descending noise levels, 1 first and 0 last: never re-derive them from a
    scheduler. ``motion_score``: unless the user asks for another. ``layout_for``: which of the denoiser's layouts is
    meant for what. ``noise``: how to draw it, in words. ``clip_psnr``: of a clip made by the graphs, against torch's,
    in dB, of the worst format that runs here (None: too large to compare). ``reach``, for decoders that move the photo:
    pixels that a vector of length 1 stands for at the end of block 1 at motion score 1; times both otherwise.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    family: Literal["nano", "ltx"]
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    num_frames: int = Field(gt=0)
    fps: float = Field(gt=0)
    latent_shape: tuple[int, int, int, int]
    levels: tuple[float, ...]
    motion_score: float
    windows: tuple[WindowContract, ...]
    reach: float | None
    layout_for: dict[str, Layout]
    noise: str
    clip_psnr: float | None = None
    weights_sha256: dict[str, str]
    versions: dict[str, str]
    graphs: tuple[GraphContract, ...]
    notes: tuple[str, ...] = ()

    @field_validator("levels")
    @classmethod
    def _descend(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        return checked_levels(levels)

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    def find(self, role: Role, **wanted: Any) -> GraphContract:
        """The only graph of ``role`` with the ``wanted`` fields; UsageError if there is none or more than one."""
        found = [g for g in self.graphs if g.role == role and all(getattr(g, k) == v for k, v in wanted.items())]
        if len(found) != 1:
            raise UsageError(f"the bundle has {len(found)} graphs for {role} {wanted}, not one")
        return found[0]


def checked_levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    """``levels`` if they fall from exactly 1 to exactly 0; ValueError otherwise."""
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) < 2 or levels[0] != 1 or levels[-1] != 0 or not falling:
        raise ValueError(f"noise levels {levels} do not fall from 1 to 0")
    return levels


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """``folder``/manifest.json."""
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    return path


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle. UsageError if there is none, it is not one, or a graph is missing or changed."""
    folder = Path(folder)
    try:
        manifest = Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{folder} is not an exported bundle: {first}") from None
    for graph in manifest.graphs:
        if not (folder / graph.file).exists() or sha256_of(folder / graph.file) != graph.sha256:
            raise UsageError(f"{folder / graph.file} is missing or is not what was exported; export again")
    return manifest


def sha256_of(path: Path) -> str:
    """Of a file's bytes; of a folder (an .mlpackage), of the names and hashes of its files."""
    if path.is_dir():
        inner = sorted(p for p in path.rglob("*") if p.is_file())
        lines = [f"{p.relative_to(path).as_posix()} {sha256_of(p)}" for p in inner]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
