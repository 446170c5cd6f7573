"""Rectified flow: noise levels, mixing, and the samplers. The only place that knows what sigma means.

sigma is in [0, 1]; x = (1 - sigma) * clean + sigma * noise; velocity = noise - clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor


def shifted(sigma: float, shift: float) -> float:
    """Bend a noise level towards noise: sigma / (sigma + (1 - sigma) / shift). Exact at 0 and 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshifted(sigma: float, shift: float) -> float:
    """The inverse of ``shifted``."""
    return sigma / (shift - (shift - 1) * sigma)


def sigmas(steps: int, shift: float, *, start: float = 1.0) -> tuple[float, ...]:
    """``steps`` + 1 descending noise levels from exactly ``start`` to exactly 0.

    Evenly spaced before the shift, as LightX2V and DiffSynth place them: 4 steps at shift 5 are
    1, .9375, .8333, .625, 0. (diffusers' ``set_timesteps(4)`` shifts its smallest sigma twice and
    gives another grid.) ``start`` below 1 is the true sigma of the first step, not a step fraction.
    """
    if steps < 1:
        raise ValueError(f"steps {steps} is not positive")
    if shift <= 0:
        raise ValueError(f"shift {shift} is not positive")
    if not 0 < start <= 1:
        raise ValueError(f"start sigma {start} is not in (0, 1]")
    top = unshifted(start, shift)
    inner = [shifted(top * (steps - i) / steps, shift) for i in range(1, steps)]
    return (float(start), *inner, 0.0)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x at level ``sigma`` (a tensor of levels broadcasts from the left over block dimensions)."""
    return (1 - sigma) * clean + sigma * noise


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """The training target."""
    return noise - clean


def denoised(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that ``velocity`` at ``x`` points to."""
    return x - sigma * velocity


def euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate the flow down ``levels`` with Euler steps; ``on_step(i)`` after the i-th (from 1).

    Exact on straight flows. ``velocity(x, sigma)`` may be any field of x's shape.
    """
    for index, (sigma, following) in enumerate(pairwise(levels), start=1):
        x = x + (following - sigma) * velocity(x, sigma)
        if on_step is not None:
            on_step(index)
    return x


def renoise(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The sampler of distribution-matching students (FastWan): jump to the clean estimate, add fresh noise.

    ``fresh_noise(i)`` is the noise mixed in after the i-th step.
    """
    for index, (sigma, following) in enumerate(pairwise(levels), start=1):
        x = denoised(x, velocity(x, sigma), sigma)
        if following > 0:
            x = add_noise(x, fresh_noise(index), following)
        if on_step is not None:
            on_step(index)
    return x
