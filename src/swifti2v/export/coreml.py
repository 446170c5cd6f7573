"""The denoiser (channels-first) and encoder as Core ML packages: iOS 17 ML programs in float16.

Converted and counted here; Core ML runs on Apple's systems alone, so nothing is compared with torch, and the manifest
says so: ``parity.error`` is None. The decoder is not converted: MIL has no bicubic sampling.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .blueprint import LIMITS, Blueprint
from .blueprints import Plan
from .budget import mil_operators
from .contracts import GraphContract, Parity, sha256_of


def write_all(plan: Plan, folder: Path) -> Iterator[GraphContract]:
    """The encoder and every window's denoiser."""
    for blueprint in plan.blueprints(("channels-first",), "coreml"):
        if blueprint.role in ("encoder", "denoiser"):
            yield write(blueprint, folder)


def write(blueprint: Blueprint, folder: Path) -> GraphContract:
    """``folder``/NAME.mlpackage, whole or not at all."""
    model = convert(blueprint.module, blueprint.examples, list(blueprint.inputs), list(blueprint.outputs))
    part, target = folder / f".{blueprint.name}.part.mlpackage", folder / f"{blueprint.name}.mlpackage"
    try:
        model.save(str(part))
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    inputs, outputs = blueprint.contracts()
    return GraphContract(
        file=target.name,
        role=blueprint.role,
        format="coreml",
        weights="float16",
        layout=blueprint.layout,
        window=blueprint.window,
        inputs=inputs,
        outputs=outputs,
        parity=Parity(error=None, limit=LIMITS["float16"]),
        operators=mil_operators(model),
        sha256=sha256_of(target),
    )


def convert(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], inputs: list[str], outputs: list[str]) -> Any:
    """A coremltools model, not loaded; tensors float32 outside, arithmetic float16."""
    import coremltools

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.eval(), examples, check_trace=False)
    kinds = [coremltools.TensorType(n, tuple(x.shape), dtype=float) for n, x in zip(inputs, examples, strict=True)]
    return coremltools.convert(
        traced,
        inputs=kinds,
        outputs=[coremltools.TensorType(name) for name in outputs],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT16,
        skip_model_load=True,
    )
