"""Heads on a frozen teacher: what they see, who learns from them, and that they can tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import small_dit

from swifti2v.core import UsageError
from swifti2v.train.adversarial import Adversary, Head, Heads, features, mean_of, steepness
from swifti2v.train.hooks import listening
from swifti2v.train.recipes_nano import MadeUp
from swifti2v.train.source import seeded

WINDOW = MadeUp(4, context=2, positions=(0, 3, 4, 5), scored=True, side=5)


@pytest.fixture
def teacher() -> Any:
    return small_dit(motion_embedding=True, patch_size=2).requires_grad_(False).eval()


def test_finished_blocks_never_reach_the_logits(teacher: Any) -> None:
    """Only the segment's tokens are handed on; their number is that of the patches, odd sides padded."""
    item, noise = WINDOW.at(0), torch.randn(2, 4, 4, 5, 5)
    with listening(dict(enumerate(teacher.blocks))) as heard:
        seen = features(teacher, item, torch.full((2,), 0.5), noise, (1,))
    assert list(seen) == [1] and seen[1].shape == (2, 2, 24, 3, 3)
    heads = Heads(24, (1,), 8)
    (logits,) = heads(seen)
    assert logits.shape == (2, 2, 3, 3)
    assert heard[1].shape[1] == 4  # the teacher itself read all four blocks
    assert torch.equal(seen[1], heard[1][:, 2:].transpose(2, 3).unflatten(3, (3, 3)))


def test_hooks_do_not_stay(teacher: Any) -> None:
    with listening({"a": teacher.blocks[0]}) as heard:
        assert len(teacher.blocks[0]._forward_hooks) == 1 and heard == {}
    assert not teacher.blocks[0]._forward_hooks
    with pytest.raises(UsageError, match="a teacher that has 2"):
        features(teacher, WINDOW.at(0), torch.full((2,), 0.5), torch.zeros(2, 4, 4, 5, 5), (2,))


def test_who_learns_from_a_judgement(teacher: Any) -> None:
    item = WINDOW.at(0)
    made = item.clean[:, :, 2:].clone().requires_grad_()
    heads = Heads(24, (0, 1), 8)
    judged = Adversary()(teacher, heads, item, made, seeded(0, 0))
    judged.fooled.backward(retain_graph=True)
    assert made.grad is not None and bool(made.grad.any())
    assert all(p.grad is None for p in heads.parameters())
    made.grad = None
    judged.told.backward()
    assert made.grad is None
    learned = {name for name, p in heads.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {f"judges.{i}.{part}.weight" for i in (0, 1) for part in ("enter", "mix", "out")} <= learned
    assert all(p.grad is None for p in teacher.parameters())


def test_hinge_by_hand_and_r1_switched(teacher: Any) -> None:
    item = WINDOW.at(0)
    made = torch.randn(2, 4, 2, 5, 5)
    heads, rule = Heads(24, (1,), 8), Adversary(r1=0.0)
    judged = rule(teacher, heads, item, made, seeded(0, 0))
    generator = seeded(0, 0)
    sigma = rule.levels.draw(2, generator)
    noise = torch.randn(item.clean.shape, generator=generator)
    fake = replace(item, clean=torch.cat([item.clean[:, :, :2], made], dim=2))
    real, false = (heads(features(teacher, batch, sigma, noise, (1,)))[0] for batch in (item, fake))
    assert float(judged.fooled.detach()) == pytest.approx(-float(false.detach().mean()), rel=1e-5)
    assert float(judged.told.detach()) == pytest.approx(
        float((F.relu(1 - real) + F.relu(1 + false)).detach().mean()), rel=1e-5
    )
    steep = Adversary(r1=0.5)(teacher, heads, item, made, seeded(0, 0))
    given = {1: features(teacher, item, sigma, noise, (1,))[1].requires_grad_()}
    penalty = float(steepness(heads(given), given).detach())
    assert penalty > 0 and float(steep.told.detach()) == pytest.approx(
        float(judged.told.detach()) + 0.5 * penalty, rel=1e-4
    )
    assert float(steep.fooled.detach()) == pytest.approx(float(judged.fooled.detach()), rel=1e-6)


def test_r1_by_hand() -> None:
    """A head that is linear here: the gradient's squared length is that of its weights."""
    weight = torch.tensor([1.0, -2.0, 3.0])
    x = {0: torch.randn(2, 1, 3, 4, 4, requires_grad=True)}
    assert float(steepness([torch.einsum("btchw,c->bthw", x[0], weight)], x)) == pytest.approx(14.0)
    assert float(mean_of([torch.ones(3), torch.zeros(1)])) == 0.5


def test_logits_are_bounded_whatever_the_weights() -> None:
    torch.manual_seed(0)
    head = Head(6, 8)
    x = torch.randn(2, 6, 5, 5)
    before = head(x)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(50 if parameter.ndim > 1 else 0)
        loud = head(1000 * x)
    assert float(loud.abs().max()) < 8 * 3 and before.shape == (2, 5, 5)
    with pytest.raises(UsageError, match="multiple of 8"):
        Head(6, 12)


def test_heads_learn_to_tell(teacher: Any) -> None:
    """Generated windows that are blurred: after some steps real logits lie above false ones, at unseen noise too."""
    torch.manual_seed(0)
    item, heads, rule = WINDOW.at(0), Heads(24, (0, 1), 16), Adversary()
    made = item.clean[:, :, 2:].mean(dim=(3, 4), keepdim=True).expand(-1, -1, -1, 5, 5)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    course = []
    for index in range(30):
        optimizer.zero_grad()
        told = rule(teacher, heads, item, made, seeded(1, index)).told
        told.backward()
        optimizer.step()
        course.append(float(told.detach()))
    assert sum(course[-5:]) < 0.7 * sum(course[:5]), course
    assert all(isinstance(p, nn.Parameter) for p in heads.parameters())
