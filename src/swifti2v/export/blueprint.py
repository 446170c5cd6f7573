"""A graph to be written: a torch module, examples of its inputs, and what its tensors are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import RunError
from .contracts import Format, GraphContract, Layout, Parity, Precision, Role, TensorContract, sha256_of

# |graph - torch| / |torch|. float16: 11 bits of each weight; int8: 8 bits by output channel. Measured values are in
# the manifests; these refuse what is broken, not what is merely rounded.
LIMITS: dict[Precision, float] = {"float32": 1e-3, "float16": 1e-2, "int8": 1e-1}


class ParityError(RunError):
    """A graph does not compute what torch does; nothing of the bundle is published."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """``inputs`` and ``outputs``: names in order, with what values to expect; ``examples``: one tensor an input, such
    as the graph will see, which the parity gate uses."""

    role: Role
    module: nn.Module
    examples: tuple[Tensor, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]
    layout: Layout | None = None
    window: int | None = None
    _wanted: list[tuple[Tensor, ...]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [self.role, "" if not self.window else str(self.window), self.layout or ""]
        return "-".join(part for part in parts if part)

    def wanted(self) -> tuple[Tensor, ...]:
        """torch's outputs for the examples."""
        if not self._wanted:
            with torch.no_grad():
                out: Any = self.module(*self.examples)
            self._wanted.append(out if isinstance(out, tuple) else (out,))
        return self._wanted[0]

    def graph(
        self, file: Path, format: Format, weights: Precision, parity: Parity, operators: dict[str, int]
    ) -> GraphContract:
        """What the manifest says of this graph, written to ``file``."""
        inputs, outputs = self.contracts()
        return GraphContract(
            file=file.name,
            role=self.role,
            format=format,
            weights=weights,
            layout=self.layout,
            window=self.window,
            inputs=inputs,
            outputs=outputs,
            parity=parity,
            operators=operators,
            sha256=sha256_of(file),
        )

    def contracts(self) -> tuple[tuple[TensorContract, ...], tuple[TensorContract, ...]]:
        """Of inputs and outputs."""
        given = zip(self.inputs.items(), self.examples, strict=True)
        made = zip(self.outputs.items(), self.wanted(), strict=True)
        ins, outs = (
            tuple(TensorContract(name=n, shape=tuple(x.shape), range=r) for (n, r), x in pairs)
            for pairs in (given, made)
        )
        return ins, outs


def gap(made: list[Any], wanted: tuple[Tensor, ...]) -> float:
    """|made - wanted| / |wanted| in L2, of the worst output; infinity if anything made is not finite."""
    worst = 0.0
    for a, b in zip(made, wanted, strict=True):
        a = torch.as_tensor(a).double()
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        scale = max(float(b.double().norm()), 1e-6 * b.numel() ** 0.5)
        worst = max(worst, float((a - b.double()).norm()) / scale)
    return worst


def refuse(what: str, error: float, limit: float) -> None:
    """ParityError if ``error`` is above ``limit``, or is no number."""
    if not error <= limit:
        raise ParityError(f"{what} is off torch by {error:.2e} of its size, more than {limit:g}; it is not published")
