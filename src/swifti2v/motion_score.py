"""MobileI2V's motion score: how much a clip moves, as one number (arXiv 2511.21475; its code's definition).

The mean |optical flow|, both components, over all pixels and a few pairs of frames of pictures resized to 576x320.
The original measures frames 0, 10, 20 and 30 with a learned flow; 17 frames have no frame 20, so here it is frames 0,
5, 10 and 15 with OpenCV's DIS flow (extra ``evaluate``). The stride belongs to the number: halve it and scores halve.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import Size, UsageError
from .metrics import luma

SCORE_SIZE = Size(576, 320)
PAIRS = ((0, 5), (5, 10), (10, 15))


def motion_score(frames: Tensor) -> float:
    """The score of a clip (3, t, h, w) in [-1, 1], t >= 6: pixels at 576x320 per five frames.

    Pairs that the clip is too short for are left out. Raises ValueError for less than 6 frames, UsageError without
    OpenCV.
    """
    pairs = [pair for pair in PAIRS if pair[1] < frames.shape[1]]
    if not pairs:
        raise ValueError(f"{frames.shape[1]} frames have no motion score: it compares frames {PAIRS[0]}")
    seen = {index: gray(frames[:, index], SCORE_SIZE) for pair in pairs for index in pair}
    return sum(float(dis_flow(seen[a], seen[b]).abs().mean()) for a, b in pairs) / len(pairs)


def gray(frame: Tensor, size: Size) -> Tensor:
    """Luma of a picture (3, h, w) in [-1, 1] as bytes at ``size``, on the CPU: what the flow looks at."""
    plane = luma(frame.float())
    small = F.interpolate(plane[None, None], (size.height, size.width), mode="bilinear", antialias=True)[0, 0]
    return ((small + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def dis_flow(a: Tensor, b: Tensor) -> Tensor:
    """Where each pixel of ``a`` went in ``b``: bytes (h, w) of both -> (2, h, w) pixels right and down."""
    return torch.from_numpy(_dis().calc(a.numpy(), b.numpy(), None)).permute(2, 0, 1).contiguous()


def check_available() -> None:
    """``UsageError`` if OpenCV is not installed."""
    if find_spec("cv2") is None:
        raise UsageError("optical flow needs OpenCV: pip install opencv-python-headless")


@cache
def _dis() -> Any:
    check_available()
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    found = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found.setFinestScale(0)
    return found
