"""What ``--fast`` stands for: options in, options out, with a line for every choice it made.

The choices are the preset's (``Preset.fast``) and become ordinary options, so that request, manifest and plan show them
and nothing else knows of ``--fast``. What the user says wins. Nothing is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .core import Request, UsageError
from .segments import CSG

if TYPE_CHECKING:
    from .options import Options
    from .presets import Preset


def hastened(options: Options, preset: Preset) -> tuple[Options, tuple[str, ...]]:
    """The options that ``--fast`` stands for with this preset, and what it changed, in words.

    UsageError if it could change nothing, or if a device or dtype is asked for that is not there.
    """
    if not options.fast:
        return options, ()
    if not preset.fast:
        raise UsageError(f"--fast: {preset.name} has nothing to change: {preset.not_fast}; leave it out")
    changed: dict[str, Any] = {}
    notices = []
    for name, usual, value in _choices(preset):
        given = getattr(options, name)
        if given is None:
            changed[name] = value
            notices.append(f"fast: {name} {usual} -> {value}")
        else:
            notices.append(f"fast: {name} stays {given}, as asked for")
    kind, line = _quantize(options, preset)
    return dataclasses.replace(options, **changed, quantize=kind), (*notices, *line)


def _choices(preset: Preset) -> Iterator[tuple[str, Any, Any]]:
    """Options by name, with their usual value and the fast one; of CSG's fields those that differ."""
    for name, value in preset.fast.items():
        usual = preset.defaults.get(name, Request.model_fields[name].default)
        if not isinstance(value, CSG):
            yield name, usual, value
            continue
        for part in CSG.model_fields:
            if getattr(value, part) != getattr(usual, part):
                yield part, getattr(usual, part), getattr(value, part)


def _quantize(options: Options, preset: Preset) -> tuple[str | None, tuple[str, ...]]:
    """The transformers' bits: the preset's kind, unless another is asked for or this device cannot."""
    from .memory import choose_placement
    from .quantize import check_quantization

    kind = preset.fast_quantize
    if kind is None:
        return options.quantize, ()
    if options.quantize is not None:
        return options.quantize, (f"fast: quantize stays {options.quantize}, as asked for",)
    placement = choose_placement(options.device, options.dtype, options.threads)
    try:
        check_quantization(kind, placement.device, placement.dtype)
    except UsageError as reason:
        return None, (f"fast: quantize stays off: {reason}",)
    return kind, (f"fast: quantize off -> {kind}",)
