"""Few-step students: the target by hand, exactness where teacher and student agree, and that it helps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective import Says
from test_recipes import on_one_item
from torch import Tensor, nn
from toys import CONFIG, TOY, rows, small_dit

from swifti2v import tiny
from swifti2v.core import UsageError
from swifti2v.flow import euler, sigmas
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.segments import CSG
from swifti2v.stage_two import dit_velocity
from swifti2v.train import state
from swifti2v.train.distill import DISTILLATIONS, Distillation, DistributionMatching, Teacher, taught, window_of
from swifti2v.train.loop import Student, train
from swifti2v.train.objective import noised
from swifti2v.train.recipe import Parts
from swifti2v.train.recipes import make
from swifti2v.train.recipes_nano import MadeUp
from swifti2v.train.source import seeded

WINDOW = MadeUp(4, context=2, positions=(0, 3, 4, 5))


class Growth(MobileTransformer3DModel):
    """dx/dsigma = gain * x: a curved path whose end is known."""

    gain: nn.Parameter

    def forward(self, hidden_states: Tensor, *rest: Any, **inputs: Any) -> Any:
        return (self.gain * hidden_states,)


def still() -> Any:
    """A frozen DiT that says 0 everywhere."""
    model = small_dit(prediction="velocity").requires_grad_(False)
    nn.init.zeros_(model.proj_out.weight)
    return model


@pytest.fixture
def teacher() -> Any:
    return small_dit().requires_grad_(False)


def parts_of(teacher: nn.Module) -> Parts:
    return taught(Parts({"transformer": deepcopy(teacher).requires_grad_(True)}), teacher)


@pytest.mark.parametrize("kind", ["progressive", "consistency"])
def test_the_target_by_hand(teacher: Any, kind: Any) -> None:
    """The teacher's Euler path between two of the student's levels, written out with the sampler's own functions."""
    item, text = WINDOW.at(0), None
    levels, fine = sigmas(4, 5.0), sigmas(12, 5.0)
    assert fine[::3] == pytest.approx(levels)
    for index in range(12):
        parts = parts_of(teacher)
        student: Any = parts.modules["transformer"]
        nn.init.normal_(student.proj_out.weight, std=0.05)  # another network than the teacher
        objective = Distillation(substeps=3, kind=kind)
        loss = objective(parts, item, seeded(0, index))
        generator = seeded(0, index)
        place = int(torch.randint(4, (), generator=generator))
        noise = torch.randn(item.clean.shape, generator=generator)
        noisy = noised(item, torch.full((2,), levels[place]), noise, CSG())
        context, window = noisy.x[:, :, :2], window_of(item)

        def along(model: nn.Module, x: Tensor, path: tuple[float, ...]) -> Tensor:
            field = dit_velocity(model, text, CSG(rope_positions="absolute"), trained_blocks=99)
            full = lambda x, s: field(torch.cat([context, x], dim=2), s, window, noisy.reference)[:, :, 2:]  # noqa: B023, E731
            return euler(full, x, path)

        with torch.no_grad():
            start = noisy.x[:, :, 2:]
            landing = along(teacher, start, fine[3 * place : 3 * place + 4])
            ours = along(student, start, (levels[place], levels[place + 1]))
            gap = levels[place] - levels[place + 1]
            expected = ((ours - landing) / gap).square().mean()
            if kind == "consistency" and levels[place + 1] > 0:
                end = along(student, landing, (levels[place + 1], 0.0))
                expected = ((along(student, start, (levels[place], 0.0)) - end) / levels[place]).square().mean()
        assert torch.allclose(loss.value, expected, rtol=1e-4, atol=1e-7)
        assert torch.allclose(loss.error, (ours - landing).square().mean(), rtol=1e-4, atol=1e-7)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_in_one_substep(teacher: Any) -> None:
    loss = Distillation(substeps=1)(parts_of(teacher), WINDOW.at(0), seeded(0, 0))
    assert float(loss.value.detach()) < 1e-10
    curved = Distillation(substeps=4)(parts_of(teacher), WINDOW.at(0), seeded(0, 0))
    assert float(curved.error) == pytest.approx(float(curved.base), rel=1e-4) and float(curved.base) > 0


