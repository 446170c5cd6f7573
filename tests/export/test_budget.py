"""Channels-first is worth nothing unless the backend keeps it: one layer at 2,760 tokens, as in the specification."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v.export.budget import mil_operators, onnx_operators
from swifti2v.models.channels_first import ChannelsFirstAttention, exportable
from swifti2v.models.mobile_dit import MobileTransformer3DModel, SelfAttention
from swifti2v.models.positions import rope_tables

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GRID, WIDTH, HEADS = (3, 23, 40), 1152, 16


def layer(kind: str, equations: Any, half: bool = False) -> tuple[nn.Module, Tensor]:
    attention = SelfAttention(WIDTH, HEADS, kind, qk_norm=kind == "linear").eval().requires_grad_(False)
    tables = rope_tables(torch.arange(GRID[0]), GRID[1:], WIDTH // HEADS, 16)
    return ChannelsFirstAttention(attention, tables, equations, half).eval(), torch.randn(1, WIDTH, 1, 2760)


@pytest.mark.parametrize(("kind", "einsums"), [("linear", 48), ("softmax", 32)])
def test_onnx_moves_nothing(kind: str, einsums: int, tmp_path: Path) -> None:
    module, x = layer(kind, "onnx")
    with torch.no_grad():
        torch.onnx.export(module, (x,), str(tmp_path / "layer.onnx"), dynamo=False, opset_version=17)
    counts = onnx_operators(tmp_path / "layer.onnx")
    assert counts.get("Transpose", 0) == counts.get("Reshape", 0) == 0
    assert counts["Einsum"] == einsums and counts["Conv"] == 2 and "MatMul" not in counts


@pytest.mark.parametrize(("kind", "einsums"), [("linear", 48), ("softmax", 32)])
def test_core_ml_transposes_keys_once(kind: str, einsums: int) -> None:
    pytest.importorskip("coremltools")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from swifti2v.export.coreml import convert

    module, x = layer(kind, "coreml", half=True)
    counts = mil_operators(convert(module, (x,), ["x"], ["y"]))
    assert counts["transpose"] == 1 and counts.get("reshape", 0) == 0
    assert counts["einsum"] == einsums and "matmul" not in counts


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_level_has_bounds_that_float16_has() -> None:
    """Without an upper one the converter takes float32's largest number, infinity in float16."""
    pytest.importorskip("coremltools")
    from swifti2v.export.coreml import convert

    sizes: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "hidden_size": 48, "num_attention_heads": 2}
    kind: dict[str, Any] = {"attention_pattern": ("linear",), "reference_channels": 8, "prediction": "residual"}
    module = exportable(MobileTransformer3DModel(**sizes, **kind).eval().requires_grad_(False), (2, 2, 3), half=True)
    latents, one = torch.randn(1, 8, 2, 2, 3), torch.ones(1)
    model = convert(
        module, (latents, one, one, latents), ["latents", "sigma", "motion_score", "reference"], ["velocity"]
    )
    (clip,) = (op for op in model._mil_program.functions["main"].operations if op.op_type == "clip")
    assert clip.inputs["beta"].val == 1
