"""Camera motion read back from clips whose motion is known exactly, and what counts as the motion asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from swifti2v import media
from swifti2v.camera import FAST_PAN, FAST_ROLL, FAST_SHAKE, FAST_ZOOM, Motion, View
from swifti2v.core import Size
from swifti2v.evaluate import optical_flow
from swifti2v.train.synthetic import make_scene, render

pytest.importorskip("cv2")
PHOTO = Path(__file__).parents[2] / "examples" / "photo.jpg"
MOTIONS = {
    "left, fast": Motion(pan=-FAST_PAN),
    "right, slow": Motion(pan=FAST_PAN / 3),
    "up": Motion(tilt=FAST_PAN * 2 / 3),
    "in, fast": Motion(zoom=FAST_ZOOM),
    "out, slow": Motion(zoom=FAST_ZOOM ** (-1 / 3)),
    "clockwise": Motion(roll=FAST_ROLL * 2 / 3),
    "right and in": Motion(pan=FAST_PAN * 2 / 3, zoom=FAST_ZOOM ** (1 / 3)),
    "still": Motion(),
}


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return media.read_image(PHOTO).pixels


def clip(photo: torch.Tensor, motion: Motion, size: Size, frames: int) -> torch.Tensor:
    return render(make_scene(photo, size, motion, 80, random.Random(0)), range(frames))


@pytest.mark.parametrize("name", MOTIONS)
@pytest.mark.parametrize(("size", "frames"), [(Size(192, 96), 41), (Size(112, 192), 17), (Size(640, 352), 9)])
def test_motion_is_read_back(photo: torch.Tensor, name: str, size: Size, frames: int) -> None:
    asked = MOTIONS[name]
    found = optical_flow.motion_of(clip(photo, asked, size, frames))
    for axis, (value, wish) in enumerate(zip(found.code()[:4], asked.code()[:4], strict=True)):
        assert value == pytest.approx(wish, abs=0.1), (axis, found.code(), asked.code())
    assert optical_flow.agreement(found, asked).right
    others = [other for other in MOTIONS.values() if other != asked]
    assert not any(optical_flow.agreement(found, other).right for other in others)


def test_shake_is_not_motion(photo: torch.Tensor) -> None:
    found = optical_flow.motion_of(clip(photo, Motion(shake=FAST_SHAKE), Size(192, 96), 81))
    assert found.shake == pytest.approx(FAST_SHAKE, rel=0.25)
    assert max(map(abs, found.code()[:4])) < 0.15


def test_what_passes_in_front_is_outvoted(photo: torch.Tensor) -> None:
    frames = clip(photo, Motion(pan=FAST_PAN), Size(192, 96), 17)
    for index in range(17):
        frames[:, index, 30:60, 10 + 8 * index : 50 + 8 * index] = frames[:, 0, 30:60, 10:50].flip(2)
    assert optical_flow.motion_of(frames).code()[0] == pytest.approx(1, abs=0.1)


def test_agreement_has_its_limits() -> None:
    left = Motion(pan=-FAST_PAN)
    assert optical_flow.agreement(Motion(pan=-FAST_PAN / 2), left).speed == pytest.approx(0.5)
    assert not optical_flow.agreement(Motion(pan=-FAST_PAN / 4), left).right  # too little
    assert not optical_flow.agreement(Motion(pan=FAST_PAN), left).right
    assert not optical_flow.agreement(Motion(pan=-FAST_PAN, roll=4), left).right  # and something nobody asked for
    assert optical_flow.agreement(Motion(pan=0.01), Motion()).right
    assert not optical_flow.agreement(left, Motion()).right


def test_warping_error_knows_motion_from_flicker(photo: torch.Tensor) -> None:
    moving = clip(photo, Motion(pan=FAST_PAN), Size(192, 96), 3)
    a, b = (optical_flow.gray(frame) for frame in (moving[:, 0], moving[:, 2]))
    steady = optical_flow.warping_error(a, b)
    unwarped = float((a.float() - b.float()).square().mean().sqrt())
    assert steady.error < unwarped / 2 and steady.visible > 0.9
    noisy = (b.float() + 12 * torch.randn(b.shape)).clamp(0, 255).to(torch.uint8)
    assert optical_flow.warping_error(a, noisy).error > steady.error + 4
    assert optical_flow.warping_error(a, a).error < 0.5


def test_color_is_followed_through_a_pan(photo: torch.Tensor) -> None:
    frames = clip(photo, Motion(pan=0.5), Size(192, 96), 81)
    seen = Motion(pan=0.5).at(80)
    true = optical_flow.followed_color_drift(frames[:, 80], frames[:, 0], seen)
    warm = frames[:, 80] + torch.tensor([0.05, 0, -0.05]).view(3, 1, 1)
    drifted = optical_flow.followed_color_drift(warm, frames[:, 0], seen)
    assert true is not None and drifted is not None and true < 0.5 < 1.5 < drifted
    assert optical_flow.followed_color_drift(frames[:, 80], frames[:, 0], View(0.95, 0, 1, 0)) is None


def test_blank_and_single_pictures() -> None:
    assert optical_flow.motion_of(torch.zeros(3, 9, 64, 64)).code() == pytest.approx((0, 0, 0, 0, 0))
    assert optical_flow.motion_of(torch.rand(3, 1, 64, 64)) == Motion()
