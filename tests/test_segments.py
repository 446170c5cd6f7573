"""CSG arithmetic: segments tile the clip, windows are bounded, positions follow the contract."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.segments import CSG, Window, motion_windows, windows

counts = st.integers(1, 200)


def test_the_papers_windows() -> None:
    assert [len(w.blocks) for w in windows(21)] == [4, 5, 5, 5, 5, 5, 4]
    assert list(windows(21))[1] == Window(0, (3,), (4, 5, 6))


@given(counts, st.integers(1, 30), st.integers(0, 30))
def test_segments_tile_the_clip_and_windows_are_bounded(blocks: int, m: int, n: int) -> None:
    cut = list(windows(blocks, segment_blocks=m, neighbor_blocks=n))
    assert [b for w in cut for b in w.segment] == list(range(1, blocks))
    for w in cut:
        start = w.segment[0]
        assert w.neighbors == tuple(range(max(1, start - n), start))
        assert w.anchor == 0 and len(w.blocks) <= 1 + n + m
        assert list(w.blocks) == sorted(set(w.blocks))


@given(counts, st.integers(3, 40), st.data())
def test_motion_windows_tile_and_have_the_trained_length(blocks: int, trained: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, trained - 2))
    for wan in (False, True):
        cut = list(motion_windows(blocks, trained_blocks=trained, overlap_blocks=overlap, generates_anchor=wan))
        assert [b for w in cut for b in w.segment] == list(range(0 if wan else 1, blocks))
        for w in cut[1:]:
            assert len(w.blocks) == trained and w.anchor == 0 and len(w.neighbors) >= overlap
            assert w.positions("clamped", trained) == tuple(range(trained))
        assert all(len(w.blocks) <= trained for w in cut)


@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 3), st.integers(8, 40))
def test_clamped_positions(start: int, m: int, n: int, trained: int) -> None:
    window = Window(0, tuple(range(max(1, start - n), start)), tuple(range(start, start + m)))
    positions = window.positions("clamped", trained)
    assert positions[0] == 0 and max(positions) <= max(trained - 1, 0)
    assert [b - a for a, b in pairwise(positions[1:])] == [1] * (len(positions) - 2)
    if window.blocks[-1] < trained:
        assert positions == window.positions("absolute", trained) == window.blocks
    assert window.positions("window", trained) == tuple(range(len(window.blocks)))


def test_sigmas_of_the_policies() -> None:
    window = Window(0, (3,), (4, 5))
    assert window.sigmas(0.5, CSG()) == (0, 0, 0.5, 0.5)
    assert window.sigmas(0.5, CSG(neighbor_timestep="current")) == (0, 0.5, 0.5, 0.5)
    assert window.sigmas(0.5, CSG(renoised="neighbors")) == (0, 0.5, 0.5, 0.5)
    assert window.sigmas(0.5, CSG(renoised="context")) == (0.5,) * 4


@pytest.mark.parametrize("bad", [{"segment_blocks": 0}, {"neighbor_blocks": -1}])
def test_impossible_cuts_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        list(windows(21, **bad))
    with pytest.raises(ValueError):
        CSG(**bad)
