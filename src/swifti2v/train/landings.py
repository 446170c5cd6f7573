"""Where a many-step teacher lands from a known noise: what few-step students regress to, made once and kept on disk.

A landing costs as many passes of the teacher as it takes steps, so ``Landings`` remembers it beside the noise's seed;
the window itself comes from its own source. It knows windows and networks that take them, not what is done with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import UsageError
from ..flow import denoised, euler, sigmas
from .distill import POSITIONS_AS_GIVEN, teacher_velocity, window_of
from .files import written
from .objective import Batch, channel_error, noised
from .recipe import Parts
from .recipes_nano import Passes
from .source import Source, seeded

PLACES = (1.0, 0.75, 0.0)  # levels of a student of two steps; 0.75 is the middle of a grid of shift 3


@dataclass(frozen=True)
class TeacherPath:
    """How the teacher comes down from pure noise: Euler steps over ``flow.sigmas(steps, shift)``."""

    steps: int = 30
    shift: float = 3.0


LONG_PATH = TeacherPath()


@dataclass(frozen=True)
class Lesson(Batch):
    """A window with what the teacher makes of it, as far as that is known.

    ``noise_seed``: of the noise at level 1 (``noise_of``). ``landing`` (b, c, segment, h, w): where the teacher's
    path from there ends. ``bases`` (b, steps): mean squared distance from the landing of the teacher's clean estimate
    at each of the student's levels, reached by the student's own few steps. ``index``: the item's number in the run,
    for weights that change as it goes on.
    """

    noise_seed: int | None = None
    landing: Tensor | None = None
    bases: Tensor | None = None
    index: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Lesson:
        """The same lesson on another device."""
        moved = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in (("landing", self.landing), ("bases", self.bases))
        }
        base: Any = super().to(device, non_blocking)
        return replace(base, **moved)


def lesson_of(batch: Batch, **known: Any) -> Lesson:
    """``batch`` as a lesson; ``known``: fields of it to set."""
    kind = Lesson if isinstance(batch, Lesson) else Batch
    return Lesson(**({item.name: getattr(batch, item.name) for item in fields(kind)} | known))


def noise_of(lesson: Lesson) -> Tensor:
    """The noise (b, c, t, h, w) that the lesson's path starts from, on the CPU. ValueError if it has none."""
    if lesson.noise_seed is None:
        raise ValueError("the lesson has no noise_seed")
    return torch.randn(lesson.clean.shape, generator=seeded(lesson.noise_seed, 0, "landing"))


def field(model: nn.Module, batch: Batch) -> Callable[[Tensor, float], Tensor]:
    """The velocity of the segment alone, (b, c, segment, h, w), for ``flow``'s samplers; finished blocks are clean."""
    count, window = batch.context, window_of(batch)
    still = noised(batch, torch.zeros(len(batch.clean)), batch.clean, POSITIONS_AS_GIVEN)
    velocity = teacher_velocity(model, batch, batch.text)

    def of_segment(x: Tensor, sigma: float) -> Tensor:
        whole = torch.cat([still.x[:, :, :count], x], dim=2)
        return velocity(whole, sigma, window, still.reference)[:, :, count:]

    return of_segment


@torch.no_grad()
def landed(
    teacher: nn.Module,
    batch: Batch,
    places: Sequence[float],
    path: TeacherPath,
    seed: int,
    weights: Tensor | None = None,
) -> Lesson:
    """``batch`` with the end of the teacher's path from the noise of ``seed``.

    ``places``: the student's levels, for ``Lesson.bases``; ``weights`` (c,): of channels in them. The teacher's passes:
    ``path.steps`` and one for every step of the student but the first.
    """
    lesson = lesson_of(batch, noise_seed=seed)
    start = noise_of(lesson).to(batch.clean)[:, :, batch.context :]
    velocity = remembering(field(teacher, batch), start)
    landing = euler(velocity, start, sigmas(path.steps, path.shift))
    bases, x = [], start
    for sigma, following in pairwise(places):
        v = velocity(x, sigma)
        bases.append(channel_error(denoised(x, v, sigma), landing, weights))
        x = x + (following - sigma) * v
    return replace(lesson, landing=landing, bases=torch.stack(bases, dim=1))


