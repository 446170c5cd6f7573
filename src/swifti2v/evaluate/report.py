"""One clip, looked at from front to back: every measure there is, as one frozen ``Scores``.

Frames are pulled one by one and only small copies of them are kept, so that length costs little memory. What needs an
extra package is measured if it is installed; ``Scores.missing`` says what was not, and why. Knows no files.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics, motion_score
from ..camera import AMPLITUDE_FRAMES, Motion
from ..core import Size, UsageError
from ..reference import resize
from . import optical_flow, perceptual

LPIPS_EVERY = 6  # frames; ST-LPIPS takes seconds each
_LPIPS_SIDE = 1280  # larger pictures are shrunk before it: its memory grows with the area
_CROP = Size(371, 248)
_FIRST = 800  # pixels a side of the copy of frame 0


@dataclass(frozen=True)
class Fidelity:
    """How close pictures are to others, mean over them. ``delta_e`` averages cells (``metrics.delta_e``)."""

    psnr: float
    ssim: float
    delta_e: float
    st_lpips: float | None


@dataclass(frozen=True)
class Series:
    """What changes over time. ``sharpness_db`` and ``color`` hold a value a frame, against the photo;
    ``change``, ``detail_change`` and ``warping`` one a step, ``flicker`` one for three frames, in 8-bit levels;
    ``followed_color`` pairs of frame and color difference where the camera was followed."""

    sharpness_db: tuple[float, ...]
    color: tuple[float, ...]
    change: tuple[float, ...]
    detail_change: tuple[float, ...]
    flicker: tuple[float, ...]
    warping: tuple[float, ...] = ()
    followed_color: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Scores:
    """All that was found about a clip. ``first``, ``stills`` and ``crops`` (bytes; of frame 0, of every frame) are for
    the picture alone."""

    size: Size
    frames: int
    segment_frames: int | None
    first_frame: Fidelity
    series: Series
    seams: tuple[tuple[str, metrics.Seam], ...]
    motion: Motion | None = None
    reference: Fidelity | None = None
    missing: tuple[str, ...] = ()
    steps: tuple[tuple[str, metrics.Steps], ...] = field(default=(), repr=False)
    first: Tensor = field(default_factory=lambda: torch.zeros(3, 1, 1, dtype=torch.uint8), repr=False)
    stills: tuple[Tensor, ...] = field(default=(), repr=False)
    crops: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def sharpness(self) -> metrics.Drift:
        """Sharpness in dB against the photo, as a line through frames 1.. (frame 0 is the photo itself)."""
        return metrics.drift(torch.tensor(self.series.sharpness_db[1:] or self.series.sharpness_db))

    @property
    def color(self) -> metrics.Drift:
        """Mean color against the photo's, CIEDE2000."""
        return metrics.drift(torch.tensor(self.series.color))

    @property
    def followed_color(self) -> metrics.Drift | None:
        """The same with the camera's motion undone; None if it was not followed or nothing stayed in view."""
        values = [value for _, value in self.series.followed_color]
        return metrics.drift(torch.tensor(values)) if values else None

    def record(self) -> dict[str, Any]:
        """For JSON: plain numbers, the series included."""
        drifts = {"sharpness_db": self.sharpness, "color": self.color, "followed_color": self.followed_color}
        return {
            "size": str(self.size),
            "frames": self.frames,
            "segment_frames": self.segment_frames,
            "first_frame": dataclasses.asdict(self.first_frame),
            "drift": {name: None if line is None else dataclasses.asdict(line) for name, line in drifts.items()},
            "flicker": mean(self.series.flicker),
            "warping_error": mean(self.series.warping),
            "camera": None if self.motion is None else dataclasses.asdict(self.motion),
            "seams": seam_records(self.seams),
            "reference": None if self.reference is None else dataclasses.asdict(self.reference),
            "missing": list(self.missing),
            "series": dataclasses.asdict(self.series),
        }


