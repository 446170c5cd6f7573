"""Both layouts are one network: the same result, the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v.models.channels_first import LAYOUTS, ChannelsFirstAttention, exportable
from swifti2v.models.mobile_dit import MobileTransformer3DModel, SelfAttention
from swifti2v.models.positions import rope_tables

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "attention_pattern": ("linear", "softmax", "linear"),
}
MOBILE_NANO: dict[str, Any] = {
    **TINY,
    "reference_channels": 4,
    "prediction": "residual",
    "absolute_positions": True,
}
CONFIGS = {
    "mobile": TINY,
    "mobile-nano": MOBILE_NANO,
    "linear": {**TINY, "attention_pattern": ("linear",) * 2},
    "softmax": {**TINY, "attention_pattern": ("softmax",) * 2, "qk_norm": "all"},
    "no motion": {**TINY, "motion_embedding": False, "rope_reference_grid": None},
    "gated": {**MOBILE_NANO, "prediction": "gated", "reference_channels": 8},
    "reference, velocity": {**MOBILE_NANO, "prediction": "velocity"},
}


def build(config: dict[str, Any]) -> MobileTransformer3DModel:
    torch.manual_seed(0)
    model = MobileTransformer3DModel(**config).eval().requires_grad_(False)
    nn.init.normal_(model.proj_out.weight, std=0.2)  # zero at birth: nothing inside would be visible
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def inputs(model: MobileTransformer3DModel, grid: tuple[int, int, int], b: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    given = [torch.randn(b, config.in_channels, *grid, generator=generator), torch.linspace(0.9, 0.3, b)]
    given.append(torch.linspace(1.0, 4.0, b))
    if config.reference_channels:
        given.append(torch.randn(b, config.reference_channels, *grid, generator=generator))
    return given


def expected(model: MobileTransformer3DModel, given: list[Tensor], frames: list[int], context: int) -> Tensor:
    latents, sigma, score, *reference = given
    timestep = (1000 * sigma)[:, None].repeat(1, latents.shape[2])
    timestep[:, :context] = 0
    out = model(
        latents,
        timestep,
        reference_hidden_states=reference[0] if reference else None,
        frame_indices=torch.tensor(frames),
        motion_score=score if model.config.motion_embedding else None,
    ).sample
    return out[:, :, context:]


@pytest.mark.parametrize("equations", ["coreml", "onnx"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("grid", "frames", "context"), [((3, 3, 5), [0, 1, 2], 1), ((4, 2, 3), [0, 7, 8, 9], 2)])
def test_channels_first_is_the_network(
    name: str, grid: tuple[int, int, int], frames: list[int], context: int, equations: Any
) -> None:
    model = build(CONFIGS[name])
    given = inputs(model, grid)
    wanted = expected(model, given, frames, context)
    module = exportable(model, grid, frames=frames, context=context, equations=equations)
    assert wanted.abs().mean() > 0.05
    torch.testing.assert_close(
        exportable(model, grid, layout="reference", frames=frames, context=context)(*given),
        wanted,
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(module(*given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mobile", "mobile-nano"])
@pytest.mark.parametrize("context", [0, 1])
def test_both_layouts_stand_behind_one_interface(name: str, context: int) -> None:
    model = build(CONFIGS[name])
    given = inputs(model, (2, 3, 3), b=1)
    reference, channels_first = (exportable(model, (2, 3, 3), layout=x, context=context)(*given) for x in LAYOUTS)
    torch.testing.assert_close(reference, expected(model, given, [0, 1], context), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(channels_first, reference, atol=1e-5, rtol=1e-5)


def test_weights_are_shared() -> None:
    model = build(MOBILE_NANO)
    module = exportable(model, (2, 3, 3))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    constants = {"cos", "sin", "features"}  # made for the grid
    copies = {
        name
        for name, tensor in [*module.named_buffers(), *module.named_parameters()]
        if tensor.untyped_storage().data_ptr() not in own and name.split(".")[-1] not in constants
    }
    assert copies == {f"blocks.{i}.ffn.{part}" for i in range(3) for part in ("weight", "bias")}
    given = inputs(model, (2, 3, 3))
    before = module(*given)
    model.blocks[0].attn.to_qkv.weight.mul_(2)
    assert not torch.allclose(module(*given), before)
    torch.testing.assert_close(module(*given), expected(model, given, [0, 1], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("equations", ["coreml", "onnx"])
def test_linear_attention_is_the_quadratic_kernel_form(equations: Any) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(36, 3, "linear", qk_norm=False).requires_grad_(False)
    tables = rope_tables(torch.arange(2), (2, 3), 12, 16)
    module = ChannelsFirstAttention(attention, tables, equations)
    q, k, v = (torch.randn(2, 12, 1, 12) for _ in range(3))
    kernel = torch.einsum("bchq,bchk->bqk", q.relu(), k.relu()).double()
    wanted = torch.einsum("bqk,bchk->bchq", kernel / (kernel.sum(-1, keepdim=True) + 1e-8), v.double())
    out = module._linear(q.relu(), k.relu().transpose(1, 3) if equations == "coreml" else k.relu(), v)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)


def test_half_precision_survives_thousands_of_tokens_that_agree() -> None:
    """Sums of this size are infinite in float16; means are not."""
    torch.manual_seed(0)
    attention = SelfAttention(12, 1, "linear", qk_norm=False).requires_grad_(False)
    grid = (3, 23, 40)
    tables = rope_tables(torch.zeros(3), grid[1:], 12, 16)
    x = 30 * torch.randn(1, 12, 1, 1).expand(-1, -1, -1, 2760) + torch.randn(1, 12, 1, 2760)
    wanted = ChannelsFirstAttention(attention, tables)(x)
    attention = attention.to(torch.float16)
    half = ChannelsFirstAttention(attention, tables, half=True)(x.to(torch.float16))
    whole = ChannelsFirstAttention(attention, tables)(x.to(torch.float16))
    assert not torch.isfinite(whole).all()
    assert ((half.float() - wanted).norm() / wanted.norm()) < 0.02


def test_silent_queries_stay_finite_in_half_precision() -> None:
    attention = SelfAttention(12, 1, "linear", qk_norm=False).requires_grad_(False).to(torch.float16)
    tables = rope_tables(torch.zeros(1), (2, 2), 12, 16)
    assert torch.isfinite(ChannelsFirstAttention(attention, tables, half=True)(torch.zeros(1, 12, 1, 4).half())).all()


def test_what_has_no_mobile_form_is_refused() -> None:
    with pytest.raises(ValueError, match="text cross-attention"):
        exportable(build({**TINY, "cross_attention_dim": 8}), (2, 3, 3))
    with pytest.raises(ValueError, match="patches of 1, not 2"):
        exportable(build({**TINY, "patch_size": 2}), (2, 3, 3))
    model = build(TINY)
    with pytest.raises(ValueError, match="3 positions and 1 finished blocks do not fit a window of 2 blocks"):
        exportable(model, (2, 3, 3), frames=[0, 1, 2])
    with pytest.raises(ValueError, match="layout 'sideways'"):
        exportable(model, (2, 3, 3), layout="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="equations 'tflite'"):
        exportable(model, (2, 3, 3), equations="tflite")  # type: ignore[arg-type]
