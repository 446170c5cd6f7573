"""Cuts found in made films; frames reached by number, with and without seeking."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from films import film, shot
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.core import UsageError
from swifti2v.train.shots import NEAR, Shot, changes, find_shots, read_frames, scan, without

LENGTHS = (14, 9, 20, 5)


@pytest.fixture(scope="module")
def cut_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "cut.mp4", LENGTHS)


def as_looks(lengths: tuple[int, ...]) -> list[np.ndarray]:
    shots = [shot(seed, n, 32, 48)[0].permute(1, 2, 3, 0) for seed, n in enumerate(lengths)]
    return [((frame + 1) * 127.5).round().byte().numpy() for one in shots for frame in one]


def test_hard_cuts_are_found_and_nothing_else(cut_film: Path) -> None:
    found = scan(cut_film)
    edges = np.cumsum((0, *LENGTHS)).tolist()
    assert [(s.start, s.end) for s in found.shots] == list(pairwise(edges))
    assert len(found.times) == sum(LENGTHS) and len(set(found.times)) == sum(LENGTHS)


@given(st.lists(st.integers(NEAR + 1, 16), min_size=1, max_size=5))
def test_any_lengths_are_found_again(lengths: list[int]) -> None:
    found = find_shots(list(changes(as_looks(tuple(lengths)))))
    assert [s.frames for s in found] == lengths


def test_a_flash_of_movement_is_no_cut() -> None:
    still = as_looks((12,))
    jolted = [np.roll(frame, 6 if i >= 6 else 0, axis=1) for i, frame in enumerate(still)]
    assert len(find_shots(list(changes(jolted)))) == 1


def test_black_frames_end_a_shot_and_belong_to_none(tmp_path: Path) -> None:
    path = film(tmp_path / "black.mp4", (10, -4, 9))
    assert [(s.start, s.end) for s in scan(path).shots] == [(0, 10), (14, 23)]


@pytest.mark.parametrize(("start", "step"), [(0, 1), (1, 1), (13, 1), (27, 2), (45, 1)])
def test_seeking_gives_the_frames_of_reading_through(cut_film: Path, start: int, step: int) -> None:
    times = scan(cut_film).times
    sought = list(read_frames(cut_film, start, 3, step=step, times=times))
    through = list(read_frames(cut_film, start, 3, step=step))
    assert all(torch.equal(a, b) for a, b in zip(sought, through, strict=True)) and len(sought) == 3


def test_times_of_another_file_cost_time_but_not_the_right_frames(cut_film: Path) -> None:
    wrong = [t + 7 if t is not None else None for t in scan(cut_film).times]
    assert torch.equal(next(read_frames(cut_film, 20, 1, times=wrong)), next(read_frames(cut_film, 20, 1)))


def test_reading_past_the_end_is_refused(cut_film: Path) -> None:
    with pytest.raises(UsageError, match="ends before frame 48"):
        list(read_frames(cut_film, 46, 4))


def test_a_scan_is_kept(cut_film: Path, tmp_path: Path) -> None:
    first = scan(cut_film, tmp_path)
    scan.cache_clear()
    (kept,) = tmp_path.iterdir()
    assert scan(cut_film, tmp_path) == first == scan(cut_film) and kept.name.startswith("cut.mp4-")


def test_damaged_files_are_refused(cut_film: Path, tmp_path: Path) -> None:
    cut_short = tmp_path / "short.mp4"
    cut_short.write_bytes(cut_film.read_bytes()[: cut_film.stat().st_size * 2 // 3])
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    for path in (cut_short, text, tmp_path / "missing.mp4"):
        with pytest.raises(UsageError):
            scan(path)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4))
def test_dropped_ranges_are_dropped_and_the_rest_is_kept(ranges: list[tuple[int, int]]) -> None:
    ranges = [(min(r), max(r)) for r in ranges]
    kept = without([Shot(0, 20), Shot(20, 50)], ranges)
    frames = {frame for s in kept for frame in range(s.start, s.end)}
    assert frames == {f for f in range(50) if not any(a <= f < b for a, b in ranges)}
    assert all(s.end <= 20 or s.start >= 20 for s in kept)


def test_an_empty_shot_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Shot(4, 4)
