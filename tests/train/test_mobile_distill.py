"""Few-step students of MobileI2V: each loss by itself, what is built for it, who learns from it, and that it helps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import on_one_item
from torch import Tensor, nn
from toys import losses, rows, small_dit

from swifti2v.core import UsageError
from swifti2v.flow import denoised, euler, sigmas
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.segments import CSG
from swifti2v.train import mobile_distill
from swifti2v.train.adversarial import Heads
from swifti2v.train.distill import taught
from swifti2v.train.export import export
from swifti2v.train.landings import Landings, Lesson, Numbered, TeacherPath, field, landed, lesson_of, noise_of
from swifti2v.train.loop import train
from swifti2v.train.mobile_distill import ONE_STEP, STUDENTS, FewSteps
from swifti2v.train.objective import Batch, channel_error, noised, predict
from swifti2v.train.recipe import Parts, record
from swifti2v.train.recipes import Given, changed, make
from swifti2v.train.recipes_nano import MadeUp
from swifti2v.train.source import Repeated, seeded

WINDOW = MadeUp(4, context=2, positions=(0, 3, 4, 5), scored=True)
PATH = TeacherPath(4)
OFF = {"regression": 0.0, "distribution": 0.0, "adversarial": 0.0}


def network(**changes: Any) -> Any:
    """A toy network that hears the motion score and really uses it."""
    model = small_dit(motion_embedding=True, **changes)
    nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


@pytest.fixture
def teacher() -> Any:
    return network().requires_grad_(False)


def only(**weights: float) -> FewSteps:
    """The losses named alone; the student's turn always comes."""
    return FewSteps(**OFF | weights, path=PATH, share=1.0)  # type: ignore[arg-type]


def pupils(teacher: nn.Module) -> Parts:
    """Student, critic and heads of a teacher; the student is another network."""
    found = taught(Parts({"transformer": network()}), teacher, critic=True)
    return replace(found, modules={**found.modules, "heads": Heads(24, (0, 1), 8)}, inner=("critic", "heads"))


def lesson(teacher: nn.Module, index: int = 0) -> Lesson:
    return replace(landed(teacher, WINDOW.at(0), (1.0, 0.75, 0.0), PATH, seed=3), index=index)


def grown(parts: Parts) -> set[str]:
    """Modules that got a gradient which is not zero."""
    got = {
        name: [p.grad for p in module.parameters() if p.grad is not None]
        for name, module in (parts.modules | parts.frozen).items()
    }
    return {name for name, gradients in got.items() if any(bool(g.any()) for g in gradients)}


# -- levels ---------------------------------------------------------------------------------------------------------


def test_a_student_of_two_steps_stands_where_the_teachers_grid_says() -> None:
    assert sigmas(2, 3.0) == (1.0, 0.75, 0.0) == FewSteps().levels
    assert sigmas(1, 3.0) == ONE_STEP
    for wrong in ((1.0,), (0.9, 0.0), (1.0, 0.5), (1.0, 0.2, 0.75, 0.0)):
        with pytest.raises(UsageError, match="do not fall from 1 to 0"):
            FewSteps(levels=wrong)
    for weights in (OFF, OFF | {"regression": -1.0}):
        with pytest.raises(UsageError, match="one of them above"):
            FewSteps(**weights)


# -- landings -------------------------------------------------------------------------------------------------------


def test_a_landing_is_where_the_sampler_ends(teacher: Any) -> None:
    """Written out with the objective's own ``predict``; finished blocks clean, the score told."""
    item, found = WINDOW.at(0), lesson(teacher)
    start = noise_of(found)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        told = torch.full((2,), sigma)
        noisy = noised(item, told, start, CSG())
        whole = torch.cat([item.clean[:, :, :2], x], dim=2)
        return predict(teacher, replace(noisy, x=whole), item, None, "window")[:, :, 2:]

    with torch.no_grad():
        x = start[:, :, 2:]
        landing = euler(velocity, x, sigmas(4, 3.0))
        middle = euler(velocity, x, (1.0, 0.75))
        first, second = denoised(x, velocity(x, 1.0), 1.0), denoised(middle, velocity(middle, 0.75), 0.75)
    assert found.landing is not None and found.bases is not None
    assert torch.allclose(found.landing, landing, atol=1e-5)
    expected = torch.stack([channel_error(guess, landing, None) for guess in (first, second)], dim=1)
    assert torch.allclose(found.bases, expected, rtol=1e-3, atol=1e-7) and bool((found.bases > 1e-6).all())


