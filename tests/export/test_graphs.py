"""What graphs say otherwise than the library says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swifti2v import carry
from swifti2v.export.carrying import Carrier, Resize, median, warp_by_taps
from swifti2v.export.nano_graphs import NanoCarry, NanoEncoder, NanoFinish, NanoFirst, NanoSoft
from swifti2v.models.causal_vae import decode_stream, encode_stream
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.reference import static_video
from swifti2v.tiny import _nano_vae


def photo_of(h: int, w: int, seed: int = 0) -> Tensor:
    """(1, 3, h, w): a random picture with large and small structure."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(1, 3, max(2, h // n), max(2, w // n), generator=generator) for n in (16, 8, 4, 2)]
    return torch.stack([F.interpolate(x, (h, w), mode="bicubic") for x in layers]).mean(0).clamp(-1, 1)


@pytest.fixture(scope="module")
def vae() -> NanoVAE:
    torch.manual_seed(0)
    made = _nano_vae().eval().requires_grad_(False)
    for part in (made.refine_image, made.refine_video):
        nn.init.normal_(part.tail.weight, std=0.1)  # zero at birth
    return made


@pytest.mark.parametrize(("source", "target"), [((48, 64), (24, 32)), ((18, 32), (9, 16)), ((9, 16), (18, 32))])
def test_resampling_is_two_products(source: Any, target: Any) -> None:
    x = torch.randn(2, 2, *source)
    torch.testing.assert_close(Resize.picture(source, target)(x), carry.scaled(x, target), atol=1e-5, rtol=1e-5)
    wanted = carry.resized_flow(x, torch.empty(1, 1, *target))
    torch.testing.assert_close(Resize.flow(source, target)(x), wanted, atol=1e-5, rtol=1e-5)


def test_median_is_the_median() -> None:
    flow = torch.randn(2, 2, 7, 9)
    assert torch.equal(median(flow), carry.median(flow))


@pytest.mark.parametrize("size", [(12, 20), (24, 40)])
def test_taps_are_grid_sampling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 12, 20)
    flow = 4 * torch.randn(2, 2, *size)
    wanted = F.grid_sample(x, _grid(flow), mode="bicubic", padding_mode="border", align_corners=False)
    torch.testing.assert_close(carry.warp(x, flow), wanted, atol=1e-6, rtol=1e-6)
    if size == (12, 20):
        torch.testing.assert_close(warp_by_taps(x, flow), wanted, atol=2e-5, rtol=1e-4)


def _grid(flow: Tensor) -> Tensor:
    h, w = flow.shape[-2:]
    gx = (flow[:, 0] + torch.arange(w) + 0.5) * (2 / w) - 1
    gy = (flow[:, 1] + torch.arange(h)[:, None] + 0.5) * (2 / h) - 1
    return torch.stack([gx, gy], dim=-1)


@pytest.mark.parametrize("size", [(96, 144), (64, 128)])
@pytest.mark.parametrize("warp", ["grid-sample", "gather"])
def test_the_carrier_follows_as_carry_does(size: tuple[int, int], warp: Any) -> None:
    photo = photo_of(*size)
    carrier, trail = Carrier(size, warp), carry.start(photo)
    flow, pictures = trail.flow, carrier.pyramid(photo)
    for shift in (1, 2):
        frame = torch.roll(photo, (shift, 2 * shift), (2, 3))
        trail = carry.follow(trail, carry.scaled(frame, trail.flow.shape[-2:]))
        flow = carrier.follow(pictures, carrier.pyramid(frame), flow)
        torch.testing.assert_close(flow, trail.flow, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(carrier.carried(photo, flow), carry.carried(trail), atol=1e-3, rtol=1e-3)
    assert trail.flow.abs().mean() > 0.2


def test_the_encoder_graph_is_the_held_still_video(vae: NanoVAE) -> None:
    photo = photo_of(32, 48)
    anchor, still = NanoEncoder(vae)(photo)
    wanted = torch.cat(list(encode_stream(vae, static_video(photo[:, :, None], 9))), dim=2)
    torch.testing.assert_close(anchor, wanted[:, :, :1], atol=1e-5, rtol=1e-5)
    for block in (1, 2):
        torch.testing.assert_close(still, wanted[:, :, block : block + 1], atol=1e-5, rtol=1e-5)


def test_step_graphs_decode_as_the_stream_does(vae: NanoVAE) -> None:
    size = (64, 96)
    photo = photo_of(*size)
    frames = torch.stack([torch.roll(photo[0], i, 2) for i in range(9)], dim=1)[None]
    latents = torch.cat(list(encode_stream(vae, frames.split([1, 4, 4], dim=2))), dim=2)
    latents = latents + 0.05 * torch.randn_like(latents)
    wanted = torch.cat(list(decode_stream(vae, latents.split(1, dim=2), photo[:, :, None])), dim=2)
    torch.testing.assert_close(NanoFirst(vae)(latents[:, :, :1]), wanted[:, :, :1], atol=1e-5, rtol=1e-5)
    soft_of, carry_on, finish = NanoSoft(vae), NanoCarry(size), NanoFinish(vae, size)
    flow = torch.zeros(1, 2, 16, 24)
    for block in (1, 2):
        z, moved = latents[:, :, block : block + 1], []
        soft = soft_of(z)
        for frame in soft.unbind(2):
            shown, flow = carry_on(photo, frame, flow)
            moved.append(shown)
        made = finish(z, soft, torch.stack(moved, dim=2))
        error = (made - wanted[:, :, 4 * block - 3 : 4 * block + 1]).abs()
        assert error.mean() < 1e-5 and error.max() < 1e-2
    assert flow.abs().mean() > 0.1
