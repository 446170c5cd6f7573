"""Transformers in 8 bits: which layers, how far off, what a machine must have, LoRAs beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v import quantize as quantization
from swifti2v.core import UsageError
from swifti2v.quantize import KINDS, check_quantization, quantize
from swifti2v.tiny import tiny_pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Relative error (L2) of one pass at tiny size against the plain path. Found: int8 .001, int8-dynamic .002, fp8 .006
# in float32; behind bfloat16's own .004 and .008. A wrong scale is off by whole factors, no rounding at all by nothing.
BOUNDS = {"int8": (1e-4, 0.01), "int8-dynamic": (2e-4, 0.02), "fp8": (1e-3, 0.05)}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    """One pass over three blocks, whichever kind of network this is."""
    config = model.config
    told: dict[str, Any] = {"timestep": torch.full((1, 3), 500.0), "return_dict": False}
    if getattr(config, "reference_channels", 0):
        told["reference_hidden_states"] = drawn(1, config.reference_channels, 3, 4, 8, seed=2)
        told["frame_indices"] = torch.arange(3)
    else:
        told["encoder_hidden_states"] = drawn(1, 512, 16, seed=3)
    return model(hidden_states=drawn(1, config.in_channels, 3, 4, 8), **told)[0]


@pytest.mark.parametrize("family", ["wan", "nano"])
@pytest.mark.parametrize("kind", BOUNDS)
def test_errors_against_the_plain_path(kind: str, family: str) -> None:
    pytest.importorskip("torchao")
    model = tiny_pipeline(family).transformer_2
    plain = velocity(model)
    kept = {name: tensor.clone() for name, tensor in model.named_parameters() if "blocks" not in name}
    assert quantize(model, kind) == sum(isinstance(m, nn.Linear) for m in model.modules() if m in set(_inside(model)))
    error = float((velocity(model) - plain).norm() / plain.norm())
    low, high = BOUNDS[kind]
    assert (low if family == "wan" else 1e-6) < error < high, error
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.named_parameters() if name in kept)


def _inside(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "blocks" in name.split(".")]


def test_a_lora_keeps_its_own_numbers() -> None:
    pytest.importorskip("torchao")
    from peft import LoraConfig

    model = tiny_pipeline("wan").transformer_2
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    whole, without = velocity(model), copy.deepcopy(model)
    without.disable_adapters()
    quantize(model, "int8")
    down = model.blocks[0].attn1.to_q.lora_A["default"].weight
    assert type(down.data) is Tensor and down.dtype == torch.float32
    found = velocity(model)
    error = float((found - whole).norm() / whole.norm())
    assert 0 < error < 0.01 < float((velocity(without) - whole).norm() / whole.norm())


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_row_of_zeros_stays_as_it_is(kind: str) -> None:
    """torchao's float8 would make NaN of it: nano's untrained cross-attention begins so."""
    pytest.importorskip("torchao")
    model = tiny_pipeline("wan").transformer_2
    silent = model.blocks[1].attn2.to_out[0]
    with torch.no_grad():
        silent.weight[3] = 0
    plain = velocity(model)
    quantize(model, kind)
    assert type(silent.weight) is nn.Parameter and type(model.blocks[0].attn2.to_out[0].weight) is not nn.Parameter
    assert float((velocity(model) - plain).norm() / plain.norm()) < BOUNDS[kind][1]


def test_nothing_to_quantize() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="no blocks of Linear layers"):
        quantize(nn.Sequential(nn.Linear(4, 4)), "int8")


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    for kind in (None, "int8", "int8-dynamic", "fp8"):
        check_quantization(kind, CPU, torch.float32)
    with pytest.raises(UsageError, match="'int4' is not known; use int8, int8-dynamic, fp8, fp8-rows"):
        check_quantization("int4", CPU, torch.float32)
    with pytest.raises(UsageError, match=r"8.9 or later .*no CUDA device; use 'fp8'"):
        check_quantization("fp8-rows", CPU, torch.bfloat16)
    with pytest.raises(UsageError, match="not possible on mps"):
        check_quantization("int8", torch.device("mps"), torch.float32)
    for capability, says in (((8, 6), "capability 8.6; use 'fp8'"), ((9, 0), "use --dtype bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(UsageError, match=says):
            check_quantization("fp8-rows", CUDA, torch.float32)
    check_quantization("fp8-rows", CUDA, torch.bfloat16)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    check_quantization(None, CPU, torch.float32)
    for kind in KINDS:
        with pytest.raises(UsageError, match=r"needs torchao, which is not installed; pip install 'swifti2v\[quant\]'"):
            check_quantization(kind, CPU, torch.bfloat16)
