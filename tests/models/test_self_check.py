from __future__ import annotations

import time

import pytest
import torch

from swifti2v.core import RunError
from swifti2v.models.self_check import conv3d_reference, require_close, self_check_conv3d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_this_build_passes_quickly(dtype: torch.dtype) -> None:
    self_check_conv3d(dtype=dtype)  # the first call also initializes oneDNN
    start = time.perf_counter()
    self_check_conv3d("cpu", dtype)
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_reference_is_conv3d(stride: tuple[int, int, int]) -> None:
    x, weight = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64), torch.randn(4, 3, 3, 2, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(x, weight, stride=stride)
    torch.testing.assert_close(conv3d_reference(x, weight, stride), expected)


@pytest.mark.parametrize("flaw", [0.1, float("nan"), float("inf")])
def test_wrong_values_are_refused_naming_the_build(flaw: float) -> None:
    expected = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    require_close(expected.float(), expected, torch.float32)
    got = expected.float()
    got[0, 0, 0, 0, 0] += flaw * expected.abs().max()
    with pytest.raises(RunError, match=rf"torch {torch.__version__.split('+')[0]}.*float32 conv3d wrongly"):
        require_close(got, expected, torch.float32)
