"""Measures of pictures and clips that need no network: fidelity, color, detail, flicker, drift, seams.

Pure functions of tensors. Pictures are (3, h, w) and clips (3, t, h, w), float, in [-1, 1], sRGB; a measure of two
of them reduces over channels and pixels and keeps the frames: () for pictures, (t,) for clips. This module knows
no files, no flow and no learned metric (``evaluate``), and nothing of how a clip was made but where its segments end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 32  # pixels a side over which color and brightness are averaged where detail must not count
_LUMA = (0.2126, 0.7152, 0.0722)
_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees
_FAINT = 0.02  # of 255: changes below it (a still picture's) are all alike to the seam score
_PERMUTATIONS = 4999


# --- a picture against another ----------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, frame by frame; 100 for equal frames (an error of 1e-10)."""
    error = (a - b).square().mean(dim=(0, -2, -1))
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), 11-tap Gaussian of 1.5 pixels, mean over RGB; at most 1.

    Only windows wholly inside the picture count, as in the original; torchmetrics also counts windows over a reflected
    border. ValueError under 11 pixels a side.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 pixels a side, not {a.shape[-1]}x{a.shape[-2]}")
    taps = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2)).to(a)
    taps = taps / taps.sum()

    def blurred(x: Tensor) -> Tensor:
        maps = x.reshape(-1, 1, *x.shape[-2:])
        return F.conv2d(F.conv2d(maps, taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))

    mean_a, mean_b = blurred(a), blurred(b)
    var_a = (blurred(a * a) - mean_a**2).clamp_min(0)
    var_b = (blurred(b * b) - mean_b**2).clamp_min(0)
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    maps = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return maps.mean(dim=(-2, -1)).view(a.shape[:-2]).mean(dim=0)


# --- color ------------------------------------------------------------------------------------------------------


def delta_e(a: Tensor, b: Tensor, *, cell: int = 1) -> Tensor:
    """Mean CIEDE2000 difference, frame by frame; 1 is about what an eye just sees side by side.

    ``cell``: first average cells of so many pixels a side in linear light, so that color counts and detail does not.
    """
    return ciede2000(lab(a, cell=cell), lab(b, cell=cell)).mean(dim=(-2, -1))


