"""Streams against diffusers' own one-shot encode and decode, on tiny Wan2.1- and Wan2.2-shaped VAEs."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.core import RunError
from swifti2v.models.causal_vae import (
    StreamingVAE,
    WanStreamingVAE,
    decode_stream,
    encode_stream,
    streaming,
)
from swifti2v.models.tiled_decoder import reach

STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
FRAMES, BLOCKS = 13, 4


def make_vae(version: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    shape: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
    if version == "2.2":
        shape |= {"decoder_base_dim": 8, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        shape |= {"scale_factor_spatial": 16}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**shape, **STATISTICS).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("bias"):  # zero at birth, which would hide what padding does
                parameter.normal_(std=0.1)
    return vae.to(dtype)


CASES = list(itertools.product(["2.1", "2.2"], [torch.float32, torch.bfloat16]))
VAES = {case: make_vae(*case) for case in CASES}


def statistics() -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values).view(1, -1, 1, 1, 1) for values in STATISTICS.values())  # type: ignore[return-value]


def pixels(vae: AutoencoderKLWan, frames: int = FRAMES, seed: int = 1) -> Tensor:
    s = streaming(vae).spatial_stride
    return torch.rand(1, 3, frames, 3 * s, 4 * s, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(blocks: int = BLOCKS, seed: int = 2) -> Tensor:
    return torch.randn(1, 4, blocks, 3, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode_whole(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    mean, std = statistics()
    return (vae.encode(x.to(vae.dtype)).latent_dist.mode().float() - mean) / std


@torch.no_grad()
def decode_whole(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    mean, std = statistics()
    return vae.decode((z * std + mean).to(vae.dtype)).sample.float()


def joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=2)


def chunked(x: Tensor, cuts: Sequence[int]) -> Iterator[Tensor]:
    edges = [0, *sorted(cuts), x.shape[2]]
    yield from (x[:, :, a:b] for a, b in itertools.pairwise(edges))


@pytest.fixture(params=CASES, ids=lambda case: f"wan{case[0]}-{str(case[1])[6:]}")
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return VAES[request.param]


def test_streams_equal_one_shot(vae: AutoencoderKLWan) -> None:
    x, z, stream = pixels(vae), latents(), streaming(vae)
    encoded, decoded = joined(encode_stream(stream, x.split(5, dim=2))), joined(decode_stream(stream, z.split(3, 2)))
    assert torch.equal(encoded, encode_whole(vae, x)) and encoded.dtype == torch.float32
    assert torch.equal(decoded, decode_whole(vae, z)) and decoded.dtype == torch.float32
    assert decoded.shape == x.shape


@settings(max_examples=8)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, FRAMES), max_size=6))
def test_any_chunking_encodes_to_the_same_bits(case: tuple[str, torch.dtype], cuts: list[int]) -> None:
    x = pixels(VAES[case])
    stream = streaming(VAES[case])
    parts = list(encode_stream(stream, chunked(x, cuts)))
    assert torch.equal(joined(parts), joined(encode_stream(stream, [x])))
    assert parts[0].shape[2] == 1


@settings(max_examples=8)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, BLOCKS), max_size=4))
def test_any_chunking_decodes_to_the_same_bits(case: tuple[str, torch.dtype], cuts: list[int]) -> None:
    stream = streaming(VAES[case])
    assert torch.equal(
        joined(decode_stream(stream, chunked(latents(), cuts))), joined(decode_stream(stream, [latents()]))
    )


def test_first_latent_is_the_latent_of_the_image_and_comes_at_once(vae: AutoencoderKLWan) -> None:
    x = pixels(vae)
    pulled: list[int] = []

    def frames() -> Iterator[Tensor]:
        for index in range(FRAMES):
            pulled.append(index)
            yield x[:, :, index : index + 1]

    first = next(encode_stream(streaming(vae), frames()))
    assert pulled == [0]
    assert torch.equal(first, encode_whole(vae, x[:, :, :1]))


def test_interleaved_streams_do_not_meet(vae: AutoencoderKLWan) -> None:
    stream, one, two = streaming(vae), latents(3, seed=3), latents(3, seed=4)
    first, second = decode_stream(stream, one.split(1, 2)), decode_stream(stream, two.split(1, 2))
    pairs = [(next(first), next(second)) for _ in range(3)]
    assert torch.equal(joined(a for a, _ in pairs), decode_whole(vae, one))
    assert torch.equal(joined(b for _, b in pairs), decode_whole(vae, two))
    x, y = pixels(vae, 5, seed=5), pixels(vae, 5, seed=6)
    encoded = list(zip(encode_stream(stream, [x]), encode_stream(stream, [y]), strict=True))
    assert torch.equal(joined(a for a, _ in encoded), encode_whole(vae, x))
    assert torch.equal(joined(b for _, b in encoded), encode_whole(vae, y))


@pytest.mark.parametrize(("frames", "nearest"), [(2, 1), (4, 5), (6, 5), (7, 9), (12, 13)])
def test_leftover_frames_are_refused(frames: int, nearest: int) -> None:
    vae = VAES["2.1", torch.float32]
    with pytest.raises(ValueError, match=rf"^{frames} frames .* nearest legal count: {nearest}$"):
        list(encode_stream(streaming(vae), pixels(vae, frames).split(3, 2)))


def test_empty_streams_give_nothing() -> None:
    stream = streaming(VAES["2.1", torch.float32])
    assert list(encode_stream(stream, [])) == list(decode_stream(stream, [])) == []


def test_chunk_methods_refuse_partial_groups() -> None:
    stream = streaming(VAES["2.1", torch.float32])
    with pytest.raises(ValueError, match="3 frames"):
        stream.encode_chunk(pixels(VAES["2.1", torch.float32], 3), None)
    with pytest.raises(ValueError, match="0 latent blocks"):
        stream.decode_chunk(latents(0), None)


@pytest.mark.parametrize("closing", ["close", "drop"])
def test_abandoned_streams_release_their_state_and_source(closing: str) -> None:
    vae = VAES["2.2", torch.float32]
    adapter = WanStreamingVAE(vae)
    states: list[weakref.ref[Any]] = []
    closed: list[bool] = []

    class Spy:  # hands everything on; only remembers the state weakly
        latent_channels, spatial_stride, temporal_stride = 4, 16, 4
        latents_mean, latents_std = adapter.latents_mean, adapter.latents_std

        def encode_chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            raise NotImplementedError

        def decode_chunk(self, z: Tensor, state: Any) -> tuple[Tensor, Any]:
            out, state = adapter.decode_chunk(z, state)
            states.append(weakref.ref(state))
            return out, state

    def source() -> Iterator[Tensor]:
        try:
            yield from latents().split(1, 2)
        finally:
            closed.append(True)

    stream = decode_stream(Spy(), source())
    next(stream)
    assert states[0]() is not None and not closed
    if closing == "close":
        stream.close()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert states[0]() is None and closed


def test_streams_leave_the_callers_grad_mode_alone() -> None:
    vae = VAES["2.1", torch.float32]
    modes = []

    def source() -> Iterator[Tensor]:
        for block in latents(2).split(1, 2):
            modes.append(torch.is_grad_enabled())
            yield block

    for out in decode_stream(streaming(vae), source()):
        modes.append(torch.is_grad_enabled())
        assert not out.requires_grad
    assert modes == [True] * 4


@pytest.mark.parametrize("tiles", [(1, 2), (2, 3), (1, 99)])
def test_tiled_equals_untiled(vae: AutoencoderKLWan, tiles: tuple[int, int]) -> None:
    expected = joined(decode_stream(WanStreamingVAE(vae), [latents()]))
    tiled = WanStreamingVAE(vae, tiles=tiles, split=2, cache_device="cpu")
    got = joined(decode_stream(tiled, latents().split([1, 2, 1], 2)))
    if vae.dtype == torch.bfloat16:
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_every_split_is_exact(split: int) -> None:
    vae = VAES["2.2", torch.float32]
    expected = joined(decode_stream(streaming(vae), [latents(2)]))
    got = joined(decode_stream(WanStreamingVAE(vae, tiles=(1, 2), split=split), [latents(2)]))
    assert (got - expected).abs().max() <= 1e-6


def test_too_small_a_halo_fails() -> None:
    vae = VAES["2.2", torch.float32]
    expected = joined(decode_stream(streaming(vae), [latents(2)]))
    tiled = WanStreamingVAE(vae, tiles=(1, 2), split=2)
    assert tiled.tiling is not None
    tiled.tiling = replace(tiled.tiling, halo=1)
    assert (joined(decode_stream(tiled, [latents(2)])) - expected).abs().max() > 1e-3


def test_halo_is_the_receptive_field_of_the_full_size_decoder() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**FULL_SIZE_22)
    decoder = vae.decoder
    # Three resnets of two 3x3 each at 2x: 6, upsampling conv at twice that: 1/2, then 6/2 and the head's 1/2.
    assert reach([*decoder.up_blocks[2:], decoder.conv_out]) == (10, 2)
    with pytest.raises(ValueError, match="attention"):
        reach([decoder.mid_block])


FULL_SIZE_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


@pytest.mark.parametrize(("tiles", "split"), [((0, 1), 2), ((1, -1), 2), ((1, 1), 5)])
def test_impossible_tilings_are_refused(tiles: tuple[int, int], split: int) -> None:
    with pytest.raises(ValueError, match=r"tiles|split"):
        WanStreamingVAE(VAES["2.1", torch.float32], tiles=tiles, split=split)


def test_geometry_and_dispatch() -> None:
    for version, stride in (("2.1", 8), ("2.2", 16)):
        stream = streaming(VAES[version, torch.float32])
        assert isinstance(stream, StreamingVAE)
        assert (stream.latent_channels, stream.spatial_stride, stream.temporal_stride) == (4, stride, 4)
        assert streaming(stream) is stream
    with pytest.raises(TypeError, match="Linear"):
        streaming(torch.nn.Linear(1, 1))


def test_offload_hooks_are_woken() -> None:
    class Waking(ModelHook):
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            self.calls += 1
            return args, kwargs

    vae = make_vae("2.1")
    hook = Waking()
    vae._hf_hook = hook
    stream = streaming(vae)
    list(decode_stream(stream, [latents(1)]))
    list(encode_stream(stream, [pixels(vae, 1)]))
    assert hook.calls == 2


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_is_exact(level: str) -> None:
    vae = make_vae("2.2")
    x, z = pixels(vae, 5), latents(2)
    encoded, decoded = encode_whole(vae, x), decode_whole(vae, z)
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    stream = streaming(vae)
    assert torch.equal(joined(encode_stream(stream, [x])), encoded)
    assert torch.equal(joined(decode_stream(stream, [z])), decoded)
    tiled = WanStreamingVAE(vae, tiles=(1, 2))
    if level == "leaf_level":
        assert (joined(decode_stream(tiled, [z])) - decoded).abs().max() <= 1e-6
    else:
        with pytest.raises(RunError, match="leaf_level"):
            list(decode_stream(tiled, [z]))
