"""ST-LPIPS: the shift-tolerant learned perceptual distance (Ghildyal and Liu, ECCV 2022), AlexNet trunk.

The weights are those of the installed package ``stlpips-pytorch`` (extra ``evaluate``); its code is not imported: it
wants torchvision, torchsummary and IPython, and part of it may not be used commercially. The numbers are the
package's own (``tests/evaluate/test_perceptual.py``) and **not** comparable with LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import read_tensors
from ..core import UsageError

_CHANNELS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIDE = 32


class STLPIPS(nn.Module):
    """The trunk and its five calibrated layers, under the names of the package's checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = {
            "net_slice1_0": nn.Conv2d(3, 64, 11, padding=2),
            "net_slice2_5": nn.Conv2d(64, 192, 5, padding=2),
            "net_slice3_9": nn.Conv2d(192, 384, 3, padding=1),
            "net_slice4_11": nn.Conv2d(384, 256, 3, padding=1),
            "net_slice5_13": nn.Conv2d(256, 256, 3, padding=1),
        }
        self.convolutions = nn.ModuleDict(convolutions)
        self.weights = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in _CHANNELS)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Five maps of unit vectors from (n, 3, h, w) in [-1, 1]; worth keeping for a truth compared often."""
        shift, scale = (torch.tensor(values).to(pictures).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        one, two, three, four, five = cast(Sequence[nn.Module], tuple(self.convolutions.values()))
        # Pooling is three times faster here with the channels last.
        x = ((pictures - shift) / scale).contiguous(memory_format=torch.channels_last)
        maps = [F.relu(_halved(one(x)))]
        maps.append(F.relu(two(_halved(F.max_pool2d(maps[-1], 3, 1)))))
        maps.append(F.relu(three(_halved(F.max_pool2d(maps[-1], 3, 1)))))
        maps.append(F.relu(four(maps[-1])))
        maps.append(F.relu(five(maps[-1])))
        return [x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for x in maps]

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """(n,) distances of two lists of ``features``."""
        terms = [
            ((x - y).square() * weight).sum(dim=1).mean(dim=(1, 2))
            for x, y, weight in zip(a, b, self.weights, strict=True)
        ]
        return torch.stack(terms).sum(dim=0)


def st_lpips(frames: Tensor, truth: Tensor) -> Tensor:
    """ST-LPIPS of (3, t, h, w) against (3, t, h, w), both in [-1, 1]: (t,), 0 for equal frames.

    Frames go through one by one, so memory does not grow with t. ``UsageError`` without the extra or under
    ``MIN_SIDE`` pixels a side.
    """
    if min(frames.shape[-2:]) < MIN_SIDE:
        raise UsageError(f"ST-LPIPS needs {MIN_SIDE} pixels a side, not {frames.shape[-1]}x{frames.shape[-2]}")
    model = load()
    with torch.no_grad():
        pairs = zip(frames.float().unbind(1), truth.float().unbind(1), strict=True)
        return torch.cat([model.distance(model.features(a[None]), model.features(b[None])) for a, b in pairs])


def check_available() -> None:
    """``UsageError`` if the weights are not installed."""
    _weights_file()


@cache
def load() -> STLPIPS:
    """The network with its weights, on the CPU, ready to measure."""
    held = read_tensors(_weights_file(), allow_pickle=True)
    model = STLPIPS()
    wanted = {}
    for name in model.convolutions:
        for part in ("weight", "bias"):
            wanted[f"convolutions.{name}.{part}"] = held[f"{name.replace('_', '.')}.{part}"]
    for index in range(len(_CHANNELS)):
        wanted[f"weights.{index}"] = held[f"lin{index}.model.1.weight"]
    model.load_state_dict(wanted)
    for parameter in model.convolutions.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def _weights_file() -> Path:
    spec = find_spec("stlpips_pytorch")
    if spec is None or spec.origin is None:
        raise UsageError("ST-LPIPS needs weights: pip install --no-deps stlpips-pytorch==0.0.2")
    return Path(spec.origin).parent / "weights" / "vST0.0" / "alex_shift_tolerant.pth"


def _halved(x: Tensor) -> Tensor:
    """Every second pixel after a 1 2 1 blur each way, borders reflected by two."""
    taps = torch.tensor([1.0, 2.0, 1.0]).to(x) / 4
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])
