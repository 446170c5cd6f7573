"""NanoVAE: exact streaming, block 0 is a photo, untrained it is the zonal DCT, and the shipped weights work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swifti2v
from swifti2v.models.causal_vae import StreamingVAE, decode_stream, encode_stream
from swifti2v.models.nano_vae import NanoVAE

SHIPPED = Path(swifti2v.__file__).parent / "nano" / "vae"
KEPT_IMAGE = [0, 256, 512, 1, 16, 17, 2, 34]
KEPT_VIDEO = [0, 1024, 2048, 1, 16, 17, 256, 273]


def tiny(seed: int = 0, trained: bool = True) -> NanoVAE:
    torch.manual_seed(seed)
    n = len(KEPT_IMAGE)
    scale = [0.3 + 0.1 * i for i in range(n)]
    halves = [s / 2 for s in scale]
    vae = NanoVAE(KEPT_IMAGE, KEPT_VIDEO, scale, halves, [0.1] * n, [1.0] * n, 8, 1, 8, 1).eval()
    if trained:  # a refiner that does something: its last layer is zero by default
        for refiner in (vae.refine_image, vae.refine_video):
            torch.nn.init.normal_(refiner.tail.weight, std=0.05)
    return vae


def clip(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(frames: int, height: int, width: int) -> Tensor:
    """A drifting sum of slow waves, no photo."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    value = 0.4 * torch.sin(x / 23 + t / 9 + phase) + 0.4 * torch.cos(y / 17 - x / 41 + phase)
    return value.float()[None]


def decibels(x: Tensor, target: Tensor) -> float:
    return float(10 * torch.log10(4 / (x - target).square().mean()))


@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@torch.no_grad()
def test_any_chunking_is_bit_identical(cuts: list[int]) -> None:
    vae, blocks = tiny(), sum(cuts)
    x = clip(1 + 4 * (blocks - 1))
    whole_z = vae.encode(x).latent_dist.mode()
    whole_x = vae.decode(whole_z).sample
    start, state, latents = 0, None, []
    for cut in cuts:
        frames = 4 * cut - (3 if start == 0 else 0)
        z, state = vae.encode_chunk(x[:, :, start : start + frames], state)
        latents.append(z)
        start += frames
    pixels, state = [], None
    for z in latents:
        y, state = vae.decode_chunk(z, state)
        pixels.append(y)
    assert torch.equal(torch.cat(latents, 2), whole_z)
    assert torch.equal(torch.cat(pixels, 2), whole_x)
    assert whole_x.shape == x.shape and whole_z.shape == (1, 8, blocks, 2, 3)


@torch.no_grad()
def test_two_streams_at_once_do_not_touch() -> None:
    vae = tiny()
    z = [vae.encode(clip(9, seed=s)).latent_dist.mode() for s in (1, 2)]
    alone = [vae.decode(each).sample for each in z]
    states: list[Any] = [None, None]
    pieces: list[list[Tensor]] = [[], []]
    for block in range(3):
        for i in (0, 1):
            y, states[i] = vae.decode_chunk(z[i][:, :, block : block + 1], states[i])
            pieces[i].append(y)
    for i in (0, 1):
        assert torch.equal(torch.cat(pieces[i], 2), alone[i])
    assert decode_states_are_reusable(vae, z[0])


def decode_states_are_reusable(vae: NanoVAE, z: Tensor) -> bool:
    _, state = vae.decode_chunk(z[:, :, :1], None)
    again = [vae.decode_chunk(z[:, :, 1:], state)[0] for _ in range(2)]
    return torch.equal(*again)


@torch.no_grad()
def test_causal_and_first_block_is_the_photo() -> None:
    vae, x = tiny(), clip(9)
    z = vae.encode(x).latent_dist.mode()
    assert torch.equal(z[:, :, :1], vae.encode(x[:, :, :1]).latent_dist.mode())
    changed = x.clone()
    changed[:, :, 5:] += 0.5
    assert torch.equal(vae.encode(changed).latent_dist.mode()[:, :, :2], z[:, :, :2])
    later = z.clone()
    later[:, :, 2] += 1
    assert torch.equal(vae.decode(later).sample[:, :, :5], vae.decode(z).sample[:, :, :5])


def numpy_zonal(x: np.ndarray, kept: list[int]) -> np.ndarray:
    """Zonal DCT of one block of frames (3, t, 16, 16), written from the definition, in float64."""

    def dct(n: int) -> np.ndarray:
        m = np.array([[np.cos(np.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)] for k in range(n)])
        m *= np.sqrt(2 / n)
        m[0] /= np.sqrt(2)
        return m

    colors = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=np.float64)
    colors /= np.linalg.norm(colors, axis=1, keepdims=True)
    a, b = dct(x.shape[1]), dct(16)
    coefficients = np.einsum("cr,tf,vy,ux,rfyx->ctvu", colors, a, b, b, x).reshape(-1)
    mask = np.zeros_like(coefficients)
    mask[kept] = 1
    zonal = (coefficients * mask).reshape(3, x.shape[1], 16, 16)
    return np.einsum("cr,tf,vy,ux,ctvu->rfyx", colors, a, b, b, zonal)