def test_finished_blocks_and_the_teacher_get_no_gradient(teacher: Any) -> None:
    says = Says(torch.randn(1, 4, 4, 4, 4))
    parts = taught(Parts({"transformer": says}), teacher)
    Distillation()(parts, WINDOW.at(0), seeded(0, 0)).value.backward()
    assert says.value.grad is not None and not says.value.grad[:, :, :2].any() and bool(says.value.grad[:, :, 2:].any())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_guidance_is_folded_in(teacher: Any) -> None:
    guided = Distillation(teacher=Teacher(guidance_scale=3.0))
    with pytest.raises(UsageError, match="null_text"):
        guided(parts_of(teacher), WINDOW.at(0), seeded(0, 0))
    heard = small_dit(cross_attention_dim=6).requires_grad_(False)
    for block in heard.blocks:
        nn.init.normal_(block.cross_attn.to_out.weight, std=0.3)
    item = replace(WINDOW.at(0), text=torch.randn(2, 5, 6))
    parts = replace(parts_of(heard), constants={"null_text": torch.randn(5, 6)})
    plain = Distillation()(parts, item, seeded(0, 0)).value
    assert not torch.allclose(plain, guided(parts, item, seeded(0, 0)).value)


def test_distillation_brings_few_steps_nearer_to_many(tmp_path: Path) -> None:
    """What it is for: one step of the student lands where eight of the teacher do, as arithmetic says."""
    recipe = replace(TOY, name="few", build=_curved, source=_window, objective=Distillation(1, 8), steps=60, lr=0.1)
    train(replace(recipe, save_every=60, optimizer="adamw", clip_norm=0.0), tmp_path, quiet=True)
    ratios = [row["ratio"] for row in rows(tmp_path)]
    assert ratios[0] == pytest.approx(1.0, rel=1e-3) and ratios[-1] < 0.01, ratios
    path, end = sigmas(8, 5.0), 1.0
    for sigma, following in pairwise(path):
        end *= 1 + 2.0 * (following - sigma)
    student = Student(_curved(), recipe.objective, "float32")
    state.load_average(state.latest(tmp_path), student)
    assert float(student.trained["transformer"].gain) == pytest.approx(1 - end, abs=0.02)


def _curved() -> Parts:
    model = Growth(**(CONFIG | {"prediction": "velocity"}))
    model.gain = nn.Parameter(torch.tensor(2.0))
    return taught(Parts({"transformer": deepcopy(model)}), model)


def _window(parts: Parts) -> Any:
    return MadeUp(4)


def test_matching_pulls_the_student_towards_the_teacher() -> None:
    """The gradient on the student's output is critic minus teacher: none if they agree, away from the critic if not."""
    teacher = still()
    item = WINDOW.at(0)
    for offset in (0.0, 1.0):
        student = Says(torch.zeros(1, 4, 4, 4, 4))
        critic = Says(torch.full((1, 4, 4, 4, 4), offset))
        parts = replace(taught(Parts({"transformer": student}), teacher), inner=("critic",))
        parts.modules["critic"] = critic
        loss = DistributionMatching(share=1.0)(parts, item, seeded(0, 0))
        loss.value.backward()
        assert student.value.grad is not None and critic.value.grad is not None
        assert not student.value.grad[:, :, :2].any()
        # the critic's clean estimate lies lower by sigma * offset: descent on the velocity must lower it, raising x
        assert (float(student.value.grad[:, :, 2:].mean()) > 0) == (offset > 0)
        assert bool(critic.value.grad[:, :, 2:].any()) and not critic.value.grad[:, :, :2].any()


def test_matching_trains_the_critic_alone_between_the_students_turns() -> None:
    student, critic = (Says(torch.zeros(1, 4, 4, 4, 4)) for _ in range(2))
    parts = replace(taught(Parts({"transformer": student}), still()), inner=("critic",))
    parts.modules["critic"] = critic
    DistributionMatching(share=0.0)(parts, WINDOW.at(0), seeded(0, 0)).value.backward()
    assert student.value.grad is not None and not student.value.grad.any()
    assert critic.value.grad is not None and bool(critic.value.grad[:, :, 2:].any())


@pytest.mark.parametrize("name", sorted(DISTILLATIONS))
def test_both_kinds_of_teacher_at_toy_size(name: str, tmp_path: Path) -> None:
    recipe = on_one_item(make(name, tiny=True))
    recipe = replace(recipe, steps=6, lr=1e-3)
    assert train(recipe, tmp_path, quiet=True).step == 6
    assert all(row["loss"] == row["loss"] for row in rows(tmp_path))
    if name == "stage_one_few":
        assert rows(tmp_path)[0]["ratio"] == pytest.approx(1.0, rel=1e-3)


def test_a_wan_stage_two_can_teach(tmp_path: Path) -> None:
    from swifti2v.models.wan import SwiftI2VTransformer3DModel

    wan = SwiftI2VTransformer3DModel.from_wan(tiny.wan_base_dit(), reference_channels=4).requires_grad_(False)
    item = replace(WINDOW.at(0), text=torch.randn(2, 12, tiny.TEXT_DIM))
    loss = Distillation(substeps=2)(parts_of(wan), item, seeded(0, 0))
    assert float(loss.error) == pytest.approx(float(loss.base), rel=1e-3)
