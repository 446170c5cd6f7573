"""Plain measures against closed forms, published values and torchmetrics; the seam test against made-up clips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from swifti2v import metrics

# Sharma, Wu and Dalal (2005), table 1: pairs that catch every known mistake in CIEDE2000.
SHARMA = (
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.4900, -0.0010), (50, -2.4900, 0.0009), 7.1792),
    ((50, 2.4900, -0.0010), (50, -2.4900, 0.0011), 7.2195),
    ((50, 2.5, 0), (61, -5, 29), 22.8977),
    ((50, 2.5, 0), (56, -27, -3), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
)


def clip(frames: int = 3, height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    noise = torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1)


def test_psnr_of_a_known_error_and_of_none() -> None:
    frames = clip()
    assert torch.allclose(metrics.psnr(frames, frames + 0.02), torch.full((3,), 40.0), atol=1e-3)
    assert torch.equal(metrics.psnr(frames, frames), torch.full((3,), 100.0))
    assert metrics.psnr(frames[:, 0], frames[:, 1]).shape == ()


def test_ssim_is_torchmetrics_but_for_the_border() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = clip(seed=1), clip(seed=1) * 0.7 + clip(seed=2) * 0.3
    _, maps = functional.structural_similarity_index_measure(
        a.transpose(0, 1), b.transpose(0, 1), data_range=2.0, return_full_image=True
    )
    assert torch.allclose(metrics.ssim(a, b), maps[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)), atol=1e-5)
    assert torch.allclose(metrics.ssim(a, a), torch.ones(3))
    with pytest.raises(ValueError, match="11 pixels"):
        metrics.ssim(a[..., :8], b[..., :8])


@pytest.mark.parametrize(("first", "second", "expected"), SHARMA)
def test_ciede2000_has_the_published_values(
    first: tuple[float, ...], second: tuple[float, ...], expected: float
) -> None:
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    assert metrics.ciede2000(a, b).item() == pytest.approx(expected, abs=6e-5)
    assert metrics.ciede2000(b, a).item() == pytest.approx(expected, abs=6e-5)


def test_lab_of_known_colors() -> None:
    colors = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, -1]]).T[:, None]  # white, black, red
    found = metrics.lab(colors)[:, 0].T
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    assert torch.allclose(found, expected, atol=0.02)


def test_color_counts_apart_from_detail() -> None:
    gray = torch.zeros(3, 1, 64, 64)
    speckled = gray + 0.05 * torch.randn(3, 1, 64, 64)
    assert metrics.delta_e(gray, speckled) > 2 and metrics.delta_e(gray, speckled, cell=32) < 0.5
    warm = gray + torch.tensor([0.05, 0, -0.05]).view(3, 1, 1, 1)
    drifted = metrics.color_drift(torch.cat([gray, warm], dim=1), gray[:, 0])
    assert drifted[0] == pytest.approx(0, abs=1e-3) and drifted[1] > 2


def test_sharpness_falls_with_blur_and_only_with_blur() -> None:
    photo = clip(1)[:, 0]
    soft = torch.nn.functional.avg_pool2d(photo, 3, 1, 1)
    values = metrics.sharpness(torch.stack([photo, photo * 0.5, soft], dim=1), photo)
    assert values[0] == 0 and values[1] == pytest.approx(-6.02, abs=0.05) and values[2] < -6
    flat = torch.zeros_like(photo)
    assert torch.isfinite(metrics.sharpness(photo[:, None], flat)).all()


def test_change_and_flicker_in_levels() -> None:
    frame = clip(1)[:, 0]
    lighter = frame + 2 / 255
    assert metrics.change(frame, lighter) == pytest.approx(1, abs=1e-3)
    assert metrics.detail_change(frame, lighter) == pytest.approx(0, abs=1e-3)
    assert metrics.flicker(frame, lighter, frame) == pytest.approx(2, abs=1e-3)
    assert metrics.flicker(frame, lighter, lighter + 2 / 255) == pytest.approx(0, abs=1e-3)  # a fade is no flicker


def test_drift_is_the_line() -> None:
    line = metrics.drift(torch.arange(5.0) * 2 + 1)
    assert (line.first, line.last, line.change, line.largest) == pytest.approx((1, 9, 8, 9))
    assert metrics.drift(torch.tensor([3.0])).change == 0
    with pytest.raises(ValueError):
        metrics.drift(torch.tensor([]))


def changes(frames: int, *, block: float, segment: float, seed: int = 0) -> Tensor:
    """Steps of a motion that speeds up, larger by a factor at block and at segment boundaries (M = 3)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.linspace(1, 4, frames - 1) * (0.1 * torch.randn(frames - 1, generator=generator)).exp()
    for step in range(4, frames - 1, 4):
        steps[step] *= segment if step % 12 == 0 else block
    return steps


def test_kinds_of_steps() -> None:
    steps = metrics.steps_by_kind(changes(81, block=1.3, segment=2.0), segment_frames=12)
    assert (len(steps.segment), len(steps.block), len(steps.inside)) == (6, 13, 60)
    assert steps.segment.exp().mean().item() == pytest.approx(2.0, rel=0.1)
    assert steps.block.exp().mean().item() == pytest.approx(1.3, rel=0.1)
    assert steps.inside.exp().mean().item() == pytest.approx(1.0, rel=0.05)  # though the motion speeds up
    twice = steps + steps
    assert len(twice.segment) == 12 and len(twice.inside) == 120
    with pytest.raises(ValueError, match="whole blocks"):
        metrics.steps_by_kind(torch.ones(20), segment_frames=10)


def test_a_seam_is_told_from_block_boundaries() -> None:
    seam = metrics.seam_score(metrics.steps_by_kind(changes(81, block=1.3, segment=2.0), segment_frames=12))
    assert seam is not None and seam.distinguishable and seam.low < seam.ratio < seam.high
    assert seam.ratio == pytest.approx(2 / 1.3, rel=0.15) and (seam.count, seam.others) == (6, 13)


def test_no_seam_is_found_where_there_is_none() -> None:
    """Chance says "distinguishable" in one clip of twenty; that is what p means."""
    found = 0
    for seed in range(60):
        steps = metrics.steps_by_kind(changes(81, block=1.3, segment=1.3, seed=seed), segment_frames=12)
        seam = metrics.seam_score(steps, seed=seed)
        found += seam is not None and seam.distinguishable
    assert found <= 8  # 3 expected; more than 8 of 60 has a probability below 0.5%
    inside = metrics.seam_score(
        metrics.steps_by_kind(changes(321, block=1.3, segment=1.3), segment_frames=12), against="inside"
    )
    assert inside is not None and inside.distinguishable and inside.ratio == pytest.approx(1.3, rel=0.1)


def test_seam_score_without_anything_to_compare() -> None:
    still = metrics.steps_by_kind(torch.zeros(80), segment_frames=12)
    seam = metrics.seam_score(still)
    assert seam is not None and seam.ratio == pytest.approx(1) and seam.p == 1 and not seam.distinguishable
    assert metrics.seam_score(metrics.steps_by_kind(torch.ones(80), segment_frames=4)) is None  # M = 1
    assert metrics.seam_score(metrics.steps_by_kind(torch.ones(8), segment_frames=12)) is None
    assert math.isclose(metrics.seam_score(still, against="inside").ratio, 1)  # type: ignore[union-attr]
