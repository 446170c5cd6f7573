"""Which parts of a pipeline are loaded in which phase, and how its large VAE is cut: an ``Arrangement`` carried out.

Text encoders, Stage I's transformer and Stage II's load when their phase begins and leave when it ends; a part that is
not there is its skeleton, a module on the meta device. The VAEs are small and stay. This module knows no files (a
part's ``load`` does) and no devices' names.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from .arrangement import Arrangement
from .memory import release_cached
from .models.causal_vae import StreamingVAE, WanStreamingVAE, streaming

Phase = Literal["text", "motion", "encode", "refine"]
PARTS: dict[Phase, tuple[str, ...]] = {
    "text": ("text_encoder", "image_encoder"),
    "motion": ("transformer",),
    "encode": (),
    "refine": ("transformer_2",),
}


class Residency:
    """Everything stays where it was put; the VAE is cut as an ``arrangement`` says, if there is one."""

    device: torch.device | None = None
    tell: Callable[[str], None] | None = None

    def __init__(self, arrangement: Arrangement | None = None) -> None:
        self.arrangement = arrangement

    def enter(self, phase: Phase, pipeline: Any) -> None:
        """What ``phase`` needs is there from here on."""

    @contextmanager
    def until_the_end(self, pipeline: Any) -> Iterator[None]:
        """The time of one run; parts that were loaded for it leave at its end."""
        yield

    def streaming(self, vae: Any) -> StreamingVAE:
        """Stage II's VAE as a stream."""
        way = self.arrangement
        if way is None or way.decode is None or way.encode is None or not isinstance(vae, AutoencoderKLWan):
            return streaming(vae)
        return WanStreamingVAE(
            vae,
            tiles=way.decode.tiles,
            split=way.decode.split,
            cache_device="cpu" if way.decode.parked else None,
            encoder_tiles=way.encode.tiles,
            encoder_split=way.encode.split,
            encoder_cache_device="cpu" if way.encode.parked else None,
        )


@dataclass(frozen=True, eq=False)
class Part:
    """A component that comes and goes: ``skeleton`` stands for it while it is away, ``load`` makes it from its files,
    ``settle`` makes it ready (adapters, dtype, device) once it is in the pipeline."""

    skeleton: nn.Module
    load: Callable[[], nn.Module]
    settle: Callable[[nn.Module], None]


class Phased(Residency):
    """Parts load and leave with their phases. ``tell`` is given the name of every part that is loaded."""

    def __init__(self, parts: Mapping[str, Part], device: torch.device, arrangement: Arrangement | None = None) -> None:
        super().__init__(arrangement)
        self.device, self.parts = device, dict(parts)
        self.phase: Phase | None = None

    def enter(self, phase: Phase, pipeline: Any) -> None:
        if phase == self.phase:
            return
        self._leave(pipeline)
        self.phase = phase
        for name in PARTS[phase]:
            if name in self.parts:
                if self.tell is not None:
                    self.tell(name)
                part = self.parts[name]
                module = part.load()
                setattr(pipeline, name, module)
                part.settle(module)

    @contextmanager
    def until_the_end(self, pipeline: Any) -> Iterator[None]:
        try:
            yield
        finally:
            self._leave(pipeline)

    def _leave(self, pipeline: Any) -> None:
        if self.phase is None:
            return
        for name in PARTS[self.phase]:
            if name in self.parts:
                setattr(pipeline, name, self.parts[name].skeleton)
        self.phase = None
        gc.collect()  # hooks and adapters hold their module in circles
        release_cached(self.device)
