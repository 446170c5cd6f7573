"""The motion score: pixels of optical flow at a fixed size and stride."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cv2")

from swifti2v.motion_score import SCORE_SIZE, motion_score

WIDTH, HEIGHT = SCORE_SIZE.width, SCORE_SIZE.height


def textured(height: int, width: int) -> torch.Tensor:
    """(3, h, w) of soft texture at several scales."""
    generator = torch.Generator().manual_seed(3)
    layers = [
        F.interpolate(torch.randn(1, 3, height // s, width // s, generator=generator), (height, width), mode="bicubic")
        for s in (8, 16, 40)
    ]
    return (sum(layers)[0] / 3).clamp(-1, 1)


def test_a_still_clip_scores_nothing() -> None:
    assert motion_score(textured(96, 160)[:, None].expand(-1, 17, -1, -1)) < 0.01


@pytest.mark.parametrize("per_frame", [1, 2])
def test_a_sideways_move_scores_half_its_pixels_in_five_frames(per_frame: int) -> None:
    wide = textured(HEIGHT, WIDTH + 64)
    frames = torch.stack([wide[:, :, k * per_frame : k * per_frame + WIDTH] for k in range(16)], dim=1)
    assert motion_score(frames) == pytest.approx(5 * per_frame / 2, rel=0.05)  # the other component is 0


def test_a_picture_twice_as_large_scores_the_same() -> None:
    wide = textured(HEIGHT, WIDTH + 64)
    frames = torch.stack([wide[:, :, 2 * k : 2 * k + WIDTH] for k in range(11)], dim=1)
    large = F.interpolate(frames.transpose(0, 1), scale_factor=2, mode="bicubic").transpose(0, 1)
    assert motion_score(large) == pytest.approx(motion_score(frames), rel=0.05)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="5 frames have no motion score"):
        motion_score(torch.zeros(3, 5, 32, 32))
