"""The segment loop: what enters a window, what is updated, what memory holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v import flow
from swifti2v.core import RunError
from swifti2v.noise import blocks_noise
from swifti2v.segments import CSG, Window, windows
from swifti2v.stage_two import Sampling, Velocity, dit_velocity, refine
from swifti2v.tiny import tiny_pipeline

SHAPE = (1, 4, 4, 6)


def reference(blocks: int) -> Tensor:
    return torch.randn(1, 4, blocks, 4, 6, generator=torch.Generator().manual_seed(1))


def sampling(steps: int = 2, start: float = 1.0, **csg: object) -> Sampling:
    return Sampling(flow.sigmas(steps, 5.0, start=start), 7, CSG(**csg))


def mixing(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
    """A field in which every block of the window depends on every other and on the reference."""
    return torch.tanh(x + 0.5 * x.mean(dim=2, keepdim=True) + 0.3 * ref) * (0.5 + sigma)


@given(st.integers(2, 12), st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_any_chunking_of_the_reference_gives_the_same_segments(blocks: int, sizes: list[int]) -> None:
    ref = reference(blocks)
    whole = list(refine(mixing, [ref], windows(blocks), sampling()))
    sizes = [*sizes, blocks]
    chunks, at = [], 0
    for size in sizes:
        if at < blocks:
            chunks.append(ref[:, :, at : at + size])
            at += size
    for a, b in zip(whole, refine(mixing, chunks, windows(blocks), sampling()), strict=True):
        assert torch.equal(a, b)


def test_the_segment_alone_is_updated_and_context_enters_clean() -> None:
    seen: list[tuple[Window, Tensor]] = []

    def field(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
        seen.append((window, x.clone()))
        return mixing(x, sigma, window, ref)

    ref = reference(8)
    out = torch.cat([ref[:, :, :1], *refine(field, [ref], windows(8), sampling())], dim=2)
    for window, x in seen:
        context = len(window.context)
        assert torch.equal(x[:, :, :context], out[:, :, list(window.context)])
    first = blocks_noise(SHAPE, (1, 2, 3), seed=7)
    assert torch.equal(seen[0][1][:, :, 1:], first)


@given(st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=15)
def test_held_segments_are_not_made_again(held: int, extra: int) -> None:
    blocks = 12
    ref = reference(blocks)
    whole = list(refine(mixing, [ref], windows(blocks), sampling()))
    held = min(held, len(whole))
    made: list[int] = []

    def field(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
        made.append(window.segment[0])
        return mixing(x, sigma, window, ref)

    again = list(refine(field, ref.split(1 + extra, dim=2), windows(blocks), sampling(), finished=whole[:held]))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert set(made) == {w.segment[0] for w in list(windows(blocks))[held:]}


def test_segments_stream_and_the_reference_is_pulled_as_needed() -> None:
    pulled: list[int] = []

    def lazily() -> Iterator[Tensor]:
        for k, block in enumerate(reference(12).split(1, dim=2)):
            pulled.append(k)
            yield block

    segments = refine(mixing, lazily(), windows(12), sampling())
    next(segments)
    assert pulled == [0, 1, 2, 3]
    next(segments)
    assert pulled[-1] == 6


def test_an_earlier_segment_does_not_depend_on_a_later_reference() -> None:
    ref, changed = reference(10), reference(10)
    changed[:, :, 7:] += 1
    a, b = (list(refine(mixing, [r], windows(10), sampling())) for r in (ref, changed))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])


def test_sdedit_starts_at_the_true_sigma() -> None:
    ref = reference(4)
    still = list(refine(lambda x, *_: torch.zeros_like(x), [ref], windows(4), sampling(3, start=0.4)))
    expected = 0.6 * ref[:, :, 1:] + 0.4 * blocks_noise(SHAPE, (1, 2, 3), seed=7)
    torch.testing.assert_close(still[0], expected)
    initial = torch.zeros_like(ref)
    how = sampling(3, start=0.4)
    other = list(refine(lambda x, *_: torch.zeros_like(x), [ref], windows(4), how, initial=[initial]))
    torch.testing.assert_close(other[0], 0.4 * blocks_noise(SHAPE, (1, 2, 3), seed=7))


@pytest.mark.parametrize("renoised", ["neighbors", "context"])
def test_renoised_context_follows_the_level(renoised: str) -> None:
    seen: list[tuple[float, Window, Tensor]] = []

    def field(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
        seen.append((sigma, window, x.clone()))
        return mixing(x, sigma, window, ref)

    ref = reference(7)
    out = torch.cat([ref[:, :, :1], *refine(field, [ref], windows(7), sampling(renoised=renoised))], dim=2)
    for sigma, window, x in seen:
        for place, block in enumerate(window.context):
            clean = out[:, :, block : block + 1]
            noisy = renoised == "context" or block > 0
            noise = blocks_noise(SHAPE, (block,), seed=7)
            torch.testing.assert_close(x[:, :, place : place + 1], flow.add_noise(clean, noise, sigma * noisy))


def test_generated_neighbor_reference() -> None:
    refs: dict[int, Tensor] = {}

    def field(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
        refs[window.segment[0]] = ref.clone()
        return mixing(x, sigma, window, ref)

    ref = reference(7)
    out = torch.cat([ref[:, :, :1], *refine(field, [ref], windows(7), sampling(neighbor_reference="generated"))], dim=2)
    assert torch.equal(refs[4][:, :, 1:2], out[:, :, 3:4])
    assert torch.equal(refs[4][:, :, 2:], ref[:, :, 4:7]) and torch.equal(refs[4][:, :, :1], ref[:, :, :1])


def test_not_finite_is_an_error_and_a_short_reference_too() -> None:
    with pytest.raises(RunError, match="not finite"):
        list(refine(lambda x, *_: x * float("nan"), [reference(4)], windows(4), sampling()))
    with pytest.raises(RunError, match="ends after 3 blocks"):
        list(refine(mixing, [reference(3)], windows(4), sampling()))


def test_stock_class_and_ours_agree_on_positions_and_timesteps() -> None:
    """wan-refine on diffusers' unmodified class equals the same weights in our class, window by window."""
    from swifti2v.models.wan import SwiftI2VTransformer3DModel

    stock = tiny_pipeline("wan-refine").transformer_2
    config = {k: v for k, v in stock.config.items() if not k.startswith("_")}
    ours = SwiftI2VTransformer3DModel(**config).eval()
    ours.load_state_dict(stock.state_dict())
    text = torch.randn(1, 512, 16)
    ref = torch.randn(1, 4, 8, 4, 8)
    how = sampling(2, start=0.5, renoised="neighbors")
    both = []
    for model in (stock, ours):
        field = dit_velocity(model, text, how.csg, trained_blocks=5)
        with torch.no_grad():
            both.append(torch.cat(list(refine(field, [ref], windows(8), how)), dim=2))
    torch.testing.assert_close(both[0], both[1], atol=2e-5, rtol=1e-4)


