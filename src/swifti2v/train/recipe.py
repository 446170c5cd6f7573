"""What a training run is, as a value: networks, data, objective and numbers; and what of it a checkpoint remembers.

It knows no loop, files or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ..core import UsageError
from .source import Source

RUNNING = ("steps", "save_every", "sample_every", "sample", "log_every", "workers", "gradient_checkpointing")
"""Fields that may change between two starts of one run: they do not change what a step computes, or only how long
the run is."""


class Loss(NamedTuple):
    """What a step lowers, and two numbers to read: the model's error and the error of doing nothing (both detached)."""

    value: Tensor
    error: Tensor
    base: Tensor


@dataclass(frozen=True)
class Parts:
    """``modules`` are trained and averaged, and exported under their names but for those in ``inner``; ``frozen`` ones
    only help.

    ``constants``: tensors an objective needs, e.g. ``channel_weights`` (c,) or ``null_text`` (l, d).
    ``tokenizer``: for recipes that encode prompts as they go.
    """

    modules: dict[str, nn.Module]
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: Any = None
    inner: tuple[str, ...] = ()


class Objective(Protocol):
    """The loss of one item. All its randomness comes from ``generator`` (on the CPU)."""

    def __call__(self, parts: Parts, item: Any, generator: torch.Generator) -> Loss: ...


Sample = Callable[[Parts, Source[Any], "Path | None"], None]
"""Called with the averaged weights in place, the source, and a folder to write to; None on processes that must compute
along (FSDP) but write nothing."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    ``build`` makes the networks (seeded by ``seed``), ``source`` the data from them. ``steps`` are optimizer steps of
    ``accumulation`` micro-batches a process; the learning rate warms up over ``warmup`` steps and falls linearly over
    the last ``decay``. ``optimizer`` "muon" takes 2-D matrices inside blocks with Muon at twice ``lr`` (weight decay
    0.01) and the rest with AdamW. ``ema_decay`` is approached as (1 + step) / (10 + step). ``clip_norm`` 0 does not
    clip. ``sample_every`` 0 makes no samples.
    """

    name: str
    build: Callable[[], Parts]
    source: Callable[[Parts], Source[Any]]
    objective: Objective
    steps: int
    lr: float
    warmup: int = 100
    decay: int = 1000
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.995
    clip_norm: float = 1.0
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 200
    sample_every: int = 0
    sample: Sample | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} of recipe {self.name!r} is below 1")
        if not self.lr > 0:
            raise UsageError(f"lr {self.lr} of recipe {self.name!r} is not positive")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay {self.ema_decay} of recipe {self.name!r} is not in [0, 1); 0 averages nothing")
        if self.optimizer not in ("adamw", "muon"):
            raise UsageError(f"optimizer {self.optimizer!r} of recipe {self.name!r} is neither 'adamw' nor 'muon'")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision {self.precision!r} is neither 'float32' nor 'bfloat16'")


def described(value: Any) -> Any:
    """A value as JSON: numbers and texts as they are, dataclasses by field, functions by name and bound arguments."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        own = {item.name: described(getattr(value, item.name)) for item in fields(value)}
        return {"type": type(value).__name__, **own}
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner) for inner in value]
    if isinstance(value, partial):
        return {"function": described(value.func), "args": described(value.args), **described(value.keywords)}
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def record(recipe: Recipe, items_per_step: int) -> dict[str, Any]:
    """What a checkpoint remembers of its recipe: everything that changes what a step computes."""
    kept = {item.name: described(getattr(recipe, item.name)) for item in fields(recipe) if item.name not in RUNNING}
    del kept["accumulation"]  # with the number of processes it makes items_per_step, which is what counts
    return {**kept, "items_per_step": items_per_step}


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], allow: tuple[str, ...], where: str) -> None:
    """UsageError naming every field that differs between two records and is not allowed to (by name or its start)."""
    before, after = flat(old), flat(new)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    wrong = [name for name in changed if not any(name == ok or name.startswith(f"{ok}.") for ok in allow)]
    if wrong:
        told = "; ".join(f"{name} was {before.get(name)!r}, is {after.get(name)!r}" for name in wrong[:5])
        raise UsageError(
            f"{where} was made with another recipe: {told}. "
            f"Use the old values, a new folder, or allow {', '.join(wrong)}"
        )