def lab(pixels: Tensor, *, cell: int = 1) -> Tensor:
    """sRGB in [-1, 1] (3, ..., h, w) as CIE L*a*b* under D65; ``cell`` averages as in ``delta_e``."""
    coded = (pixels.clamp(-1, 1) + 1) / 2
    linear = torch.where(coded > 0.04045, ((coded + 0.055) / 1.055) ** 2.4, coded / 12.92)
    if cell > 1:
        linear = _cells(linear, cell)
    xyz = torch.einsum("ij,j...->i...", torch.tensor(_XYZ).to(linear), linear)
    xyz = xyz / torch.tensor(_WHITE).to(linear).view(3, *[1] * (linear.ndim - 1))
    f = torch.where(xyz > 216 / 24389, xyz.clamp_min(1e-8) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    return torch.stack((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


def ciede2000(a: Tensor, b: Tensor) -> Tensor:
    """The CIEDE2000 difference of L*a*b* colors (3, ...) -> (...); as Sharma, Wu and Dalal (2005) write it."""
    chroma = (a[1:].norm(dim=0) + b[1:].norm(dim=0)) / 2
    g = (1 - (chroma**7 / (chroma**7 + 25.0**7)).sqrt()) / 2
    a1, b1 = a[1] * (1 + g), b[1] * (1 + g)
    c1, c2 = torch.hypot(a1, a[2]), torch.hypot(b1, b[2])
    h1, h2 = torch.atan2(a[2], a1) % math.tau, torch.atan2(b[2], b1) % math.tau
    gray = (c1 * c2) == 0
    turn = h2 - h1
    turn = torch.where(turn > math.pi, turn - math.tau, torch.where(turn < -math.pi, turn + math.tau, turn))
    turn = torch.where(gray, 0.0, turn)
    hue = torch.where((h1 - h2).abs() > math.pi, (h1 + h2 + math.tau) / 2, (h1 + h2) / 2) % math.tau
    hue = torch.where(gray, h1 + h2, hue)
    lightness, chroma = (a[0] + b[0]) / 2, (c1 + c2) / 2
    degree = math.pi / 180
    t = 1 - 0.17 * torch.cos(hue - 30 * degree) + 0.24 * torch.cos(2 * hue)
    t = t + 0.32 * torch.cos(3 * hue + 6 * degree) - 0.20 * torch.cos(4 * hue - 63 * degree)
    around = torch.exp(-(((hue / degree - 275) / 25) ** 2))
    twist = -2 * (chroma**7 / (chroma**7 + 25.0**7)).sqrt() * torch.sin(60 * degree * around)
    s_l = 1 + 0.015 * (lightness - 50) ** 2 / (20 + (lightness - 50) ** 2).sqrt()
    d_l = (b[0] - a[0]) / s_l
    d_c = (c2 - c1) / (1 + 0.045 * chroma)
    d_h = 2 * (c1 * c2).sqrt() * torch.sin(turn / 2) / (1 + 0.015 * chroma * t)
    return (d_l**2 + d_c**2 + d_h**2 + twist * d_c * d_h).clamp_min(0).sqrt()


def color_drift(frames: Tensor, photo: Tensor) -> Tensor:
    """CIEDE2000 between the mean colors (linear light) of each frame and of ``photo``: what comes into view counts."""
    size = max(frames.shape[-2:])
    return ciede2000(lab(frames, cell=size), lab(photo, cell=size).view(3, *[1] * (frames.ndim - 1)))[..., 0, 0]


# --- detail -----------------------------------------------------------------------------------------------------


def luma(frames: Tensor) -> Tensor:
    """BT.709 luma, in [-1, 1], without the channel dimension."""
    return torch.einsum("c,c...->...", torch.tensor(_LUMA).to(frames), frames)


def detail(frames: Tensor) -> Tensor:
    """Luma's finest octave: what a 1 4 6 4 1 blur takes away; same shape as ``luma``."""
    plane = luma(frames)
    maps = F.pad(plane.reshape(-1, 1, *plane.shape[-2:]), (2, 2, 2, 2), mode="replicate")
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(plane) / 16
    smooth = F.conv2d(F.conv2d(maps, taps.view(1, 1, 5, 1)), taps.view(1, 1, 1, 5))
    return plane - smooth.view(plane.shape)


def high_frequency_energy(frames: Tensor) -> Tensor:
    """Mean square of ``detail``, frame by frame, in 8-bit levels squared."""
    return plane_energy(detail(frames))


def plane_energy(plane: Tensor) -> Tensor:
    """``high_frequency_energy`` of a ``detail`` (..., h, w) that somebody has already."""
    return plane.square().mean(dim=(-2, -1)) * 127.5**2


def sharpness(frames: Tensor, photo: Tensor) -> Tensor:
    """High-frequency energy against the photo's, in dB, frame by frame: 0 as sharp, negative softer."""
    return decibels(high_frequency_energy(frames), high_frequency_energy(photo))


def decibels(energy: Tensor, other: Tensor) -> Tensor:
    """One energy against another; finite for a picture without any detail."""
    faint = 1e-3
    return 10 * torch.log10((energy + faint) / (other + faint))


# --- over time --------------------------------------------------------------------------------------------------


def change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute luma change from ``a`` to ``b``, in 8-bit levels."""
    return plane_change(luma(a), luma(b))


def detail_change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute change of ``detail`` from ``a`` to ``b``, in 8-bit levels: textures that swim or jump."""
    return plane_change(detail(a), detail(b))


def plane_change(a: Tensor, b: Tensor) -> Tensor:
    """``change`` of two planes (..., h, w) that somebody has already: their ``luma`` or their ``detail``."""
    return (b - a).abs().mean(dim=(-2, -1)) * 127.5


def flicker(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """How far brightness swings back within three frames, in 8-bit levels (RMS of the second difference).

    Over cells of ``CELL`` pixels, so that steady motion of detail counts little.
    """
    low, middle, high = (_cells(luma(x)[None], CELL)[0] for x in (before, now, after))
    return (low - 2 * middle + high).square().mean(dim=(-2, -1)).sqrt() * 127.5


@dataclass(frozen=True)
class Drift:
    """A straight line through a series: its value at the first and the last frame, and the largest absolute value."""

    first: float
    last: float
    largest: float

    @property
    def change(self) -> float:
        return self.last - self.first


def drift(series: Tensor) -> Drift:
    """The least-squares line through (t,) values, one a frame. ValueError for none."""
    if series.ndim != 1 or not len(series):
        raise ValueError(f"a drift is read off a series of values, not {tuple(series.shape)}")
    largest = float(series.abs().max())
    if len(series) == 1:
        return Drift(float(series[0]), float(series[0]), largest)
    time = torch.arange(len(series), dtype=torch.float64) - (len(series) - 1) / 2
    values = series.double()
    slope = float((time * values).sum() / (time * time).sum())
    middle, half = float(values.mean()), (len(series) - 1) / 2
    return Drift(middle - slope * half, middle + slope * half, largest)


# --- seams ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A clip's frame-to-frame steps by kind, as log ratios to the steps around them (0: nothing special).

    ``segment``: into a new segment; ``block``: into another latent block of the same segment; ``inside``: the others.
    """

    segment: Tensor
    block: Tensor
    inside: Tensor

    def __add__(self, other: Steps) -> Steps:
        """Both clips' steps together."""
        pairs = ((self.segment, other.segment), (self.block, other.block), (self.inside, other.inside))
        return Steps(*(torch.cat(pair) for pair in pairs))


def steps_by_kind(changes: Tensor, *, segment_frames: int, block_frames: int = 4) -> Steps:
    """Sort ``changes`` (t-1,), the change from each frame to the next, into kinds of step.

    Frame 0 is a block of its own; then come blocks of ``block_frames`` and segments of ``segment_frames``. Each
    step is set against the mean (of logs) of the inside steps at most ``block_frames - 1`` away, so that
    motion that gathers or loses speed does not count. The step from the photo to frame 1 is left out.
    """
    if segment_frames < block_frames or segment_frames % block_frames:
        raise ValueError(f"segments of {segment_frames} frames are not whole blocks of {block_frames}")
    logs = (changes.double() + _FAINT).log()
    kinds: dict[str, list[float]] = {"segment": [], "block": [], "inside": []}
    for step in range(1, len(logs)):
        near = range(max(1, step - block_frames + 1), min(len(logs), step + block_frames))
        around = [float(logs[k]) for k in near if k != step and k % block_frames]
        if around:
            kind = "inside" if step % block_frames else "block" if step % segment_frames else "segment"
            kinds[kind].append(float(logs[step]) - sum(around) / len(around))
    return Steps(*(torch.tensor(kinds[kind], dtype=torch.float64) for kind in ("segment", "block", "inside")))


@dataclass(frozen=True)
class Seam:
    """Segment boundaries against other steps, as ratios of change (1: no seam).

    ``ratio`` with its 95% bootstrap interval ``low``..``high``; ``p``: permutation test, two-sided; ``count``
    segment boundaries against ``others`` steps of kind ``against``.
    """

    ratio: float
    low: float
    high: float
    p: float
    count: int
    others: int
    against: str

    @property
    def distinguishable(self) -> bool:
        """Whether the boundaries can be told from other steps (p below 0.05)."""
        return self.p < 0.05


def seam_score(steps: Steps, *, against: str = "block", seed: int = 0) -> Seam | None:
    """Is the change at segment boundaries larger than ``against`` "block" (other block boundaries) or "inside" steps?

    Block boundaries are the fair comparison: a VAE that decodes four frames at once steps there anyhow. None if
    there is nothing to compare (fewer than two of a kind: a clip of one segment, or, for "block", M = 1).
    """
    ours, theirs = steps.segment, {"block": steps.block, "inside": steps.inside}[against]
    if len(ours) < 2 or len(theirs) < 2:
        return None
    found = float(ours.mean() - theirs.mean())
    generator = torch.Generator().manual_seed(seed)
    both = torch.cat([ours, theirs])
    order = torch.rand(_PERMUTATIONS, len(both), generator=generator).argsort(dim=1)
    shuffled = both[order]
    permuted = shuffled[:, : len(ours)].mean(dim=1) - shuffled[:, len(ours) :].mean(dim=1)
    # The labeling found is one of those that chance may give, hence the ones added.
    p = (1 + int((permuted.abs() >= abs(found) - 1e-12).sum())) / (1 + _PERMUTATIONS)
    drawn = [
        values[torch.randint(len(values), (_PERMUTATIONS, len(values)), generator=generator)].mean(dim=1)
        for values in (ours, theirs)
    ]
    low, high = (drawn[0] - drawn[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Seam(math.exp(found), math.exp(low), math.exp(high), p, len(ours), len(theirs), against)


def _cells(frames: Tensor, cell: int) -> Tensor:
    """Means over cells of about ``cell`` pixels a side: (3, ..., h, w) -> (3, ..., h', w'), at least one cell."""
    height, width = frames.shape[-2:]
    grid = (max(1, round(height / cell)), max(1, round(width / cell)))
    return F.adaptive_avg_pool2d(frames.reshape(-1, 1, height, width), grid).view(*frames.shape[:-2], *grid)
