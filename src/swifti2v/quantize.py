"""Transformers in 8 bits by torchao: the Linear layers of the repeated blocks, and nothing else.

Most of a transformer's weights are there; patch embedding, time embedding, norms, modulation and head keep their
dtype. A kind that the machine cannot run is refused before weights load. Weights that have been rounded stay so; the
witness multiplies those in the run's own dtype. This module knows no pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .core import UsageError

FP8_CAPABILITY = (8, 9)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Kind:
    """One way to quantize: in words, torchao's configuration, and whether products are of float8 too."""

    what: str
    config: Callable[[], Any]
    fp8_products: bool = False


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _fp8_rows() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


KINDS = {
    "int8": Kind("weights in int8", _int8),
    "int8-dynamic": Kind("weights and activations in int8", _int8_dynamic),
    "fp8": Kind("weights in float8", _fp8),
    "fp8-rows": Kind("weights and activations in float8, a scale a row", _fp8_rows, fp8_products=True),
}


def check_quantization(kind: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """UsageError for a kind that is not known or that this device cannot run in this dtype. None is always right."""
    if kind is None:
        return
    if kind not in KINDS:
        raise UsageError(f"quantize {kind!r} is not known; use {', '.join(KINDS)}")
    if find_spec("torchao") is None:
        raise UsageError(f"quantize {kind!r} needs torchao, which is not installed; pip install 'swifti2v[quant]'")
    if device.type not in DEVICES:
        raise UsageError(
            f"quantize {kind!r} is not possible on {device.type}; leave it out, or use {', '.join(DEVICES)}"
        )
    if not KINDS[kind].fp8_products:
        return
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < FP8_CAPABILITY:
        has = "no CUDA device" if found is None else f"capability {found[0]}.{found[1]}"
        raise UsageError(
            f"quantize {kind!r} needs a GPU of compute capability 8.9 or later (Ada, Hopper), here is {has}; use 'fp8'"
        )
    if dtype != torch.bfloat16:
        raise UsageError(f"quantize {kind!r} multiplies in bfloat16, not in {str(dtype)[6:]}; use --dtype bfloat16")


def quantize(transformer: nn.Module, kind: str, device: torch.device | None = None) -> int:
    """Quantize a transformer's blocks in place; returns the number of layers.

    LoRAs have to be attached before and keep their own dtype. With ``device`` each layer is moved there first,
    one after another, so that the device never holds the whole network unquantized.
    Raises ValueError if there is no layer to quantize.
    """
    from torchao.quantization import quantize_

    layers = [name for name, module in transformer.named_modules() if is_quantized(module, name)]
    if not layers:
        raise ValueError(f"a {type(transformer).__name__} has no blocks of Linear layers to quantize")
    quantize_(transformer, KINDS[kind].config(), filter_fn=is_quantized, device=device)
    return len(layers)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether ``quantize`` changes this layer: of a block, not a LoRA's, and without rows of zeros.

    A row of zeros (an output projection that was never trained) has no scale: torchao's float8 makes NaN of it.
    """
    parts = name.split(".")
    if not isinstance(module, nn.Linear) or "blocks" not in parts or any(part.startswith("lora_") for part in parts):
        return False
    return bool(module.weight.detach().abs().amax(dim=1).gt(0).all())


def kind_of(transformer: nn.Module) -> str | None:
    """The class of a transformer's quantized weights; None for one without any."""
    return next((type(layer.weight).__name__ for layer in _quantized_layers(transformer)), None)


@contextmanager
def dequantized(transformer: nn.Module) -> Iterator[None]:
    """Products in the run's dtype while the context lasts, of the rounded weights: unpacked layer by layer."""
    handles = []
    for layer in _quantized_layers(transformer):
        packed = layer.weight

        def unpack(module: Any, given: Any) -> None:
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)

        def pack(module: Any, given: Any, result: Any, packed: Any = packed) -> None:
            module.weight = packed

        handles += [layer.register_forward_pre_hook(unpack), layer.register_forward_hook(pack, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantized_layers(transformer: nn.Module) -> Iterator[Any]:
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data).__module__.startswith("torchao."):
            yield module