@torch.no_grad()
def test_untrained_decoder_is_the_zonal_dct() -> None:
    """Of a first frame without detail there is nothing to carry."""
    vae, x = tiny(trained=False), clip(5, 16, 32)
    x[:, :, :1] = x[:, :, :1].mean(dim=(3, 4), keepdim=True)
    y = vae(x).sample[0].numpy()
    for column in (0, 16):
        for frames, kept in ((slice(0, 1), KEPT_IMAGE), (slice(1, 5), KEPT_VIDEO)):
            block = x[0, :, frames, :, column : column + 16].double().numpy()
            np.testing.assert_allclose(y[:, frames, :, column : column + 16], numpy_zonal(block, kept), atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 1, 30, 48), "height 30 .* nearest is 32"),
        ((1, 3, 1, 32, 41), "width 41 .* nearest is 48"),
        ((1, 3, 4, 32, 48), "4 frames .* nearest is 5"),
        ((1, 4, 1, 32, 48), "not \\(b, 3"),
    ],
)
def test_illegal_pixels_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().encode(torch.zeros(shape))


def test_illegal_latents_and_lists_are_named() -> None:
    vae = tiny()
    with pytest.raises(ValueError, match="not \\(b, 8"):
        vae.decode(torch.zeros(1, 7, 1, 2, 2))
    _, state = vae.encode_chunk(clip(1), None)
    with pytest.raises(ValueError, match=r"5 frames .* 4k; the nearest is 4"):
        vae.encode_chunk(clip(5), state)
    with pytest.raises(ValueError, match="8 entries"):
        NanoVAE(KEPT_IMAGE, KEPT_VIDEO[1:], [1.0] * 8, [1.0] * 8, [0.0] * 8, [1.0] * 8)


@torch.no_grad()
def test_save_load_and_bfloat16(tmp_path: Path) -> None:
    vae, x = tiny(), smooth(5, 32, 48)
    vae.save_pretrained(tmp_path)
    again = NanoVAE.from_pretrained(tmp_path)
    assert torch.equal(again(x).sample, vae(x).sample)
    half = NanoVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (
        half.refine_image.head.weight.dtype == torch.bfloat16
        and half.dtype == half.analysis_video.dtype == half.latents_mean.dtype == torch.float32
    )
    cast = tiny().to(torch.bfloat16)
    assert torch.equal(cast.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())
    assert torch.equal(cast(x).sample, half(x).sample)
    assert cast(x).sample.dtype == torch.float32


@torch.no_grad()
def test_streams_of_the_library() -> None:
    vae, x = tiny(), clip(9)
    assert isinstance(vae, StreamingVAE)
    z = torch.cat(list(encode_stream(vae, x.split(2, dim=2))), dim=2)
    expected = vae.encode(x).latent_dist.mode() - vae.latents_mean[:, None, None, None]
    assert torch.allclose(z, expected)
    y = torch.cat(list(decode_stream(vae, z.split(1, dim=2))), dim=2)
    assert torch.allclose(y, vae(x).sample.clamp(-1, 1), atol=1e-4)


@torch.no_grad()
def test_shipped_weights() -> None:
    vae = NanoVAE.from_pretrained(SHIPPED, torch_dtype=torch.bfloat16).eval()
    assert vae.latent_channels == 96 and sum(p.numel() for p in vae.parameters()) < 2_500_000
    still = smooth(1, 64, 96).expand(-1, -1, 9, -1, -1)
    z = vae.encode(still).latent_dist.mode()
    assert torch.allclose(z[:, :34, 0], z[:, :34, 2], atol=1e-4)  # a motionless video: the shared channels agree
    for x in (still, smooth(9, 64, 96)):
        y = vae(x).sample
        assert decibels(y[:, :, :1], x[:, :, :1]) > 45
        assert decibels(y[:, :, 1:], x[:, :, 1:]) > 43


@torch.no_grad()
def test_detail_is_carried_into_later_frames() -> None:
    """A still clip of a detailed picture: the transform alone loses the detail, the decoder takes it from frame 0."""
    config = NanoVAE.load_config(str(SHIPPED))
    thin = {"image_width": 8, "image_layers": 1, "video_width": 8, "video_layers": 1}
    vae = NanoVAE.from_config({**config, **thin}).eval()
    texture = 0.15 * clip(1, 64, 96)
    x = (smooth(1, 64, 96) * 0.8 + texture).clamp(-1, 1).expand(-1, -1, 5, -1, -1)
    z = vae.encode(x).latent_dist.mode()
    soft = vae.decode_linear(z[:, :, 1], first=False)
    known, _ = vae.decode_chunk(z, vae.decoder_state(x[:, :, :1]))
    assert decibels(known[:, :, 1:], x[:, :, 1:]) > decibels(soft, x[:, :, 1:]) + 3
    assert torch.equal(known[:, :, :1], vae.decode(z).sample[:, :, :1])  # frame 0 itself is decoded as ever
