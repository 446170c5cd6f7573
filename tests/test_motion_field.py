"""Motion fields: latents and back, interpolation, and frames looked up in the photo."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swifti2v import motion_field
from swifti2v.camera import Motion, camera_video
from swifti2v.core import Size
from swifti2v.costs_mobile import MotionFieldCost
from swifti2v.costs_nano import NanoVAECost
from swifti2v.meters import measure
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.motion_field import CHANNELS, decode_stream, interpolation, moved, reach, to_latents, to_motion, upsampled
from swifti2v.presets import package_folder
from swifti2v.train.moving import view_fields


def smooth_photo(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    planes = [torch.sin(x / a + y / b) for a, b in ((9.0, 31.0), (17.0, 12.0), (40.0, 8.0))]
    return 0.8 * torch.stack(planes)[None, :, None]


@given(b=st.integers(1, 2), t=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4))
def test_latents_and_back(b: int, t: int, h: int, w: int) -> None:
    motion = torch.randn(b, 2, t, 2 * h, 2 * w)
    latents = to_latents(motion)
    assert latents.shape == (b, CHANNELS, t, h, w)
    torch.testing.assert_close(to_motion(latents), motion, atol=1e-5, rtol=1e-5)


def test_a_uniform_motion_is_two_numbers_a_token() -> None:
    motion = torch.tensor([1.5, -0.5])[None, :, None, None, None].expand(1, 2, 1, 4, 6)
    latents = to_latents(motion)
    scale = motion_field.SCALES[0]
    torch.testing.assert_close(latents[0, :2, 0, 0, 0], torch.tensor([3.0, -1.0]) / scale)
    assert latents[:, 2:].abs().max() < 1e-6


@given(cells=st.integers(2, 12), pixels=st.integers(1, 200), slope=st.floats(-3, 3), start=st.floats(-3, 3))
def test_linear_fields_stay_linear_up_to_the_edges(cells: int, pixels: int, slope: float, start: float) -> None:
    centers, places = ((torch.arange(n) + 0.5) / n for n in (cells, pixels))
    found = interpolation(cells, pixels) @ (slope * centers + start)
    torch.testing.assert_close(found, slope * places + start, atol=2e-5, rtol=1e-5)


def test_interpolation_smooths_and_sums_to_one() -> None:
    weights = interpolation(9, 81)  # every cell's center is a pixel's
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(81), atol=1e-6, rtol=0)
    spline_of_binomial = torch.tensor([1.0, 6.0, 10.0, 6.0, 1.0]) / 24  # (1 4 1)/6 with (1 2 1)/4
    torch.testing.assert_close(weights[40, 2:7], spline_of_binomial, atol=1e-6, rtol=0)
    noise = torch.randn(9, 1000)
    assert (weights[20:60] @ noise).std() < 0.65 * noise.std()  # along one axis
    assert torch.equal(interpolation(1, 7), torch.ones(7, 1))


def test_no_motion_is_the_photo() -> None:
    photo = smooth_photo(128, 192)
    chunks = list(decode_stream([torch.zeros(1, 8, 1, 2, 3), torch.zeros(1, 8, 2, 2, 3)], photo, 2.0))
    assert [chunk.shape[2] for chunk in chunks] == [1, 8]
    assert torch.equal(chunks[0], photo)
    torch.testing.assert_close(chunks[1], photo.expand(-1, -1, 8, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", [[1, 4], [3, 2], [5], [1, 1, 1, 1, 1]])
def test_chunking_does_not_matter(cut: list[int]) -> None:
    photo = smooth_photo(128, 192)
    latents = torch.randn(1, 8, 5, 2, 3, generator=torch.Generator().manual_seed(0)).index_fill_(2, torch.tensor(0), 0)
    whole, cuts = (
        torch.cat(list(decode_stream(latents.split(sizes, dim=2), photo, 1.0)), dim=2) for sizes in ([5], cut)
    )
    assert whole.shape[2] == 17 and torch.equal(whole, cuts)


@given(dx=st.integers(-9, 9), dy=st.integers(-9, 9))
def test_a_whole_number_of_pixels_is_a_shift(dx: int, dy: int) -> None:
    picture = torch.rand(1, 3, 40, 50)
    found = moved(picture, torch.tensor([float(dx), float(dy)])[None, :, None, None].expand(1, 2, 2, 2))
    rolled = torch.roll(picture, (-dy, -dx), dims=(2, 3))
    torch.testing.assert_close(found[..., 12:-12, 12:-12], rolled[..., 12:-12, 12:-12], atol=1e-4, rtol=0)


@pytest.mark.parametrize("motion", [Motion(pan=0.1), Motion(zoom=1.5), Motion(tilt=-0.1, roll=4), Motion(zoom=0.9)])
def test_a_camera_as_a_field_is_the_camera(motion: Motion) -> None:
    """Fields made of a known camera show what ``camera_video`` shows at the end of a block, also beyond the edges."""
    size, photo = Size(192, 128), smooth_photo(128, 192)
    true = torch.cat(list(camera_video(photo, motion, 9)), dim=2)
    field = view_fields(motion, [8], (4, 6), size)[None, :, 0]
    torch.testing.assert_close(moved(photo[:, :, 0], field), true[:, :, 8], atol=5e-3, rtol=0)


def test_the_score_is_the_flow_of_the_frames() -> None:
    """A push in of 1 in units of the score moves the picture by the score, counted at 576x320 in five frames."""
    size, score = Size(640, 384), 2.5
    per_frame = reach(1, score, size.width, size.height) / motion_field.FRAMES
    flow = torch.tensor([per_frame * 5 * 576 / size.width, per_frame * 5 * 320 / size.height])
    assert float(flow.mean()) == pytest.approx(score)
    assert reach(3, score, 640, 384) == pytest.approx(3 * reach(1, score, 640, 384))


def test_upsampled_is_separable() -> None:
    field = torch.randn(2, 2, 4, 6)
    found = upsampled(field, 32, 48)
    assert found.shape == (2, 2, 32, 48)
    torch.testing.assert_close(found[0, 1], interpolation(4, 32) @ field[0, 1] @ interpolation(6, 48).T)


def test_what_the_network_is_told() -> None:
    vae = NanoVAE.from_pretrained(package_folder() / "nano" / "vae")
    photo = smooth_photo(128, 192)
    told = motion_field.reference(vae, photo)
    assert told.shape == (1, CHANNELS + vae.latent_channels, 1, 2, 3) and not told[:, :CHANNELS].any()
    assert torch.equal(told, motion_field.reference(vae, photo)) and told[:, CHANNELS:].abs().max() > 0.1


@pytest.mark.parametrize("size", [(258, 320), (320, 260)])
def test_sizes_off_the_grid_are_refused_by_their_own_numbers(size: tuple[int, int]) -> None:
    vae = NanoVAE.from_pretrained(package_folder() / "nano" / "vae")
    with pytest.raises(ValueError, match="is not a positive multiple of 64"):
        motion_field.reference(vae, torch.zeros(1, 3, 1, *size))


def test_what_is_kept_does_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        found = interpolation(7, 91)
    assert found.device.type == "cpu"


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_it_costs(blocks: int) -> None:
    photo, h, w = smooth_photo(256, 384), 4, 6
    cost = MotionFieldCost(NanoVAECost.from_config(dict(NanoVAE.load_config(str(package_folder() / "nano" / "vae")))))

    def last() -> Tensor:
        frames = decode_stream([torch.zeros(1, 8, 1, h, w), torch.zeros(1, 8, blocks, h, w)], photo, 1.0)
        next(frames)
        return next(frames)

    met = measure(last)
    assert met.flops.total == cost.decode_flops(h, w, blocks + 1)
    assert met.peak_bytes == pytest.approx(cost.decode_bytes(h * w, blocks, 4), rel=0.03)
    assert math.isclose(cost.encode_flops(h * w, 1), 2 * 96 * 768 * h * w)
