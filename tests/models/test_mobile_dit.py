"""The hybrid DiT: its size, its arithmetic against slow witnesses, and what each option promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swifti2v.models.mobile_dit import (
    GLUMBConv,
    MobileTransformer3DModel,
    linear_attention_dense,
    linear_attention_heads,
    rms_norm,
    softmax_attention,
)
from swifti2v.models.positions import rope_axes, rope_tables, rotate

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "attention_pattern": ("linear", "softmax"),
}
NANO: dict[str, Any] = {
    **TINY,
    "patch_size": 2,
    "rope_reference_grid": None,
    "motion_embedding": False,
    "reference_channels": 4,
    "cross_attention_dim": 8,
    "absolute_positions": True,
    "prediction": "residual",
}


def build(
    config: dict[str, Any], *, seed: int = 0, random_output: bool = True, **changes: Any
) -> MobileTransformer3DModel:
    torch.manual_seed(seed)
    model = MobileTransformer3DModel(**{**config, **changes}).eval()
    if random_output:  # zero at birth: nothing inside would be visible
        for name, parameter in model.named_parameters():
            if "proj_out" in name or "cross_attn.to_out" in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: MobileTransformer3DModel, t: int = 3, h: int = 4, w: int = 6, b: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    given = {
        "hidden_states": torch.randn(b, config.in_channels, t, h, w, generator=generator),
        "timestep": torch.rand(b, t, generator=generator) * 900 + 50,
    }
    if config.reference_channels:
        given["reference_hidden_states"] = torch.randn(b, config.reference_channels, t, h, w, generator=generator)
    if config.cross_attention_dim:
        given["encoder_hidden_states"] = torch.randn(b, 5, config.cross_attention_dim, generator=generator)
    return given


def test_parameter_ledger_of_mobilei2v() -> None:
    with torch.device("meta"):
        model = MobileTransformer3DModel()
    counts = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert [i for i, n in enumerate(counts) if n == 15_336_576] == [7, 15]
    assert counts.count(15_335_424) == 14
    assert sum(p.numel() for p in model.parameters()) == 264_855_296
    assert len(list(model.parameters())) == 196 - 5  # without the text MLP and its norm


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=15, deadline=None)
def test_linear_attention_is_the_quadratic_kernel_form(heads: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, n, heads, 6) for _ in range(3))
    q, k, v = (y.to(dtype) for y in (q.relu() + 0.1, k.relu() + 0.1, v))
    kernel = torch.einsum("bnhc,bmhc->bhnm", q.double(), k.double())
    expected = torch.einsum("bhnm,bmhc->bnhc", kernel / kernel.sum(-1, keepdim=True), v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for form in (linear_attention_dense, linear_attention_heads):
        out = form(q, k, v)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_linear_attention_of_silent_queries_is_zero() -> None:
    q, v = torch.zeros(1, 4, 2, 6), torch.randn(1, 4, 2, 6)
    for form in (linear_attention_dense, linear_attention_heads):
        assert torch.equal(form(q, q, v), torch.zeros_like(v))


def test_softmax_attention_is_softmax() -> None:
    q, k, v = torch.randn(1, 7, 2, 6), torch.randn(1, 5, 2, 6), torch.randn(1, 5, 2, 6)
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(6)).softmax(-1)
    torch.testing.assert_close(softmax_attention(q, k, v), torch.einsum("bhnm,bmhc->bnhc", weights, v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    norm = nn.RMSNorm(24, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24).to(dtype)
    torch.testing.assert_close(rms_norm(x, norm).float(), norm(x.float()), atol=tolerance, rtol=tolerance)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_feed_forward_is_the_plain_convolution(t: int, h: int, w: int) -> None:
    torch.manual_seed(0)
    ffn = GLUMBConv(6, 8)
    x = torch.randn(2, t, h * w, 6)
    y = get_activation("silu")(x @ ffn.expand.weight.T + ffn.expand.bias)
    y = y.reshape(2 * t, h, w, 16).permute(0, 3, 1, 2).contiguous()
    kernel = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    y = torch.einsum("bchwij,cij->bchw", kernel, ffn.depthwise.weight[:, 0]) + ffn.depthwise.bias[:, None, None]
    value, gate = y.chunk(2, dim=1)
    expected = (value * F.silu(gate)).permute(0, 2, 3, 1).reshape(2, t, h * w, 8) @ ffn.project.weight.T
    torch.testing.assert_close(ffn(x, (h, w)), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x, (h, w)), expected, atol=1e-5, rtol=1e-4)


@given(st.sampled_from([12, 20, 64, 72]), st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_rotation_is_half_split_per_axis_and_relative(head: int, shift: int) -> None:
    frames = torch.tensor([0, 3, 4])
    tables = rope_tables(frames, (2, 3), head, None)
    q, k = torch.randn(1, 18, 1, head), torch.randn(1, 18, 1, head)
    parts, start = [], 0
    for width in rope_axes(head):
        part, start = q[..., start : start + width], start + width
        first, second = part.chunk(2, dim=-1)
        parts.append(torch.cat([-second, first], dim=-1))
    cos, sin = (table[:, None] for table in tables)
    torch.testing.assert_close(rotate(q, *tables), q * cos + torch.cat(parts, -1) * sin)
    moved = rope_tables(frames + shift, (2, 3), head, None)
    scores = [torch.einsum("bnhc,bmhc->bnm", rotate(q, *x), rotate(k, *x)) for x in (tables, moved)]
    torch.testing.assert_close(scores[0], scores[1], atol=2e-4, rtol=1e-4)


def test_each_axis_has_its_own_table_on_a_square_grid() -> None:
    cos, sin = rope_tables(torch.tensor([0]), (4, 4), 72, 16)
    angle = torch.atan2(sin, cos).view(4, 4, 72)
    step = 16 / 4 * torch.exp(-math.log(1e4) * torch.arange(12) / 12)
    folded = torch.atan2(step.sin(), step.cos()).repeat(2)
    torch.testing.assert_close(angle[1, 0, 24:48], folded)  # one row down turns y
    assert (angle[1, 0, 48:] == 0).all() and (angle[1, 0, :24] == 0).all()
    torch.testing.assert_close(angle[0, 1, 48:], folded)  # one column right turns x
    assert (angle[0, 1, :48] == 0).all()


def test_720p_positions_are_squeezed_as_published() -> None:
    cos, _ = rope_tables(torch.tensor([2]), (23, 40), 72, 16)
    cos = cos.view(23, 40, 72)
    wanted = torch.tensor([2.0, 22 / 1.4375, 39 / 2.5]).cos()
    torch.testing.assert_close(cos[22, 39, [0, 24, 48]], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [TINY, NANO])
def test_modulation_per_block_equals_modulation_per_token(config: dict[str, Any]) -> None:
    block = build(config, cross_attention_dim=None).blocks[0]
    x, modulation = torch.randn(2, 3, 4, 24), torch.randn(2, 3, 6, 24)
    cos, sin = rope_tables(torch.arange(3), (2, 2), 12, None)
    out = block(x, modulation, cos, sin, None, (2, 2))
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
        part.expand(2, 3, 4, 24) for part in (block.scale_shift_table + modulation)[:, :, :, None].unbind(2)
    )
    y = x + gate_a * block.attn(F.layer_norm(x, (24,), eps=1e-6) * (1 + scale_a) + shift_a, cos, sin)
    y = y + gate_f * block.ffn(F.layer_norm(y, (24,), eps=1e-6) * (1 + scale_f) + shift_f, (2, 2))
    torch.testing.assert_close(out, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [TINY, NANO])
def test_blocks_may_come_in_any_order_if_their_positions_do_too(config: dict[str, Any]) -> None:
    model = build(config)
    call = inputs(model)
    frames, order = torch.tensor([0, 7, 8]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight = model(**call, frame_indices=frames).sample
        shuffled = {
            k: v[:, order] if k == "timestep" else v[:, :, order] if v.ndim == 5 else v for k, v in call.items()
        }
        turned = model(**shuffled, frame_indices=frames[order]).sample
        elsewhere = model(**call, frame_indices=torch.tensor([0, 1, 2])).sample
    torch.testing.assert_close(turned, straight[:, :, order], atol=1e-4, rtol=1e-4)
    assert (elsewhere - straight).abs().max() > 1e-4


def test_untrained_residual_network_points_exactly_to_its_reference() -> None:
    model = build(NANO, random_output=False)
    call = inputs(model)
    call["timestep"] = torch.tensor([[0.0, 5.0, 500.0], [0.0, 20.0, 1000.0]])
    velocity = model(**call, return_dict=False)[0]
    sigma = (call["timestep"] / 1000).clamp(min=0.02)[:, None, :, None, None]
    expected = (call["hidden_states"] - call["reference_hidden_states"]) / sigma
    assert torch.equal(velocity, expected)
    denoised = call["hidden_states"] - sigma * velocity
    torch.testing.assert_close(denoised, call["reference_hidden_states"], atol=1e-5, rtol=1e-5)
    half = model.to(torch.bfloat16)(**call).sample  # float32 latents keep it exact under bfloat16 weights
    assert torch.equal(half, expected)


def test_a_gated_network_goes_from_one_reference_to_the_other() -> None:
    model = build(NANO, random_output=False, prediction="gated", reference_channels=8)
    call = inputs(model)
    assert call["reference_hidden_states"].shape[1] == 8
    call["timestep"] = torch.full_like(call["timestep"], 1000.0)
    first, second = call["reference_hidden_states"].chunk(2, dim=1)
    torch.testing.assert_close(call["hidden_states"] - model(**call).sample, first, atol=1e-5, rtol=1e-5)
    model.proj_out.bias.data.unflatten(0, (8, -1))[4:] = 1.0  # the gate, open
    torch.testing.assert_close(call["hidden_states"] - model(**call).sample, second, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="gated prediction needs 8 reference channels, not 4"):
        build(NANO, prediction="gated")


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 5), (4, 7), (5, 4)])
def test_odd_grids_pad_by_repetition_and_crop(h: int, w: int) -> None:
    model = build(NANO, prediction="velocity")
    call = inputs(model, h=h, w=w)
    with torch.no_grad():
        out = model(**call).sample
        padded = {
            k: F.pad(v.flatten(1, 2), (0, w % 2, 0, h % 2), mode="replicate").unflatten(1, (4, 3)) if v.ndim == 5 else v
            for k, v in call.items()
        }
        whole = model(**padded).sample
    assert out.shape == (2, 4, 3, h, w)
    torch.testing.assert_close(out, whole[..., :h, :w])


@pytest.mark.parametrize("config", [TINY, NANO])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(config: dict[str, Any]) -> None:
    model = build(config).train()
    call = inputs(model)
    model(**call).sample.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(plain) == {name for name, _ in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in plain.values())
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**call).sample.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@pytest.mark.parametrize("config", [TINY, NANO])
def test_save_and_load(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config)
    model.save_pretrained(tmp_path)
    again = MobileTransformer3DModel.from_pretrained(tmp_path).eval()
    call = inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**call).sample, model(**call).sample)


@pytest.mark.parametrize("config", [TINY, NANO])
def test_bfloat16_and_autocast_are_close_to_float32(config: dict[str, Any]) -> None:
    model = build(config, prediction="velocity")
    call = inputs(model)
    with torch.no_grad():
        exact = model(**call).sample
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**call).sample
        half = model.to(torch.bfloat16)(**call).sample
    for out in (mixed, half):
        assert out.dtype == torch.float32
        assert (out - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_the_segment_sees_its_context(kind: str) -> None:
    model = build(TINY, attention_pattern=(kind,))
    call = inputs(model)
    call["timestep"][:, 0] = 0
    changed = {**call, "hidden_states": call["hidden_states"].clone()}
    changed["hidden_states"][:, :, 0] += 1
    with torch.no_grad():
        difference = (model(**call).sample - model(**changed).sample)[:, :, 1:]
    assert difference.abs().max() > 1e-4


def test_each_condition_matters() -> None:
    with torch.no_grad():
        model = build(TINY)
        call = inputs(model)
        default = model(**call).sample
        assert torch.equal(model(**call, motion_score=torch.ones(2)).sample, default)
        assert not torch.allclose(model(**call, motion_score=torch.full((2,), 5.0)).sample, default)
        model = build(NANO)
        call = inputs(model)
        other = {**call, "encoder_hidden_states": call["encoder_hidden_states"].flip(0)}
        assert not torch.allclose(model(**other).sample, model(**call).sample)


def test_padding_does_not_dilute_the_mean_of_the_text() -> None:
    embed = build(NANO).text_embed
    text = torch.randn(2, 5, 8)
    _, pooled = embed(F.pad(text, (0, 0, 0, 20)))
    torch.testing.assert_close(pooled, embed.pool(text.mean(1)))
    assert torch.isfinite(embed(torch.zeros(2, 5, 8))[1]).all()


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="4 reference channels, not 0"):
        MobileTransformer3DModel(**TINY, prediction="residual")
    with pytest.raises(ValueError, match="neither 'linear' nor 'softmax'"):
        MobileTransformer3DModel(**{**TINY, "attention_pattern": ("fast",)})
    model = build(NANO)
    call = inputs(model)
    for missing in ("reference_hidden_states", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            model(**{k: v for k, v in call.items() if k != missing})
    with pytest.raises(ValueError, match="motion_score is given"):
        model(**call, motion_score=torch.ones(2))
    with pytest.raises(ValueError, match="every block needs its own"):
        model(**{**call, "timestep": torch.ones(2)})