def evaluate_clip(
    frames: Iterable[Tensor],
    photo: Tensor,
    *,
    segment_frames: int | None = None,
    reference: Iterable[Tensor] | None = None,
) -> Scores:
    """Measure a clip against the photo it begins with.

    ``frames``: (1, 3, 1, h, w) or (3, h, w) each, in [-1, 1]; ``photo`` (3, h, w), fitted to their size.
    ``segment_frames``: frames a segment (4 M); without it seams are not looked for. ``reference``: frames that the
    clip should look like (the true clip, or Stage I's motion), compared at the smaller of the two sizes as
    far as both go. Raises ``UsageError`` for sizes that differ and for clips without frames.
    """
    watch = _Watch(photo)
    compare = None if reference is None else _Comparison(iter(reference))
    for frame in map(_picture, frames):
        watch.see(frame)
        if compare is not None:
            compare.see(frame)
    if not watch.thumbs:
        raise UsageError("the clip has no frames")
    missing = [*missing_tools()]
    series, motion = watch.series, None
    if _has(motion_score):
        series, motion = _followed(watch, photo)
    steps, seams = _seams(series, segment_frames)
    if segment_frames is None:
        missing.append("seams: the file does not say where its segments end; give --segment-frames (12 for M = 3)")
    elif not seams:
        missing.append(f"seams: {len(watch.thumbs)} frames in segments of {segment_frames} have too few boundaries")
    return Scores(
        size=Size(photo.shape[2], photo.shape[1]),
        frames=len(watch.thumbs),
        segment_frames=segment_frames,
        first_frame=watch.first_frame,
        series=series,
        seams=seams,
        motion=motion,
        reference=None if compare is None else compare.result(),
        missing=tuple(missing),
        steps=steps,
        first=watch.first,
        stills=tuple(watch.thumbs),
        crops=tuple(watch.crops),
    )


def missing_tools() -> Iterator[str]:
    """What cannot be measured here, and how to mend it."""
    for tool in (perceptual, motion_score):
        try:
            tool.check_available()
        except UsageError as error:
            yield str(error)


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return statistics.fmean(values) if values else None


def seam_records(seams: Iterable[tuple[str, metrics.Seam]]) -> list[dict[str, Any]]:
    """Seams for JSON."""
    return [
        {"signal": signal, **dataclasses.asdict(seam), "distinguishable": seam.distinguishable}
        for signal, seam in seams
    ]


def find_seams(steps: Iterable[tuple[str, metrics.Steps]]) -> tuple[tuple[str, metrics.Seam], ...]:
    """The seam scores of each signal's steps, against other block boundaries and against steps inside blocks."""
    found = [(signal, metrics.seam_score(kinds, against=kind)) for signal, kinds in steps for kind in KINDS]
    return tuple((signal, seam) for signal, seam in found if seam is not None)


KINDS = ("block", "inside")


# --- how it is done ---------------------------------------------------------------------------------------------


class _Watch:
    """Sees the frames go by and keeps what later measures need: small copies and numbers."""

    def __init__(self, photo: Tensor) -> None:
        self.photo, self.thumb = photo, small(photo)
        self._corner = crop_corner(photo)
        self.energy = metrics.high_frequency_energy(photo)
        self.thumbs: list[Tensor] = []
        self.crops: list[Tensor] = []
        self._values: dict[str, list[float]] = {name: [] for name in ("sharpness_db", "color", "change", "detail")}
        self._flicker: list[float] = []
        self._last: list[Tensor] = []
        self._planes: tuple[Tensor, Tensor] | None = None

    @property
    def series(self) -> Series:
        values = {name: tuple(row) for name, row in self._values.items()}
        return Series(values["sharpness_db"], values["color"], values["change"], values["detail"], tuple(self._flicker))

    def see(self, frame: Tensor) -> None:
        if frame.shape != self.photo.shape:
            sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (frame, self.photo)]
            raise UsageError(f"a frame is {sizes[0]} where the photo was fitted to {sizes[1]}")
        if not self.thumbs:
            self.first_frame = fidelity([frame], [self.photo])
            self.first = as_bytes(small(frame, _FIRST))
        add = {name: row.append for name, row in self._values.items()}
        planes = (metrics.luma(frame), metrics.detail(frame))
        add["sharpness_db"](float(metrics.decibels(metrics.plane_energy(planes[1]), self.energy)))
        add["color"](float(metrics.color_drift(small(frame), self.thumb)))
        if self._planes is not None:
            add["change"](float(metrics.plane_change(self._planes[0], planes[0])))
            add["detail"](float(metrics.plane_change(self._planes[1], planes[1])))
        self._planes = planes
        self.thumbs.append(as_bytes(small(frame)))
        self.crops.append(as_bytes(crop(frame, self._corner)))
        self._last = [*self._last, frame][-3:]
        if len(self._last) == 3:
            self._flicker.append(float(metrics.flicker(*self._last)))


class _Comparison:
    """Frames against a reference's, as far as both go."""

    def __init__(self, reference: Iterator[Tensor]) -> None:
        self._reference = reference
        self._found: list[Fidelity] = []

    def see(self, frame: Tensor) -> None:
        other = next(self._reference, None)
        if other is None:
            return
        other = _picture(other)
        size = min((Size(x.shape[2], x.shape[1]) for x in (frame, other)), key=lambda size: size.area)
        learned = len(self._found) % LPIPS_EVERY == 0
        self._found.append(fidelity([resize(frame, size)], [resize(other, size)], learned=learned))

    def result(self) -> Fidelity:
        if not self._found:
            raise UsageError("the reference has no frames")
        learned = [one.st_lpips for one in self._found if one.st_lpips is not None]
        psnr, ssim, delta_e = (
            statistics.fmean(getattr(one, name) for one in self._found) for name in ("psnr", "ssim", "delta_e")
        )
        return Fidelity(psnr, ssim, delta_e, mean(learned))


