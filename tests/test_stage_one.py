"""Stage I through the segment loop: continuation beyond the trained length, resumption, strength, bounded memory."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v.camera import camera_video
from swifti2v.models.causal_vae import encode_stream, streaming
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.pipeline import Reporter, SwiftI2VPipeline
from swifti2v.presets import resolve
from swifti2v.reference import static_video
from swifti2v.stage_one import Conditions, MotionPlan, generates_anchor, motion_latents
from swifti2v.tiny import tiny_pipeline

FAMILIES = ["nano", "wan"]
TRAINED, OVERLAP, STEPS = 5, 2, 2


@cache
def pipeline(family: str) -> SwiftI2VPipeline:
    return tiny_pipeline(family)


@cache
def told(family: str, scale: float = 1.0) -> Conditions:
    pipe = pipeline(family)
    request, _ = resolve(pipe.preset, prompt="slow pan left", seed=3, guidance_scale=scale)
    with torch.no_grad():
        return pipe.encode(photo(64, 128), request, Reporter(None))


def photo(height: int = 16, width: int = 32) -> Tensor:
    return torch.rand(1, 3, 1, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def plan(blocks: int, **fields: Any) -> MotionPlan:
    return MotionPlan(blocks, STEPS, 5.0, 3, TRAINED, OVERLAP, **fields)


@torch.no_grad()
def windows_of(family: str, blocks: int, *, scale: float = 1.0, **more: Any) -> list[Tensor]:
    """The windows of motion latents; keywords of ``MotionPlan`` and of ``motion_latents`` alike."""
    fields = {name: more.pop(name) for name in ("strength", "round_timesteps_bf16") if name in more}
    pipe = pipeline(family)
    vae, conditions = streaming(pipe.vae), more.pop("conditions", None) or told(family, scale)
    return list(motion_latents(pipe.transformer, vae, photo(), conditions, plan=plan(blocks, **fields), **more))


class Seen:
    """What the network was given, call by call."""

    def __init__(self, family: str) -> None:
        self.calls: list[dict[str, Any]] = []
        self.hook = pipeline(family).transformer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [2, 5, 6, 9, 13])
def test_windows_tile_the_clip_and_never_exceed_the_trained_length(family: str, blocks: int) -> None:
    with Seen(family) as seen:
        made = windows_of(family, blocks)
    assert sum(window.shape[2] for window in made) == blocks and made[0].shape[2] == min(blocks, TRAINED)
    assert len(made) == plan(blocks).num_windows and all(window.dtype == torch.float32 for window in made)
    assert all(bool(torch.isfinite(window).all()) for window in made)
    assert len(seen.calls) == len(made) * STEPS
    for call in seen.calls:
        assert call["hidden_states"].shape[2] == min(blocks, TRAINED)
        if family == "nano":
            assert call["frame_indices"].tolist() == list(range(min(blocks, TRAINED)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_clip_begins_like_a_shorter_one(family: str) -> None:
    assert torch.equal(windows_of(family, TRAINED)[0], windows_of(family, 13)[0])


@pytest.mark.parametrize("moving", [False, True])
def test_nano_is_given_the_photo_clean_and_the_filmed_photo_as_reference(moving: bool) -> None:
    conditions = told("nano") if moving else dataclasses.replace(told("nano"), camera=None)
    with Seen("nano") as seen:
        made = windows_of("nano", 9, conditions=conditions)
    video = static_video(photo(), 33) if conditions.camera is None else camera_video(photo(), conditions.camera, 33)
    assert (conditions.camera is not None) == moving
    expected = torch.cat(list(encode_stream(streaming(pipeline("nano").vae), video)), dim=2)
    assert torch.equal(made[0][:, :, :1], expected[:, :, :1])
    for call in seen.calls:
        assert torch.equal(call["hidden_states"][:, :, :1], expected[:, :, :1]) and call["timestep"][0, 0] == 0
    assert torch.equal(seen.calls[0]["reference_hidden_states"], expected[:, :, :TRAINED])
    # The continuation sees the last finished blocks clean.
    context = seen.calls[STEPS]["hidden_states"][:, :, 1:3]
    assert torch.equal(context, made[0][:, :, -2:]) and seen.calls[STEPS]["timestep"][0, 1:3].tolist() == [0, 0]


def test_wan_is_given_mask_condition_and_one_timestep() -> None:
    with Seen("wan") as seen:
        made = windows_of("wan", 9)
    first, later = seen.calls[0]["hidden_states"], seen.calls[STEPS]["hidden_states"]
    assert first.shape[1] == later.shape[1] == 36
    assert first[0, 16:20].mean(dim=(0, 2, 3)).tolist() == [1, 0, 0, 0, 0]
    # A continuation knows the anchor and the finished blocks, clean in the condition, noised in the latents.
    known = later[0, 16:20].mean(dim=(0, 2, 3))
    finished = int(known.sum())
    assert known.tolist() == [1] * finished + [0] * (TRAINED - finished) and finished >= 1 + OVERLAP
    assert torch.equal(later[:, 20:, 1:finished], made[0][:, :, TRAINED - finished + 1 :])
    assert not torch.equal(later[:, :16, 1:finished], made[0][:, :, TRAINED - finished + 1 :])
    assert all(call["timestep"].shape == (1,) for call in seen.calls)
    assert seen.calls[0]["encoder_hidden_states_image"].shape[1] == 257


@pytest.mark.parametrize("family", FAMILIES)
def test_finished_windows_are_taken_and_not_made_again(family: str) -> None:
    whole = windows_of(family, 9)
    for held in range(len(whole) + 1):
        steps: list[tuple[int, int]] = []

        def follow(window: int, step: int, steps: list[tuple[int, int]] = steps) -> None:
            steps.append((window, step))

        again = windows_of(family, 9, finished=whole[:held], on_step=follow)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        assert {window for window, _ in steps} == set(range(held, len(whole)))
        assert len(steps) == STEPS * (len(whole) - held)


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_starts_from_other_latents(family: str) -> None:
    whole = torch.cat(windows_of(family, 9), dim=2)
    initial = torch.randn(whole.shape, generator=torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match=r"strength 0.5 .* no initial"):
        windows_of(family, 9, strength=0.5)
    half = torch.cat(windows_of(family, 9, strength=0.5, initial=initial.split([1, 4, 4], dim=2)), dim=2)
    chunked = torch.cat(windows_of(family, 9, strength=0.5, initial=[initial]), dim=2)
    assert torch.equal(half, chunked) and not torch.equal(half, whole)
    little = torch.cat(windows_of(family, 9, strength=0.01, initial=[initial]), dim=2)
    if family == "wan":  # nano predicts from its reference (docs/decisions/0002), however little noise there is
        near, far = ((x - initial).abs().mean() for x in (little, half))
        assert near < far and near < 0.1
    full = torch.cat(windows_of(family, 9, initial=[initial]), dim=2)
    torch.testing.assert_close(full, whole)  # pure noise at the start: nothing of the initial is left


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_runs_twice_and_matters(family: str) -> None:
    with Seen(family) as seen:
        guided = windows_of(family, 5, scale=4.0)
    assert len(seen.calls) == 2 * STEPS
    assert not torch.equal(guided[0], windows_of(family, 5)[0])


def test_rounded_timesteps_are_what_the_network_sees() -> None:
    with Seen("wan") as seen:
        windows_of("wan", 5, round_timesteps_bf16=True)
    for call in seen.calls:
        assert torch.equal(call["timestep"], call["timestep"].bfloat16().float())


class Counting(NanoVAE):
    """Counts the frames it encodes."""

    frames = 0

    def encode_chunk(self, x: Tensor, state: Any) -> Any:
        self.frames += x.shape[2]
        return super().encode_chunk(x, state)


def test_the_reference_is_encoded_as_it_is_needed() -> None:
    """So that a long clip's motionless video is never whole in memory, and the first window need not wait for it."""
    counting = Counting.from_config(pipeline("nano").vae.config)
    counting.load_state_dict(pipeline("nano").vae.state_dict())
    pipe = pipeline("nano")
    made = motion_latents(pipe.transformer, counting, photo(), told("nano"), plan=plan(41))
    with torch.no_grad():
        next(made)
        assert counting.frames <= (TRAINED - 1) * 4 + 1 + 4
        next(made)
        assert counting.frames <= (TRAINED - 1 + 2) * 4 + 1 + 4
        made.close()


def test_which_networks_make_the_first_block_themselves() -> None:
    assert generates_anchor(pipeline("wan").transformer) and not generates_anchor(pipeline("nano").transformer)
    assert plan(9).windows(True)[0].segment[0] == 0 and plan(9).windows(False)[0].segment[0] == 1
