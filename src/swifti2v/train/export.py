"""Averaged weights out of a run, as folders that pipelines load: bfloat16 safetensors, whole or not at all.

It knows checkpoints and networks, not how they were trained.
"""

from __future__ import annotations

import os
import shutil
import uuid
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import memory
from ..core import UsageError
from . import state
from .loop import Student
from .recipe import Parts, Recipe


def export(recipe: Recipe, out: str | Path, folder: str | Path, *, replace: bool = False) -> dict[str, Path]:
    """Write the averaged weights of the last checkpoint in ``out`` to ``folder``/NAME for every trained module.

    In one process, whatever number trained it. ``replace`` puts the new folders in the place of old ones; else they
    are refused. Returns the folders by name.
    """
    found = state.latest(Path(out))
    if found is None:
        raise UsageError(f"{out} holds no checkpoint to export")
    torch.manual_seed(recipe.seed)
    parts = recipe.build()
    state.load_average(found, Student(parts, recipe.objective, recipe.precision))
    return export_modules(parts, Path(folder), replace=replace, keep=False)


def export_modules(parts: Parts, folder: Path, *, replace: bool = False, keep: bool = True) -> dict[str, Path]:
    """``folder``/NAME for every trained module, in bfloat16, as its weights are now; a recipe's ``sample`` may call it.

    ``keep``: of a copy, so that the modules stay as they are.
    """
    modules: dict[str, nn.Module] = {key: module for key, module in parts.modules.items() if key not in parts.inner}
    for name in modules:
        if (folder / name).exists() and not replace:
            raise UsageError(f"{folder / name} exists; name a new folder or ask to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write(deepcopy(m) if keep else m, folder / name) for name, m in modules.items()}


def _write(module: Any, folder: Path) -> Path:
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        _save(module, part)
        if folder.exists():
            old = part.with_suffix(".old")
            os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old)
        else:
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _save(module: Any, folder: Path) -> None:
    """An adapter alone if the module carries one; else the whole module, marked as trained if it was widened."""
    if getattr(module, "peft_config", None):
        memory.place(module, torch.device("cpu"), torch.bfloat16)
        module.save_lora_adapter(folder, adapter_name=next(iter(module.peft_config)))
        return
    if not hasattr(module, "save_pretrained"):
        raise UsageError(f"a {type(module).__name__} cannot be exported: it has no save_pretrained")
    if getattr(module.config, "reference_is_untrained", False):
        module.register_to_config(reference_is_untrained=False)
    memory.place(module, torch.device("cpu"), torch.bfloat16)
    module.save_pretrained(folder)
