"""What training sees: pixels of a clip, its latents as Stage I and Stage II learn from them, and sources of both.

Every source is a pure function of an index (``source.Source``). ``FilmSource`` cuts windows out of real shots,
``sprites.SyntheticSource`` renders them, ``shards.ShardSource`` reads latents made before, ``MixedSource`` mixes any.
This module knows no networks but the VAE that it is given, and no manifests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from ..camera import Motion, camera_video
from ..core import Size, UsageError
from ..models.causal_vae import StreamingVAE, decode_stream, encode_pairs, encode_stream
from ..reference import GROUP, hybrid_reference, resize, static_video, zero_video
from .shots import Shot, read_frames, scan
from .source import Source, seeded

ReferenceMaker = Callable[[Tensor, Iterable[Tensor], Size], Iterator[Tensor]]
"""(photo (1, 3, 1, H, W), Stage I's motion in chunks (1, 3, t, h, w), Stage II's size) -> the hybrid reference, or its
pairs as ``reference.carried_reference`` gives them: chunks (1 or 2, 3, t, H, W)."""

TextEncoder = Callable[[str], Tensor]
"""A prompt -> its states (l, d)."""

Item = TypeVar("Item")
CYCLE = 1000  # items after which every source of a mixture has had exactly its share


@dataclass(frozen=True, eq=False)
class Pixels:
    """A clip before any VAE: ``frames`` uint8 (3, 4k+1, h, w); frame 0 is the photo.

    ``kind``: film, synthetic, real or photo. ``motion``: the camera's, where it is known. ``motion_score``: where it
    was measured before (``motion_score.py``).
    """

    frames: Tensor
    prompt: str
    name: str
    kind: str
    motion: Motion | None = None
    motion_score: float | None = None

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 4 or self.frames.shape[0] != 3:
            raise ValueError(f"{self.name}: {self.frames.dtype} {tuple(self.frames.shape)} is not uint8 (3, t, h, w)")
        if self.frames.shape[1] % GROUP != 1:
            nearest = round((self.frames.shape[1] - 1) / GROUP) * GROUP + 1
            raise ValueError(f"{self.name}: {self.frames.shape[1]} frames are not 4k+1; the nearest is {nearest}")

    @property
    def size(self) -> Size:
        return Size(self.frames.shape[3], self.frames.shape[2])

    @property
    def blocks(self) -> int:
        return (self.frames.shape[1] - 1) // GROUP + 1

    def to(self, device: torch.device) -> Pixels:
        """The same clip on another device."""
        return replace(self, frames=self.frames.to(device))

    @property
    def image(self) -> Tensor:
        """Frame 0, (1, 3, 1, h, w) float32 in [-1, 1]."""
        return from_bytes(self.frames[:, :1])[None]

    def chunks(self) -> Iterator[Tensor]:
        """Frame 0, then four at a time: (1, 3, t, h, w) float32 in [-1, 1]."""
        yield self.image
        for start in range(1, self.frames.shape[1], GROUP):
            yield from_bytes(self.frames[:, start : start + GROUP])[None]

    def shrunk(self, size: Size) -> Iterator[Tensor]:
        """The chunks at a smaller ``size``, antialiased, frame by frame as at inference; first the photo alone."""
        for chunk in self.chunks():
            yield torch.stack([resize(frame, size) for frame in chunk[0].unbind(1)], dim=1)[None]


@dataclass(frozen=True, eq=False)
class Clip:
    """One sample as a source or a shard yields it: latents of the whole clip, normalized.

    ``clean`` (c, T, h, w), block 0 the anchor; ``reference`` (c or 2c, T, h, w), 2c where it is a pair;
    ``transition``: the reference made by stage transition (paper section 3.3), of the same shape; ``text`` (l, d).
    ``kind``: film, synthetic, real or photo. ``image`` (257, 1280): CLIP states of the photo, for Wan2.1-I2V.
    ``motion_score``: how much the clip moves (``motion_score.py``), for MobileI2V.
    """

    clean: Tensor
    reference: Tensor
    transition: Tensor | None
    text: Tensor | None
    prompt: str
    name: str
    kind: str
    motion: Motion | None = None
    image: Tensor | None = None
    motion_score: float | None = None

    def __post_init__(self) -> None:
        clean, reference = self.clean.shape, self.reference.shape
        if clean[1:] != reference[1:] or reference[0] % clean[0]:
            raise ValueError(f"{self.name}: reference {tuple(reference)} of clean {tuple(clean)}")
        if self.transition is not None and self.transition.shape != reference:
            raise ValueError(f"{self.name}: transition {tuple(self.transition.shape)}, reference {tuple(reference)}")


def from_bytes(frames: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return frames.to(torch.float32).div_(127.5).sub_(1)


def to_bytes(frames: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded."""
    return frames.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def rng_of(seed: int, index: int, use: str) -> random.Random:
    """Python's generator for the draws of one item, a function of the three and nothing else."""
    return random.Random(seeded(seed, index, use).initial_seed())


