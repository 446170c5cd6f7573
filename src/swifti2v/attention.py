"""Which attention kernel runs: probed once against torch's own, set for each transformer, and undone for a while.

The kernels are diffusers'. What is asked for is tried on a small tensor on the device and in the dtype of the run and
compared with ``scaled_dot_product_attention``, the slow witness: a kernel that is not there, or computes otherwise, is
refused with the reason. Only "auto" chooses, among exact kernels, and says what it passed over. This module knows no
segments and no pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .core import UsageError

NATIVE = "native"
NAMES = tuple(sorted(name.value for name in AttentionBackendName))
PREFERRED = {"cuda": ("_flash_3", "flash", "_native_cudnn", NATIVE)}
"""What "auto" tries, by device, best first. None of them rounds more than the dtype does; elsewhere torch chooses."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Greatest relative error (L2) that is still the dtype's rounding."""
QUANTIZED = 0.1
"""The same for kernels that round to 8 bits, sage's: they have to be asked for by name."""

WAN_HEAD_DIM = 128
_REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError)


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel by diffusers' name, and why it."""

    name: str
    reason: str


def known_attention(name: str) -> str:
    """The name as diffusers writes it, or "auto". Raises UsageError for one that diffusers does not have."""
    lower = name.lower()
    if lower != "auto" and lower not in NAMES:
        near = [other for other in NAMES if lower and lower.strip("_") in other] or [NATIVE, "flash", "_native_cudnn"]
        raise UsageError(f"attention {name!r} is not known; use auto, {', '.join(near[:4])}")
    return lower


def choose_attention(asked: str, device: torch.device, dtype: torch.dtype, *head_dims: int) -> AttentionChoice:
    """The kernel for heads of all these widths (default: Wan's) on this device in this dtype.

    ``asked``: one of ``NAMES``, or "auto" for the first of ``PREFERRED`` that is there and right.
    Raises UsageError for an unknown name, and for one that is not there or wrong, with the nearest that works.
    """
    asked = known_attention(asked)
    if asked != "auto":
        refused = probe(asked, device, dtype, *head_dims)
        if refused is None:
            return AttentionChoice(asked, "asked for")
        nearest = choose_attention("auto", device, dtype, *head_dims).name
        raise UsageError(f"attention {asked!r} cannot be used on {device.type}: {refused}; {nearest!r} works here")
    passed_over: list[str] = []
    for name in PREFERRED.get(device.type, (NATIVE,)):
        if name == NATIVE or (refused := probe(name, device, dtype, *head_dims)) is None:
            why = f"passed over {'; '.join(passed_over)}" if passed_over else f"best known on {device.type}"
            return AttentionChoice(name, why)
        passed_over.append(f"{name} ({refused})")
    raise AssertionError("the last preferred kernel is torch's own")


def probe(name: str, device: torch.device, dtype: torch.dtype, *head_dims: int) -> str | None:
    """Why a kernel cannot be used, in a few words; None if it computes what torch's own does."""
    backend = AttentionBackendName(name)
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)  # only those named *_hub, and only when asked for
        error = max(_relative_error(backend, device, dtype, width) for width in head_dims or (WAN_HEAD_DIM,))
    except _REFUSALS as refusal:
        return " ".join(str(refusal).split())[:160] or type(refusal).__name__
    tolerance = QUANTIZED if "sage" in name else TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if error > tolerance:
        return f"its relative error against torch's own is {error:.2g}, over {tolerance:g}"
    return None


def attention_of(transformer: nn.Module) -> str:
    """The kernel that is set for a transformer; what diffusers would take for the process if none is."""
    held = {str(processor._attention_backend.value) for processor in _processors(transformer) if _is_set(processor)}
    if len(held) > 1:
        return "+".join(sorted(held))
    return held.pop() if held else str(AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value)


def use_attention(transformers: Sequence[nn.Module], choice: AttentionChoice) -> None:
    """Set the kernel of each of these transformers, and of nothing else.

    diffusers' ``set_attention_backend`` sets the whole process's as well, which every other model then uses.
    """
    for transformer in transformers:
        for processor in _processors(transformer):
            processor._attention_backend = AttentionBackendName(choice.name)


def takes_attention(transformer: nn.Module) -> bool:
    """Whether the transformer calls diffusers' dispatcher at all. nano's and mobile's call torch's own."""
    return any(True for _ in _processors(transformer))


@contextmanager
def native_attention(transformer: nn.Module) -> Iterator[None]:
    """Torch's own attention, the witness, while the context lasts."""
    before = [(processor, processor._attention_backend) for processor in _processors(transformer)]
    use_attention([transformer], AttentionChoice(NATIVE, "witness"))
    try:
        yield
    finally:
        for processor, backend in before:
            processor._attention_backend = backend


def _processors(transformer: nn.Module) -> Iterator[Any]:
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            yield processor


def _is_set(processor: Any) -> bool:
    return processor._attention_backend is not None


@torch.no_grad()
def _relative_error(backend: AttentionBackendName, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Of a kernel against torch's own, on as many queries and other keys: neither is a multiple of a tile."""
    q, k, v = (_drawn((1, tokens, 2, head_dim), seed).to(device, dtype) for seed, tokens in enumerate((150, 77, 77)))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    expected = expected.transpose(1, 2).float()
    found = dispatch_attention_fn(q, k, v, backend=backend).float()
    if found.shape != expected.shape:
        raise ValueError(f"gives {tuple(found.shape)} for {tuple(expected.shape)}")
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")  # NaN is no number that max could compare


def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Drawn on the CPU: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
