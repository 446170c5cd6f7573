"""The Turbo-VAED-like decoder: its parameter ledger, its geometry, and its parts against plain formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swifti2v.models.turbo_decoder import (
    FEATURES,
    Conv3d,
    ResidualBlock,
    TurboDecoder,
    rms_norm,
    unfold_double,
)

TINY = {"latent_channels": 4, "widths": (8, 8, 8, 16), "layers": (1, 1, 1, 1, 1), "depthwise_kernel": 3}


def tiny() -> TurboDecoder:
    return TurboDecoder(**TINY).eval().requires_grad_(False)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_ledger() -> None:
    with torch.device("meta"):
        model = TurboDecoder()
    assert count(model) == 41_896_023  # the 41.896 M of specs/mobilei2v.md section 2
    parts = [count(model.conv_in), count(model.mid_block), *map(count, model.up_blocks)]
    assert parts == [1_769_984, 654_336, 654_336, 30_217_472, 6_670_720, 1_889_600]
    assert count(model.tail) + count(model.conv_out) == 36_928 + 2_320 + 327
    assert not list(model.buffers())


def test_true_size_geometry() -> None:
    with torch.device("meta"):
        out = TurboDecoder().decode(torch.empty(1, 128, 3, 23, 40), features=True)
    assert out.sample.shape == (1, 3, 17, 736, 1280)
    assert [tuple(f.shape[1:]) for f in out.features] == [
        (512, 3, 23, 40),
        (512, 3, 23, 40),
        (256, 5, 46, 80),
        (128, 9, 92, 160),
        (64, 17, 184, 320),
    ]
    assert len(out.features) == len(FEATURES)


def test_features_are_where_the_teachers_are() -> None:
    """The stages pair with LTX's own decoder: the same grids; equal widths in the middle and in the first stage."""
    with torch.device("meta"):
        teacher, student = AutoencoderKLLTXVideo().decoder, TurboDecoder()
        z, seen = torch.empty(1, 128, 3, 6, 5), []
        for stage in (teacher.mid_block, *teacher.up_blocks):
            stage.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
        teacher(z)
        ours = [tuple(f.shape) for f in student.decode(z, features=True).features]
    assert [s[2:] for s in seen] == [s[2:] for s in ours]
    assert [s[1] for s in seen] == [512, 512, 512, 256, 128] and [s[1] for s in ours] == [512, 512, 256, 128, 64]


@settings(max_examples=10)
@given(t=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3))
def test_any_clip_is_eight_frames_a_block_and_one_for_block_0(t: int, h: int, w: int) -> None:
    z = torch.randn(1, 4, t, h, w)
    assert tiny()(z).shape == (1, 3, 8 * (t - 1) + 1, 32 * h, 32 * w)


@given(t=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3))
def test_upsampling_is_the_joint_shuffle_without_its_first_frame(t: int, h: int, w: int) -> None:
    """Decoupled, but the same rearrangement as LTX's: (c, time, row, column) to its place in the doubled grid."""
    x = torch.randn(2, 3 * 8, t, h, w)
    joint = x.reshape(2, 3, 2, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, 3, 2 * t, 2 * h, 2 * w)
    # The time factor lies innermost here (reshape first, then the 2-D shuffle), outermost in LTX's joint one.
    ours = x.reshape(2, 3, 2, 2, 2, t, h, w).permute(0, 1, 3, 4, 2, 5, 6, 7).reshape(2, 24, t, h, w)
    assert torch.equal(unfold_double(ours), joint[:, :, 1:])


def test_norms_and_their_eps() -> None:
    x = torch.randn(2, 5, 3, 4, 4) * 1e-4  # small: eps 1e-8 is then visible
    expected = x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(rms_norm(x), expected)
    assert (rms_norm(x) - x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()).abs().max() > 0.1
    assert ResidualBlock(4, 6, None).norm_shortcut.eps == 1e-6 and ResidualBlock(4, 4, None).norm_shortcut is None
    assert torch.equal(rms_norm(torch.zeros(1, 4, 1, 1, 1)), torch.zeros(1, 4, 1, 1, 1))


def test_activations_are_relu_first_in_doubling_blocks_only() -> None:
    model = tiny()
    assert [block.relu for stage in model.up_blocks for block in stage.blocks] == [False, True, True, True]
    assert all(not stage.entry.relu for stage in model.up_blocks if stage.entry is not None)
    x = torch.randn(1, 8, 2, 3, 3)
    block = ResidualBlock(8, 8, None, relu=True)
    by_hand = x + block.conv2(torch.nn.functional.silu(rms_norm(block.conv1(rms_norm(x).relu()))))
    torch.testing.assert_close(block(x), by_hand)


def test_time_is_padded_by_repetition() -> None:
    layer = Conv3d(2, 2, 3)
    still = torch.randn(1, 2, 1, 4, 4)
    clip = still.expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(layer(clip), layer(still).expand(-1, -1, 5, -1, -1))


def test_gradients_reach_everything_with_and_without_checkpointing() -> None:
    torch.manual_seed(0)
    model, z = TurboDecoder(**TINY), torch.randn(1, 4, 2, 1, 1)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        out = model.decode(z, features=True)
        (out.sample.square().mean() + sum(f.square().mean() for f in out.features)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        assert all(g.abs().sum() > 0 for g in found[-1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_save_and_load(tmp_path: Path) -> None:
    model, z = tiny(), torch.randn(1, 4, 2, 1, 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(z), TurboDecoder.from_pretrained(tmp_path)(z))


@pytest.mark.parametrize(
    "wrong", [{"widths": (8, 8, 8)}, {"layers": (1,)}, {"widths": (8, 8, 8, 8)}, {"depthwise_kernel": 4}]
)
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needed are"):
        TurboDecoder(**{**TINY, **wrong})
    with pytest.raises(ValueError, match="are not"):
        tiny().decode(torch.zeros(1, 5, 1, 1, 1))
