"""A start-up check that this build of torch computes conv3d rightly.

Some did not, silently (pytorch#169688, #163539), and a VAE is a hundred of them; so small ones like the VAE's are
compared with arithmetic done by hand in float64. What goes wrong only at large sizes, as bf16 with cuDNN 9.10
did, a small convolution cannot show.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from ..core import RunError

# Relative to the largest output. float32 allows TF32, which cuDNN convolutions use by default.
_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_STRIDES = ((1, 1, 1), (2, 1, 1))


def self_check_conv3d(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Compare conv3d on ``device`` in ``dtype`` with a float64 reference; milliseconds on a CPU.

    ``dtype``: float32, float16 or bfloat16. Raises core.RunError, naming the versions, if it is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 4, 6, 6, generator=generator).to(dtype)
    weight = torch.randn(16, 16, 3, 3, 3, generator=generator).to(dtype)
    for stride in _STRIDES:
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            with torch.no_grad():
                x_here, weight_here = (tensor.to(device).to(memory_format=memory_format) for tensor in (x, weight))
                got = torch.nn.functional.conv3d(x_here, weight_here, stride=stride)
            require_close(got, conv3d_reference(x, weight, stride), dtype)


def conv3d_reference(x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """conv3d without padding as one float64 product on the CPU of unfolded windows (b, c, t, h, w) and weights."""
    windows = x.cpu().double()
    for axis, (size, step) in enumerate(zip(weight.shape[2:], stride, strict=True), start=2):
        windows = windows.unfold(axis, size, step)
    return torch.einsum("bcthwijk,ocijk->bothw", windows, weight.cpu().double())


def require_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise core.RunError if ``got`` is further from ``expected`` than rounding in ``dtype`` explains."""
    error = ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE[dtype]:  # also refuses NaN
        cudnn = torch.backends.cudnn.version() if got.device.type == "cuda" else None
        raise RunError(
            f"torch {torch.__version__}{f' with cuDNN {cudnn}' if cudnn else ''} on {platform.machine()} computes "
            f"{str(dtype).removeprefix('torch.')} conv3d wrongly (error {error:.2g}, at most {_TOLERANCE[dtype]:g} "
            "is rounding); install another torch build"
        )
