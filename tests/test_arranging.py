"""What fits where: within the budget, never slower for more memory, and refusals that name the nearest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v import costs, presets
from swifti2v.arrangement import Arrangement
from swifti2v.arranging import Pricing, arrange
from swifti2v.calibration import Calibration
from swifti2v.core import UsageError
from swifti2v.plan import Planner
from swifti2v.profiles import CARD_RESERVE, GIB, NAMES, PROFILES, Budget, budget_of


@cache
def planner(name: str, **fields: Any) -> Planner:
    preset = presets.get(name)
    request, _ = presets.resolve(preset, prompt="", seed=0, **fields)
    networks = costs.networks_of(preset.family, preset.folder, preset.prompt_tokens)
    return Planner(request, preset, networks, Calibration())


@cache
def on_card(name: str) -> Arrangement:
    return arrange(planner("wan"), PROFILES[name].budget())


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_the_headline_fits_every_card(name: str) -> None:
    way, budget = on_card(name), PROFILES[name].budget()
    assert way.missing(budget) == 0
    assert all(need.device_bytes <= PROFILES[name].device_gib * GIB - CARD_RESERVE for need in way.needs)
    assert [need.phase for need in way.needs][-1] == "refine" and way.source == f"profile {name}"
    assert Arrangement.from_json(way.to_json()) == way


def test_smaller_cards_give_up_more() -> None:
    cards = sorted(PROFILES, key=lambda name: -PROFILES[name].device_gib)
    seconds = [on_card(name).extra_seconds for name in cards]
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0]
    largest, smallest = on_card(cards[0]), on_card(cards[-1])
    assert not largest.streamed and largest.decode is not None and largest.decode.tiles is None
    assert {"transformer", "transformer_2", "text_encoder"} == set(smallest.streamed)
    assert smallest.decode is not None and smallest.decode.parked and smallest.encode is not None
    assert smallest.encode_when == "ahead" and not smallest.overlap


@settings(max_examples=4)
@given(st.integers(7, 60), st.integers(0, 20))
def test_more_memory_never_costs_more(gib: int, more: int) -> None:
    small = arrange(planner("wan"), Budget(gib * GIB, 64 * GIB, "so much"))
    large = arrange(planner("wan"), Budget((gib + more) * GIB, 64 * GIB, "so much"))
    assert small.device_bytes <= gib * GIB and small.host_bytes <= 64 * GIB
    assert large.extra_seconds <= small.extra_seconds


def test_little_host_memory_streams_from_files() -> None:
    way = arrange(planner("wan"), Budget(20 * GIB, 28 * GIB, "a small machine"))
    assert way.from_disk and "transformer" in way.streamed
    assert any("from their files" in line for line in way.ways())


def test_8_bits_make_room_without_streaming() -> None:
    budget = PROFILES["24gb"].budget()
    assert "transformer" in on_card("24gb").streamed
    way = arrange(planner("wan"), budget, layer_bytes=1.06)
    assert not {"transformer", "transformer_2"} & set(way.streamed)


@pytest.mark.slow
def test_a_refusal_names_the_nearest_card() -> None:
    with pytest.raises(UsageError, match=r"do not fit \(tiny, 3\.0 GiB and 64 in host .*\): \w+ needs .*; .*fits 8gb"):
        arrange(planner("wan"), Budget(3 * GIB, 64 * GIB, "tiny"))


def test_refusals_name_the_phase_and_what_would_fit() -> None:
    with pytest.raises(UsageError, match=r"2560x1408, 81 frames do not fit .*; \d+x\d+ would fit$"):
        arrange(planner("nano"), budget_of("cpu", None, 2 * GIB))


@pytest.mark.slow
def test_a_refusal_on_a_cpu() -> None:
    with pytest.raises(UsageError, match=r"motion needs 3\d\.\d GiB at least; no smaller size fits"):
        arrange(planner("wan"), budget_of("cpu", None, 20 * GIB))


def test_nano_gives_up_overlap_before_it_is_refused() -> None:
    roomy = arrange(planner("nano"), budget_of("cpu", None, 16 * GIB))
    assert roomy.overlap and not roomy.phased and roomy.ways() == ["everything stays loaded"]
    need = Pricing(planner("nano"), on_cpu=True)
    least = min(way.device_bytes for way in (need.smallest(Budget(b, 0, "", True)) for b in (0, GIB)))
    tight = arrange(planner("nano"), Budget(least + GIB // 100, 0, "tight", on_cpu=True))
    assert not tight.overlap and tight.device_bytes < roomy.device_bytes


def test_an_asked_for_order_is_kept() -> None:
    ahead = planner("wan")
    ahead = replace(ahead, request=ahead.request.model_copy(update={"encode": "ahead"}))
    assert arrange(ahead, PROFILES["80gb"].budget(), encode="ahead").encode_when == "ahead"
    assert on_card("24gb").encode_when == "ahead"
    assert arrange(planner("wan"), PROFILES["24gb"].budget(), encode="lazy").encode_when == "lazy"
    assert not arrange(planner("wan"), PROFILES["80gb"].budget(), overlap=False).overlap


def test_budgets() -> None:
    assert budget_of("24gb", None, None).device_bytes < 23.5 * GIB
    assert budget_of("auto", 10 * GIB, 30 * GIB).device_bytes < 10 * GIB
    assert budget_of("auto", None, 8 * GIB).on_cpu and not budget_of("auto", 8 * GIB, 8 * GIB).on_cpu
    with pytest.raises(UsageError, match="'25gb' is not known; use auto, 80gb, 24gb"):
        budget_of("25gb", None, None)
    with pytest.raises(UsageError, match="free memory is not known"):
        budget_of("cpu", None, None)
    assert set(PROFILES) < set(NAMES)
