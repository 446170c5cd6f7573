"""Few-step students of a many-step teacher, for the same loop: land where it lands, or match what it makes.

``Distillation`` follows the teacher's Euler path from one of the student's noise levels to the next, in ``substeps``
steps on the finer grid that shares those levels; the student must get there in one. "progressive" students then sample
with Euler steps; "consistency" students jump to the clean end of the path and re-noise (``flow.renoise``).
``DistributionMatching`` (DMD, arXiv 2311.18828, 2405.14867) compares scores of teacher and a critic instead.
The teacher is any network behind ``stage_two.Velocity``, guidance folded in.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .. import tiny as twins
from ..core import UsageError
from ..flow import denoised, sigmas, velocity_of
from ..models.mobile_dit import MobileTransformer3DModel
from ..presets import WAN_STAGE_ONE
from ..segments import CSG, Window
from ..stage_one import Conditions, motion_velocity
from ..stage_two import Velocity, dit_velocity, guided
from . import recipes_nano
from .objective import SMALL_BASE, Batch, Levels, Network, Noisy, channel_error, noised, predict, sole, text_states
from .recipe import Loss, Parts, Recipe
from .recipes import TOY_CLIPS, Given, WholeShards, toy, with_lora

POSITIONS_AS_GIVEN = CSG(rope_positions="absolute")  # a batch's frame_indices are positions already
UNKNOWN_LENGTH = 1 << 30  # trained_blocks does not matter to absolute positions


@dataclass(frozen=True)
class Teacher:
    """What kind of network the teacher is and how strongly it is guided."""

    network: Network = "window"
    guidance_scale: float = 1.0


PLAIN, CRITIC_LEVELS = Teacher(), Levels(low=0.02)


def teacher_velocity(
    teacher: nn.Module, batch: Batch, text: Tensor | None, rule: Teacher = PLAIN, null: Tensor | None = None
) -> Velocity:
    """The frozen teacher as the samplers see it; ``null`` (l, d): negative text for guidance above 1."""
    negative = None if null is None or text is None else null.to(text).expand_as(text)
    if rule.guidance_scale != 1.0 and negative is None:
        raise UsageError('a teacher guided above 1 needs constants["null_text"], the states of its negative prompt')
    if rule.network == "wan_image":
        told = Conditions(text, negative, batch.image, rule.guidance_scale)
        return motion_velocity(teacher, told, CSG(rope_positions="window"), UNKNOWN_LENGTH)
    scale = rule.guidance_scale
    if batch.motion_score is not None:

        def at_motion(x: Tensor, sigma: float, window: Window, reference: Tensor) -> Tensor:
            levels = torch.tensor([window.sigmas(sigma, POSITIONS_AS_GIVEN)], device=x.device).expand(len(x), -1)
            noisy = Noisy(x, levels, x, levels[:, -1], reference)
            return guided(lambda states: predict(teacher, noisy, batch, states, "window"), text, negative, scale)

        return at_motion
    return dit_velocity(
        teacher, text, POSITIONS_AS_GIVEN, trained_blocks=UNKNOWN_LENGTH, guidance_scale=scale, negative_text=negative
    )


def window_of(batch: Batch) -> Window:
    """The window whose absolute positions are the batch's."""
    places = tuple(batch.frame_indices.tolist())
    anchor = places[0] if batch.context else None
    return Window(anchor, places[1 : batch.context] if batch.context else (), places[batch.context :])


