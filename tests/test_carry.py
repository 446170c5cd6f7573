"""Detail carried along the motion: known motion is found, detail arrives where it belongs, cuts are noticed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v import carry
from swifti2v.camera import Motion, warp

WINDOW = (32, 32, 128, 192)


def picture(seed: int = 0, height: int = 192, width: int = 256) -> Tensor:
    """Noise with detail at every scale, (3, h, w) in [-1, 1]."""
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(3, height, width)
    for cell in (2, 4, 8, 16, 32):
        noise = torch.randn(1, 3, height // cell, width // cell, generator=generator)
        total += F.interpolate(noise, (height, width), mode="bicubic")[0] * cell**0.5 / 8
    return total.clamp(-1, 1)


def views(motion: Motion, frames: list[int]) -> Tensor:
    """(t, 3, 128, 192): what a camera sees of the picture's middle."""
    return warp(picture(), [motion.at(frame) for frame in frames], WINDOW)


def low(x: Tensor) -> Tensor:
    return carry.scaled(x, (32, 48))


def psnr(a: Tensor, b: Tensor) -> float:
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    return -10 * math.log10(float((a[inner] - b[inner]).square().mean()) / 4)


def test_at_the_picture_itself_nothing_moves_and_all_is_trusted() -> None:
    still = views(Motion(), [0])
    trail = carry.follow(carry.start(still), low(still))
    assert trail.flow.abs().max() < 0.02
    soft = carry.scaled(low(still), (128, 192))
    trusted, everything = carry.detailed(soft, low(still), trail)
    assert psnr(everything, still) > 40 and psnr(trusted, still) > psnr(soft, still) + 10


@pytest.mark.parametrize(
    "motion", [Motion(pan=0.15), Motion(tilt=-0.1), Motion(zoom=1.15), Motion(roll=6), Motion(pan=-0.08, zoom=0.9)]
)
def test_a_moving_camera_is_followed_and_detail_arrives(motion: Motion) -> None:
    frames = views(motion, [0, 20, 40, 60, 80])
    trail = carry.start(frames[:1])
    for frame in frames[1:]:
        trail = carry.follow(trail, low(frame[None]))
    last = frames[-1:]
    soft = carry.scaled(low(last), (128, 192))
    trusted, _ = carry.detailed(soft, low(last), trail)
    assert psnr(trusted, last) > psnr(soft, last) + 3


def test_after_a_cut_nothing_is_trusted() -> None:
    frames = views(Motion(), [0])
    other = picture(seed=9)[None, :, 32:160, 32:224]
    trail = carry.follow(carry.start(frames), low(other))
    soft = carry.scaled(low(other), (128, 192))
    trusted, everything = carry.detailed(soft, low(other), trail)
    assert psnr(trusted, other) > psnr(soft, other) - 0.3
    assert psnr(everything, other) < psnr(soft, other) - 1


def test_items_of_a_batch_do_not_touch() -> None:
    frames = views(Motion(pan=0.1), [0, 40])
    pair = torch.cat([frames[:1], frames[:1].flip(3)])
    later = torch.cat([frames[1:], frames[1:].flip(3)])
    both = carry.follow(carry.start(pair), low(later))
    alone = carry.follow(carry.start(frames[:1]), low(frames[1:]))
    torch.testing.assert_close(both.flow[:1], alone.flow, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_size_is_legal(height: int, width: int) -> None:
    x = torch.rand(1, 3, 4 * height, 4 * width) * 2 - 1
    trail = carry.follow(carry.start(x), carry.scaled(x, (height, width)))
    assert trail.flow.shape == (1, 2, height, width) and bool(trail.flow.isfinite().all())
    assert carry.carried(trail).shape == x.shape


def test_trust_is_a_share() -> None:
    known = torch.randn(1, 3, 16, 16)
    assert carry.trust(known, known, 2).min() > 0.99
    assert carry.trust(known, -known, 2).max() == 0
    assert carry.trust(known, torch.zeros_like(known), 2).max() == 0
