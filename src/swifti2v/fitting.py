"""What a request costs here, and how it is made to fit: options and this machine in, a ``Plan`` or ``Arrangement`` out.

Reads configurations, never weights. A preset of Wan's on a GPU is fitted to what is free unless another profile is
asked for; everything else is loaded as it is unless a profile is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrangement import Arrangement
from .arranging import arrange
from .calibration import Calibration, stored_calibration
from .core import Request, UsageError
from .journal import Manifest
from .machine import available_memory
from .plan import Plan, Planner, plan
from .presets import Preset, get
from .profiles import NAMES, PROFILES, budget_of

if TYPE_CHECKING:
    from .options import Options

# Bytes of a weight that torchao keeps in 8 bits, with its scales and what of a transformer stays in 16.
BYTES_IN_8_BITS = 1.06


def planned(request: Request, preset: Preset, model: str | None, *, overlap: bool = False) -> Plan:
    """What a request costs with these weights on this machine, as ``doctor`` measured it."""
    return plan(request, preset, stored_calibration(), networks=_networks(preset, model), overlap=overlap)


def at_once(asked: bool | None = None, device: str | None = None) -> bool:
    """Whether stages overlap: as asked, or on a GPU. On a CPU 6 % of the time costs half the memory again."""
    return _on_gpu(device) if asked is None else asked


def check_names(options: Options) -> None:
    """UsageError for a kernel or a kind of 8 bits that is not known; what this machine can run is not asked."""
    from .attention import known_attention
    from .quantize import KINDS

    known_attention(options.attention.lower())
    if options.quantize is not None and options.quantize not in KINDS:
        raise UsageError(f"quantize {options.quantize!r} is not known; use {', '.join(KINDS)}")


def arrangement_of(options: Options, request: Request, preset: Preset) -> Arrangement | None:
    """How the clip is to be made in the memory of ``--profile``; None to load everything as it is.

    Raises UsageError if it fits in no way, or for an unknown profile.
    """
    name = options.profile
    if options.context_parallel is not None and name is not None:
        raise UsageError(f"--profile {name} fits one process; leave it out, or --context-parallel")
    apart = options.vae_device is not None or options.context_parallel is not None
    unfitted = apart or preset.family not in ("wan", "wan-refine")
    if name is None and (unfitted or not _on_gpu(options.device)):
        return None
    name = (name or "auto").lower()
    if name in PROFILES or name not in NAMES:
        budget = budget_of(name, None, None)
    else:
        budget = budget_of(name, _free_device(options.device) if name == "auto" else None, available_memory())
    way = arrange(
        _planner(request, preset, options.model),
        budget,
        layer_bytes=None if options.quantize is None else BYTES_IN_8_BITS,
        overlap=at_once(options.at_once, options.device),
        encode=options.encode,
    )
    if options.compile and {"transformer", "transformer_2"} & set(way.streamed):
        raise UsageError(f"--compile: layers are streamed to fit {way.source} and cannot be compiled; leave it out")
    return way


def fitted_again(manifest: Manifest, profile: str | None = None) -> Manifest:
    """A recorded clip made to fit here, in the order of work that it was asked for. UsageError if it does not."""
    from .options import Options

    request, settings = manifest.request, manifest.settings
    options = Options(
        model=manifest.inputs.model,
        encode=request.encode,
        profile=profile,
        device=settings.get("device"),
        vae_device=settings.get("vae_device"),
        quantize=settings.get("quantize"),
        compile="compile" in settings,
    )
    way = arrangement_of(options, request, get(request.preset))
    inputs = manifest.inputs.model_copy(update={"arrangement": None if way is None else way.to_json()})
    return manifest.model_copy(update={"inputs": inputs})


def _planner(request: Request, preset: Preset, model: str | None) -> Planner:
    from . import costs
    from .plan_mobile import planner_of

    known, calibration = _networks(preset, model), stored_calibration() or Calibration()
    if preset.family == "mobile":
        return planner_of(request, preset, calibration, known, False)
    return Planner(
        request, preset, known or costs.networks_of(preset.family, preset.folder, preset.prompt_tokens), calibration
    )


def _networks(preset: Preset, model: str | None) -> Any:
    """The networks of a folder, for presets that come in sizes of their own; None: the preset's."""
    from .costs import read_nano
    from .costs_mobile import read_mobile

    if model is None or not Path(model).is_dir() or preset.family not in ("nano", "mobile"):
        return None
    try:
        if preset.family == "nano":
            return read_nano(Path(model), preset.prompt_tokens)
        return read_mobile(Path(model), preset.vae_folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"--model {Path(model).name} has an unusable config.json: {error}") from None


def _on_gpu(device: str | None) -> bool:
    from .memory import choose_placement

    return choose_placement(device, "float32").device.type == "cuda"


def _free_device(device: str | None) -> int | None:
    from .memory import choose_placement, free_memory

    return free_memory(choose_placement(device, "float32").device)
