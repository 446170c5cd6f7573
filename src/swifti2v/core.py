"""The nouns that flow through SwiftI2V: sizes, grids, requests, chunks and events.

Everything here is frozen and refuses bad values at birth. This module knows arithmetic only:
no tensors are made, no files opened, nothing is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .segments import CSG

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIDE = 8192
MAX_FRAMES = 4001
MAX_PROMPT_CHARACTERS = 10_000

Fit = Literal["auto", "crop", "pad"]
RESOLUTIONS = {"360p": 640 * 352, "720p": 1280 * 704, "1080p": 1920 * 1088, "2k": 2560 * 1408}
_ROWS = {"360p": 360, "720p": 720, "1080p": 1080, "2k": 1440}


class UsageError(ValueError):
    """A request that can be refused before anything heavy loads (exit code 2)."""


class RunError(RuntimeError):
    """A failure after work has begun (exit code 1)."""


@dataclass(frozen=True, order=True)
class Size:
    """Width and height in pixels, both positive integers."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{name} {value!r} is not a whole number of pixels, e.g. 2560x1408")
            if value <= 0:
                raise UsageError(f"{name} {value} is not positive; give a size such as 2560x1408")

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``2560x1408`` (``*`` and ``:`` are accepted for ``x``)."""
        match = re.fullmatch(r"\s*(-?\d{1,9})\s*[xX*:×]\s*(-?\d{1,9})\s*", text)
        if not match:
            shown = text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"
            raise UsageError(f"size {shown!r} is not WIDTHxHEIGHT in whole pixels, e.g. 2560x1408")
        return cls(int(match[1]), int(match[2]))

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def aspect(self) -> float:
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Lattice:
    """How one stage's VAE and DiT cut pixels.

    ``stride``: pixels per latent; ``patch``: latents per token side; ``channels``: of one latent;
    ``pads``: the DiT pads odd latent grids itself, so that the patch does not restrict sizes.
    ``unit``: the VAE itself pads sides that are multiples of this to whole latents, and its decoder's surplus is cut.
    """

    stride: int
    patch: int
    channels: int
    pads: bool = False
    unit: int | None = None

    @property
    def multiple(self) -> int:
        if self.unit is not None:
            return self.unit
        return self.stride if self.pads else self.stride * self.patch

    def latent_size(self, size: Size) -> Size:
        if self.unit is not None:
            return Size(-(-size.width // self.stride), -(-size.height // self.stride))
        return Size(size.width // self.stride, size.height // self.stride)

    def tokens_per_block(self, size: Size) -> int:
        latent = self.latent_size(size)
        return math.ceil(latent.height / self.patch) * math.ceil(latent.width / self.patch)


@dataclass(frozen=True)
class Grid:
    """The legal sizes and lengths of a preset, and how pixels, latents and tokens correspond.

    ``scale`` is the ratio of Stage II to Stage I pixels (paper: 2560x1408 against 640x352, 4).
    ``stage_one_area``: if set, Stage I runs at its own legal size of about this area instead
    (``wan-refine``: the public Stage I was trained at 832x480).
    A preset with one stage (MobileI2V) names its lattice twice, with ``scale`` 1.
    """

    stage_one: Lattice
    stage_two: Lattice
    scale: int = 4
    temporal_stride: int = 4
    trained_blocks: int = 21
    default_size: Size = Size(2560, 1408)
    stage_one_area: int | None = None
    max_frames: int = MAX_FRAMES

    @property
    def multiple(self) -> int:
        """Every legal side is a multiple of this many pixels."""
        if self.stage_one_area is not None:
            return self.stage_two.multiple
        return math.lcm(self.stage_two.multiple, self.scale * self.stage_one.multiple)

    def is_legal(self, size: Size) -> bool:
        m = self.multiple
        return size.width % m == 0 and size.height % m == 0 and max(size.width, size.height) <= MAX_SIDE

    def snap(self, size: Size) -> Size:
        """The nearest legal size; refuses sides over the limit."""
        if max(size.width, size.height) > MAX_SIDE:
            largest = MAX_SIDE // self.multiple * self.multiple
            raise UsageError(
                f"size {size} is over the limit of {MAX_SIDE} pixels a side; largest legal side: {largest}"
            )
        return Size(self._nearest(size.width), self._nearest(size.height))

    @property
    def frame_rule(self) -> str:
        """Which frame counts are legal, in words: one frame for block 0, then whole blocks."""
        return f"{self.temporal_stride}k+1, k >= 1"

    def area_of(self, resolution: str) -> int:
        """Pixels of a resolution by name: 16:9, or what is nearest to it where sides go in coarse steps."""
        fine = self.multiple <= 8
        return _ROWS[resolution] ** 2 * 16 // 9 if fine else RESOLUTIONS[resolution]

    def snap_frames(self, num_frames: int) -> int:
        """The nearest legal frame count (``frame_rule``); refuses non-positive and over-long clips."""
        if isinstance(num_frames, bool) or not isinstance(num_frames, int):
            raise UsageError(f"num_frames {num_frames!r} is not a whole number, e.g. 81")
        s = self.temporal_stride
        if num_frames <= 0:
            raise UsageError(f"num_frames {num_frames} is not positive; the shortest clip has {s + 1} frames")
        if num_frames > self.max_frames:
            raise UsageError(f"num_frames {num_frames} is over the limit of {self.max_frames}")
        blocks = max(1, math.floor((num_frames - 1) / s + 0.5))
        return blocks * s + 1

    def size_for(self, area: int, aspect: float) -> Size:
        """The legal size whose aspect is nearest to ``aspect`` among those of about ``area`` pixels."""
        m = self.multiple
        ideal_height = math.sqrt(area / aspect)
        candidates = []
        for rows in {max(1, math.floor(ideal_height / m)), max(1, math.ceil(ideal_height / m))}:
            for columns in {max(1, math.floor(rows * aspect)), max(1, math.ceil(rows * aspect))}:
                candidates.append(Size(min(columns * m, MAX_SIDE // m * m), min(rows * m, MAX_SIDE // m * m)))

        def distance(size: Size) -> tuple[float, int, int]:
            return (
                abs(math.log(size.aspect / aspect)) + 0.5 * abs(math.log(size.area / area)),
                size.width,
                size.height,
            )

        return min(candidates, key=distance)

    def blocks(self, num_frames: int) -> int:
        """Latent blocks of a clip: one for frame 0, then one for every ``temporal_stride`` frames."""
        return (num_frames - 1) // self.temporal_stride + 1

    def frames(self, num_blocks: int) -> int:
        return (num_blocks - 1) * self.temporal_stride + 1

    def block_frames(self, block: int) -> range:
        """The frames that latent block ``block`` stands for."""
        s = self.temporal_stride
        return range(0, 1) if block == 0 else range((block - 1) * s + 1, block * s + 1)

    def motion_size(self, size: Size) -> Size:
        """Stage I's size for a Stage II size."""
        if self.stage_one_area is None:
            return Size(size.width // self.scale, size.height // self.scale)
        m = self.stage_one.multiple
        height = max(m, round(math.sqrt(self.stage_one_area / size.aspect) / m) * m)
        return Size(max(m, round(height * size.aspect / m) * m), height)

    def _nearest(self, side: int) -> int:
        m = self.multiple
        return min(max(m, math.floor(side / m + 0.5) * m), MAX_SIDE // m * m)


class Request(BaseModel):
    """One clip to make, complete and legal: with the photo and the weights it determines the video."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str
    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT_CHARACTERS)
    width: int = Field(gt=0, le=MAX_SIDE)
    height: int = Field(gt=0, le=MAX_SIDE)
    num_frames: int = Field(gt=0, le=MAX_FRAMES)
    seed: int = Field(ge=0, lt=2**63)
    fps: float = Field(default=15.0, gt=0, le=240)
    fit: Literal["crop", "pad"] = "crop"
    num_inference_steps: int = Field(default=4, ge=1, le=1000)
    num_inference_steps_2: int = Field(default=4, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=1.0, le=100)
    guidance_scale_2: float = Field(default=1.0, ge=1.0, le=100)
    shift: float = Field(default=5.0, gt=0, le=100)
    shift_2: float = Field(default=5.0, gt=0, le=100)
    strength_2: float = Field(default=1.0, gt=0, le=1)
    csg: CSG = CSG()
    sampler_2: Literal["euler", "renoise"] = "euler"
    motion_score: float | None = Field(default=None, ge=0, le=100)
    encode: Literal["lazy", "ahead"] = "lazy"
    exact_first_frame: bool = False
    image_sha256: str = ""
    motion_sha256: str = ""

    @field_validator("prompt", "negative_prompt", mode="before")
    @classmethod
    def _printable(cls, text: object) -> object:
        if not isinstance(text, str):
            return text
        if "\x00" in text:
            raise ValueError("the prompt holds a NUL character; remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the prompt is not valid Unicode (lone surrogate); re-type it") from None
        return text

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)


@dataclass(frozen=True)
class Chunk:
    """Finished pixels: ``frames`` is (b, 3, t, h, w) in [-1, 1], the clip's frames from ``start`` on.

    ``segment`` is 0 for the chunk of frame 0 alone and then counts CSG segments from 1.
    """

    frames: Tensor
    start: int
    segment: int
    num_segments: int


@dataclass(frozen=True)
class Event:
    """Something happened: the fixed fields that the CLI, a server and a log all read.

    ``type``: started, progress, segment, notice, completed, failed. ``phase``: text, image, motion,
    refine, decode, write. ``step`` of ``total`` within the phase; ``seconds`` since the run began.
    """

    type: Literal["started", "progress", "segment", "notice", "completed", "failed"]
    phase: str
    segment: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    message: str = ""
