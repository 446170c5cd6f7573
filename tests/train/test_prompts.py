from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.camera import Motion
from swifti2v.train.prompts import MAX_BYTES, caption, motion_of, parse

SLOW_ZOOM_IN = motion_of(("in",), 0)


@given(seed=st.integers(0, 1_000_000))
@settings(max_examples=300, deadline=None)
def test_captions_parse_back_whatever_stands_around_the_motion(seed: int) -> None:
    made = caption(random.Random(seed))
    assert parse(made.prompt) == made.motion, made.prompt


@pytest.mark.parametrize(
    ("prompt", "motion"),
    [
        ("a mountain lake at dawn, tilt up", motion_of(("up",), 1)),
        ("the camera gently zooms in and pans to the right", motion_of(("in", "right"), 0)),
        ("A bird flies left. Camera pans right.", motion_of(("right",), 1)),
        ("Panning from right to left over the harbour", motion_of(("left",), 1)),
        ("move the camera down", motion_of(("down",), 1)),
        ("push-in on the detective", motion_of(("in",), 1)),
        ("the camera pulls back quickly to reveal the valley", motion_of(("out",), 2)),
        ("a slow river, truck left", motion_of(("left",), 1)),
        ("anti-clockwise rotation", motion_of(("counterclockwise",), 1)),
        ("hand-held shot of a street musician", motion_of(("shake",), 1)),
    ],
)
def test_requests_in_other_words(prompt: str, motion: Motion) -> None:
    assert parse(prompt) == motion


@pytest.mark.parametrize(
    "prompt",
    [
        "a bird flies left",
        "a bright morning",
        "The sun sets over the town.",
        "she looks up at the stars",
        "rolling hills on the right bank of the river",
        "two cookies left alone on a plate, upright piano",
        "eggs in a frying pan",
        "gears rotate clockwise",
        "a train moves forward",
        "",
    ],
)
def test_what_the_picture_does_is_no_camera_motion(prompt: str) -> None:
    assert parse(prompt) == SLOW_ZOOM_IN


@pytest.mark.parametrize(
    "prompt",
    ["static shot", "still camera, a bird flies left", "A lake, no camera movement.", "the camera does not move"],
)
def test_a_camera_told_to_stay_stays(prompt: str) -> None:
    assert parse(prompt) == Motion()


def test_the_motion_is_said_before_the_prompt_is_cut() -> None:
    captions = [caption(random.Random(seed)) for seed in range(3000)]
    long = [made for made in captions if len(made.prompt.encode()) > MAX_BYTES]
    assert long
    for made in long:
        # The cut may fall into a word of the scenery, which then says something else only by chance.
        assert parse(made.prompt[:MAX_BYTES].rpartition(" ")[0]) == made.motion, made.prompt


def test_typos_change_letters_and_never_the_motion() -> None:
    pairs = [(caption(random.Random(seed)), caption(random.Random(seed), typos=1.0)) for seed in range(300)]
    assert all(plain.motion == mistyped.motion for plain, mistyped in pairs)
    assert sum(plain.prompt != mistyped.prompt for plain, mistyped in pairs) > 200
    assert all(abs(len(plain.prompt) - len(mistyped.prompt)) <= 3 for plain, mistyped in pairs)


def test_every_kind_of_request_is_drawn() -> None:
    motions = [caption(random.Random(seed)).motion for seed in range(2000)]
    assert 150 < sum(motion == Motion() for motion in motions) < 300
    codes = [tuple(round(value, 2) for value in motion.code()) for motion in motions]
    for axis in range(5):
        found = {code[axis] for code in codes}
        assert found >= {0.0, 0.33, 0.67, 1.0}
        assert axis == 4 or found >= {-0.33, -0.67, -1.0}
    assert max(sum(value != 0 for value in code) for code in codes) == 2
