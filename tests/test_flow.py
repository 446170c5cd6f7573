"""Levels are the published grid; Euler is exact where it must be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from swifti2v import flow

shifts = st.floats(0.5, 12)


def test_the_four_step_grid_is_exact() -> None:
    assert flow.sigmas(4, 5.0) == (1.0, 0.9375, 2.5 / 3, 0.625, 0.0)


def test_equals_diffusers_with_explicit_sigmas_and_not_its_own_grid() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(flow.sigmas(4, 5.0)))
    scheduler.set_timesteps(4)
    assert abs(float(scheduler.sigmas[3]) - 0.625) > 0.5  # the trap


@given(st.integers(1, 60), shifts, st.floats(0.05, 1.0))
def test_levels_descend_from_start_to_zero(steps: int, shift: float, start: float) -> None:
    levels = flow.sigmas(steps, shift, start=start)
    assert len(levels) == steps + 1 and levels[0] == start and levels[-1] == 0.0
    assert all(a > b for a, b in pairwise(levels))


@given(st.floats(0, 1), shifts)
def test_shift_inverts(sigma: float, shift: float) -> None:
    assert flow.unshifted(flow.shifted(sigma, shift), shift) == pytest.approx(sigma, abs=1e-9)


@given(st.integers(1, 20), shifts, st.floats(0.1, 1.0))
def test_euler_is_exact_on_straight_flow(steps: int, shift: float, start: float) -> None:
    clean, noise = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = flow.add_noise(clean, noise, start)
    calls: list[int] = []
    levels = flow.sigmas(steps, shift, start=start)
    got = flow.euler(lambda x, s: flow.velocity_of(clean, noise), x, levels, calls.append)
    torch.testing.assert_close(got, clean)
    assert calls == list(range(1, steps + 1))


@given(st.floats(0, 1))
def test_conversions_round_trip(sigma: float) -> None:
    clean, noise = torch.randn(2, 4, dtype=torch.float64)
    x = flow.add_noise(clean, noise, sigma)
    torch.testing.assert_close(flow.denoised(x, flow.velocity_of(clean, noise), sigma), clean)


def test_renoise_ends_at_the_clean_estimate() -> None:
    clean = torch.full((2,), 3.0)
    fresh = {1: torch.ones(2), 2: -torch.ones(2)}
    got = flow.renoise(lambda x, s: (x - clean) / s, torch.randn(2), (1.0, 0.7, 0.4, 0.0), fresh.__getitem__)
    torch.testing.assert_close(got, clean)


@pytest.mark.parametrize(("steps", "shift", "start"), [(0, 5, 1), (4, 0, 1), (4, 5, 0), (4, 5, 1.1), (-1, 5, 1)])
def test_impossible_levels_are_refused(steps: int, shift: float, start: float) -> None:
    with pytest.raises(ValueError):
        flow.sigmas(steps, shift, start=start)
