"""``--fast``: one name for choices that are all visible; what the user says wins; refused where it means nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swifti2v import presets, quantize
from swifti2v.core import Request, UsageError
from swifti2v.hastening import hastened
from swifti2v.options import Options
from swifti2v.order import plan_of, prepare, request_of
from swifti2v.plan import plan
from swifti2v.presets import PRESETS, get
from swifti2v.segments import CSG
from swifti2v.tiny import tiny_pipeline

FAST = [name for name, preset in PRESETS.items() if preset.fast]
WAN = Options(prompt="zoom in", preset="wan", seed=1, device="cpu", fast=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_choices_or_a_reason(name: str) -> None:
    preset = PRESETS[name]
    assert bool(preset.fast) != bool(preset.not_fast)
    assert set(preset.fast) <= set(Request.model_fields)
    assert preset.fast_quantize is None or (preset.fast and preset.fast_quantize in quantize.KINDS)
    with pytest.raises(TypeError):
        preset.fast["seed"] = 1  # type: ignore[index]


@pytest.mark.parametrize("name", FAST)
def test_one_request_from_the_command_line_and_in_python(name: str) -> None:
    """The whole of ``--fast`` is in the request, and it is less work than the usual one."""
    preset = get(name)
    options, lines = hastened(Options(prompt="zoom in", preset=name, seed=1, device="cpu", fast=True), preset)
    asked, _ = request_of(options, preset, None)
    assert asked == presets.resolve(preset, prompt="zoom in", seed=1, **preset.fast)[0]
    usual, _ = presets.resolve(preset, prompt="zoom in", seed=1)
    assert plan(asked, preset).flops < plan(usual, preset).flops
    assert len(lines) >= len(preset.fast) and all(line.startswith("fast: ") for line in lines)
    for field in set(Request.model_fields) - set(preset.fast):
        assert getattr(asked, field) == getattr(usual, field)


def test_wan_in_words() -> None:
    _, lines = hastened(WAN, get("wan"))
    assert lines[:2] == ("fast: num_inference_steps_2 4 -> 2", "fast: segment_blocks 3 -> 4")
    assert len(lines) == 3 and lines[2].startswith("fast: quantize stays off: quantize 'fp8-rows' needs a GPU")
    refine, _ = hastened(replace(WAN, preset="wan-refine"), get("wan-refine"))
    request, _ = request_of(refine, get("wan-refine"), None)
    assert request.csg == get("wan-refine").defaults["csg"].model_copy(update={"segment_blocks": 4})


def test_no_other_cut_with_one_neighbor_takes_fewer_flops() -> None:
    """Why M = 4: presets says so, ``plan`` counts it."""

    def refine(blocks: int) -> int:
        request, _ = presets.resolve(get("wan"), prompt="", seed=1, csg=CSG(segment_blocks=blocks))
        return plan(request, get("wan")).row("refine").flops

    cost = {blocks: refine(blocks) / 1e15 for blocks in range(1, 21)}
    assert min(cost, key=lambda blocks: cost[blocks]) == get("wan").fast["csg"].segment_blocks
    assert [round(cost[blocks], 2) for blocks in (3, 4, 5)] == [7.01, 6.72, 6.73]


def test_what_the_user_says_wins() -> None:
    said = replace(WAN, num_inference_steps_2=3, neighbor_blocks=2, quantize="int8")
    options, lines = hastened(said, get("wan"))
    request, _ = request_of(options, get("wan"), None)
    assert request.num_inference_steps_2 == 3 and options.quantize == "int8"
    assert request.csg == CSG(segment_blocks=4, neighbor_blocks=2)
    assert lines == (
        "fast: num_inference_steps_2 stays 3, as asked for",
        "fast: segment_blocks 3 -> 4",
        "fast: quantize stays int8, as asked for",
    )


def test_8_bits_where_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "check_quantization", lambda *_: None)
    options, lines = hastened(WAN, get("wan"))
    assert options.quantize == "fp8-rows" and lines[-1] == "fast: quantize off -> fp8-rows"


def test_refused_where_it_could_change_nothing() -> None:
    for name, why in (("mobile", "no student"), ("mobile-nano", "no student"), ("nano", "its transformers")):
        with pytest.raises(UsageError, match=f"^--fast: {name} has nothing to change: {why}"):
            plan_of(Options(preset=name, fast=True))
    with pytest.raises(UsageError, match="device"):
        plan_of(replace(WAN, device="abacus"))
    assert hastened(Options(preset="mobile"), get("mobile")) == (Options(preset="mobile"), ())


def test_in_the_order_its_manifest_and_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save("photo.png")
    tiny_pipeline("wan").save_pretrained("twin")
    plain = Options(
        image="photo.png", prompt="pan", preset="tiny-wan", model="twin", seed=1, num_frames=17, device="cpu"
    )
    order = prepare(replace(plain, fast=True, quantize="int8"))
    assert {"fast: num_inference_steps_2 2 -> 1", "fast: segment_blocks 3 -> 4"} <= set(order.notices)
    kept = json.loads(order.manifest.model_dump_json())
    assert kept["request"]["num_inference_steps_2"] == 1 and kept["request"]["csg"]["segment_blocks"] == 4
    assert kept["settings"]["quantize"] == "int8"
    usual, fast = (plan_of(replace(plain, fast=on)).row("refine") for on in (False, True))
    assert (usual.windows, usual.forwards) == (2, 4) and (fast.windows, fast.forwards) == (1, 1)
