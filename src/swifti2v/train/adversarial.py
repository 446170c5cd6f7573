"""A discriminator out of a frozen teacher (LADD, arXiv 2403.12015): small heads that judge its layers' features.

Real and generated windows are noised to a common level, the teacher reads them, and heads say token by token which is
which. Only the segment's tokens are judged: finished blocks are the same in both. It knows windows and MobileI2V-like
networks (``blocks`` over tokens (b, t, n, d)), no students and no schedules of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..core import UsageError
from .distill import POSITIONS_AS_GIVEN
from .hooks import listening
from .objective import Batch, Levels, noised, predict

SLOPE, GROUPS = 0.2, 8
MIDDLE = Levels(shift=1.0, low=0.02, law="logit-normal")
Features = dict[int, Tensor]
"""Layer -> features (b, t, d, h, w) of the segment's tokens, t blocks of h x w."""


class Head(nn.Module):
    """Features (n, d, h, w) -> a logit a token (n, h, w), each aware of its neighbors.

    Both inner convolutions are normalized, so their scale does not matter, and the last one has a fixed length (which
    is its spectral norm): logits stay bounded whatever is learned. Groups are normalized within a picture, not over
    the batch, which is small.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        if width % GROUPS:
            raise UsageError(f"a head's width {width} is not a multiple of {GROUPS}")
        self.enter = nn.Conv2d(d, width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.group_norm(self.enter(x), GROUPS), SLOPE)
        x = x + F.leaky_relu(F.group_norm(self.mix(x), GROUPS), SLOPE)
        return F.conv2d(x, F.normalize(self.out.weight, dim=1), self.out.bias)[:, 0]


class Heads(nn.Module):
    """One ``Head`` for each of the teacher's ``layers``, of features of width ``d``."""

    def __init__(self, d: int, layers: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.judges = nn.ModuleDict({str(layer): Head(d, width) for layer in layers})

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(map(int, self.judges))

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: heads are too small to be worth computing twice."""

    def forward(self, features: Features) -> list[Tensor]:
        """A list of logits (b, t, h, w), one a layer."""
        out = []
        for layer, judge in self.judges.items():
            x = features[int(layer)]
            out.append(judge(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return out


def features(
    teacher: Any, batch: Batch, sigma: Tensor, noise: Tensor, layers: tuple[int, ...], text: Tensor | None = None
) -> Features:
    """What the teacher's layers make of ``batch`` with its segment at level ``sigma`` (b,); context tokens left out.

    Gradients reach ``batch.clean``. UsageError if the teacher has no such layers.
    """
    if not all(0 <= layer < len(teacher.blocks) for layer in layers):
        raise UsageError(f"layers {layers} of a teacher that has {len(teacher.blocks)}: choose from 0 on")
    noisy = noised(batch, sigma, noise, POSITIONS_AS_GIVEN)
    with listening({layer: teacher.blocks[layer] for layer in layers}) as heard:
        predict(teacher, noisy, batch, text, "window")
    patch = teacher.patch_size
    grid = tuple(math.ceil(side / patch) for side in batch.clean.shape[3:])
    found = {layer: x[:, batch.context :].transpose(2, 3) for layer, x in heard.items()}
    return {layer: x.unflatten(3, grid).float() for layer, x in found.items()}


@dataclass(frozen=True)
class Judgement:
    """``fooled``: what the generator lowers, no gradient in the heads; ``told``: what the heads lower, none outside."""

    fooled: Tensor
    told: Tensor


@dataclass(frozen=True)
class Adversary:
    """Hinge losses of heads on the teacher's features. ``levels``: where real and generated windows are compared.

    ``r1``: weight of the squared gradient of real logits over the heads' inputs, 0 for none (and nothing is computed).
    """

    levels: Levels = MIDDLE
    r1: float = 1e-5

    def __call__(
        self, teacher: nn.Module, heads: Any, real: Batch, made: Tensor, generator: torch.Generator
    ) -> Judgement:
        """``made`` (b, c, segment, h, w): generated in the place of the segment of ``real``; gradients reach it."""
        sigma = self.levels.draw(len(made), generator)
        noise = torch.randn(real.clean.shape, generator=generator)
        fake = replace(real, clean=torch.cat([real.clean[:, :, : real.context], made], dim=2))
        seen = features(teacher, fake, sigma, noise, heads.layers, real.text)
        with torch.no_grad():
            true = features(teacher, real, sigma, noise, heads.layers, real.text)
        fixed = {name: parameter.detach() for name, parameter in heads.named_parameters()}
        fooled = mean_of([-logits for logits in functional_call(heads, fixed, (seen,))])
        told = mean_of([F.relu(1 + logits) for logits in heads({layer: x.detach() for layer, x in seen.items()})])
        if self.r1:
            true = {layer: x.requires_grad_() for layer, x in true.items()}
        verdict = heads(true)
        told = told + mean_of([F.relu(1 - logits) for logits in verdict])
        return Judgement(fooled, told + self.r1 * steepness(verdict, true) if self.r1 else told)


def mean_of(values: list[Tensor]) -> Tensor:
    """Mean over layers of the mean over tokens."""
    return torch.stack([value.float().mean() for value in values]).mean()


def steepness(logits: list[Tensor], inputs: Mapping[int, Tensor]) -> Tensor:
    """R1: squared length of the gradient of the logits over features, a token's mean, with a graph of its own."""
    total = torch.stack([value.float().sum() for value in logits]).sum()
    gradients = torch.autograd.grad(total, list(inputs.values()), create_graph=True)
    return mean_of([gradient.square().sum(dim=2) for gradient in gradients])