@dataclass(frozen=True)
class Distillation:
    """The student lands in one step where the teacher lands in ``substeps``, at ``steps`` levels of ``shift``.

    Error and base, for the log: squared distance of the student's landing, and of the teacher's own single step, from
    the teacher's landing; a ratio below 1 is what distillation gains.
    ``weighting`` "residual": quiet items count as much as busy ones, as in ``FlowMatching``.
    """

    steps: int = 4
    substeps: int = 4
    shift: float = 5.0
    kind: Literal["progressive", "consistency"] = "progressive"
    teacher: Teacher = PLAIN
    weighting: Literal["velocity", "residual"] = "velocity"
    model: str = ""
    text_length: int = 128

    def __call__(self, parts: Parts, item: Batch, generator: torch.Generator) -> Loss:
        place = int(torch.randint(self.steps, (), generator=generator))
        path = sigmas(self.steps * self.substeps, self.shift)[place * self.substeps : (place + 1) * self.substeps + 1]
        noise = torch.randn(item.clean.shape, generator=generator)
        noisy = noised(item, torch.full((len(item.clean),), path[0]), noise, POSITIONS_AS_GIVEN)
        text = text_states(parts, item, self.text_length)
        student, null = sole(parts, self.model), parts.constants.get("null_text")
        with torch.no_grad():
            velocity = teacher_velocity(parts.frozen["teacher"], item, text, self.teacher, null)
            landing, single = follow(velocity, item, noisy, path)
            target = self._target(student, item, noisy, landing, path, text)
        count = item.context
        guess = predict(student, noisy, item, text, self.teacher.network)[:, :, count:]
        weights, stride = parts.constants.get("channel_weights"), path[0] - path[-1]
        each = channel_error(guess, target, weights)
        value = each
        if self.weighting == "residual":
            base = channel_error(item.reference[:, :, count:], item.clean[:, :, count:], weights)
            value = each * (base + SMALL_BASE).rsqrt()
        reached = noisy.x[:, :, count:] - stride * guess.detach()
        errors = [channel_error(x, landing, weights).mean() for x in (reached, single)]
        return Loss(value.mean(), *errors)

    def _target(
        self,
        student: nn.Module,
        batch: Batch,
        noisy: Noisy,
        landing: Tensor,
        path: tuple[float, ...],
        text: Tensor | None,
    ) -> Tensor:
        """The velocity that leads to the landing, or on from there to where the student itself says the path ends."""
        start, count = noisy.x[:, :, batch.context :], batch.context
        if self.kind == "progressive" or path[-1] == 0:
            return (start - landing) / (path[0] - path[-1])
        sigma = torch.full_like(noisy.sigma, path[-1])
        there = replace(
            noisy, x=torch.cat([noisy.x[:, :, :count], landing], dim=2), sigma=sigma, levels=_told(noisy, sigma)
        )
        ahead = predict(student, there, batch, text, self.teacher.network)[:, :, count:]
        return (start - denoised(landing, ahead, path[-1])) / path[0]


def _told(noisy: Noisy, sigma: Tensor) -> Tensor:
    """The levels of a window whose segment is at ``sigma``; its context stays clean."""
    return torch.where(noisy.levels > 0, sigma[:, None], noisy.levels)


def follow(velocity: Velocity, batch: Batch, noisy: Noisy, path: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The segment after Euler steps down ``path``, and after one step of its whole length; finished blocks stay."""
    window, count = window_of(batch), batch.context
    context, x = noisy.x[:, :, :count], noisy.x[:, :, count:]
    single = x
    for number, (sigma, following) in enumerate(pairwise(path)):
        v = velocity(torch.cat([context, x], dim=2), sigma, window, noisy.reference)[:, :, count:]
        if number == 0:
            single = x + (path[-1] - sigma) * v
        x = x + (following - sigma) * v
    return x, single


@dataclass(frozen=True)
class DistributionMatching:
    """The student's clips should be as likely to the teacher as to a critic that knows the student alone.

    ``modules["critic"]`` is trained beside the student, on its outputs, by flow matching. ``share``: of items on which
    the student learns too (the critic must keep up). Error and base: how far teacher and critic disagree, and the
    teacher's own correction of the student's output.
    """

    steps: int = 4
    shift: float = 5.0
    levels: Levels = CRITIC_LEVELS
    teacher: Teacher = PLAIN
    share: float = 0.2
    model: str = ""
    text_length: int = 128

    def __call__(self, parts: Parts, item: Batch, generator: torch.Generator) -> Loss:
        levels, count = sigmas(self.steps, self.shift), item.context
        start = torch.full((len(item.clean),), levels[int(torch.randint(self.steps, (), generator=generator))])
        learns = float(torch.rand((), generator=generator)) < self.share
        noises = [torch.randn(item.clean.shape, generator=generator) for _ in range(3)]
        text = text_states(parts, item, self.text_length)
        noisy = noised(item, start, noises[0], POSITIONS_AS_GIVEN)
        velocity = predict(sole(parts, self.model), noisy, item, text, self.teacher.network)
        broad = noisy.sigma[:, None, None, None, None]
        made = denoised(noisy.x[:, :, count:], velocity[:, :, count:], broad)
        fake = replace(item, clean=torch.cat([item.clean[:, :, :count], made.detach()], dim=2))
        gradient, apart, corrected = self.correction(parts, fake, text, noises[1], generator)
        critic = self.critic_loss(parts, fake, text, noises[2], generator)
        # Times 0 rather than left out: sharded processes that draw differently must still gather the same layers.
        return Loss((made * gradient).mean() * float(learns) + critic, apart, corrected)

    @torch.no_grad()
    def correction(
        self, parts: Parts, fake: Batch, text: Tensor | None, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the student's clean output should not go: critic's estimate minus teacher's, of common size."""
        sigma = self.levels.draw(1, generator).to(fake.clean)
        noisy = noised(fake, sigma.expand(len(fake.clean)), noise, POSITIONS_AS_GIVEN)
        null, count = parts.constants.get("null_text"), fake.context
        teacher = teacher_velocity(parts.frozen["teacher"], fake, text, self.teacher, null)
        v_real = teacher(noisy.x, float(sigma), window_of(fake), noisy.reference)[:, :, count:]
        v_fake = predict(parts.modules["critic"], noisy, fake, text, self.teacher.network)[:, :, count:]
        x, made = noisy.x[:, :, count:], fake.clean[:, :, count:]
        real, critic = (denoised(x, v, float(sigma)) for v in (v_real, v_fake))
        size = (made - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-4)
        return (critic - real) / size, (critic - real).square().mean(), (made - real).square().mean()

    def critic_loss(
        self, parts: Parts, fake: Batch, text: Tensor | None, noise: Tensor, generator: torch.Generator
    ) -> Tensor:
        """How badly the critic denoises ``fake``, whose segment the student made."""
        noisy = noised(fake, self.levels.draw(len(fake.clean), generator), noise, POSITIONS_AS_GIVEN)
        guess = predict(parts.modules["critic"], noisy, fake, text, self.teacher.network)
        return (guess - velocity_of(fake.clean, noisy.noise))[:, :, fake.context :].square().mean()


# -- recipes ------------------------------------------------------------------------------------------------------


def taught(parts: Parts, teacher: nn.Module, critic: bool = False) -> Parts:
    """``parts`` with a frozen teacher and, for distribution matching, a critic that starts as the teacher."""
    modules = dict(parts.modules)
    if critic:
        modules["critic"] = deepcopy(teacher).requires_grad_(True)
    inner = ("critic",) if critic else ()
    return replace(parts, modules=modules, frozen={**parts.frozen, "teacher": teacher}, inner=inner)


def nano_parts(base: Path | None, tiny: bool, critic: bool = False) -> Parts:
    """nano's Stage I twice, from ``base`` or the package: a frozen teacher and the student that starts as its copy."""
    parts = recipes_nano.dit_parts("one", tiny, recipes_nano.package("vae"), recipes_nano.package("text_encoder"))
    model: Any = parts.modules["transformer"]
    if tiny:
        nn.init.normal_(model.proj_out.weight, std=0.02)  # zero at first: there would be nothing to learn from it
    else:
        folder = base or recipes_nano.package("transformer")
        model = MobileTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    return taught(replace(parts, modules={"transformer": model}), deepcopy(model), critic)


def wan_parts(base: str, rank: int, tiny: bool) -> Parts:
    """Wan2.1-I2V twice, in bfloat16: a frozen teacher, and a student that is the same under a new LoRA."""
    if tiny:
        wan: Any = twins.wan_stage_one_dit()
    else:
        wan = WanTransformer3DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.bfloat16)
    return taught(Parts({"transformer": with_lora(deepcopy(wan), rank)}), wan)


