"""From photo and motion to the pixels the stages see: fitting, shrinking, and the hybrid reference.

Pure functions of tensors, lazy where a clip is involved. Knows no files, models or latents.
All resampling is antialiased bicubic (a = -0.5, as Pillow), the same filter down and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import carry
from .core import RunError, Size

STRIP_ROWS = 512  # float rows of a large photo held at once
GROUP = 4  # frames yielded at once: what one latent block stands for, and a bound on memory


def fit_image(photo: Tensor, size: Size, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """A photo, uint8 (3, h, w), at exactly ``size``: (1, 3, 1, H, W) float32 in [-1, 1]; never stretched.

    ``crop`` fills the frame and cuts the longer sides equally; ``pad`` shows all of it between black bars.
    A photo that already has the size keeps its pixels exactly.
    """
    if photo.dtype != torch.uint8 or photo.ndim != 3 or photo.shape[0] != 3:
        raise ValueError(f"photo is {photo.dtype} {tuple(photo.shape)}, not uint8 (3, h, w)")
    if fit == "crop":
        return _resample(_center(photo, size), size)[None, :, None]
    if fit != "pad":
        raise ValueError(f"fit {fit!r} is not 'crop' or 'pad'")
    height, width = photo.shape[1:]
    scale = min(size.width / width, size.height / height)
    inner = Size(_side(width * scale, size.width), _side(height * scale, size.height))
    canvas = torch.full((3, size.height, size.width), -1.0)
    top, left = (size.height - inner.height) // 2, (size.width - inner.width) // 2
    canvas[:, top : top + inner.height, left : left + inner.width] = _resample(photo, inner)
    return canvas[None, :, None]


def shrink(image: Tensor, size: Size) -> Tensor:
    """The fitted photo (1, 3, t, H, W) at Stage I's ``size``, in [-1, 1].

    Resizes exactly to ``size``, so that the hybrid reference, which undoes the same mapping, stays aligned
    even where Stage I's legal sizes do not have quite Stage II's aspect.
    """
    return torch.stack([resize(frame, size) for frame in image[0].unbind(1)], dim=1)[None]


def resize(frame: Tensor, size: Size) -> Tensor:
    """One frame, float (3, h, w), at ``size``: antialiased bicubic, clamped to [-1, 1]."""
    if frame.shape[-2:] == (size.height, size.width):
        return frame.clamp(-1, 1)
    target = (size.height, size.width)
    return F.interpolate(frame[None], target, mode="bicubic", antialias=True)[0].clamp_(-1, 1)


def fit_pixels(frame: Tensor, size: Size) -> Tensor:
    """A float frame (3, h, w) at ``size``, filling it: cropped at the center, never stretched, in [-1, 1]."""
    return resize(_center(frame, size), size)


def hybrid_reference(image: Tensor, motion: Iterable[Tensor], size: Size) -> Iterator[Tensor]:
    """Stage I's motion at Stage II's ``size`` with the photo as frame 0 (paper: the hybrid reference).

    ``image`` (1, 3, 1, H, W) and the chunks of ``motion``, (1, 3, t, h, w) of any t, are in [-1, 1]. Yields
    the image, then at most four frames at a time; the frames do not depend on how ``motion`` is cut. The
    motion's own frame 0 is dropped. Raises ``RunError`` if the motion has no frame.
    """
    return _hybrid(image, motion, size, lambda frame: resize(frame, size))


def carried_reference(image: Tensor, motion: Iterable[Tensor], size: Size) -> Iterator[Tensor]:
    """The hybrid reference with the photo's detail moved along the motion (``carry``, docs/decisions/0008).

    As ``hybrid_reference``, but every chunk is a pair (2, 3, t, H, W): first the detail added where the motion agrees
    with it, then added everywhere, for a network to choose from.
    """
    return _hybrid(image, motion, size, _Carrier(image, size), pairs=True)


def _hybrid(
    image: Tensor, motion: Iterable[Tensor], size: Size, enlarge: Callable[[Tensor], Tensor], pairs: bool = False
) -> Iterator[Tensor]:
    if tuple(image.shape) != (1, 3, 1, size.height, size.width):
        raise ValueError(f"image has shape {tuple(image.shape)}, not (1, 3, 1, {size.height}, {size.width})")
    join = partial(torch.stack, dim=2) if pairs else _clip_of
    seen = 0
    for chunk in motion:
        if chunk.ndim != 5 or chunk.shape[:2] != (1, 3):
            raise ValueError(f"motion chunk has shape {tuple(chunk.shape)}, not (1, 3, t, h, w)")
        frames = list(chunk[0].unbind(1))
        if frames and seen == 0:
            yield image.expand(2, -1, -1, -1, -1) if pairs else image
            frames = frames[1:]
        seen += chunk.shape[2]
        for start in range(0, len(frames), GROUP):
            # Frame by frame, so that no kernel can make a frame depend on its companions.
            # Nothing of it bears a name, so that nothing is held while the consumer works.
            yield join([enlarge(frame) for frame in frames[start : start + GROUP]])
    if seen == 0:
        raise RunError("the motion video has no frames; Stage I wrote nothing")


def _clip_of(frames: list[Tensor]) -> Tensor:
    return torch.stack(frames, dim=1)[None]


class _Carrier:
    """Enlarges the frames (3, h, w) of one clip in turn, to (2, 3, H, W), following the photo's pixels from each to the
    next."""

    def __init__(self, image: Tensor, size: Size) -> None:
        self.picture, self.size = image[:, :, 0].float(), size
        self.trail: carry.Trail | None = None

    def __call__(self, frame: Tensor) -> Tensor:
        small = frame[None].float()
        trail = self.trail if self.trail is not None else carry.start(self.picture, (small.shape[2], small.shape[3]))
        self.trail = carry.follow(trail, small)
        return torch.cat(carry.detailed(resize(frame, self.size)[None], small, self.trail)).clamp_(-1, 1)


def static_video(image: Tensor, num_frames: int) -> Iterator[Tensor]:
    """The photo held still: frame 0 alone, then groups of four (the last may be shorter)."""
    return _clip(image, image, num_frames)


def zero_video(image: Tensor, num_frames: int) -> Iterator[Tensor]:
    """The photo, then mid-gray (zero) frames: what Wan2.1-I2V is conditioned on."""
    return _clip(image, torch.zeros_like(image), num_frames)


def _clip(first: Tensor, rest: Tensor, num_frames: int) -> Iterator[Tensor]:
    if num_frames < 1:
        raise ValueError(f"num_frames {num_frames} is not positive")

    def chunks() -> Iterator[Tensor]:
        yield first
        for start in range(1, num_frames, GROUP):
            yield rest.expand(-1, -1, min(GROUP, num_frames - start), -1, -1)

    return chunks()


def _side(ideal: float, limit: int) -> int:
    return min(limit, max(1, round(ideal)))


def _center(photo: Tensor, size: Size) -> Tensor:
    """The largest central part with the aspect of ``size``, to the pixel."""
    height, width = photo.shape[1:]
    kept_width = _side(height * size.width / size.height, width)
    kept_height = _side(width * size.height / size.width, height)
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return photo[:, top : top + kept_height, left : left + kept_width]


def _resample(photo: Tensor, size: Size) -> Tensor:
    """uint8 (3, h, w) -> float32 (3, H, W) in [-1, 1]: across in strips, then down; the whole is never float."""
    height, width = photo.shape[1:]
    strips = []
    for strip in photo.split(STRIP_ROWS, dim=1):
        pixels = strip.to(torch.float32)
        if width != size.width:
            pixels = F.interpolate(pixels[None], (strip.shape[1], size.width), mode="bicubic", antialias=True)[0]
        strips.append(pixels)
    pixels = torch.cat(strips, dim=1)
    if height != size.height:
        pixels = F.interpolate(pixels[None], (size.height, size.width), mode="bicubic", antialias=True)[0]
    return pixels.div_(127.5).sub_(1).clamp_(-1, 1)