def joined(stream: Iterable[Tensor]) -> Tensor:
    """A stream of latents (1, c, t, h, w) as one tensor (c, T, h, w) on the CPU."""
    return torch.cat([chunk[0].cpu() for chunk in stream], dim=1)


def device_of(vae: StreamingVAE) -> torch.device:
    """Where a VAE computes, offloaded or not: pixels that meet its output have to be there."""
    return get_module_execution_device(getattr(vae, "vae", vae))


@dataclass(frozen=True)
class StageTwoEncoder:
    """Pixels -> the ``Clip`` that Stage II learns from: the clip itself, and the hybrid reference of its small copy.

    ``motion_size``: Stage I's size for a Stage II size (``core.Grid.motion_size``). ``motion_vae``: Stage I's VAE, as
    everything that Stage I hands over has been through it; None leaves the small copy untouched.
    """

    vae: StreamingVAE
    motion_size: Callable[[Size], Size]
    motion_vae: StreamingVAE | None = None
    make_reference: ReferenceMaker = hybrid_reference
    encode_text: TextEncoder | None = None

    def __call__(self, pixels: Pixels) -> Clip:
        pixels = pixels.to(device_of(self.vae))
        motion = pixels.shrunk(self.motion_size(pixels.size))
        if self.motion_vae is not None:
            small = next(iter(pixels.shrunk(self.motion_size(pixels.size))))
            motion = decode_stream(self.motion_vae, encode_stream(self.motion_vae, motion), small)
        clean = joined(encode_stream(self.vae, pixels.chunks()))
        reference = joined(encode_pairs(self.vae, self.make_reference(pixels.image, motion, pixels.size)))
        return _clip(pixels, clean, reference, self.encode_text)


@dataclass(frozen=True)
class StageOneEncoder:
    """Pixels -> the ``Clip`` that Stage I learns from, at the pixels' own size: the reference is what Stage I is given.

    ``condition``: ``camera``, the photo as the clip's camera would see it, held still where that is unknown (nano);
    ``zero``, the photo and empty frames (Wan2.1-I2V, which also hears ``encode_image``: CLIP states (1, 257, d) of
    the photo (1, 3, 1, h, w), as ``SwiftI2VPipeline.encode_image`` gives them).
    """

    vae: StreamingVAE
    condition: Literal["camera", "zero"]
    encode_text: TextEncoder | None = None
    encode_image: Callable[[Tensor], Tensor] | None = None

    def __call__(self, pixels: Pixels) -> Clip:
        pixels = pixels.to(device_of(self.vae))
        frames = pixels.frames.shape[1]
        if self.condition == "zero":
            given = zero_video(pixels.image, frames)
        elif pixels.motion is None:
            given = static_video(pixels.image, frames)
        else:
            given = camera_video(pixels.image, pixels.motion, frames)
        clean = joined(encode_stream(self.vae, pixels.chunks()))
        made = _clip(pixels, clean, joined(encode_stream(self.vae, given)), self.encode_text)
        return made if self.encode_image is None else replace(made, image=self.encode_image(pixels.image)[0].cpu())


def _clip(pixels: Pixels, clean: Tensor, reference: Tensor, encode_text: TextEncoder | None) -> Clip:
    text = None if encode_text is None else encode_text(pixels.prompt).cpu()
    return Clip(clean, reference, None, text, pixels.prompt, pixels.name, pixels.kind, pixels.motion)


@dataclass(frozen=True)
class Encoded:
    """A source of pixels as a source of clips."""

    source: Source[Pixels]
    encode: Callable[[Pixels], Clip]

    def at(self, index: int) -> Clip:
        return self.encode(self.source.at(index))