def nano_one_few(given: Given) -> Recipe:
    """nano's Stage I in 4 steps, from the trained one (--base FOLDER, or the package's)."""
    base = None if given.base is None else Path(given.base)
    recipe = replace(
        recipes_nano.nano_stage("one", given.data, given.tiny),
        name="nano_one_few",
        build=partial(nano_parts, base, given.tiny),
        objective=Distillation(weighting="residual", text_length=recipes_nano.TEXT_LENGTH),
        steps=1500,
        lr=3e-4,
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe


def nano_one_dmd(given: Given) -> Recipe:
    """nano's Stage I in 4 steps by distribution matching: sharper where many motions are possible, less exact."""
    recipe = nano_one_few(given)
    base = None if given.base is None else Path(given.base)
    build = partial(nano_parts, base, given.tiny, critic=True)
    objective = DistributionMatching(text_length=recipes_nano.TEXT_LENGTH)
    name = "nano_one_dmd"
    return replace(recipe, name=name, build=build, objective=objective, optimizer="adamw", lr=1e-4)


def stage_one_few(given: Given) -> Recipe:
    """A 4-step LoRA for Wan2.1-I2V-14B (or what --base holds) from its own 40 steps."""
    recipe = Recipe(
        "stage_one_few",
        partial(wan_parts, given.base or WAN_STAGE_ONE, 4 if given.tiny else 64, given.tiny),
        partial(recipes_nano.made_up, source=TOY_CLIPS) if given.tiny else WholeShards(given.data),
        Distillation(substeps=10, teacher=Teacher("wan_image")),
        steps=3000,
        lr=5e-5,
        decay=1,
        betas=(0.9, 0.999),
        ema_decay=0.99,
        accumulation=4,
        gradient_checkpointing=True,
        save_every=100,
    )
    return (
        toy(replace(recipe, objective=Distillation(substeps=2, teacher=Teacher("wan_image"))), lr=1e-2)
        if given.tiny
        else recipe
    )


DISTILLATIONS = {"nano_one_few": nano_one_few, "nano_one_dmd": nano_one_dmd, "stage_one_few": stage_one_few}
