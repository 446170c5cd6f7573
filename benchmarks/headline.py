"""How long does the true size take end to end, and where do the seconds and the memory go?

    python benchmarks/headline.py --preset wan --profile 80gb --record      # 81 frames 2560x1408, M=3 N=1, 4 + 4 steps
    python benchmarks/headline.py --preset wan --profile 24gb --at-once --record
    python benchmarks/headline.py --preset wan --profile 24gb --tiny        # seconds, on a CPU too

``pipeline.stream`` with random weights. Pixels stay on the device: nothing is written. ``--profile`` makes the clip as
``generate`` would on that card: the library's arrangement, carried out by its ``residency``, with no more of the card's
memory than the profile's (which shows what fits, never how fast a smaller card is). Without it everything stays loaded.

In turn (the default) the clip is timed by its own events and by its networks' calls, the device idle at every change of
phase: so the phases add up to the whole. "motion" is Stage I with its VAE's two parts, "encode" and "decode" are Stage
II's VAE, "refine K" is segment K, "load" takes a part's weights from host memory (no file is read), "between" is the
rest. ``--at-once`` lets stages overlap as ``generate`` does: then only the whole is timed, beside the seconds that its
threads were in each stage (on a GPU, whose kernels they start and do not wait for, that is not its work).

``needs`` holds the peak that was predicted for every phase beside the one measured; wanted is a ratio of 0.9 to 1.1.
FLOPs are the closed forms of ``plan``, of the untiled decoder (tiny: counted). ``first_segment_seconds`` is when the
first generated frames are there. A tiny twin does as is arranged for the true size; what is predicted is that size's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import arranged
import common
import gpu
import torch
from torch import Tensor

from swifti2v import presets
from swifti2v.core import Chunk, Event, Request
from swifti2v.images import read_image
from swifti2v.meters import FlopMeter
from swifti2v.overlap import Lanes
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.profiles import PROFILES
from swifti2v.quantize import KINDS
from swifti2v.reference import fit_image
from swifti2v.residency import Phased
from swifti2v.tiny import tiny_pipeline
from swifti2v.trace import Trace, own_seconds

TRUE_SIZE = {"size": "2560x1408", "num_frames": 81}
# A step a stage of a small clip with two segments, whose every tile has a pixel; what is compiled sees its own shapes.
ONE_STEP = {"num_inference_steps": 1, "num_inference_steps_2": 1}
SMALL = {"size": "256x128", "num_frames": 17}


def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments)
    machine = gpu.Machine.of(asked)
    record = common.Record("seconds and peak GiB of every phase of a clip", asked, __file__)
    preset = presets.get(f"tiny-{asked.preset}" if asked.tiny else asked.preset)
    way = arranged.way_of(asked, requested(asked, presets.get(asked.preset), **(TRUE_SIZE if asked.tiny else {})))
    request = requested(asked, preset, encode=way.encode_when)
    pipeline = arranged.built(machine, asked, way)
    limited = arranged.limit(machine, asked.profile)
    flops = count(machine, asked.preset, request) if asked.tiny else closed_flops(request)
    if asked.compile or not asked.tiny:
        small = {} if asked.compile else SMALL
        run(machine, pipeline, requested(asked, preset, encode=way.encode_when, **ONE_STEP, **small))
    if asked.at_once and way.overlap:
        results = run_at_once(machine, pipeline, request)
        results["flops"], seconds = sum(flops.values()), results["seconds"]
        results["tflop_per_second"] = round(results["flops"] / seconds / 1e12, 4)
    else:
        results = run(machine, pipeline, request)
        results |= rates(results["phases"], flops)
    settings = {
        "preset": preset.name,
        "size": str(request.size),
        "num_frames": request.num_frames,
        "steps": request.num_inference_steps,
        "steps_2": request.num_inference_steps_2,
        "csg": [request.csg.segment_blocks, request.csg.neighbor_blocks],
        "encode": request.encode,
        "weights": "random",
        "memory_gib": limited,
        "profile": asked.profile,
        "arranged": way.ways(),
        "at_once": asked.at_once and way.overlap,
        **pipeline.placement.settings(),
    }
    record.finish(settings, results | {"needs": arranged.compared(way, results, measurable=not asked.tiny)})


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.gpu_parser(__doc__)
    parser.add_argument("--preset", choices=("wan", "wan-refine"), default="wan")
    parser.add_argument("--size", help="default: 2560x1408; tiny: 64x64")
    parser.add_argument("--num-frames", type=int, help="default: 81; tiny: 17")
    parser.add_argument("--steps", type=int, help="of Stage I (default: 4; tiny: 2)")
    parser.add_argument("--steps-2", type=int, help="of Stage II (default: 4; tiny: 2)")
    parser.add_argument("--encode", choices=("lazy", "ahead"), default="lazy")
    parser.add_argument("--profile", choices=list(PROFILES), help="make it fit this card (default: all stays loaded)")
    parser.add_argument("--at-once", action="store_true", help="stages overlap, where arranged; the whole is timed")
    parser.add_argument("--attention", default="auto", help="a kernel by diffusers' name")
    parser.add_argument("--quantize", choices=list(KINDS), help="both transformers in 8 bits")
    parser.add_argument("--compile", action="store_true", help="the transformers' layers compiled, in a warm-up")
    asked = common.parsed(parser, arguments)
    defaults = ("64x64", 17, 2) if asked.tiny else (*TRUE_SIZE.values(), 4)
    asked.size, asked.num_frames = asked.size or defaults[0], asked.num_frames or defaults[1]
    asked.steps, asked.steps_2 = asked.steps or defaults[2], asked.steps_2 or defaults[2]
    return asked


def requested(asked: argparse.Namespace, preset: presets.Preset, **others: Any) -> Request:
    told: dict[str, Any] = {
        "size": asked.size,
        "num_frames": asked.num_frames,
        "num_inference_steps": asked.steps,
        "num_inference_steps_2": asked.steps_2,
        "encode": asked.encode,
    }
    request, _ = presets.resolve(preset, prompt=common.PROMPT, seed=1, strict=True, **{**told, **others})
    return request


# -- one run --------------------------------------------------------------------------------------------------------


class Phases:
    """What passes between two changes of phase is charged to the phase that was on: seconds, bytes and FLOPs."""

    def __init__(self, machine: gpu.Machine, flops: Callable[[], int] | None = None) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.segment = 1
        self.phase, self._machine, self._flops = "between", machine, flops
        machine.forget_peak()
        self.began = self._begin = time.perf_counter()
        self._counted = 0

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.close()
            self.phase = phase

    def close(self) -> float:
        """Charge what has passed so far; the clock's reading until which it is charged."""
        self._machine.wait()
        now, counted = time.perf_counter(), self._flops() if self._flops else 0
        row = self.rows.setdefault(self.phase, {"seconds": 0.0, "peak_bytes": 0, "flops": 0})
        row["seconds"] += now - self._begin
        row["peak_bytes"] = max(row["peak_bytes"], self._machine.peak())
        row["flops"] += counted - self._counted
        self._machine.forget_peak()
        self._begin, self._counted = now, counted
        return now

    def follow(self, event: Event) -> None:
        """The pipeline's events: a finished segment is followed by the next."""
        if event.type == "segment":
            self.segment = event.segment + 1


