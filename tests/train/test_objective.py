"""The flow-matching objective: values by hand, no gradient on finished blocks, the conventions of inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import small_dit, windows

from swifti2v import tiny
from swifti2v.models.text import nano_tokenizer
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.segments import CSG, Window
from swifti2v.stage_one import Conditions, motion_velocity
from swifti2v.stage_two import dit_velocity
from swifti2v.train.csg_source import WholeClips, Windows
from swifti2v.train.distill import window_of
from swifti2v.train.objective import (
    Batch,
    FlowMatching,
    Levels,
    bell,
    encoded,
    noised,
    predict,
    text_states,
    window_batch,
)
from swifti2v.train.recipe import Parts
from swifti2v.train.recipes_nano import MadeUp, text_parts
from swifti2v.train.source import Source, seeded


class Says(nn.Module):
    """A network whose velocity is a parameter (1, c, t, h, w)."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.heard: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.heard = inputs
        return (self.value.expand_as(inputs["hidden_states"]),)


def batch(context: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clean, reference = torch.randn(2, 2, 3, 4, 2, 2, generator=generator)
    return Batch(clean, reference, torch.tensor([0, 4, 5, 6]), context)


def test_the_velocity_loss_by_hand() -> None:
    item, generator = batch(), seeded(0, 0)
    objective = FlowMatching(Levels(shift=5.0, low=0.0))
    model = Says(torch.zeros(1, 3, 4, 2, 2))
    loss = objective(Parts({"m": model}), item, generator)
    again = seeded(0, 0)
    even = torch.rand(2, generator=again)
    torch.rand(2, generator=again)
    sigma = 5 * even / (1 + 4 * even)
    noise = torch.randn(item.clean.shape, generator=again)
    by_hand = (noise - item.clean)[:, :, 2:].square().mean()
    assert torch.allclose(loss.value, by_hand)
    x = model.heard["hidden_states"]
    for i in range(2):
        assert torch.equal(x[i, :, :2], item.clean[i, :, :2])
        assert torch.allclose(x[i, :, 2:], (1 - sigma[i]) * item.clean[i, :, 2:] + sigma[i] * noise[i, :, 2:])
        assert model.heard["timestep"][i].tolist() == pytest.approx([0.0, 0.0] + [1000 * float(sigma[i])] * 2)
    # a velocity of zero says that x itself is clean
    assert torch.allclose(loss.error, (x - item.clean)[:, :, 2:].square().mean())
    assert torch.allclose(loss.base, (item.reference - item.clean)[:, :, 2:].square().mean())


def test_the_residual_loss_by_hand() -> None:
    """As the first nano was trained: half-way between absolute and relative error, channels weighed."""
    item, weights = batch(context=1), torch.tensor([2.0, 0.5, 0.5])
    model = Says(torch.full((1, 3, 4, 2, 2), 0.3))
    objective = FlowMatching(Levels(one=1.0), "residual")
    loss = objective(Parts({"m": model}, constants={"channel_weights": weights}), item, seeded(0, 3))
    x = model.heard["hidden_states"]
    total = 0.0
    for i in range(2):
        guess = x[i, :, 1:] - 1.0 * 0.3
        error = ((guess - item.clean[i, :, 1:]).square().mean(dim=(1, 2, 3)) * weights).mean()
        base = ((item.reference - item.clean)[i, :, 1:].square().mean(dim=(1, 2, 3)) * weights).mean()
        total += float(error / (base + 0.02).sqrt()) / 2
    assert float(loss.value.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("weighting", ["velocity", "bell", "residual"])
def test_finished_blocks_get_no_gradient(weighting: Any) -> None:
    model = Says(torch.randn(1, 3, 4, 2, 2))
    FlowMatching(weighting=weighting)(Parts({"m": model}), batch(), seeded(0, 1)).value.backward()
    assert model.value.grad is not None
    assert not model.value.grad[:, :, :2].any() and bool(model.value.grad[:, :, 2:].all())


def test_levels_are_spread_as_the_sampler_places_them() -> None:
    levels = Levels(shift=5.0, low=0.03, one=0.25).draw(4000, seeded(0, 0))
    assert levels.min() > 5 * 0.03 / (1 + 4 * 0.03) - 1e-6 and levels.max() == 1.0
    assert abs(float((levels == 1).float().mean()) - 0.25) < 0.03
    below = levels[levels < 1]
    assert abs(float((below < 5 * 0.515 / (1 + 4 * 0.515)).float().mean()) - 0.5) < 0.03  # the even middle, shifted
    assert bool((Levels(one=1.0).draw(5, seeded(0, 0)) == 1).all())


def test_the_bell_has_mean_one_and_ends_at_zero() -> None:
    grid = torch.linspace(1, 0.001, 1000)
    shifted = 5 * grid / (1 + 4 * grid)
    assert float(bell(shifted, 5.0).mean()) == pytest.approx(1.0, rel=1e-3)
    assert float(bell(torch.ones(()), 5.0)) == pytest.approx(0.0, abs=1e-6)


def test_what_csg_says_of_finished_blocks() -> None:
    item, sigma = batch(), torch.tensor([0.5, 0.25])
    noise = torch.randn_like(item.clean)
    told = {
        ("none", "zero"): (0, 0),
        ("none", "current"): (0, 1),
        ("neighbors", "zero"): (0, 1),
        ("context", "zero"): (1, 1),
    }
    for (renoised, timestep), (anchor, neighbor) in told.items():
        csg = CSG(renoised=renoised, neighbor_timestep=timestep)  # type: ignore[arg-type]
        noisy = noised(item, sigma, noise, csg)
        expected = [Window(0, (4,), (5, 6)).sigmas(float(s), csg) for s in sigma]
        assert noisy.levels.tolist() == [list(row) for row in expected]
        assert noisy.levels.tolist() == [[anchor * s, neighbor * s, s, s] for s in sigma.tolist()]
        assert torch.equal(noisy.x[:, :, 0], item.clean[:, :, 0]) == (renoised != "context")
        assert torch.equal(noisy.x[:, :, 1], item.clean[:, :, 1]) == (renoised == "none")
    generated = noised(item, sigma, noise, CSG(neighbor_reference="generated")).reference
    assert torch.equal(generated[:, :, 1], item.clean[:, :, 1])
    assert torch.equal(generated[:, :, [0, 2, 3]], item.reference[:, :, [0, 2, 3]])


def test_training_asks_networks_what_inference_asks_them() -> None:
    """The same window through the objective's ``predict`` and the sampler's velocity: all three kinds of network."""
    sigma = torch.tensor([0.7])
    wan = SwiftI2VTransformer3DModel.from_wan(tiny.wan_base_dit(), reference_channels=4)
    nn.init.normal_(wan.patch_embedding.weight, std=0.1)
    text = torch.randn(1, 12, tiny.TEXT_DIM)
    for model, item in (
        (small_dit(), MadeUp(4, count=1)),
        (wan, MadeUp(4, count=1, context=2, positions=(0, 3, 4, 5))),
    ):
        one = replace(item.at(0), text=text)
        noisy = noised(one, sigma, torch.randn_like(one.clean), CSG())
        trained = predict(model, noisy, one, text if model is wan else None, "window")
        field = dit_velocity(model, text if model is wan else None, CSG(rope_positions="absolute"), trained_blocks=21)
        sampled = field(noisy.x, 0.7, window_of(one), noisy.reference)
        assert torch.allclose(trained[:, :, one.context :], sampled[:, :, one.context :], atol=1e-5)
    one = MadeUp(16, blocks=3, count=1, context=0, image_dim=20, text=(512, tiny.TEXT_DIM)).at(0)
    model = tiny.wan_stage_one_dit()
    noisy = noised(one, sigma, torch.randn_like(one.clean), CSG())
    field = motion_velocity(model, Conditions(one.text, image_embeds=one.image), CSG(), 21)
    sampled = field(noisy.x, 0.7, Window(None, (), (0, 1, 2)), noisy.reference)
    assert torch.allclose(predict(model, noisy, one, one.text, "wan_image"), sampled, atol=1e-5)
    with pytest.raises(ValueError, match="CLIP states"):
        predict(model, noisy, replace(one, image=None), one.text, "wan_image")


@dataclass(frozen=True)
class ToyClip:
    clean: Tensor
    reference: Tensor
    transition: Tensor | None = None
    text: Tensor | None = None
    prompt: str = "pan left"
    image: Tensor | None = None


@dataclass(frozen=True)
class ToyClips:
    """Clips whose every latent is its block's number; the reference is 100 more, the transition 200 more."""

    blocks: int = 8
    transition: bool = True

    def at(self, index: int) -> ToyClip:
        clean = torch.arange(self.blocks).float()[None, :, None, None].expand(2, -1, 2, 2) + 1000 * index
        return ToyClip(clean, clean + 100, clean + 200 if self.transition else None, torch.ones(3, 4))


def test_a_window_batch_holds_the_window() -> None:
    window = Window(0, (3,), (4, 5))
    clips = [ToyClips().at(0), ToyClips().at(1)]
    given: dict[str, Any] = {"generator": seeded(0, 0), "positions": (0, 3, 4, 5)}
    got = window_batch(clips, window, transition_share=0.0, **given)
    assert got.clean[:, 0, :, 0, 0].tolist() == [[0, 3, 4, 5], [1000, 1003, 1004, 1005]]
    assert torch.equal(got.reference, got.clean + 100) and got.context == 2
    assert got.frame_indices.tolist() == [0, 3, 4, 5] and got.text is not None and got.text.shape == (2, 3, 4)
    assert torch.equal(window_batch(clips, window, transition_share=1.0, **given).reference, got.clean + 200)
    bare = [ToyClips(transition=False).at(0)]
    assert torch.equal(window_batch(bare, window, transition_share=1.0, **given).reference, got.clean[:1] + 100)
    seen = [replace(clip, image=torch.full((257, 8), float(i))) for i, clip in enumerate(clips)]
    image = window_batch(seen, window, transition_share=0.0, **given).image
    assert image is not None and image.shape == (2, 257, 8) and got.image is None
    with pytest.raises(ValueError, match="a clip of 5 blocks has no block 5"):
        window_batch([ToyClips(5).at(0)], window, transition_share=0.0, **given)
    with pytest.raises(ValueError, match="2 positions for 4 blocks"):
        window_batch(clips, window, transition_share=0.0, generator=seeded(0, 0), positions=(0, 1))


def test_windows_are_those_of_inference() -> None:
    source: Source[Batch] = Windows(ToyClips())
    found = {tuple(source.at(index).frame_indices.tolist()) for index in range(40)}
    assert found == {(0, 1, 2, 3), (0, 3, 4, 5, 6), (0, 6, 7)}
    anywhere = Windows(ToyClips(), segment_blocks=((2, 1.0),), neighbor_blocks=((0, 0.5), (2, 0.5)), on_grid=False)
    drawn = {tuple(anywhere.at(index).frame_indices.tolist()) for index in range(200)}
    assert {(0, 1, 2), (0, 6, 7), (0, 4, 5, 6, 7), (0, 1, 2, 3)} <= drawn and max(map(len, drawn)) == 5
    assert torch.equal(anywhere.at(3).clean, anywhere.at(3).clean)
    shares = [
        bool((Windows(ToyClips(), transition_share=0.3).at(i).reference[0, 0, 0, 0, 0] % 1000) == 200)
        for i in range(200)
    ]
    assert 0.2 < sum(shares) / 200 < 0.4
    whole = WholeClips(ToyClips()).at(0)
    assert whole.context == 0 and whole.clean.shape[2] == 8


def test_prompts_are_encoded_and_dropped() -> None:
    encoder = text_parts(tiny=True).modules["text_encoder"].eval().requires_grad_(False)
    parts = Parts({}, {"text_encoder": encoder}, tokenizer=nano_tokenizer())
    item = replace(windows(parts).at(0), prompts=("pan left", "a much longer prompt"))
    states = text_states(parts, item, 64)
    assert states is not None and states.shape == (2, 64, 16) and states.dtype == torch.float32
    assert not states[0, 9:].any() and bool(states[0, :9].any())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoded(parts.tokenizer, encoder, item.prompts, 64), states)
    null = replace(parts, constants={"null_text": torch.full((64, 16), 7.0)})
    assert bool((text_states(null, item, 64, 1.0, seeded(0, 0)) == 7).all())  # type: ignore[union-attr]
    assert text_states(Parts({}), replace(item, prompts=()), 64) is None
