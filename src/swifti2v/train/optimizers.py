"""The update: AdamW, or Muon for matrices inside blocks; the learning rate's course; the average of the weights.

All of it works on plain and on sharded (FSDP2) parameters. It knows parameters by name, not what they are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core import UsageError
from .recipe import Recipe

Named = Mapping[str, nn.Parameter]
MUON_RATE, MUON_DECAY = 2.0, 0.01


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that want a gradient, by name; each once, though it may be tied to several names."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def make_optimizers(named: Named, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One or two optimizers that together hold every parameter; rates are set at every step by ``set_rate``."""
    if not named:
        raise UsageError(f"recipe {recipe.name!r} trains nothing: no parameter of its modules wants a gradient")
    inner = [p for name, p in named.items() if is_inner_matrix(name, p)] if recipe.optimizer == "muon" else []
    chosen = {id(parameter) for parameter in inner}
    rest = [parameter for parameter in named.values() if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if inner:
        # From torch 2.9; named here so that AdamW recipes run on older ones.
        muon: Any = torch.optim.Muon
        optimizers.append(muon(inner, lr=recipe.lr, weight_decay=MUON_DECAY, adjust_lr_fn="match_rms_adamw"))
    if rest:
        adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
        optimizers.append(adamw)
    return optimizers


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may take it: two-dimensional, inside a block, and a matrix rather than a table of vectors."""
    return ".block" in name and parameter.ndim == 2 and "table" not in name and "temporal" not in name


def rate(step: int, steps: int, warmup: int, decay: int) -> float:
    """Factor of the learning rate: warm up, stay, then fall linearly over the last ``decay`` steps (or all, if there
    are fewer) down to 0.02.

    The end can be moved while a run is young: until ``decay`` steps before it nothing depends on ``steps``.
    """
    return min(1.0, (step + 1) / max(1, warmup), max(0.02, (steps - step) / max(1, min(decay, steps))))


def set_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        factor = 1.0 if isinstance(optimizer, torch.optim.AdamW) else MUON_RATE
        for group in optimizer.param_groups:
            group["lr"] = factor * lr


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros where an item did not use a parameter: its averages in the optimizer go on, on every process alike."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their common norm is at most ``limit`` (0: leave them); returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm(gradients)
    whole = total.full_tensor() if hasattr(total, "full_tensor") else total
    if limit > 0:
        factor = torch.clamp(limit / (whole + 1e-6), max=1.0)
        for gradient in gradients:
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.mul_(factor)
    return float(whole)


class Average:
    """Exponential moving average of parameters (EMA), float32, sharded as they are."""

    def __init__(self, named: Named, decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone().float() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, named: Named, step: int) -> None:
        """After optimizer step ``step`` (from 1): the decay grows as (1 + step) / (10 + step) up to its value."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in named.items():
            self.values[name].lerp_(parameter.detach().float(), weight)

    @contextmanager
    def in_place_of(self, named: Named) -> Iterator[None]:
        """Inside, the parameters hold the average."""
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        copy_into(named, self.values)
        try:
            yield
        finally:
            copy_into(named, before)


@torch.no_grad()
def copy_into(named: Named, values: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])