def watch(pipeline: SwiftI2VPipeline, phases: Phases) -> list[Any]:
    """A call of a network enters its phase. Convolutions that are called in tiles and without begin Stage II's VAE."""
    large: Any = pipeline.vae_2
    told = {
        pipeline.text_encoder: lambda: "text",
        pipeline.image_encoder: lambda: "image",
        pipeline.vae.encoder: lambda: "motion encode",
        pipeline.transformer: lambda: "motion",
        pipeline.vae.post_quant_conv: lambda: "motion decode",
        large.encoder.conv_in: lambda: "encode",
        pipeline.transformer_2: lambda: f"refine {phases.segment}",
        large.post_quant_conv: lambda: "decode",
    }
    if isinstance(pipeline.residency, Phased):
        pipeline.residency.tell = lambda name: phases.enter("load")

    def enter(phase: Callable[[], str], *_: Any) -> None:
        phases.enter(phase())

    return [part.register_forward_pre_hook(partial(enter, phase)) for part, phase in told.items()]


def count(machine: gpu.Machine, name: str, request: Request) -> dict[str, int]:
    """FLOPs of every phase of a tiny twin, counted in a run of its own, as nothing is arranged."""
    pipeline = tiny_pipeline(name).to(machine.device)
    with FlopMeter() as meter:
        rows = run(machine, pipeline, request, flops=lambda: meter.count.total)["phases"]
    return {name: row["flops"] for name, row in rows.items()}


