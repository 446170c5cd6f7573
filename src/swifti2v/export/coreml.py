"""A pipeline's graphs as Core ML packages: iOS 17 ML programs, the denoiser channels-first.

Encoder and denoiser are float16. mobile-nano's decoder is float32: float16 tells places in a picture apart by a whole
pixel from 1,024 on. Converted and counted here; Core ML runs on Apple's systems alone, so nothing is compared with
torch, and the manifest says so: ``parity.error`` is None. An LTX decoder is not converted.
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
from .contracts import GraphContract, Parity, Precision


def write_all(plan: Plan, folder: Path) -> Iterator[GraphContract]:
    """The encoder, every window's denoiser and mobile-nano's decoder."""
    for blueprint in plan.blueprints(("channels-first",), "coreml", "taps"):
        if blueprint.role != "decoder" or plan.nano:
            yield write(blueprint, folder)


def write(blueprint: Blueprint, folder: Path) -> GraphContract:
    """``folder``/NAME.mlpackage, whole or not at all."""
    precision: Precision = "float32" if blueprint.role == "decoder" else "float16"
    model = convert(blueprint.module, blueprint.examples, list(blueprint.inputs), list(blueprint.outputs), precision)
    part, target = folder / f".{blueprint.name}.part.mlpackage", folder / f"{blueprint.name}.mlpackage"
    try:
        model.save(str(part))
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return blueprint.graph(
        target, "coreml", precision, Parity(error=None, limit=LIMITS[precision]), mil_operators(model)
    )


def convert(
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    precision: Precision = "float16",
) -> Any:
    """A coremltools model, not loaded; tensors float32 outside, arithmetic in ``precision``."""
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
        compute_precision=coremltools.precision(precision),
        skip_model_load=True,
    )
