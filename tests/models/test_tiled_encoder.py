"""The tiled encoder against the whole one, on tiny Wan2.1- and Wan2.2-shaped VAEs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from test_causal_vae import CASES, FULL_SIZE_22, VAES, chunked, joined
from torch import Tensor

from swifti2v.core import RunError
from swifti2v.models.causal_vae import WanStreamingVAE, encode_stream, streaming
from swifti2v.models.spans import spans
from swifti2v.models.tiled_encoder import EncoderTiling, level_ends
from swifti2v.models.tiles import creep


@pytest.fixture(params=CASES, ids=lambda case: f"wan{case[0]}-{str(case[1])[6:]}")
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return VAES[request.param]


def pixels(vae: AutoencoderKLWan, frames: int = 9, latent: tuple[int, int] = (5, 7)) -> Tensor:
    """More than a halo wide, and of an odd number of latents both ways."""
    s = streaming(vae).spatial_stride
    return torch.rand(1, 3, frames, latent[0] * s, latent[1] * s, generator=torch.Generator().manual_seed(3)) * 2 - 1


def encoded(stream: WanStreamingVAE, x: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
    return joined(encode_stream(stream, chunked(x, cuts)))


def same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """The same bits in bfloat16, up to rounding in float32 (a kernel may sum a narrower tile in another order)."""
    return torch.equal(found, expected) if dtype == torch.bfloat16 else bool((found - expected).abs().max() <= 2e-6)


@pytest.mark.parametrize(("tiles", "split"), [((1, 2), 1), ((2, 3), 2), ((3, 1), 3), ((3, 5), 1), ((99, 2), 2)])
def test_tiled_equals_untiled(vae: AutoencoderKLWan, tiles: tuple[int, int], split: int) -> None:
    x = pixels(vae)
    expected = encoded(WanStreamingVAE(vae), x)
    tiled = WanStreamingVAE(vae, encoder_tiles=tiles, encoder_split=split, encoder_cache_device="cpu")
    found = encoded(tiled, x, (1, 3, 8))
    assert found.shape == expected.shape and same(found, expected, vae.dtype)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("split", [0, 1, 2, 3, 4])
def test_every_split_is_exact_and_groups_may_come_together(version: str, split: int) -> None:
    vae = VAES[version, torch.float32]
    x = pixels(vae)
    expected, _ = WanStreamingVAE(vae).encode_chunk(x, None)
    tiled = WanStreamingVAE(vae, encoder_tiles=(2, 2), encoder_split=split)
    found, state = tiled.encode_chunk(x[:, :, :5], None)
    more, _ = tiled.encode_chunk(x[:, :, 5:], state)
    assert same(torch.cat([found, more], dim=2), expected, torch.float32)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_halo_one_smaller_fails(version: str, split: int) -> None:
    """The halo is not only enough: without its last pixel the result is another."""
    vae = VAES[version, torch.float32]
    x = pixels(vae, 5, (6, 8))
    tiled = WanStreamingVAE(vae, encoder_tiles=(2, 2), encoder_split=split)
    assert tiled.encoder_tiling is not None
    tiled.encoder_tiling = replace(tiled.encoder_tiling, halo=tiled.encoder_tiling.halo - 1)
    assert (encoded(tiled, x) - encoded(WanStreamingVAE(vae), x)).abs().max() > 1e-4


def test_halo_and_levels_of_the_full_size_encoders() -> None:
    with torch.device("meta"):
        wan22, wan21 = AutoencoderKLWan(**FULL_SIZE_22).encoder, AutoencoderKLWan().encoder
    assert level_ends(wan22) == [1, 2, 3, 4] and level_ends(wan21) == [3, 6, 9, 11]
    # conv_in and two resnets of two 3x3: 5 pixels; halved with the padding below and right: 5 // 2 + 1 = 3.
    # Four convolutions more: 7; halved: 4. Four more: 8; halved: 5.
    for encoder in (wan22, wan21):
        tilings = [EncoderTiling.of(encoder, 2, 4, split=split) for split in (0, 1, 2, 3, 4)]
        assert [(t.halo, t.scale) for t in tilings] == [(1, 1), (3, 2), (4, 4), (5, 8), (9, 8)]
    with pytest.raises(ValueError, match="attention"):
        creep([wan22.mid_block])


@pytest.mark.parametrize(("tiles", "split"), [((0, 1), 1), ((1, -1), 1), ((1, 1), 5), ((1, 1), -1)])
def test_impossible_tilings_are_refused(tiles: tuple[int, int], split: int) -> None:
    with pytest.raises(ValueError, match=r"tiles|split"):
        WanStreamingVAE(VAES["2.1", torch.float32], encoder_tiles=tiles, encoder_split=split)


def test_interleaved_tiled_streams_do_not_meet() -> None:
    vae = VAES["2.2", torch.float32]
    stream, one = WanStreamingVAE(vae, encoder_tiles=(2, 2)), pixels(vae, 5)
    two = one.flip(-1)
    pairs = list(zip(encode_stream(stream, [one]), encode_stream(stream, [two]), strict=True))
    assert same(joined(a for a, _ in pairs), encoded(WanStreamingVAE(vae), one), torch.float32)
    assert same(joined(b for _, b in pairs), encoded(WanStreamingVAE(vae), two), torch.float32)


def test_block_offload_is_refused_and_leaf_offload_exact() -> None:
    from test_causal_vae import make_vae

    for level in ("leaf_level", "block_level"):
        vae = make_vae("2.2")
        x = pixels(vae, 5)
        expected = encoded(WanStreamingVAE(vae), x)
        vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
        tiled: Any = WanStreamingVAE(vae, encoder_tiles=(1, 2))
        if level == "leaf_level":
            assert same(encoded(tiled, x), expected, torch.float32)
        else:
            with pytest.raises(RunError, match="leaf_level"):
                encoded(tiled, x)


@pytest.mark.parametrize("length", [1, 2, 7, 88])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("halo", [0, 1, 5])
def test_spans_cover_every_pixel_once_and_see_their_margin(length: int, count: int, halo: int) -> None:
    cut = spans(length, count, halo)
    assert [pixel for span in cut for pixel in range(span.start, span.stop)] == list(range(length))
    for span in cut:
        assert span.low == max(span.start - halo, 0) and span.high == min(span.stop + halo, length)
        seen = list(range(length))[span.outer()]
        assert seen[span.crop()] == list(range(length))[span.paste()] and len(seen) == span.length
