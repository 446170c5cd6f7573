"""Presets and what becomes of a user's words: sizes, lengths and seeds snapped, drawn or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v import presets
from swifti2v.core import RESOLUTIONS, Request, Size, UsageError
from swifti2v.presets import PRESETS, check, get, resolve
from swifti2v.segments import CSG, motion_windows, windows

NANO = get("nano")


def resolved(preset: str = "nano", **fields: Any) -> tuple[Request, list[str]]:
    prompt = "zoom in" if get(preset).reads_text else ""
    return resolve(get(preset), **{"prompt": prompt, "seed": 1, **fields})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name and preset.title and preset.grid.is_legal(preset.grid.default_size)
    request, notices = resolved(name)
    assert notices == [] and check(request) is preset
    assert request.size == preset.grid.default_size and request.num_frames == preset.num_frames and request.fps == 15
    assert preset.num_frames == (17 if preset.stages == 1 else 81)
    assert set(preset.defaults) <= set(Request.model_fields)
    blocks = preset.grid.blocks(request.num_frames)
    for generates in (False, True):
        plan = list(
            motion_windows(
                blocks,
                trained_blocks=preset.grid.trained_blocks,
                overlap_blocks=preset.overlap_blocks,
                generates_anchor=generates,
            )
        )
        assert sorted(block for window in plan for block in window.segment) == list(range(not generates, blocks))
    cut = {"segment_blocks": request.csg.segment_blocks, "neighbor_blocks": request.csg.neighbor_blocks}
    assert sum(len(window.segment) for window in windows(blocks, **cut)) == blocks - 1


def test_shown_presets_and_where_their_weights_come_from() -> None:
    shown = ["nano", "wan", "wan-refine", "mobile", "mobile-nano"]
    assert [name for name, preset in PRESETS.items() if not preset.hidden] == shown
    assert get("mobile").folder is None and get("mobile-nano").folder == presets.package_folder() / "nano_mobile"
    assert get("mobile-nano").vae_folder == presets.package_folder() / "nano" / "vae"
    assert NANO.folder == presets.package_folder() / "nano"
    assert get("wan").folder is None and get("tiny-nano").folder is None
    with pytest.raises(UsageError, match=f"known presets: {', '.join(shown)}$"):
        get("huge")


def test_size_is_exact_or_snapped_with_a_notice() -> None:
    request, notices = resolved(size="2560x1408")
    assert (request.width, request.height, request.fit, notices) == (2560, 1408, "crop", [])
    request, notices = resolved(size="1000x600")
    assert NANO.grid.is_legal(request.size) and len(notices) == 1
    assert "size 1000x600 is off the grid" in notices[0] and f"using {request.size}" in notices[0]
    assert max(abs(request.width - 1000), abs(request.height - 600)) <= NANO.grid.multiple / 2
    with pytest.raises(UsageError, match=f"nearest legal value: {request.size}"):
        resolved(size="1000x600", strict=True)
    assert resolved(size="1x1")[0].size == Size(NANO.grid.multiple, NANO.grid.multiple)


@given(st.integers(1, 8192), st.integers(1, 8192), st.integers(1, 4001))
def test_whatever_is_positive_snaps_to_the_nearest(width: int, height: int, frames: int) -> None:
    request, notices = resolved(size=f"{width}x{height}", num_frames=frames)
    assert check(request) is NANO
    multiple = NANO.grid.multiple
    for asked, got in ((width, request.width), (height, request.height)):
        assert abs(asked - got) <= multiple / 2 or got == multiple or got == 8192 // multiple * multiple
    assert abs(frames - request.num_frames) <= 2 or request.num_frames == 5
    assert request.num_frames % 4 == 1 and request.num_frames >= 5
    changed = (request.size != Size(width, height)) + (request.num_frames != frames)
    assert len(notices) == changed
    if changed:
        with pytest.raises(UsageError, match="nearest legal value"):
            resolved(size=f"{width}x{height}", num_frames=frames, strict=True)
    again, more = resolved(size=str(request.size), num_frames=request.num_frames, strict=True)
    assert again == request and more == []


@pytest.mark.parametrize("preset", ["nano", "wan", "wan-refine"])
@given(st.floats(1 / 8, 8), st.sampled_from(sorted(RESOLUTIONS)))
def test_auto_takes_the_photos_aspect(preset: str, aspect: float, resolution: str) -> None:
    photo = Size(max(1, round(1000 * aspect)), 1000)
    request, notices = resolved(preset, photo_size=photo, resolution=resolution)
    assert notices == [] and request.fit == "crop" and check(request).name == preset
    grid = get(preset).grid
    assert 0.4 < request.size.area / RESOLUTIONS[resolution] < 2.5
    # A side is at most one step of the grid from its ideal.
    slack = 1 + grid.multiple / min(request.width, request.height)
    assert 1 / slack <= request.size.aspect / photo.aspect <= slack
    small = grid.motion_size(request.size)
    assert small.width % grid.stage_one.multiple == 0 and small.height % grid.stage_one.multiple == 0


def test_portrait_photos_make_portrait_videos_unless_told_otherwise() -> None:
    portrait = Size(3024, 4032)
    request, _ = resolved(photo_size=portrait)
    assert request.height > request.width and abs(request.size.aspect - 0.75) < 0.05
    turned, _ = resolved(photo_size=Size(4032, 3024))
    assert turned.size == Size(request.height, request.width)
    for fit in ("crop", "pad"):
        request, _ = resolved(photo_size=portrait, fit=fit, resolution="720p")
        assert request.width > request.height and request.fit == fit
    assert resolved(photo_size=portrait, size="1280x704")[0].size == Size(1280, 704)
    assert resolved(size="1280x704", fit="pad")[0].fit == "pad"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"size": "64x64", "resolution": "2k"}, "give one of them"),
        ({"size": "64x64", "fit": "auto"}, "--fit auto chooses a size"),
        ({"fit": "stretch"}, "use auto, crop or pad"),
        ({"resolution": "8k"}, "known: 360p, 720p, 1080p, 2k"),
        ({"photo_size": Size(8000, 16)}, "too extreme"),
        ({"size": "9000x64"}, "over the limit of 8192"),
        ({"size": "0x64"}, "not positive"),
        ({"size": "64.0x64"}, "whole pixels"),
        ({"num_frames": 0}, "the shortest clip has 5 frames"),
        ({"num_frames": 4002}, "over the limit of 4001"),
        ({"num_frames": 9.0}, "not a whole number"),
        ({"num_frames": True}, "not a whole number"),
        ({"seed": -2}, "seed -2"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"guidance_scale": 0.9}, "guidance_scale 0.9"),
        ({"shift": 0}, "shift 0"),
        ({"strength_2": 1.5}, "strength_2 1.5"),
        ({"sampler_2": "heun"}, "sampler_2 'heun'"),
        ({"csg": {"segment_blocks": 0}}, "csg.segment_blocks 0"),
        ({"csg": {"rope_positions": "spiral"}}, "csg.rope_positions 'spiral'"),
        ({"colour": "red"}, "colour 'red'"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a\udc80"}, "lone surrogate"),
        ({"prompt": "x" * 10_001}, "at most 10000"),
    ],
)
def test_refused_in_one_line_with_the_value(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolved(**fields)
    assert says in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_seeds_are_drawn_told_and_kept() -> None:
    drawn = [resolve(NANO, prompt="", seed=seed) for seed in (None, -1, None)]
    assert all(notices == [f"seed drawn: {request.seed}"] for request, notices in drawn)
    assert len({request.seed for request, _ in drawn}) == 3
    assert resolved(seed=0)[0].seed == 0 and resolved(seed=2**63 - 1)[1] == []


def test_own_words_win_over_the_presets_and_nothing_over_nothing() -> None:
    refine = get("wan-refine")
    request, _ = resolved("wan-refine")
    assert request.strength_2 == 0.5 and request.csg == refine.defaults["csg"]
    request, _ = resolved("wan-refine", strength_2=0.3, csg=CSG(), guidance_scale=None)
    assert request.strength_2 == 0.3 and request.csg == CSG() and request.guidance_scale == 1.0
    assert resolved(fps=24)[0].fps == 24


def test_a_recorded_request_is_checked_against_the_grid() -> None:
    request, _ = resolved("tiny-nano")
    for change, says in (
        ({"width": 130}, "nearest legal value: 128x64"),
        ({"num_frames": 34}, "nearest legal value: 33"),
        ({"preset": "huge"}, "known presets"),
    ):
        with pytest.raises(UsageError, match=says):
            check(request.model_copy(update=change))
