"""Stage transition with both kinds of Stage I: what is corrupted, what is denoised, and as a job over shards."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v.core import Size, UsageError
from swifti2v.flow import sigmas
from swifti2v.models.causal_vae import decode_stream, encode_stream, streaming
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.reference import carried_reference
from swifti2v.tiny import tiny_pipeline
from swifti2v.train.data import Clip, Pixels, StageTwoEncoder, joined
from swifti2v.train.shards import Plan, ShardSource, places, read_clip, write_shards
from swifti2v.train.transition import (
    ABLATED,
    StageOne,
    Transition,
    decoded,
    steps_from,
    transition_latents,
    transition_pixels,
)

FAMILIES = ["nano", "wan"]
SIZE = {"nano": Size(64, 64), "wan": Size(64, 64)}


@cache
def pipeline(family: str) -> Any:
    return tiny_pipeline(family)


def stage_one(family: str) -> StageOne:
    return StageOne.of(pipeline(family), steps=4)


def vae_two(family: str) -> Any:
    pipe = pipeline(family)
    return streaming(pipe.vae if pipe.vae_2 is None else pipe.vae_2)


def pixels(family: str, seed: int = 0, frames: int = 9) -> Pixels:
    size = SIZE[family]
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    still = torch.nn.functional.interpolate(coarse, (size.height, size.width), mode="bilinear")[0]
    clip = torch.stack([still.roll(i, dims=2) for i in range(frames)], dim=1)
    return Pixels((clip * 255).to(torch.uint8), "pan left", f"clip {seed}", "film")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_less_noise_leaves_more_of_the_clip(family: str) -> None:
    one, item = stage_one(family), pixels(family)
    small = one.motion_size(item.size)
    image = next(iter(item.shrunk(small)))
    true = joined(decode_stream(one.vae, encode_stream(one.vae, item.shrunk(small)), image))
    errors = []
    for sigma in (0.02, 0.4, 0.95):
        made = joined(transition_pixels(item, one, sigma, seed=1))
        assert made.shape == true.shape == (3, 9, small.height, small.width)
        errors.append(float((made - true).square().mean()))
    # nano's network says what the clip is, whatever it is shown; random weights then say nothing of the noise
    assert family == "nano" or errors[0] < errors[1] < errors[2]
    assert len(set(errors)) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_starts_at_sigma_from_the_noised_clip(family: str) -> None:
    seen: list[float] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(float(kwargs["timestep"].max()))

    hook = pipeline(family).transformer.register_forward_pre_hook(look, with_kwargs=True)
    list(transition_pixels(pixels(family), stage_one(family), 0.8333, seed=1))
    hook.remove()
    expected = [1000 * level for level in sigmas(steps_from(0.8333, 4, 5.0), 5.0, start=0.8333)[:-1]]
    assert seen == pytest.approx(expected, rel=1e-4) and len(seen) == 2
    assert isinstance(pipeline(family).transformer, MobileTransformer3DModel) == (family == "nano")


def test_steps_are_those_left_of_a_whole_run() -> None:
    assert [steps_from(s, 4, 5.0) for s in (*ABLATED, 0.9375, 0.99)] == [1, 1, 1, 2, 3, 4]
    assert [steps_from(s, 50, 5.0) for s in (0.001, 0.8333)] == [1, 25]


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_references_of_the_clip(family: str) -> None:
    one, two, item = stage_one(family), vae_two(family), pixels(family)
    made = transition_latents(item, one, two, sigma=0.4, seed=1)
    clip = StageTwoEncoder(two, one.motion_size, one.vae)(item)
    assert made.shape == clip.clean.shape == clip.reference.shape and torch.equal(made[:, 0], clip.clean[:, 0])
    assert torch.equal(made, transition_latents(item, one, two, sigma=0.4, seed=1))
    assert not torch.equal(made, transition_latents(item, one, two, sigma=0.4, seed=2))


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sigma_outside_0_1_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        Transition(stage_one("nano"), vae_two("nano"), (0.4, sigma))
    with pytest.raises(UsageError):
        list(transition_pixels(pixels("nano"), stage_one("nano"), sigma, seed=1))


def test_sigmas_are_mixed_by_seeded_choice() -> None:
    jobs = [Transition(stage_one("nano"), vae_two("nano"), (0.25, 0.625), seed) for seed in (0, 0, 1)]
    drawn = [[job.sigma(number) for number in range(40)] for job in jobs]
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0.25, 0.625}
    with pytest.raises(UsageError, match="no sigma"):
        Transition(stage_one("nano"), vae_two("nano"), ())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_a_job_over_shards_interrupted_or_not(family: str, tmp_path: Path) -> None:
    one, two = stage_one(family), vae_two(family)
    encode = StageTwoEncoder(two, one.motion_size, one.vae)
    write_shards(tmp_path / "in", Plan(2, 1), lambda number: encode(pixels(family, number, 5)))
    held, job = places(tmp_path / "in"), Transition(one, two, (0.25, 0.625))
    plan, died = Plan(2, 1, settings=job.settings()), []

    def make(number: int) -> Clip:
        return job.clip(number, read_clip(tmp_path / "in", held[number]))

    def dying(number: int) -> Clip:
        died.append(number)
        if number == 1:
            raise KeyboardInterrupt
        return make(number)

    write_shards(tmp_path / "whole", plan, make)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "torn", plan, dying)
    write_shards(tmp_path / "torn", plan, make)
    whole, torn = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "torn"))
    assert whole == torn and died == [0, 1]
    for index in range(2):
        clip = ShardSource(tmp_path / "whole").at(index)
        assert clip.transition is not None and torch.equal(clip.transition[:, 0], clip.clean[:, 0])
        assert not torch.equal(clip.transition, clip.reference)


def test_true_pixels_are_used_where_they_are_at_hand() -> None:
    one, two, item = stage_one("nano"), vae_two("nano"), pixels("nano")
    clip = StageTwoEncoder(two, one.motion_size)(item)
    job = Transition(one, two, (0.4,), pixels=lambda number: item)
    without = Transition(one, two, (0.4,)).clip(0, clip).transition
    made = job.clip(0, clip).transition
    assert made is not None and without is not None and not torch.equal(made, without)
    near = decoded(clip, two)
    assert near.frames.shape == item.frames.shape
    with pytest.raises(UsageError, match="other pixels"):
        Transition(one, two, (0.4,), pixels=lambda number: pixels("nano", 0, 5)).clip(0, clip)


def test_carried_references_are_pairs_and_so_are_their_transitions() -> None:
    one, two = stage_one("nano"), vae_two("nano")
    clip = StageTwoEncoder(two, one.motion_size, one.vae, carried_reference)(pixels("nano"))
    made = Transition(one, two, (0.4,), make_reference=carried_reference).clip(0, clip).transition
    assert made is not None and made.shape == clip.reference.shape and len(made) == 2 * len(clip.clean)
    assert torch.equal(made[:, 0], clip.reference[:, 0]) and not torch.equal(made, clip.reference)
    with pytest.raises(UsageError, match="another maker"):
        Transition(one, two, (0.4,)).clip(0, clip)
