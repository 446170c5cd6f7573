"""ST-LPIPS as computed here against the package's own module."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from swifti2v.core import UsageError
from swifti2v.evaluate import perceptual

if perceptual.find_spec("stlpips_pytorch") is None:
    pytest.skip("stlpips-pytorch is not installed (extra evaluate)", allow_module_level=True)


def test_same_as_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchsummary", "IPython", "torchvision", "torchvision.models"):
        module = ModuleType(name)
        module.summary = module.embed = module.models = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    from stlpips_pytorch import stlpips  # it imports the four above and uses none of them here

    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    a = torch.nn.functional.avg_pool2d(torch.rand(3, 2, 97, 160) * 2 - 1, 3, 1)
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    with torch.no_grad():
        expected = theirs(a.transpose(0, 1), b.transpose(0, 1)).flatten()
    found = perceptual.st_lpips(a, b)
    assert found.shape == (2,) and torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_equal_frames_and_tiny_ones() -> None:
    frames = torch.rand(3, 1, 40, 40)
    assert perceptual.st_lpips(frames, frames).item() == 0
    with pytest.raises(UsageError, match="32 pixels"):
        perceptual.st_lpips(frames[..., :16], frames[..., :16])
