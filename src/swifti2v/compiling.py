"""The repeated layers of a transformer compiled once, for all layers and for windows of every length.

Regional compilation is diffusers' ``compile_repeated_blocks``. Sizes are symbols from the start: the windows of 4, 5, 5
and 3 blocks that a clip is made of need one graph, not one each. (A first window as long as something else that enters
a layer, 6 blocks for the 6 modulations, may cost a second.) What the compiler fuses is what stands between matrix
products and attention: norm, modulation, rotation, activation, gate. This module knows no pipelines.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .core import UsageError

COMPILERS = ("g++", "clang++", "c++")


def check_compiling(device: torch.device) -> None:
    """UsageError where torch's compiler lacks what it needs to make kernels for this device."""
    if device.type == "cpu" and not any(shutil.which(name) for name in COMPILERS):
        raise UsageError(f"compile needs a C++ compiler on a CPU ({', '.join(COMPILERS)}), none is here; leave it out")
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError("compile needs triton on a GPU, which is not installed; leave it out")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"compile is not possible on {device.type}; leave it out, or use cpu or cuda")


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """Compile a transformer's repeated layers when they are first called; LoRAs have to be attached before.

    ``backend``: of ``torch.compile``. Raises UsageError for a transformer whose weights come and go (offloading moves
    them between its layers, which a whole graph cannot do), ValueError for one that names no repeated layers.
    """
    for name, module in transformer.named_modules():
        if _is_offloaded(module):
            raise UsageError(f"compile and offloading exclude each other ({name or 'the model'} is offloaded); use one")
    repeated: Any = transformer
    repeated.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=True)


def is_compiled(transformer: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in transformer.modules())


@contextmanager
def uncompiled(transformer: nn.Module) -> Iterator[None]:
    """The layers as they are written, the witness, while the context lasts."""
    held = [(module, module._compiled_call_impl) for module in transformer.modules()]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in held:
            module._compiled_call_impl = compiled


def _is_offloaded(module: nn.Module) -> bool:
    """By accelerate, or by diffusers' groups."""
    registry = getattr(module, "_diffusers_hook", None)
    in_a_group = registry is not None and any("group_offloading" in name for name in registry.hooks)
    hook = getattr(module, "_hf_hook", None)
    return in_a_group or bool(getattr(hook, "offload", False)) or type(hook).__name__ == "CpuOffload"
