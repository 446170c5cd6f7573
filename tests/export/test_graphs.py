"""What graphs say otherwise than the library says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v import motion_field
from swifti2v.export.nano_graphs import NanoDecoder, NanoEncoder
from swifti2v.export.warp import Sampler
from swifti2v.tiny import tiny_mobile

WARPS = ("grid-sample", "taps")


def photo_of(h: int, w: int, seed: int = 0) -> Tensor:
    """(1, 3, h, w): a random picture with large and small structure."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(1, 3, max(2, h // n), max(2, w // n), generator=generator) for n in (16, 8, 4, 2)]
    return torch.stack([F.interpolate(x, (h, w), mode="bicubic") for x in layers]).mean(0).clamp(-1, 1)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("far", [3.0, 40.0, 500.0])  # the last leaves the picture by several of its mirror images
def test_both_warps_look_up_as_torch_does(warp: Any, far: float) -> None:
    photo, field = photo_of(64, 128), far * torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    made = Sampler((64, 128), warp)(photo, motion_field.upsampled(field, 64, 128))
    torch.testing.assert_close(made, motion_field.moved(photo, field), atol=5e-4, rtol=0)


def test_taps_are_exact_where_nothing_moves() -> None:
    photo = photo_of(64, 192)
    torch.testing.assert_close(Sampler((64, 192), "taps")(photo, torch.zeros(1, 2, 64, 192)), photo, atol=1e-6, rtol=0)


def test_the_encoder_graph_is_the_reference() -> None:
    vae, photo = tiny_mobile("mobile-nano").vae, photo_of(128, 192)
    anchor, reference = NanoEncoder(vae)(photo)
    wanted = motion_field.reference(vae, photo[:, :, None])
    torch.testing.assert_close(reference, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(anchor, torch.zeros_like(wanted[:, : motion_field.CHANNELS]))


@pytest.mark.parametrize("warp", WARPS)
def test_the_decoder_graph_decodes_as_the_stream_does(warp: Any) -> None:
    height, width, score = 128, 192, 3.0
    photo, generator = photo_of(height, width), torch.Generator().manual_seed(2)
    latents = torch.randn(1, 8, 4, 2, 3, generator=generator)
    wanted = torch.cat(list(motion_field.decode_stream(latents.split([1, 2, 1], 2), photo[:, :, None], score)), dim=2)
    decoder, field = NanoDecoder((height, width), warp), torch.zeros(1, 2, 4, 6)
    for block in (1, 2, 3):
        reach = torch.tensor([motion_field.reach(block, score, width, height)])
        frames, field = decoder(photo, latents[:, :, block : block + 1], field, reach)
        torch.testing.assert_close(frames, wanted[:, :, 4 * block - 3 : 4 * block + 1], atol=1e-3, rtol=0)
    assert field.abs().mean() > 1  # pixels: something moved