def remembering(velocity: Callable[[Tensor, float], Tensor], start: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The same field, asked only once about ``start`` at level 1, where every path begins."""
    kept: list[Tensor] = []

    def once(x: Tensor, sigma: float) -> Tensor:
        if x is not start or sigma != 1.0:
            return velocity(x, sigma)
        if not kept:
            kept.append(velocity(x, sigma))
        return kept[0]

    return once


class Landings:
    """The batches of ``source`` as lessons, their landings made by ``teacher`` and remembered in ``folder``.

    What is kept is bound to the teacher's weights, both paths, ``seed`` and the window's bytes; anything else is made
    anew. Without a folder everything is made when it is asked for. ``precision`` "bfloat16" runs the teacher under
    autocast. Landings are kept as float16.
    """

    def __init__(
        self,
        source: Source[Batch],
        teacher: nn.Module,
        places: tuple[float, ...],
        path: TeacherPath,
        folder: Path | None = None,
        *,
        weights: Tensor | None = None,
        precision: str = "float32",
    ) -> None:
        self.source, self.teacher, self.places, self.path = source, teacher, places, path
        self.weights, self.half = weights, precision == "bfloat16"
        told = repr((places, path, precision, None if weights is None else weights.tolist()))
        self.folder = None if folder is None else folder / digest(told, *teacher.state_dict().values())

    def at(self, index: int) -> Lesson:
        batch = self.source.at(index)
        if self.folder is None:
            return self._make(batch, index)
        path, mark = self.folder / f"{index:06d}.npz", digest("", batch.clean, batch.reference, batch.motion_score)
        found = self._read(path, batch, mark)
        return self._keep(path, self._make(batch, index), mark) if found is None else found

    def _make(self, batch: Batch, index: int) -> Lesson:
        device = next(self.teacher.parameters()).device
        was, given = self.teacher.training, batch.to(device)
        self.teacher.eval()
        weights = None if self.weights is None else self.weights.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            made = landed(self.teacher, given, self.places, self.path, index, weights)
        self.teacher.train(was)
        return made.to(batch.clean.device)

    def _read(self, path: Path, batch: Batch, mark: str) -> Lesson | None:
        if not path.exists():
            return None
        with np.load(path) as kept:
            if str(kept["mark"]) != mark:
                return None
            landing, bases = (torch.from_numpy(kept[name]).float() for name in ("landing", "bases"))
            return lesson_of(batch, noise_seed=int(kept["seed"]), landing=landing, bases=bases)

    def _keep(self, path: Path, lesson: Lesson, mark: str) -> Lesson:
        """Written, and given as it will be read: the first time must not differ from the second."""
        assert lesson.landing is not None and lesson.bases is not None
        landing, bases = lesson.landing.to(torch.float16), lesson.bases.float()
        with written(path) as file:
            np.savez(
                file,
                seed=np.array(lesson.noise_seed),
                landing=landing.numpy(),
                bases=bases.numpy(),
                mark=np.array(mark),
            )
        return replace(lesson, landing=landing.float(), bases=bases)


def digest(text: str, *tensors: Tensor | None) -> str:
    """16 hexadecimal digits that stand for a text and the bytes of tensors."""
    found = hashlib.blake2b(text.encode(), digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Numbered:
    """The items of ``source`` as lessons that know their number in the run."""

    source: Source[Batch]

    def at(self, index: int) -> Lesson:
        return lesson_of(self.source.at(index), index=index)


@dataclass(frozen=True)
class Lessons:
    """A recipe's ``source``: lessons from the windows of ``windows``, with landings if ``landings``.

    ``pairs``: of how many windows landings are made; they are gone through again and again. ``folder``: where they are
    kept ("" nowhere).
    """

    windows: Callable[[Parts], Source[Batch]]
    places: tuple[float, ...] = PLACES
    path: TeacherPath = LONG_PATH
    landings: bool = True
    pairs: int = 200
    folder: str = ""
    precision: str = "float32"

    def __call__(self, parts: Parts) -> Source[Batch]:
        source = self.windows(parts)
        if not self.landings:
            return Numbered(source)
        if self.pairs < 1:
            raise UsageError(f"pairs {self.pairs} is below 1: a student needs landings to regress to")
        made = Landings(
            source,
            parts.frozen["teacher"],
            self.places,
            self.path,
            Path(self.folder) if self.folder else None,
            weights=parts.constants.get("channel_weights"),
            precision=self.precision,
        )
        return Numbered(Passes(made, self.pairs))