def fidelity(frames: Sequence[Tensor], truth: Sequence[Tensor], *, learned: bool = True) -> Fidelity:
    """Of pictures (3, h, w) to others; ST-LPIPS, if ``learned`` and installed, at 1280 pixels a side or less."""
    a, b = torch.stack(list(frames), dim=1), torch.stack(list(truth), dim=1)
    distance = None
    if learned and _has(perceptual) and min(a.shape[-2:]) >= perceptual.MIN_SIDE:
        pair = [torch.stack([small(frame, _LPIPS_SIDE) for frame in x.unbind(1)], dim=1) for x in (a, b)]
        distance = float(perceptual.st_lpips(*pair).mean())
    color = float(metrics.delta_e(a, b, cell=metrics.CELL).mean())
    return Fidelity(float(metrics.psnr(a, b).mean()), float(metrics.ssim(a, b).mean()), color, distance)


def _followed(watch: _Watch, photo: Tensor) -> tuple[Series, Motion]:
    """The series that need flow, and the camera's motion."""
    pictures = [as_float(thumb) for thumb in watch.thumbs]
    grays = [optical_flow.gray(picture) for picture in pictures]
    path = optical_flow.camera_path(grays)
    first = small(photo)
    colors = [(k, optical_flow.followed_color_drift(pictures[k], first, view)) for k, view in path.items()]
    series = dataclasses.replace(
        watch.series,
        warping=tuple(optical_flow.warping_error(a, b).error for a, b in itertools.pairwise(grays)),
        followed_color=tuple((k, value) for k, value in colors if value is not None),
    )
    motion = optical_flow.fitted_motion({k: view for k, view in path.items() if k <= AMPLITUDE_FRAMES})
    return series, motion


def _seams(
    series: Series, segment_frames: int | None
) -> tuple[tuple[tuple[str, metrics.Steps], ...], tuple[tuple[str, metrics.Seam], ...]]:
    if segment_frames is None:
        return (), ()
    signals = {"change": series.change, "detail": series.detail_change, "warping": series.warping}
    steps = tuple(
        (name, metrics.steps_by_kind(torch.tensor(values), segment_frames=segment_frames))
        for name, values in signals.items()
        if values
    )
    return steps, find_seams(steps)


def _has(tool: Any) -> bool:
    try:
        tool.check_available()
    except UsageError:
        return False
    return True


def _picture(frame: Tensor) -> Tensor:
    return frame.reshape(3, *frame.shape[-2:]).float()


def small(frame: Tensor, side: int = optical_flow.WIDTH) -> Tensor:
    """A picture (3, h, w), shrunk to at most ``side`` pixels a side."""
    scale = min(1.0, side / max(frame.shape[1:]))
    size = [max(1, round(length * scale)) for length in frame.shape[1:]]
    return F.interpolate(frame[None], size, mode="bilinear", antialias=True)[0] if scale < 1 else frame


def crop_corner(photo: Tensor) -> tuple[int, int]:
    """Row and column of the crop that shows most of a picture's detail; the picture's edges are left out."""
    height, width = _crop_sides(photo)
    energy = metrics.detail(photo).square()[None, None]
    room = [(total - side) // 8 for total, side in zip(energy.shape[-2:], (height, width), strict=True)]
    inner = energy[..., room[0] : energy.shape[-2] - room[0], room[1] : energy.shape[-1] - room[1]]
    steps = (max(1, height // 5), max(1, width // 5))
    found = F.avg_pool2d(inner, (height, width), steps)[0, 0]
    row, column = divmod(int(found.argmax()), found.shape[1])
    return room[0] + row * steps[0], room[1] + column * steps[1]


def crop(frame: Tensor, corner: tuple[int, int]) -> Tensor:
    """A small part of a picture, pixel by pixel."""
    height, width = _crop_sides(frame)
    return frame[:, corner[0] : corner[0] + height, corner[1] : corner[1] + width]


def _crop_sides(frame: Tensor) -> tuple[int, int]:
    return min(frame.shape[1], _CROP.height), min(frame.shape[2], _CROP.width)


def as_bytes(picture: Tensor) -> Tensor:
    return ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_float(picture: Tensor) -> Tensor:
    return picture.float() / 127.5 - 1