def test_guidance_extrapolates() -> None:
    model = tiny_pipeline("wan").transformer_2
    text, negative = torch.randn(2, 1, 512, 16)
    window, x, ref = Window(0, (), (1, 2)), torch.randn(1, 4, 3, 4, 8), torch.randn(1, 4, 3, 4, 8)
    with torch.no_grad():
        one = dit_velocity(model, text, CSG(), trained_blocks=5)(x, 0.5, window, ref)
        none = dit_velocity(model, negative, CSG(), trained_blocks=5)(x, 0.5, window, ref)
        both = dit_velocity(model, text, CSG(), trained_blocks=5, guidance_scale=3.0, negative_text=negative)
        torch.testing.assert_close(both(x, 0.5, window, ref), none + 3 * (one - none), atol=1e-5, rtol=1e-4)


def test_a_reference_with_more_channels_reaches_the_network_whole() -> None:
    """The first channels are the reference proper: anchor and starting point; the network sees all of them."""
    ref, seen = torch.cat([reference(5), 9 * torch.ones(1, 4, 5, 4, 6)], dim=1), []

    def field(x: Tensor, sigma: float, window: Window, given: Tensor) -> Tensor:
        seen.append((x.shape[1], given))
        return mixing(x, sigma, window, given[:, :4])

    wide = list(refine(field, [ref], windows(5), sampling(start=0.6), channels=4))
    plain = list(refine(mixing, [ref[:, :4]], windows(5), sampling(start=0.6)))
    assert all(torch.equal(a, b) for a, b in zip(wide, plain, strict=True))
    assert {count for count, _ in seen} == {4} and all(given.shape[1] == 8 for _, given in seen)
    seen.clear()
    generated = list(refine(field, [ref], windows(5), sampling(neighbor_reference="generated"), channels=4))
    last = seen[-1][1]
    assert torch.equal(last[:, :4, 1], generated[0][:, :, -1]) and torch.equal(last[:, 4:, 1], generated[0][:, :, -1])


def broken_in(*segments: int) -> Velocity:
    """Not finite in windows whose segment begins at one of these blocks."""

    def field(x: Tensor, sigma: float, window: Window, ref: Tensor) -> Tensor:
        return mixing(x, sigma, window, ref) * (float("nan") if window.segment[0] in segments else 1)

    return field


def test_a_segment_that_is_not_finite_is_made_again_by_the_witness() -> None:
    """Bit for bit what the witness makes, in that segment; the others are the fast path's."""
    told: list[int] = []

    def witness(velocity: Velocity, number: int) -> Velocity:
        told.append(number)
        return mixing

    ref = reference(10)
    guarded = dataclasses.replace(sampling(), witness=witness)
    made = list(refine(broken_in(4, 7), [ref], windows(10), guarded))
    assert told == [1, 2]
    for a, b in zip(made, refine(mixing, [ref], windows(10), sampling()), strict=True):
        assert torch.equal(a, b)
    # A run that is resumed after the first broken segment has not seen it, and chooses alike.
    told.clear()
    resumed = list(refine(broken_in(4, 7), [ref], windows(10), guarded, finished=made[:2]))
    assert told == [2] and all(torch.equal(a, b) for a, b in zip(made, resumed, strict=True))


def test_not_finite_even_by_the_witness_is_an_error() -> None:
    guarded = dataclasses.replace(sampling(), witness=lambda velocity, number: broken_in(4))
    with pytest.raises(RunError, match="segment 2 is not finite"):
        list(refine(broken_in(4), [reference(7)], windows(7), guarded))
