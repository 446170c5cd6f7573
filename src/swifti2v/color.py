"""RGB <-> BT.709 Y'CbCr 4:2:0, done here because libswscale's defaults are wrong for us.

Left alone, swscale converts RGB with the BT.601 matrix, rounds inaccurately and repeats chroma: a photo loses
3 to 9 dB. Here the matrix is explicit and chroma sits where H.264 says it does by default: level with the
left luma sample of each pair, half-way between the two rows. This module knows no files and no codecs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BT709_KR, BT709_KB = 0.2126, 0.0722
# Kr and Kb by the matrix code of ITU-T H.273; 2 (unspecified) is the caller's to guess.
_LUMA_WEIGHTS = {
    1: (BT709_KR, BT709_KB),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}


@dataclass(frozen=True)
class Planes:
    """One 4:2:0 picture as code values: ``y`` (h, w), ``cb`` and ``cr`` (h/2, w/2); whole numbers as float32."""

    y: Tensor
    cb: Tensor
    cr: Tensor


def knows_matrix(matrix: int) -> bool:
    """Whether ``yuv420_to_rgb`` has the weights of this H.273 matrix code."""
    return matrix in _LUMA_WEIGHTS


def rgb_to_yuv420(frame: Tensor, *, bit_depth: int = 8) -> Planes:
    """RGB (3, h, w) in [-1, 1], h and w even, to BT.709 limited-range code values of ``bit_depth`` bits."""
    rgb = frame.clamp(-1, 1)
    # y, b - y and r - y are linear in [-1, 1]; the shift to [0, 1] is folded into the last step.
    luma = BT709_KR * rgb[0] + (1 - BT709_KR - BT709_KB) * rgb[1] + BT709_KB * rgb[2]
    cb = _halve(rgb[2] - luma) * (0.25 / (1 - BT709_KB))
    cr = _halve(rgb[0] - luma) * (0.25 / (1 - BT709_KR))
    unit = 2 ** (bit_depth - 8)
    return Planes(
        luma.mul_(219 * unit / 2).add_((16 + 219 / 2) * unit).round_(),
        cb.mul_(224 * unit).add_(128 * unit).round_(),
        cr.mul_(224 * unit).add_(128 * unit).round_(),
    )


def yuv420_to_rgb(planes: Planes, *, bit_depth: int = 8, matrix: int = 1, full_range: bool = False) -> Tensor:
    """Code values to RGB (3, h, w) float32 in [-1, 1]. ``matrix`` is an H.273 code; chroma is left-sited."""
    kr, kb = _LUMA_WEIGHTS[matrix]
    unit = 2 ** (bit_depth - 8)
    top = 2**bit_depth - 1
    black, luma_span, chroma_span = (0.0, top, top) if full_range else (16.0 * unit, 219.0 * unit, 224.0 * unit)
    luma = (planes.y - black) * (2 / luma_span) - 1
    cb = _double((planes.cb - 128 * unit) * (2 / chroma_span))
    cr = _double((planes.cr - 128 * unit) * (2 / chroma_span))
    red = luma + 2 * (1 - kr) * cr
    blue = luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return torch.stack((red, green, blue)).clamp_(-1, 1)


def _halve(plane: Tensor) -> Tensor:
    """(h, w) -> (h/2, w/2): rows averaged in pairs, columns weighted 1 2 1 around every even one."""
    rows = (plane[0::2] + plane[1::2]) * 0.5
    odd = rows[:, 1::2]
    before = torch.cat((rows[:, :1], odd[:, :-1]), dim=1)
    return 0.5 * rows[:, 0::2] + 0.25 * (before + odd)


def _double(plane: Tensor) -> Tensor:
    """(h, w) -> (2h, 2w), linear, with the sample positions of ``_halve``."""
    above = torch.cat((plane[:1], plane[:-1]))
    below = torch.cat((plane[1:], plane[-1:]))
    rows = torch.stack((0.75 * plane + 0.25 * above, 0.75 * plane + 0.25 * below), dim=1).flatten(0, 1)
    right = torch.cat((rows[:, 1:], rows[:, -1:]), dim=1)
    return torch.stack((rows, 0.5 * (rows + right)), dim=2).flatten(1, 2)
