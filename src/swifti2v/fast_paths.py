"""The transformers' fast paths together: refused at the door, set after loading, left again for a witness.

``attention``, ``quantize`` and ``compiling`` know one each. This module knows which presets take them, in which order
they are set, and how a segment is made again without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .attention import (
    NATIVE,
    AttentionChoice,
    attention_of,
    choose_attention,
    known_attention,
    native_attention,
    takes_attention,
    use_attention,
)
from .compiling import check_compiling, compile_blocks, is_compiled, uncompiled
from .core import UsageError
from .memory import FastPaths, Placement, place
from .quantize import check_quantization, dequantized, kind_of, quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from .segments import Window
    from .stage_two import Velocity, Witness

WAN_FAMILIES = ("wan", "wan-refine")


def check_fast_paths(fast: FastPaths, family: str, placement: Placement) -> None:
    """UsageError for what is not known, not for this family of presets, or not possible on this machine.

    A kernel that is asked for by name is tried here. Nothing is loaded.
    """
    name = known_attention(fast.attention)
    if family not in WAN_FAMILIES and name not in ("auto", NATIVE):
        raise UsageError(f"attention {name!r}: {family} has one kernel, torch's own; use auto or {NATIVE}")
    check_quantization(fast.quantize, placement.device, placement.dtype)
    if fast.compile:
        check_compiling(placement.device)
    if name not in ("auto", NATIVE):
        choose_attention(name, placement.device, placement.dtype)


def chosen(fast: FastPaths, transformers: Sequence[nn.Module], placement: Placement) -> FastPaths:
    """``fast`` with a kernel that all these transformers can use. UsageError if that asked for is none."""
    widths = {_head_dim(transformer) for transformer in transformers if takes_attention(transformer)}
    if not widths:
        return dataclasses.replace(fast, attention=NATIVE)
    choice = choose_attention(fast.attention, placement.device, placement.dtype, *sorted(widths))
    return dataclasses.replace(fast, attention=choice.name, reason=choice.reason)


def settle(transformer: nn.Module, placement: Placement) -> None:
    """A transformer as a run wants it: cast, in 8 bits, moved, with its kernel, compiled. LoRAs are attached before.

    ``placement.fast.attention`` has been chosen. What is quantized goes to the device layer by layer.
    """
    fast = placement.fast or FastPaths(NATIVE)
    if fast.quantize is None:
        place(transformer, placement.device, placement.dtype)
    else:
        place(transformer, next(transformer.parameters()).device, placement.dtype)
        quantize(transformer, fast.quantize, placement.device)
        place(transformer, placement.device)
    use_attention([transformer], AttentionChoice(fast.attention, "chosen"))
    if fast.compile:
        compile_blocks(transformer)


def witness(transformer: nn.Module, report: Callable[..., None], phase: str) -> Witness | None:
    """How to make a segment again without fast paths, reporting a notice; None for a transformer that has none.

    Without means: torch's own attention, layers as they are written, products in the run's dtype (of weights that
    have been rounded to 8 bits and stay so), latents and reference embedded together.
    """
    on = []
    if takes_attention(transformer) and attention_of(transformer) != NATIVE:
        on.append(f"attention {attention_of(transformer)!r}")
    if kind_of(transformer) is not None:
        on.append(f"8-bit products ({kind_of(transformer)})")
    if is_compiled(transformer):
        on.append("compiled layers")
    if not on:
        return None

    def slow(velocity: Velocity, number: int) -> Velocity:
        where = f"{'window' if phase == 'motion' else 'segment'} {number + 1}"
        line = f"{where} was not finite with {' and '.join(on)}: made again without"
        report("notice", phase, segment=number + 1, message=line)

        def plain(x: Tensor, sigma: float, window: Window, reference: Tensor) -> Tensor:
            with contextlib.ExitStack() as stack:
                for path in (native_attention, uncompiled, dequantized):
                    stack.enter_context(path(transformer))
                return velocity(x, sigma, window, reference)

        return plain

    return slow


def _head_dim(transformer: Any) -> int:
    return int(transformer.config.attention_head_dim)