@dataclass(frozen=True)
class MixedSource(Generic[Item]):
    """Items of several sources, each source read from its own 0 on without gaps.

    Within every ``CYCLE`` items each source has exactly its share (rounded to a thousandth), in seeded random order.
    """

    sources: tuple[Source[Item], ...]
    shares: tuple[float, ...]
    seed: int = 0
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.shares) or not self.sources:
            raise UsageError(
                f"{len(self.sources)} sources and {len(self.shares)} shares; give one share for each source"
            )
        if min(self.shares) < 0 or not sum(self.shares) > 0:
            raise UsageError(f"shares {self.shares} are not all 0 or more with a positive sum, e.g. (0.7, 0.3)")
        ideal = np.array(self.shares) / sum(self.shares) * CYCLE
        counts = np.floor(ideal).astype(int)
        for source in np.argsort(counts - ideal, kind="stable")[: CYCLE - counts.sum()]:
            counts[source] += 1
        object.__setattr__(self, "counts", tuple(int(count) for count in counts))

    def which(self, index: int) -> tuple[int, int]:
        """(source, its own index) that ``index`` stands for."""
        cycle, place = divmod(index, CYCLE)
        order = _order(self.seed, cycle, self.counts)
        source = order[place]
        return source, cycle * self.counts[source] + order[:place].count(source)

    def at(self, index: int) -> Item:
        source, own = self.which(index)
        return self.sources[source].at(own)


@lru_cache(maxsize=64)
def _order(seed: int, cycle: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    order = [source for source, count in enumerate(counts) for _ in range(count)]
    rng_of(seed, cycle, "mixture").shuffle(order)
    return tuple(order)


@dataclass(frozen=True)
class FilmShot:
    """A shot in a file: ``path``, and which of its frames; ``kind`` and ``prompt`` are handed on."""

    path: Path
    shot: Shot
    size: Size
    kind: str = "film"
    prompt: str = ""


def film_shots(listing: Path, split: str = "train", min_frames: int = 5) -> tuple[FilmShot, ...]:
    """The shots of ``split`` in a ``clips.jsonl`` (scripts/fetch_clips.py), paths relative to its folder."""
    rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    shots = tuple(
        FilmShot(
            listing.parent / row["path"],
            Shot(row["start"], row["end"]),
            Size(row["width"], row["height"]),
            row["kind"],
            row.get("prompt", ""),
        )
        for row in rows
        if row["split"] == split and row["end"] - row["start"] >= min_frames
    )
    if not shots:
        raise UsageError(f"{listing} lists no shot of split {split!r} with at least {min_frames} frames")
    return shots


@dataclass(frozen=True)
class FilmSource:
    """Random windows of ``frames`` consecutive frames inside one shot, at a random crop, scale and mirroring.

    ``sizes``: (size, weight) to draw from; a shot smaller than the size drawn is enlarged at most ``max_upscale``
    times, else another shot is drawn. ``times``: a folder where scans of files are kept, so that later processes need
    not decode whole files first. Raises UsageError at birth if some size finds no shot.
    """

    shots: tuple[FilmShot, ...]
    frames: int
    sizes: tuple[tuple[Size, float], ...]
    seed: int = 0
    max_upscale: float = 1.0
    times: Path | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % GROUP != 1:
            raise UsageError(f"{self.frames} frames are not 4k+1; the nearest is {max(1, self.frames // 4 * 4 + 1)}")
        for size, _ in self.sizes:
            if not self._fitting(size):
                raise UsageError(
                    f"no shot has {self.frames} frames of {size} at {self.max_upscale} times; shrink either"
                )

    def at(self, index: int) -> Pixels:
        rng = rng_of(self.seed, index, "film")
        size = rng.choices([size for size, _ in self.sizes], [weight for _, weight in self.sizes])[0]
        shots = self._fitting(size)
        taken = rng.choices(shots, [shot.shot.frames - self.frames + 1 for shot in shots])[0]
        start = rng.randint(taken.shot.start, taken.shot.end - self.frames)
        crop = random_crop(taken.size, size, rng)
        mirrored = rng.random() < 0.5
        times = scan(taken.path, self.times).times
        pictures = []
        for frame in read_frames(taken.path, start, self.frames, times=times):
            part = resize(frame[:, crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]], size)
            pictures.append(to_bytes(part.flip(2) if mirrored else part))
        name = f"{taken.path.name}@{start}"
        return Pixels(torch.stack(pictures, dim=1), taken.prompt, name, taken.kind)

    def _fitting(self, size: Size) -> list[FilmShot]:
        return [
            shot
            for shot in self.shots
            if shot.shot.frames >= self.frames and upscale(shot.size, size) <= self.max_upscale
        ]


def upscale(given: Size, wanted: Size) -> float:
    """How many times ``given`` has to be enlarged to fill ``wanted`` (below 1: it is shrunk)."""
    return max(wanted.width / given.width, wanted.height / given.height)


def random_crop(given: Size, wanted: Size, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the aspect of ``wanted``: between all that fits and its own pixels, anywhere."""
    largest = 1 / upscale(given, wanted)
    ratio = largest if largest <= 1 else rng.uniform(1.0, largest)
    height, width = (min(given.height, round(wanted.height * ratio)), min(given.width, round(wanted.width * ratio)))
    return rng.randint(0, given.height - height), rng.randint(0, given.width - width), height, width
