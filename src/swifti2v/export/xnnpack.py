"""Blueprints to ExecuTorch programs (.pte) for XNNPACK, its CPU backend, that ExecuTorch has run here: parity with
torch is checked before a file gets its name.

Weights and arithmetic are float32, the denoiser is in the reference layout. What XNNPACK does not take, such as
gathering, is left to ExecuTorch's portable kernels; ``operators`` of a graph says what that is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import runner
from .blueprint import LIMITS, Blueprint, gap, refuse
from .blueprints import Plan
from .budget import edge_operators
from .contracts import GraphContract, Parity


def write_all(plan: Plan, folder: Path) -> Iterator[GraphContract]:
    """The encoder, every window's denoiser and the decoder."""
    for blueprint in plan.blueprints(("reference",), warp="taps"):
        yield write(blueprint, folder)


def write(blueprint: Blueprint, folder: Path) -> GraphContract:
    """``folder``/NAME.pte, whole or not at all; ParityError if it does not compute what torch does."""
    part, target = folder / f".{blueprint.name}.part.pte", folder / f"{blueprint.name}.pte"
    try:
        operators = lower(blueprint, part)
        made = opened(part)(*(x.numpy() for x in blueprint.examples))
        error, limit = gap(made, blueprint.wanted()), LIMITS["float32"]
        refuse(target.name, error, limit)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return blueprint.graph(target, "executorch", "float32", Parity(error=error, limit=limit), operators)


def lower(blueprint: Blueprint, path: Path) -> dict[str, int]:
    """The program at ``path``, unchecked; its operators."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(blueprint.module.eval(), blueprint.examples, strict=False)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        operators = edge_operators(edge.exported_program())  # the next line changes it
        program = edge.to_executorch()
    with open(path, "wb") as file:
        program.write_to_file(file)
    return operators


def opened(path: Path) -> Callable[..., list[np.ndarray]]:
    """The program at ``path`` as a function of arrays by position."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        made: Any = method.execute([torch.from_numpy(np.ascontiguousarray(x)) for x in arrays])
        return [x.numpy().copy() for x in made]  # its memory is the next call's

    return call


class Bundle(runner.Bundle):
    """A folder of .pte for ``runner.generate``: clips are made by the code of ``run.py``, with ExecuTorch's graphs."""

    kind = "executorch"

    def opened(self, graph: dict[str, Any]) -> Callable[..., list[np.ndarray]]:
        """``graph`` as a function of tensors by position."""
        return opened(self.folder / graph["file"])
