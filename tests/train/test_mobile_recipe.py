"""MobileI2V's base recipe: what it learns from, with which motion score, and what of it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import on_one_item
from torch import Tensor
from toys import losses

from swifti2v import tiny
from swifti2v.core import UsageError
from swifti2v.models.ltx_vae import LTXCodec
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.segments import CSG
from swifti2v.train import mobile
from swifti2v.train.data import Clip, Pixels
from swifti2v.train.loop import train
from swifti2v.train.mobile import ClipEncoder, MobileShards
from swifti2v.train.objective import FlowMatching, Levels, noised, predict
from swifti2v.train.recipe import Parts
from swifti2v.train.recipes import make
from swifti2v.train.shards import Plan, ShardSource, write_shards
from swifti2v.train.source import seeded


def pixels(frames: int, score: float | None = 1.5) -> Pixels:
    made = torch.randint(0, 255, (3, frames, 32, 64), dtype=torch.uint8, generator=seeded(0, frames))
    return Pixels(made, "", "clip", "film", motion_score=score)


def clip(number: int, score: float | None) -> Clip:
    clean = torch.randn(4, 3, 4, 4, generator=seeded(0, number)).half().float()
    return Clip(clean, clean.clone(), None, None, "", str(number), "film", motion_score=score)


def test_a_clip_is_encoded_with_its_score() -> None:
    codec = LTXCodec(tiny.ltx_vae())
    found = ClipEncoder(codec)(pixels(17))
    assert found.clean.shape == (8, 3, 1, 2) and found.motion_score == 1.5
    assert torch.equal(found.reference, found.clean[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(UsageError, match=r"13 frames are not 8k\+1"):
        ClipEncoder(codec)(pixels(13))


def test_a_score_that_is_not_known_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(mobile, "motion_score", lambda frames: seen.append(frames) or 4.25)
    assert ClipEncoder(LTXCodec(tiny.ltx_vae()))(pixels(17, None)).motion_score == 4.25
    assert seen[0].shape == (3, 17, 32, 64) and -1 <= float(seen[0].min()) < 0 < float(seen[0].max()) <= 1


def test_scores_travel_through_shards_to_the_network(tmp_path: Path) -> None:
    scores = (0.5, 2.25)
    write_shards(tmp_path / "new", Plan(2, 2), lambda number: clip(number, scores[number]))
    write_shards(tmp_path / "old", Plan(2, 2), lambda number: clip(number, None))
    assert {ShardSource(tmp_path / "new").at(i).motion_score for i in range(2)} == set(scores)
    assert ShardSource(tmp_path / "old").at(0).motion_score is None
    parts = Parts({})
    batch = MobileShards((tmp_path / "new",), batch=2)(parts).at(0)
    assert batch.motion_score is not None and sorted(batch.motion_score.tolist()) == list(scores)
    assert batch.context == 1 and batch.frame_indices.tolist() == [0, 1, 2]  # 17 frames are one segment
    assert MobileShards((tmp_path / "old",), batch=2)(parts).at(0).motion_score is None
    with pytest.raises(UsageError, match="a folder of latent shards"):
        MobileShards(())(parts)


def test_the_photo_is_masked_out_and_levels_lie_in_the_middle(tmp_path: Path) -> None:
    objective = make("mobile", (tmp_path,)).objective
    assert isinstance(objective, FlowMatching) and objective.weighting == "velocity"
    assert objective.levels == Levels(shift=1.0, low=0.001, law="logit-normal")
    drawn = objective.levels.draw(4000, seeded(0, 0))
    assert abs(float(drawn.median()) - 0.5) < 0.02 and 0.65 < float(((drawn - 0.5).abs() < 0.23).float().mean()) < 0.71


def test_it_learns_at_toy_size(tmp_path: Path) -> None:
    recipe = replace(on_one_item(make("mobile", tiny=True)), steps=30)
    train(recipe, tmp_path, quiet=True)
    course = losses(tmp_path)
    assert sum(course[-3:]) < 0.95 * sum(course[:3]), course


def test_a_network_without_reference_channels_is_given_none() -> None:
    recipe = make("mobile", tiny=True)
    parts = recipe.build()
    model: Any = parts.modules["transformer"]
    assert model.config.reference_channels == 0
    item = recipe.source(parts).at(0)
    noisy = noised(item, torch.full((2,), 0.5), item.clean, CSG())
    told = predict(model, noisy, item, None, "window")
    bare = replace(noisy, reference=0 * noisy.reference)
    assert torch.equal(told, predict(model, bare, item, None, "window"))
    faster = replace(item, motion_score=item.motion_score + 3)
    assert not torch.equal(told, predict(model, noisy, faster, None, "window"))


def test_the_defaults_are_the_published_size() -> None:
    with torch.device("meta"):
        found = mobile.parts(tiny=False).modules["transformer"]
    assert isinstance(found, MobileTransformer3DModel)
    assert sum(p.numel() for p in found.parameters()) == 264_855_296
