"""Sizes snap or refuse by one rule; what a Request holds is legal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from swifti2v import presets
from swifti2v.core import MAX_SIDE, Grid, Lattice, Request, Size, UsageError

GRID = presets.get("wan").grid
sides = st.integers(1, MAX_SIDE)


def test_paper_sizes() -> None:
    assert GRID.multiple == 64
    assert GRID.motion_size(Size(2560, 1408)) == Size(640, 352)
    assert GRID.stage_two.tokens_per_block(Size(2560, 1408)) == 3520
    assert GRID.stage_one.tokens_per_block(Size(640, 352)) * GRID.blocks(81) == 18_480
    assert GRID.is_legal(Size(1280, 704)) and not GRID.is_legal(Size(1280, 720))


@given(sides, sides)
def test_snapping_is_legal_idempotent_and_nearest(width: int, height: int) -> None:
    legal = GRID.snap(Size(width, height))
    assert GRID.is_legal(legal) and GRID.snap(legal) == legal
    for asked, got in ((width, legal.width), (height, legal.height)):
        assert abs(asked - got) <= GRID.multiple / 2 or asked < GRID.multiple / 2


@given(st.integers(1, 4001))
def test_frames_snap_to_4k_plus_1(num_frames: int) -> None:
    legal = GRID.snap_frames(num_frames)
    assert (legal - 1) % 4 == 0 and legal >= 5 and (abs(legal - num_frames) <= 2 or num_frames < 5)
    assert GRID.frames(GRID.blocks(legal)) == legal


@given(st.integers(1, 60))
def test_block_frames_tile_the_clip(blocks: int) -> None:
    frames = [f for block in range(blocks) for f in GRID.block_frames(block)]
    assert frames == list(range(GRID.frames(blocks)))


@given(st.floats(0.2, 5.0), st.sampled_from([640 * 352, 1280 * 704, 2560 * 1408]))
def test_size_for_keeps_area_and_aspect(aspect: float, area: int) -> None:
    size = GRID.size_for(area, aspect)
    assert GRID.is_legal(size)
    assert abs(math.log(size.area / area)) < 0.5 and abs(math.log(size.aspect / aspect)) < 0.3


@pytest.mark.parametrize("text", ["", "2560", "axb", "2560x", "2560x1408x3", "1.5x2", "-64x64", "0x64", "64x-1"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Size.parse(text)


@pytest.mark.parametrize("text", ["2560x1408", "2560X1408", "2560*1408", "2560:1408", " 2560 x 1408 "])
def test_size_spellings(text: str) -> None:
    assert Size.parse(text) == Size(2560, 1408)


@pytest.mark.parametrize("frames", [0, -1, 4002, True, 1.5])
def test_bad_frame_counts_are_refused(frames: int) -> None:
    with pytest.raises(UsageError):
        GRID.snap_frames(frames)


def test_over_limit_names_the_largest_legal_side() -> None:
    with pytest.raises(UsageError, match="8192"):
        GRID.snap(Size(MAX_SIDE + 1, 64))


def test_multiple_is_the_lcm_of_both_stages() -> None:
    grid = Grid(Lattice(8, 2, 16), Lattice(16, 3, 48), scale=2)
    assert grid.multiple == math.lcm(48, 32)


def test_request_refuses_unknown_and_illegal_fields() -> None:
    good = {"preset": "nano", "prompt": "a", "width": 64, "height": 64, "num_frames": 5, "seed": 0}
    Request(**good)
    for bad in ({"sizes": 1}, {"seed": -1}, {"fps": float("nan")}, {"prompt": "a\x00"}, {"prompt": "\ud800"}):
        with pytest.raises(ValidationError):
            Request(**{**good, **bad})
