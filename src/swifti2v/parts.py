"""A pipeline whose large parts are loaded when their phase begins (``residency.Phased``), from their own files.

``load`` makes it: small parts loaded, large ones as skeletons on the meta device, each with a way to load it by the
same code that loads whole pipelines. Weights come through safetensors' memory maps, a part at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import nn

from . import sources
from .arrangement import Arrangement
from .checkpoints import read_json
from .core import RunError, UsageError
from .fast_paths import check_fast_paths, chosen, settle
from .lora import Stage
from .memory import FastPaths, Placement, choose_placement, place, stream_weights
from .models.self_check import self_check_conv3d
from .presets import Preset
from .residency import Part, Phased, Residency
from .sources import attach_loras, local_folder, wan_component, wan_folders

if TYPE_CHECKING:
    from .mobile import MobileI2VPipeline
    from .pipeline import SwiftI2VPipeline

LARGE = ("text_encoder", "image_encoder", "transformer", "transformer_2")
TRANSFORMERS: dict[str, Stage] = {"transformer": "one", "transformer_2": "two"}
Loras = Mapping[Stage, Sequence[tuple[str, float]]]


def load(
    preset: Preset,
    arrangement: Arrangement,
    *,
    model: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    loras_2: Sequence[tuple[str, float]] = (),
    fast: FastPaths | None = None,
    **where: Any,
) -> SwiftI2VPipeline | MobileI2VPipeline:
    """As ``sources.load`` (``where``: its ``device``, ``dtype``, ``threads``), but made to fit by ``arrangement``.

    Raises what that raises.
    """
    if not arrangement.phased:
        pipeline = sources.load(preset, model=model, loras=loras, loras_2=loras_2, fast=fast, **where)
        pipeline.residency = Residency(arrangement)
        return pipeline
    fast, placement = fast or FastPaths(), choose_placement(**where)
    check_fast_paths(fast, preset.family, placement)
    self_check_conv3d(str(placement.device))
    model = preset.name if model is None and preset.folder is not None else model
    saved = model is not None and "," not in model
    deferred, loaders = _from_folder(str(model)) if saved else _from_two(preset, model, placement)
    if deferred.preset.name != preset.name:
        raise RunError(f"{model} holds weights of {deferred.preset.name}, not of {preset.name}")
    skeletons = {name: getattr(deferred, name) for name in loaders}
    transformers = [skeletons[name] for name in TRANSFORMERS]
    placement = dataclasses.replace(placement, fast=chosen(fast, transformers, placement))
    for name in ("vae", "vae_2", "camera"):
        place(getattr(deferred, name, None), placement.device, None if name == "camera" else placement.dtype)
    deferred.placement = placement
    ready = _Ready(deferred, placement, {"one": loras, "two": loras_2}, arrangement)
    parts = {name: Part(skeletons[name], loader, ready.of(name)) for name, loader in loaders.items()}
    deferred.residency = Phased(parts, placement.device, arrangement)
    return deferred


@dataclasses.dataclass(frozen=True, eq=False)
class _Ready:
    """Makes a part that has just been loaded ready for its phase."""

    pipeline: SwiftI2VPipeline
    placement: Placement
    loras: Loras
    arrangement: Arrangement

    def of(self, name: str) -> Callable[[nn.Module], None]:
        def settled(module: nn.Module) -> None:
            module.requires_grad_(False)
            streamed = name in self.arrangement.streamed
            home = dataclasses.replace(self.placement, device=torch.device("cpu")) if streamed else self.placement
            if name in TRANSFORMERS:
                self._attach(name)
                settle(module, home)
            else:
                place(module, home.device)
            if streamed:
                # diffusers 0.42 gives a T5 that it streams from a disk other weights than the file's.
                stream_weights(module, self.placement.device, self._folder(module) if name in TRANSFORMERS else None)

        return settled

    def _attach(self, name: str) -> None:
        stage = TRANSFORMERS[name]
        try:
            attach_loras(self.pipeline, stage, self.loras[stage])
        except UsageError as error:  # whether a file fits is known only here, after the weights
            raise RunError(str(error)) from None

    def _folder(self, module: nn.Module) -> Path | None:
        """Where a part that is streamed from a disk lies; it goes with the part."""
        if not self.arrangement.from_disk:
            return None
        folder = tempfile.mkdtemp(prefix="swifti2v-")
        weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def _from_folder(model: str) -> tuple[SwiftI2VPipeline, dict[str, Callable[[], nn.Module]]]:
    """A pipeline that was saved as one, and how to load each of its large parts."""
    from .pipeline import SwiftI2VPipeline

    folder = local_folder(model)
    index = read_json(folder / "model_index.json")
    there = [name for name in LARGE if isinstance(index.get(name), list) and index[name][1] is not None]
    pipeline = SwiftI2VPipeline.from_pretrained(folder, **dict.fromkeys(there))
    components = [name for name, entry in index.items() if isinstance(entry, list)]

    def loader(name: str) -> Callable[[], nn.Module]:
        apart: Any = dict.fromkeys(other for other in components if other != name)
        return lambda: getattr(SwiftI2VPipeline.from_pretrained(folder, **apart), name)

    for name in there:
        setattr(pipeline, name, _skeleton(folder / name, *index[name]))
    return pipeline, {name: loader(name) for name in there}


def _from_two(
    preset: Preset, model: str | None, placement: Placement
) -> tuple[SwiftI2VPipeline, dict[str, Callable[[], nn.Module]]]:
    """Two public Wan checkpoints as a pipeline (``from_wan``), and how to load each large part."""
    from .pipeline import SwiftI2VPipeline

    one, two = wan_folders(preset, model)
    homes = {"transformer": (one, "transformer"), "transformer_2": (two, "transformer")}
    homes |= {name: (one, name) for name in ("text_encoder", "image_encoder") if (one / name).is_dir()}
    parts: dict[str, Any] = {
        name: wan_component(one, name, placement.dtype) for name in ("tokenizer", "image_processor", "vae")
    }
    parts["vae_2"] = wan_component(two, "vae", placement.dtype)
    for name, (folder, component) in homes.items():
        entry = read_json(folder / "model_index.json")[component]
        parts[name] = _skeleton(folder / component, *entry)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = SwiftI2VPipeline(**parts, scheduler=scheduler, preset=preset.name)
    pipeline.sources = (one, two)

    def loader(folder: Path, component: str) -> Callable[[], nn.Module]:
        return lambda: wan_component(folder, component, placement.dtype)

    return pipeline, {name: loader(*home) for name, home in homes.items()}


def _skeleton(folder: Path, library: str, name: str) -> nn.Module:
    """A component without weights, by its configuration."""
    kind: Any = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if issubclass(kind, ModelMixin):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
