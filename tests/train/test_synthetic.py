from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.camera import Motion
from swifti2v.core import Size
from swifti2v.train.prompts import PAN, SPEEDS, caption, motion_of, parse
from swifti2v.train.synthetic import make_scene, reach, render

SIZE = Size(80, 48)


def picture(seed: int = 0, height: int = 120, width: int = 200) -> torch.Tensor:
    """A smooth random photo, uint8."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine[0] * 255).to(torch.uint8)


def scene(motion: Motion, seed: int = 0):
    return make_scene(picture(seed), SIZE, motion, 80, random.Random(seed))


def test_pan_left_moves_the_picture_right_by_its_amplitude() -> None:
    made = scene(Motion(pan=-0.1))
    clip = render(made, [0, 40, 80])
    for index, pixels in ((1, 4), (2, 8)):
        torch.testing.assert_close(
            clip[:, index, :, pixels:], made.photo[:, :, : SIZE.width - pixels], atol=2e-3, rtol=0
        )


def test_tilt_up_moves_the_picture_down() -> None:
    made = scene(Motion(tilt=0.125))
    clip = render(made, [80])
    torch.testing.assert_close(clip[:, 0, 6:], made.photo[:, : SIZE.height - 6], atol=2e-3, rtol=0)


@pytest.mark.parametrize("zoom", [1.2, 1 / 1.2])
def test_zoom_keeps_the_center_and_scales_around_it(zoom: float) -> None:
    view = Motion(zoom=zoom).at(80)
    assert (view.x, view.y, view.angle) == (0, 0, 0)
    assert view.scale == pytest.approx(1 / zoom)
    clip = render(scene(Motion(zoom=zoom)), [0, 80])
    middle = clip[:, :, 23:25, 39:41].mean(dim=(2, 3))
    assert (middle[:, 0] - middle[:, 1]).abs().max() < 0.03
    assert (clip[:, 0] - clip[:, 1]).abs().max() > 0.05


def test_clockwise_roll_turns_the_picture_the_other_way() -> None:
    made = scene(Motion(roll=90.0))
    side = 40
    crop = made.photo[:, 4:44, 20 : 20 + side]
    rolled = render(made, [80])[:, 0, 4:44, 20 : 20 + side]
    torch.testing.assert_close(rolled, torch.rot90(crop, 1, dims=(1, 2)), atol=5e-3, rtol=0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_frame_0_is_exactly_the_fitted_view_and_the_photo_covers_every_view(seed: int) -> None:
    rng = random.Random(seed)
    motion = caption(rng).motion
    made = make_scene(picture(seed), SIZE, motion, 80, rng)
    clip = render(made, [0, 79, 80])
    assert torch.equal(clip[:, 0], made.photo)
    assert clip.shape == (3, 3, SIZE.height, SIZE.width)
    assert clip.abs().max() <= 1
    left, right, up, down = reach(motion, SIZE, 80)
    assert left <= made.left and up <= made.top
    assert made.source.shape[2] >= made.left + SIZE.width + right
    assert made.source.shape[1] >= made.top + SIZE.height + down


@given(seed=st.integers(0, 100_000))
@settings(max_examples=400, deadline=None)
def test_prompts_parse_back_to_their_motion(seed: int) -> None:
    made = caption(random.Random(seed))
    assert parse(made.prompt) == made.motion, made.prompt


def test_speed_words_order_the_amplitudes() -> None:
    pans = [abs(parse(f"{speed} pan left".strip()).pan) for speed in SPEEDS]
    assert pans == list(PAN)


@pytest.mark.parametrize(
    ("prompt", "motion"),
    [
        ("The camera pans slowly to the right over a lake", motion_of(("right",), 0)),
        ("a flower in a vase", motion_of(("in",), 0)),
        ("static shot of a street", Motion()),
        ("zoom out and roll clockwise, fast", motion_of(("out", "clockwise"), 2)),
        ("rotate anti-clockwise", motion_of(("counterclockwise",), 1)),
    ],
)
def test_sentences_a_person_would_type(prompt: str, motion: Motion) -> None:
    assert parse(prompt) == motion


def test_deterministic_by_seed() -> None:
    assert caption(random.Random(7)) == caption(random.Random(7))
    first, second = (render(scene(Motion(pan=0.1, shake=0.01), seed=3), [0, 5, 9]) for _ in range(2))
    assert torch.equal(first, second)


def test_low_resolution_scene_shows_the_same_motion() -> None:
    made = make_scene(picture(), SIZE, Motion(pan=0.2), 80, random.Random(0))
    small = render(made.at(Size(20, 12)), [80])
    large = render(made, [80])
    shrunk = torch.nn.functional.interpolate(large[:, 0][None], size=(12, 20), mode="bicubic", antialias=True)[0]
    assert (small[:, 0] - shrunk).abs().mean() < 0.02


def test_a_motion_that_no_photo_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="no window"):
        make_scene(picture(), SIZE, Motion(pan=60.0), 80, random.Random(0))
