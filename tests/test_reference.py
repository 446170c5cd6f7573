"""Fitting and the hybrid reference: never stretched, any chunking alike, lazy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.core import RunError, Size
from swifti2v.reference import carried_reference, fit_image, hybrid_reference, shrink, static_video, zero_video

sides = st.integers(16, 90)
quick = settings(max_examples=30, deadline=None)


def smooth(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (torch.stack((x, y, (x + y) / 2)) * 255).round().to(torch.uint8)


@quick
@given(sides, sides, sides, sides, st.sampled_from(["crop", "pad"]))
def test_fit_gives_exactly_the_size_in_range(h: int, w: int, height: int, width: int, fit: str) -> None:
    image = fit_image(torch.randint(0, 256, (3, h, w), dtype=torch.uint8), Size(width, height), fit)
    assert image.shape == (1, 3, 1, height, width) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1


@quick
@given(sides, sides)
def test_same_size_keeps_every_pixel(h: int, w: int) -> None:
    photo = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    for fit in ("crop", "pad"):
        back = ((fit_image(photo, Size(w, h), fit)[0, :, 0] + 1) * 127.5).round().to(torch.uint8)
        assert torch.equal(back, photo)


@quick
@given(sides, sides, sides, sides)
def test_crop_never_stretches(h: int, w: int, height: int, width: int) -> None:
    """A ramp of one gray level a pixel keeps equal slopes across and down."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    photo = torch.stack((x, y, x)).to(torch.uint8)
    image = (fit_image(photo, Size(width, height))[0, :, 0] + 1) * 127.5
    expected = min(h / height, w / width)
    # Bicubic's border bends the ramp for two and a half of the photo's pixels.
    border = max(4, math.ceil(2.5 / expected))
    assume(min(height, width) >= 2 * border + 4)
    middle = slice(border, -border)
    across = image[0, height // 2, middle].diff().mean()
    down = image[1, middle, width // 2].diff().mean()
    # The crop is to whole pixels, half a pixel of the shorter kept side at most.
    allowed = 0.5 / (expected * min(height, width)) + 0.01
    assert across == pytest.approx(expected, rel=allowed) and down == pytest.approx(expected, rel=allowed)


def test_crop_is_centered_and_pad_is_black() -> None:
    photo = torch.zeros(3, 40, 120, dtype=torch.uint8)
    photo[:, :, 40:80] = 255
    assert fit_image(photo, Size(40, 40)).min() == 1
    padded = fit_image(photo, Size(120, 120), "pad")[0, :, 0]
    assert (padded[:, :40] == -1).all() and (padded[:, 80:] == -1).all() and padded[:, 60, 60].min() == 1


def test_fit_matches_pillows_bicubic() -> None:
    photo = torch.randint(0, 256, (3, 1100, 600), dtype=torch.uint8)  # more rows than a strip
    ours = (fit_image(photo, Size(150, 275))[0, :, 0] + 1) * 127.5
    theirs = Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((150, 275), Image.Resampling.BICUBIC)
    assert (ours.permute(1, 2, 0).numpy() - np.asarray(theirs, np.float32)).__abs__().max() < 1.6


def test_fit_refuses_what_is_not_a_photo() -> None:
    for bad in (torch.zeros(3, 20, 20), torch.zeros(1, 20, 20, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            fit_image(bad, Size(16, 16))
    with pytest.raises(ValueError, match="stretch"):
        fit_image(smooth(20, 20), Size(16, 16), "stretch")  # type: ignore[arg-type]


def test_shrink_keeps_smooth_pictures_and_removes_aliases() -> None:
    image = fit_image(smooth(96, 128), Size(128, 96))
    assert shrink(image, Size(32, 24)).shape == (1, 3, 1, 24, 32)
    again = next(iter(hybrid_reference(image, [shrink(image, Size(32, 24))], Size(128, 96))))
    assert torch.equal(again, image)
    checkers = torch.ones(1, 3, 1, 96, 128)
    checkers[..., ::2, 1::2] = checkers[..., 1::2, ::2] = -1
    assert shrink(checkers, Size(32, 24))[..., 2:-2, 2:-2].abs().max() < 0.02


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(sum))
def test_any_chunking_gives_identical_frames(cuts: list[int]) -> None:
    frames = sum(cuts)
    motion = torch.rand(1, 3, frames, 12, 16, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    image, size = torch.rand(1, 3, 1, 24, 32), Size(32, 24)
    whole = torch.cat(list(hybrid_reference(image, [motion], size)), dim=2)
    chunks = list(hybrid_reference(image, motion.split(cuts, dim=2), size))
    assert torch.equal(torch.cat(chunks, dim=2), whole)
    assert whole.shape[2] == frames and torch.equal(whole[:, :, :1], image)
    assert max(chunk.shape[2] for chunk in chunks) <= 4 and whole.abs().max() <= 1


def test_hybrid_reference_is_lazy_and_aligned() -> None:
    image = fit_image(smooth(96, 128), Size(128, 96))
    asked: list[int] = []

    def motion() -> Iterator[torch.Tensor]:
        for i in range(1000):
            asked.append(i)
            yield shrink(image, Size(32, 24))

    stream = hybrid_reference(image, motion(), Size(128, 96))
    next(stream)
    later = next(stream)
    assert asked == [0, 1]
    assert (later - image)[..., 8:-8, 8:-8].abs().max() < 0.02  # half a pixel off would be 0.03 here


def test_hybrid_reference_refuses() -> None:
    image = torch.zeros(1, 3, 1, 24, 32)
    with pytest.raises(RunError, match="no frames"):
        list(hybrid_reference(image, [], Size(32, 24)))
    with pytest.raises(ValueError, match="image"):
        list(hybrid_reference(image, [image], Size(64, 48)))
    with pytest.raises(ValueError, match="motion"):
        list(hybrid_reference(image, [torch.zeros(3, 4, 4)], Size(32, 24)))


@given(st.integers(1, 40))
def test_static_and_zero_videos(num_frames: int) -> None:
    image = torch.rand(1, 3, 1, 4, 6)
    still, zero = list(static_video(image, num_frames)), list(zero_video(image, num_frames))
    assert [c.shape[2] for c in still] == [c.shape[2] for c in zero]
    assert still[0].shape[2] == 1 and all(c.shape[2] == 4 for c in still[1:-1])
    whole = torch.cat(still, dim=2)
    assert whole.shape[2] == num_frames and torch.equal(whole, image.expand_as(whole))
    whole = torch.cat(zero, dim=2)
    assert torch.equal(whole[:, :, :1], image) and not whole[:, :, 1:].any()
    with pytest.raises(ValueError, match="num_frames"):
        static_video(image, 0)


def test_carried_reference_pairs_what_is_trusted_with_all_of_it() -> None:
    size = Size(192, 128)
    generator = torch.Generator().manual_seed(0)
    world = torch.nn.functional.interpolate(torch.randn(1, 3, 80, 120, generator=generator), (160, 240), mode="bicubic")
    world = world.clamp(-1, 1)[0]
    clip = torch.stack([world[:, 8 : 8 + 128, 4 + shift : 4 + shift + 192] for shift in range(0, 18, 2)], dim=1)
    image, low = clip[None, :, :1], shrink(clip[None], Size(48, 32))
    plain = torch.cat(list(hybrid_reference(image, [low], size)), dim=2)[0]
    pairs = [torch.cat(list(carried_reference(image, low.split(cut, dim=2), size)), dim=2) for cut in (9, 2)]
    assert torch.equal(*pairs) and pairs[0].shape == (2, 3, 9, 128, 192)
    assert torch.equal(pairs[0][0, :, :1], image[0]) and torch.equal(pairs[0][1, :, :1], image[0])
    errors = [float((frames - clip)[:, 1:, 8:-8, 8:-24].square().mean()) for frames in (plain, *pairs[0])]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[0] / 2
