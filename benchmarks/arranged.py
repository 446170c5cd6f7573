"""Wan's pipeline with random weights, made to fit a card as ``generate`` would: arranged by the library, carried out by
its ``residency``, and the memory that was predicted beside what a run took.

Parts that come with their phase wait in host memory, where ``generate`` reads them from files. Knows no clocks.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from typing import Any

import gpu
import torch
from torch import nn

from swifti2v import costs, fast_paths, presets
from swifti2v.arrangement import Arrangement
from swifti2v.arranging import arrange
from swifti2v.calibration import Calibration
from swifti2v.core import Request, UsageError
from swifti2v.fitting import BYTES_IN_8_BITS
from swifti2v.memory import FastPaths, Placement, place, stream_weights
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.plan import Planner
from swifti2v.profiles import PROFILES, Budget
from swifti2v.residency import Part, Phased, Residency
from swifti2v.tiny import tiny_pipeline

TRANSFORMERS = ("transformer", "transformer_2")
LARGE = ("text_encoder", "image_encoder", *TRANSFORMERS)
WITHOUT_END = Budget(2**60, 2**60, "any memory")
# The phases of headline.py, without numbers, that an arrangement's phase is made of.
PARTS_OF = {
    "text": ("text", "image"),
    "motion": ("motion", "motion encode"),
    "encode": ("encode", "motion decode"),
    "refine": ("refine", "decode"),
}


def way_of(asked: argparse.Namespace, request: Request) -> Arrangement:
    """How ``generate`` would make the clip with ``--profile`` and ``--at-once``. UsageError if it cannot be."""
    way = arrange(
        planner(request),
        PROFILES[asked.profile].budget() if asked.profile else WITHOUT_END,
        layer_bytes=BYTES_IN_8_BITS if asked.quantize else None,
        overlap=asked.at_once,
    )
    if way.from_disk:
        raise UsageError(f"{way.source}: transformers would be streamed from files, of which there are none here")
    if asked.compile and {*TRANSFORMERS} & {*way.streamed}:
        raise UsageError(f"--compile: layers are streamed to fit {way.source} and cannot be compiled; leave it out")
    return way


def planner(request: Request) -> Planner:
    preset = presets.get(request.preset)
    networks: Any = costs.networks_of(preset.family, preset.folder, preset.prompt_tokens)
    return Planner(request, preset, networks, Calibration())


def built(machine: gpu.Machine, asked: argparse.Namespace, way: Arrangement) -> SwiftI2VPipeline:
    """The pipeline with random weights. Parts that come with their phase wait in host memory, those that are streamed
    stay there; the rest is on the device."""
    fast = FastPaths(asked.attention, asked.quantize, asked.compile)
    placement = Placement(machine.device, machine.dtype, torch.get_num_threads(), "of the benchmark")
    fast_paths.check_fast_paths(fast, asked.preset, placement)
    with torch.device("meta"):
        alike = gpu.stage_one_dit(asked.tiny)  # heads as wide as Stage II's
    placement = replace(placement, fast=fast_paths.chosen(fast, [alike], placement))
    components: Any = tiny_pipeline(asked.preset).components.items() if asked.tiny else None
    parts, waiting = {}, {}
    for name, part in components or gpu.components(machine, widened=asked.preset == "wan"):
        parts[name] = part
        if name in LARGE and way.phased and name not in way.streamed:
            place(part, torch.device("cpu"))
            settle = partial(ready, name=name, placement=placement, way=way)
            waiting[name] = Part(part, partial(beside, part), settle)
        elif isinstance(part, nn.Module):
            ready(part, name, placement, way)
        machine.tidy()  # before the next is made: together they may not fit
    pipeline = SwiftI2VPipeline(**parts, preset=f"tiny-{asked.preset}" if asked.tiny else asked.preset)
    pipeline.placement = placement
    pipeline.residency = Phased(waiting, machine.device, way) if way.phased else Residency(way)
    return pipeline


def ready(part: nn.Module, name: str, placement: Placement, way: Arrangement) -> None:
    """A part as its phase wants it, as ``parts.load`` makes it."""
    streamed = name in way.streamed
    home = replace(placement, device=torch.device("cpu")) if streamed else placement
    if name in TRANSFORMERS:
        fast_paths.settle(part, home)
    else:
        place(part, home.device)
    if streamed:
        stream_weights(part, placement.device)


def beside(waiting: nn.Module) -> nn.Module:
    """A copy that shares its weights until it is moved. Hooks are copied, too: it is watched as the other is."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in waiting.parameters()}
    return copy.deepcopy(waiting, shared | {id(buffer): buffer for buffer in waiting.buffers()})


def limit(machine: gpu.Machine, profile: str | None) -> float | None:
    """Hold this process to a profile's card; None where there is no limit (a CPU has none)."""
    if profile is None or not machine.cuda:
        return None
    machine.tidy()
    total, gib = torch.cuda.get_device_properties(machine.device).total_memory, PROFILES[profile].device_gib
    torch.cuda.set_per_process_memory_fraction(min(gib * gpu.GIB / total, 1.0), machine.device)
    return gib


def compared(way: Arrangement, results: dict[str, Any], measurable: bool) -> dict[str, dict[str, float]]:
    """Predicted and measured peaks by the arrangement's phases; of the whole alone, if only that was measured."""
    if "phases" not in results:
        measured, predicted = {"whole": results["peak_gib"]}, {"whole": way.device_bytes}
    else:
        predicted = {str(need.phase): need.device_bytes for need in way.needs}
        measured = dict.fromkeys(predicted, 0.0)
        for name, row in results["phases"].items():
            bare = name.rstrip(" 0123456789")
            phase = next((phase for phase, parts in PARTS_OF.items() if bare in parts), None)
            if phase is not None:  # encoded along with refining, unless ahead
                phase = phase if phase in predicted else "refine"
                measured[phase] = max(measured[phase], row["peak_gib"])
    rows = {phase: {"predicted_gib": gpu.gib(count)} for phase, count in predicted.items()}
    for phase, row in rows.items():
        if measurable and measured[phase]:
            row |= {"peak_gib": measured[phase], "ratio": round(row["predicted_gib"] / measured[phase], 3)}
    return rows