def test_the_teacher_hears_the_motion_score(teacher: Any) -> None:
    item = WINDOW.at(0)
    fast = replace(item, motion_score=10 * item.motion_score)  # type: ignore[operator]
    landings = [landed(teacher, batch, ONE_STEP, PATH, seed=3).landing for batch in (item, fast)]
    assert not torch.allclose(*landings)  # type: ignore[arg-type]


class Counting:
    """How often a network was asked."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.passes += 1


def test_landings_are_made_once_and_belong_to_their_teacher(teacher: Any, tmp_path: Path) -> None:
    asked = Counting(teacher)
    source = Landings(WINDOW, teacher, (1.0, 0.75, 0.0), PATH, tmp_path)
    first = source.at(5)
    assert asked.passes == 4 + 1  # the student's second step; its first is the path's own
    again = Landings(WINDOW, teacher, (1.0, 0.75, 0.0), PATH, tmp_path).at(5)
    assert asked.passes == 5 and torch.equal(again.landing, first.landing)  # type: ignore[arg-type]
    assert torch.equal(noise_of(again), noise_of(first)) and torch.equal(again.clean, first.clean)
    assert torch.equal(again.motion_score, WINDOW.at(5).motion_score)  # type: ignore[arg-type]
    Landings(replace(WINDOW, count=1), teacher, (1.0, 0.75, 0.0), PATH, tmp_path).at(5)
    assert asked.passes == 10  # other windows
    Landings(WINDOW, teacher, ONE_STEP, PATH, tmp_path).at(5)
    assert asked.passes == 14  # another student
    nn.init.normal_(teacher.proj_out.weight, std=0.2)
    other = Landings(WINDOW, teacher, (1.0, 0.75, 0.0), PATH, tmp_path).at(5)
    assert asked.passes == 19 and not torch.allclose(other.landing, first.landing)  # type: ignore[arg-type]


def test_a_lesson_travels_whole_and_knows_its_number(teacher: Any) -> None:
    source = Numbered(Repeated(Landings(WINDOW, teacher, ONE_STEP, PATH)))
    found = source.at(7)
    assert found.index == 7 and found.noise_seed == 0 and isinstance(Numbered(WINDOW).at(2), Lesson)
    moved = found.to("meta")
    assert moved.landing is not None and moved.landing.is_meta and moved.bases is not None and moved.bases.is_meta
    assert moved.index == 7 and moved.clean.is_meta and found.clean.device.type == "cpu"


# -- what the student is asked --------------------------------------------------------------------------------------


def test_the_students_estimate_is_that_of_the_sampler(teacher: Any) -> None:
    """Both steps of a student, from the noise of its lesson, as ``flow.euler`` takes them."""
    parts, item = pupils(teacher), lesson(teacher)
    student = parts.modules["transformer"]
    start = noise_of(item)[:, :, 2:]
    velocity = field(student, item)
    with torch.no_grad():
        end = euler(velocity, start, (1.0, 0.75, 0.0))
        estimates = [denoised(start, velocity(start, 1.0), 1.0), end]
    seen = set()
    for index in range(8):
        loss = only(regression=1.0)(parts, item, seeded(0, index))
        error = [float(channel_error(guess, item.landing, None).mean()) for guess in estimates]  # type: ignore[arg-type]
        place = min((0, 1), key=lambda i: abs(error[i] - float(loss.error)))
        assert float(loss.error) == pytest.approx(error[place], rel=1e-4)
        assert float(loss.base) == pytest.approx(float(item.bases[:, place].mean()), rel=1e-4)  # type: ignore[index]
        seen.add(place)
    assert seen == {0, 1}


def test_a_student_that_is_its_teacher_is_as_good_as_it(teacher: Any) -> None:
    parts = taught(Parts({"transformer": deepcopy(teacher).requires_grad_(True)}), teacher)
    loss = only(regression=1.0)(parts, lesson(teacher), seeded(0, 0))
    assert float(loss.error) == pytest.approx(float(loss.base), rel=1e-4) and float(loss.base) > 0
    alone = replace(only(regression=1.0), path=TeacherPath(1), levels=ONE_STEP)
    assert float(alone(parts, WINDOW.at(0), seeded(0, 0)).value.detach()) < 1e-3


def test_a_landing_that_is_missing_is_made_there_and_then(teacher: Any) -> None:
    asked = Counting(teacher)
    loss = only(regression=1.0)(pupils(teacher), WINDOW.at(0), seeded(0, 0))
    assert asked.passes == 5 and float(loss.base) > 0
    only(distribution=1.0)(pupils(teacher), WINDOW.at(0), seeded(0, 0))
    assert asked.passes == 6


def test_regression_fades(teacher: Any) -> None:
    rule = replace(only(regression=2.0), fade=100)
    parts = pupils(teacher)
    values = [float(rule(parts, lesson(teacher, index), seeded(0, 0)).value.detach()) for index in (0, 50, 100, 500)]
    shares = [value / values[0] for value in values]
    assert shares == pytest.approx([1.0, 0.625, 0.25, 0.25], rel=1e-5)


def test_distances_by_hand(teacher: Any) -> None:
    parts, item = pupils(teacher), lesson(teacher)
    square = replace(only(regression=1.0), distance="mse")(parts, item, seeded(0, 0))
    assert float(square.value) == pytest.approx(float(square.error), rel=1e-5)
    huber = replace(only(regression=1.0), levels=ONE_STEP)
    one = replace(item, bases=item.bases[:, :1])  # type: ignore[index]
    with torch.no_grad():
        start = noise_of(one)[:, :, 2:]
        made = denoised(start, field(parts.modules["transformer"], one)(start, 1.0), 1.0)
        each = (made - one.landing).square().mean(dim=(1, 2, 3, 4))  # type: ignore[operator]
    expected = ((each + 1e-4).sqrt() - 0.01).mean()
    assert float(huber(parts, one, seeded(0, 0)).value.detach()) == pytest.approx(float(expected), rel=1e-5)


# -- switches -------------------------------------------------------------------------------------------------------


def test_each_loss_teaches_whom_it_should(teacher: Any) -> None:
    expected = {
        "regression": {"transformer"},
        "distribution": {"transformer", "critic"},
        "adversarial": {"transformer", "heads"},
    }
    total, item = 0.0, lesson(teacher)
    torch.manual_seed(0)
    apart = pupils(teacher)
    nn.init.normal_(apart.modules["critic"].proj_out.weight, std=0.3)  # type: ignore[union-attr,arg-type]
    for name, learned in expected.items():
        parts = deepcopy(apart)
        value = only(**{name: 0.5})(parts, item, seeded(0, 1)).value
        value.backward()
        assert grown(parts) == learned, name
        total += float(value.detach())
    every = FewSteps(regression=0.5, distribution=0.5, adversarial=0.5, path=PATH, share=1.0)
    assert float(every(apart, item, seeded(0, 1)).value.detach()) == pytest.approx(total, rel=1e-4)


def test_between_its_turns_the_student_only_regresses(teacher: Any) -> None:
    parts = pupils(teacher)
    rule = FewSteps(regression=0.0, path=PATH, share=0.0)
    rule(parts, lesson(teacher), seeded(0, 0)).value.backward()
    assert grown(parts) == {"critic", "heads"}
    assert all(p.grad is not None for p in parts.modules["transformer"].proj_out.parameters())  # type: ignore[union-attr]
    again = pupils(teacher)
    replace(rule, regression=1.0)(again, lesson(teacher), seeded(0, 0)).value.backward()
    assert grown(again) == {"transformer", "critic", "heads"}


@pytest.mark.parametrize("off", ["regression", "distribution", "adversarial"])
def test_what_is_switched_off_is_not_built(off: str) -> None:
    recipe = changed(make("mobile_nano_two", tiny=True), f"objective.{off}", "0.0")
    parts = recipe.build()
    beside = {"critic": "distribution", "heads": "adversarial"}
    assert set(parts.modules) == {"transformer", *(name for name, loss in beside.items() if loss != off)}
    assert set(parts.inner) == set(parts.modules) - {"transformer"}
    found = recipe.source(parts).at(0)
    assert (found.landing is None) == (off == "regression")
    recipe.objective(parts, found, seeded(0, 0)).value.backward()
    assert all(p.grad is None for p in parts.frozen["teacher"].parameters())


def test_a_recipe_follows_its_objective() -> None:
    recipe = changed(make("mobile_nano_two", tiny=True), "objective.levels", "[1.0, 0.5, 0.0]")
    assert recipe.source.places == (1.0, 0.5, 0.0)  # type: ignore[attr-defined]
    assert record(recipe, 1)["build"]["critic"] is True
    fewer = changed(recipe, "objective.distribution", "0.0")
    assert record(fewer, 1)["build"]["critic"] is False
    assert changed(recipe, "source.pairs", "7").source.pairs == 7  # type: ignore[attr-defined]
    assert make("mobile_nano_one", tiny=True).objective.levels == ONE_STEP  # type: ignore[attr-defined]


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_students_learn_at_toy_size(name: str, tmp_path: Path) -> None:
    """The regression falls; with all losses on, every step is finite and the critic and the heads stay behind."""
    recipe = on_one_item(make(name, tiny=True))
    quiet = replace(recipe, objective=replace(recipe.objective, **OFF | {"regression": 1.0}), steps=25)  # type: ignore[type-var]
    train(quiet, tmp_path / "regression", quiet=True)
    course = losses(tmp_path / "regression")
    assert sum(course[-5:]) < 0.8 * sum(course[:5]), course
    whole = replace(recipe, steps=4)
    train(whole, tmp_path / "all", quiet=True)
    assert len(rows(tmp_path / "all")) == 4
    folders = export(whole, tmp_path / "all", tmp_path / "out")
    assert set(folders) == {"transformer"}
    MobileTransformer3DModel.from_pretrained(folders["transformer"])


def test_one_step_goes_on_from_two(tmp_path: Path) -> None:
    """--base is the teacher, build.init the student to begin with."""
    models = [network(prediction="residual") for _ in range(2)]
    for name, model in zip(("teacher", "two"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    recipe = changed(
        make("mobile_nano_one", base=str(tmp_path / "teacher"), tiny=True), "build.init", str(tmp_path / "two")
    )
    parts = recipe.build()
    found = (parts.frozen["teacher"], parts.modules["critic"], parts.modules["transformer"])
    for module, model in zip(found, (models[0], models[0], models[1]), strict=True):
        assert torch.equal(module.proj_out.weight, model.proj_out.weight)  # type: ignore[union-attr,arg-type]
    wants = {name for name, module in parts.modules.items() if all(p.requires_grad for p in module.parameters())}
    assert wants == {"transformer", "critic", "heads"}


def test_a_student_needs_a_teacher(tmp_path: Path) -> None:
    for name, maker in STUDENTS.items():
        with pytest.raises(UsageError, match="needs --base FOLDER"):
            maker(Given((tmp_path,)))
        assert maker.__doc__ and name in mobile_distill.STUDENTS


def test_lessons_keep_what_a_batch_says() -> None:
    item: Batch = WINDOW.at(1)
    kept = lesson_of(item, index=4)
    assert kept.motion_score is item.motion_score and kept.context == 2 and lesson_of(kept).index == 4