def run(
    machine: gpu.Machine, pipeline: SwiftI2VPipeline, request: Request, flops: Callable[[], int] | None = None
) -> dict[str, Any]:
    """Make the clip, watched. If memory runs out, ``fits`` is False and ``ended_in`` the phase it ran out in."""
    photo = fitted(machine, request)
    phases = Phases(machine, flops)
    hooks = watch(pipeline, phases)
    try:
        stream = pipeline.stream(photo, request, emit=phases.follow)
        fits, arrived = pulled(stream, phases.began, lambda: phases.enter("between"))
    finally:
        for hook in hooks:
            hook.remove()
    ended_in, seconds = phases.phase, phases.close() - phases.began
    peak = max(row["peak_bytes"] for row in phases.rows.values())
    return {"fits": fits, "ended_in": ended_in, **facts(seconds, arrived, peak), "phases": phases.rows}


def run_at_once(machine: gpu.Machine, pipeline: SwiftI2VPipeline, request: Request) -> dict[str, Any]:
    """Make the clip, its stages at once, which nothing may disturb: the whole's clock, and the threads' own."""
    photo, trace = fitted(machine, request), Trace()

    def there() -> None:
        if machine.cuda:  # the chunk, not what other stages have begun since
            torch.cuda.current_stream(machine.device).synchronize()

    machine.forget_peak()
    begin = time.perf_counter()
    fits, arrived = pulled(pipeline.stream(photo, request, lanes=Lanes(True, trace)), begin, there)
    machine.wait()
    seconds = time.perf_counter() - begin
    own = {name: round(spent, 4) for name, spent in own_seconds(trace.spans).items()}
    return {"fits": fits, **facts(seconds, arrived, machine.peak()), "own_seconds": own}


def fitted(machine: gpu.Machine, request: Request) -> Tensor:
    photo = fit_image(read_image(common.PHOTO).pixels, request.size, request.fit).to(machine.device)
    machine.wait()
    return photo


def pulled(stream: Iterator[Chunk], begin: float, there: Callable[[], None]) -> tuple[bool, list[dict[str, Any]]]:
    """Whether there was enough memory, and when chunks arrived; ``there``: until one is computed."""
    arrived = []
    try:
        for chunk in stream:
            there()
            arrived.append(arrival(chunk, time.perf_counter() - begin))
            del chunk
    except torch.OutOfMemoryError:
        return False, arrived
    return True, arrived


def facts(seconds: float, arrived: list[dict[str, Any]], peak: int) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 4),
        "first_frame_seconds": arrived[0]["seconds"] if arrived else None,
        "first_segment_seconds": arrived[1]["seconds"] if len(arrived) > 1 else None,
        "peak_gib": gpu.gib(peak),
        "chunks": arrived,
    }


def arrival(chunk: Chunk, seconds: float) -> dict[str, Any]:
    return {"segment": chunk.segment, "frames": chunk.frames.shape[2], "seconds": round(seconds, 4)}


# -- FLOPs ----------------------------------------------------------------------------------------------------------


def closed_flops(request: Request) -> dict[str, int]:
    """FLOPs of every phase by the closed forms: together those of the plan."""
    planned = arranged.planner(request)
    networks: Any = planned.networks
    rows = {row.phase: row.flops for row in planned.rows()}
    small, large = planned.positions
    tokens = planned.preset.grid.stage_two.tokens_per_block(request.size)
    passes = request.num_inference_steps_2 * (2 if request.guidance_scale_2 > 1 else 1)
    flops = {
        "text": rows["text"],
        "image": networks.image.flops(),
        "motion encode": networks.vae.encode_flops(small, planned.blocks),
        "motion": rows["motion"],
        "motion decode": rows["motion decode"],
        "encode": rows["reference"] + networks.vae_2.encode_flops(large, 1),
        "decode": rows["decode"],
    }
    for number, window in enumerate(planned.stage_two_windows, 1):
        flops[f"refine {number}"] = passes * networks.stage_two.flops(len(window.blocks), tokens)
    return flops


def rates(phases: dict[str, dict[str, Any]], flops: dict[str, int]) -> dict[str, Any]:
    """The phases with their FLOPs and TFLOP/s, and the whole's."""
    rows = {}
    for name, row in phases.items():
        counted, seconds = flops.get(name, 0), row["seconds"]
        rows[name] = {
            "seconds": round(seconds, 4),
            "peak_gib": gpu.gib(row["peak_bytes"]),
            "flops": counted,
            "tflop_per_second": round(counted / seconds / 1e12, 4),
        }
    whole, seconds = sum(flops.values()), sum(row["seconds"] for row in phases.values())
    return {"phases": rows, "flops": whole, "tflop_per_second": round(whole / seconds / 1e12, 4)}


if __name__ == "__main__":
    main()
