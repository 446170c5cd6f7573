"""Few-step students of MobileI2V: two steps, then one, from a many-step teacher (arXiv 2511.21475 names three losses).

In rectified-flow variables, over windows whose finished blocks stay as they are: ``regression`` to where the teacher
lands from the same noise, ``distribution`` matching against a critic that follows the student (DMD2), and an
``adversarial`` term on the teacher's own features (LADD). A weight of 0 switches a loss off, and then its networks are
neither built nor run. The paper gives no numbers for any of it: the schedules here are this project's.

Students sample with Euler steps: landings are functions of the first noise, which fresh noise would wash out of the
second step, and one seed then gives the same motion in one step, two, and the teacher's thirty.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import UsageError
from ..flow import denoised, euler
from . import mobile, mobile_nano
from .adversarial import Adversary, Heads
from .distill import DistributionMatching, taught
from .landings import LONG_PATH, PLACES, Lesson, Lessons, TeacherPath, field, landed, lesson_of, noise_of
from .objective import Batch, Levels, channel_error
from .recipe import Loss, Parts, Recipe
from .recipes import Given, toy
from .source import seeded

HUBER = 0.01  # root mean square below which the pseudo-Huber distance is a square
ONE_STEP = (1.0, 0.0)
ADVERSARY = Adversary()
MATCHING = DistributionMatching(levels=Levels(shift=3.0, low=0.02))
STUDENT = "transformer"


@dataclass(frozen=True)
class FewSteps:
    """The student's clean estimate at one of its ``levels``, which it reaches by its own Euler steps, and what is wrong
    with it.

    ``regression``: weight of the distance from the teacher's landing (``Lesson.landing``; without one the teacher walks
    its ``path`` there and then), falling over the first ``fade`` items to ``regression_last`` of it. "huber" counts
    items by their root mean square, "mse" by their mean square. ``distribution``: of ``matching``'s gradient, which has
    ``modules["critic"]`` learn beside. ``adversarial``: of fooling ``modules["heads"]``. The latter two reach the
    student on a ``share`` of items; critic and heads learn on all. Every loss draws its own noise: switching one does
    not change another.

    Error and base, for the log: squared distance from the landing of the student's estimate and of the teacher's, got
    in as few steps; without landings, of the estimate and of the bare reference from the truth.
    """

    levels: tuple[float, ...] = PLACES
    regression: float = 1.0
    distribution: float = 1.0
    adversarial: float = 0.1
    regression_last: float = 0.25
    fade: int = 3000
    distance: Literal["huber", "mse"] = "huber"
    share: float = 0.2
    path: TeacherPath = LONG_PATH
    matching: DistributionMatching = MATCHING
    adversary: Adversary = ADVERSARY

    def __post_init__(self) -> None:
        ends = (self.levels[0], self.levels[-1]) if len(self.levels) > 1 else ()
        if ends != (1.0, 0.0) or any(a <= b for a, b in pairwise(self.levels)):
            raise UsageError(f"levels {self.levels} do not fall from 1 to 0, as (1.0, 0.75, 0.0) do")
        weights = (self.regression, self.distribution, self.adversarial)
        if min(weights) < 0 or not any(weights):
            raise UsageError(
                f"weights {weights} of regression, distribution, adversarial: 0 or more, one of them above"
            )

    def __call__(self, parts: Parts, item: Batch, generator: torch.Generator) -> Loss:
        root = int(torch.randint(1 << 62, (), generator=generator))
        place = int(torch.randint(len(self.levels) - 1, (), generator=generator))
        learns = float(torch.rand((), generator=generator) < self.share)
        weights, lesson = parts.constants.get("channel_weights"), self._lesson(parts, item, root)
        made = self._made(parts.modules[STUDENT], lesson, place)
        value = made.new_zeros(())
        if self.regression:
            value = value + self._regression(lesson, made, weights)
        # Times 0 rather than left out: sharded processes that draw differently must still gather the same layers.
        if self.distribution:
            pull, critic = self._matching(parts, lesson, made, seeded(root, 0, "distribution"))
            value = value + self.distribution * learns * pull + critic
        if self.adversarial:
            draws = seeded(root, 0, "adversarial")
            judged = self.adversary(parts.frozen["teacher"], parts.modules["heads"], lesson, made, draws)
            value = value + self.adversarial * learns * judged.fooled + judged.told
        return Loss(value, *_errors(lesson, made.detach(), place, weights))

    def _lesson(self, parts: Parts, item: Batch, root: int) -> Lesson:
        """With its noise, and a landing if that is needed and not there yet."""
        lesson = item if isinstance(item, Lesson) else lesson_of(item)
        if self.regression and lesson.landing is None:
            weights = parts.constants.get("channel_weights")
            index = lesson.index
            return replace(landed(parts.frozen["teacher"], lesson, self.levels, self.path, root, weights), index=index)
        return lesson if lesson.noise_seed is not None else replace(lesson, noise_seed=root)

    def _made(self, student: nn.Module, lesson: Lesson, place: int) -> Tensor:
        """The clean estimate (b, c, segment, h, w) at ``levels[place]``, reached as at inference, without gradient."""
        velocity, start = field(student, lesson), noise_of(lesson).to(lesson.clean)[:, :, lesson.context :]
        # Processes that share a student's layers must run it equally often, wherever each of them learns.
        passes = len(self.levels) - 2 if dist.is_available() and dist.is_initialized() else place
        x, reached = start, start
        with torch.no_grad():
            for number in range(passes):
                x = euler(velocity, x, self.levels[number : number + 2])
                reached = x if number + 1 == place else reached
        sigma = self.levels[place]
        return denoised(reached, velocity(reached, sigma), sigma)

    def _regression(self, lesson: Lesson, made: Tensor, weights: Tensor | None) -> Tensor:
        assert lesson.landing is not None
        error = channel_error(made, lesson.landing, weights)
        each = error if self.distance == "mse" else (error + HUBER**2).sqrt() - HUBER
        return self.weight_at(lesson.index) * each.mean()

    def weight_at(self, index: int) -> float:
        """Of the regression at item ``index``: linear from ``regression`` to its ``regression_last``-th part."""
        done = min(1.0, index / self.fade) if self.fade else 0.0
        return self.regression * (1 - done * (1 - self.regression_last))

    def _matching(
        self, parts: Parts, lesson: Lesson, made: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What pulls the student to the teacher, and what the critic learns from its output."""
        fake = replace(lesson, clean=torch.cat([lesson.clean[:, :, : lesson.context], made.detach()], dim=2))
        noises = [torch.randn(lesson.clean.shape, generator=generator) for _ in range(2)]
        gradient, _, _ = self.matching.correction(parts, fake, lesson.text, noises[0], generator)
        return (made * gradient).mean(), self.matching.critic_loss(parts, fake, lesson.text, noises[1], generator)


