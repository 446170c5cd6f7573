"""Noise depends on where a block is, and on nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.noise import block_noise, blocks_noise

SHAPE = (4, 6, 8)


@given(st.integers(0, 2**62), st.integers(0, 400))
def test_repeats_and_does_not_touch_the_global_generator(seed: int, block: int) -> None:
    before = torch.random.get_rng_state()
    a = block_noise(SHAPE, seed=seed, block=block)
    torch.randn(7)
    torch.random.set_rng_state(before)
    assert torch.equal(a, block_noise(SHAPE, seed=seed, block=block))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_coordinate_matters() -> None:
    base = {"seed": 1, "block": 2, "stage": "stage_two", "item": 0, "step": 0}
    first = block_noise(SHAPE, **base)
    for change in ({"seed": 2}, {"block": 3}, {"stage": "stage_one"}, {"item": 1}, {"step": 1}):
        assert not torch.equal(first, block_noise(SHAPE, **{**base, **change}))


@given(st.integers(1, 6), st.integers(0, 5))
def test_any_cut_gives_the_same_noise(first: int, second: int) -> None:
    blocks = list(range(first + second))
    whole = blocks_noise((2, *SHAPE), blocks, seed=9)
    parts = [blocks_noise((2, *SHAPE), part, seed=9) for part in (blocks[:first], blocks[first:]) if part]
    assert torch.equal(whole, torch.cat(parts, dim=2))
    assert not torch.equal(whole[0], whole[1])


def test_is_standard_normal() -> None:
    sample = block_noise((64, 64, 64), seed=0, block=1)
    assert abs(float(sample.mean())) < 0.01 and abs(float(sample.std()) - 1) < 0.01 and sample.dtype == torch.float32
