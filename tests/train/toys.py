"""A toy recipe that steps in milliseconds: a real nano DiT of a thousandth of its size on made-up windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.train.objective import Batch, FlowMatching
from swifti2v.train.recipe import Parts, Recipe
from swifti2v.train.recipes_nano import MadeUp
from swifti2v.train.source import Source

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "attention_pattern": ("linear", "softmax"),
    "patch_size": 2,
    "reference_channels": 4,
    "motion_embedding": False,
    "prediction": "residual",
}


def small_dit(**changes: Any) -> MobileTransformer3DModel:
    model = MobileTransformer3DModel(**(CONFIG | changes))
    nn.init.normal_(model.proj_out.weight, std=0.02)
    return model


def build() -> Parts:
    return Parts({"transformer": small_dit()})


def windows(parts: Parts) -> Source[Batch]:
    return MadeUp(channels=4)


TOY = Recipe(
    "toy",
    build,
    windows,
    FlowMatching(weighting="residual"),
    steps=6,
    lr=1e-2,
    warmup=1,
    decay=1,
    optimizer="muon",
    precision="float32",
    log_every=1,
    save_every=2,
)


@dataclass(frozen=True)
class Interrupted:
    """Does something before giving the item of ``index``."""

    source: Source[Batch]
    index: int
    act: Callable[[], None]

    def at(self, index: int) -> Batch:
        if index == self.index:
            self.act()
        return self.source.at(index)


def interrupted(index: int, act: Callable[[], None]) -> Recipe:
    """TOY, with ``act`` called when item ``index`` is asked for; a checkpoint does not see the difference."""
    return replace(TOY, source=_Watched(index, act))


class _Watched:
    def __init__(self, index: int, act: Callable[[], None]) -> None:
        self.index, self.act, self.__qualname__ = index, act, "windows"

    def __call__(self, parts: Parts) -> Source[Batch]:
        return Interrupted(windows(parts), self.index, self.act)


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]