def _errors(lesson: Lesson, made: Tensor, place: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if lesson.landing is not None and lesson.bases is not None:
        return channel_error(made, lesson.landing, weights).mean(), lesson.bases[:, place].mean()
    clean = lesson.clean[:, :, lesson.context :]
    bare = lesson.reference[:, : clean.shape[1], lesson.context :]
    error, base = (channel_error(x, clean, weights).mean() for x in (made, bare))
    return error, base


# -- networks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pupils:
    """A recipe's ``build``: a frozen teacher, the student, and what the losses need beside them.

    ``network`` makes ``Parts`` with the network of a folder. ``init``: the student's start if it is not the teacher
    (the two-step student, for one that shall do with one). ``layers``: of the teacher, for the heads of ``width``.
    """

    network: Callable[[str], Parts]
    teacher: str = ""
    init: str = ""
    critic: bool = False
    heads: bool = False
    layers: tuple[int, ...] = (3, 7, 11, 15)
    width: int = 64

    def __call__(self) -> Parts:
        parts = self.network(self.teacher)
        teacher: Any = parts.modules[STUDENT]
        student = self.network(self.init).modules[STUDENT] if self.init else deepcopy(teacher)
        found = taught(replace(parts, modules={STUDENT: student}), teacher.requires_grad_(False), self.critic)
        if not self.heads:
            return found
        heads = Heads(teacher.config.hidden_size, self.layers, self.width)
        return replace(found, modules={**found.modules, "heads": heads}, inner=(*found.inner, "heads"))


@dataclass(frozen=True)
class StudentRecipe(Recipe):
    """A recipe whose networks and lessons follow its objective: what a weight of 0 switches off is not built."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = self.objective
        if not isinstance(rule, FewSteps):
            return
        if isinstance(self.build, Pupils):
            build = replace(self.build, critic=rule.distribution > 0, heads=rule.adversarial > 0)
            object.__setattr__(self, "build", build)
        if isinstance(self.source, Lessons):
            lands = rule.regression > 0
            source = replace(self.source, places=rule.levels, path=rule.path, landings=lands)
            object.__setattr__(self, "source", source)


# -- recipes ------------------------------------------------------------------------------------------------------


def nano_network(tiny: bool, folder: str) -> Parts:
    """mobile-nano's; at toy size one that already says something."""
    parts = mobile_nano.parts(tiny, folder or None)
    if tiny and not folder:
        model: Any = parts.modules[STUDENT]
        nn.init.normal_(model.proj_out.weight, std=0.02)
    return parts


def mobile_network(tiny: bool, folder: str) -> Parts:
    """MobileI2V's."""
    return mobile.parts(tiny, folder or None)


def mobile_nano_two(given: Given) -> Recipe:
    """mobile-nano in two steps, from the many-step one in --base FOLDER (photos.jsonl)."""
    return _nano_student("mobile_nano_two", given, FewSteps(fade=300))


def mobile_nano_one(given: Given) -> Recipe:
    """mobile-nano in one step: --base the many-step FOLDER, --set build.init=the two-step student's."""
    return _nano_student("mobile_nano_one", given, FewSteps(ONE_STEP, fade=300))


def _nano_student(name: str, given: Given, rule: FewSteps) -> Recipe:
    base = _base(given, name)
    plain = mobile_nano.mobile_nano(replace(given, base=None))
    toys, folder = given.tiny, _beside(given, "cache/landings")
    recipe = StudentRecipe(
        **{item.name: getattr(plain, item.name) for item in fields(Recipe)}
        | {
            "name": name,
            "build": Pupils(
                partial(nano_network, toys), base, layers=(0, 1) if toys else (2, 4), width=8 if toys else 64
            ),
            "source": Lessons(
                mobile_nano.source(given.data, toys, small=True),
                pairs=40,
                folder=folder,
                precision="float32" if toys else "bfloat16",
            ),
            "objective": replace(rule, path=TeacherPath(4)) if toys else rule,
            "steps": 300,
            "lr": 3e-4,
            "decay": 150,
            "optimizer": "adamw",
            "ema_decay": 0.99,
            "sample": mobile_nano.MotionVideos(steps=len(rule.levels) - 1),
        }
    )
    return toy(recipe, lr=3e-3) if toys else recipe


def mobile_few(given: Given) -> Recipe:
    """MobileI2V in two steps, from the many-step one in --base FOLDER, on latent shards."""
    toys, base = given.tiny, _base(given, "mobile_few")
    recipe = StudentRecipe(
        "mobile_few",
        Pupils(
            partial(mobile_network, toys), base, layers=(0, 1) if toys else (3, 7, 11, 15), width=8 if toys else 128
        ),
        Lessons(mobile.source(given), pairs=200 if toys else 10_000, folder=_beside(given, "landings")),
        FewSteps(path=TeacherPath(4)) if toys else FewSteps(fade=100_000),
        steps=10_000,
        lr=1e-5,
        warmup=500,
        betas=(0.9, 0.999),
        ema_decay=0.999,
        accumulation=4,
        gradient_checkpointing=True,
    )
    return toy(recipe, lr=3e-3) if toys else recipe


def _beside(given: Given, name: str) -> str:
    """A folder for landings: in a folder of shards, beside a listing; none at toy size or without data."""
    if given.tiny or not given.data:
        return ""
    data = given.data[0]
    return str((data if data.is_dir() else data.parent) / name)


def _base(given: Given, name: str) -> str:
    if given.base is None and not given.tiny:
        raise UsageError(f"{name} needs --base FOLDER: the many-step network it learns from")
    return given.base or ""


STUDENTS = {"mobile_few": mobile_few, "mobile_nano_two": mobile_nano_two, "mobile_nano_one": mobile_nano_one}
