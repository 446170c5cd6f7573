"""How long does the true size take end to end, and where do the seconds and the memory go?

    python benchmarks/headline.py --preset wan --record                     # 81 frames 2560x1408, M=3 N=1, 4 + 4 steps
    python benchmarks/headline.py --preset wan --memory-gib 24 --tiles 2x4 --park --record \\
        --offload transformer transformer_2 text_encoder image_encoder      # what a 24 GB card would hold
    python benchmarks/headline.py --preset wan --tiny                       # seconds, on a CPU too

``pipeline.stream`` with random weights, timed by its own events and by its networks' calls, the device idle at every
change of phase: so the phases add up to the whole. Pixels stay on the device: nothing is written. Phases: "motion" is
Stage I with its VAE's two parts, "encode" and "decode" are Stage II's VAE, "refine K" is segment K, "between" the rest.
FLOPs are the closed forms of ``plan``, of the untiled decoder (tiny: counted). ``first_segment_seconds`` is when the
first generated frames are there. A memory limit shows what fits, never how fast a smaller card is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import gpu
import torch
from torch import nn

from swifti2v import costs, presets
from swifti2v.calibration import Calibration
from swifti2v.core import Chunk, Event, Request
from swifti2v.images import read_image
from swifti2v.meters import FlopMeter
from swifti2v.models.causal_vae import WanStreamingVAE
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.plan import Planner
from swifti2v.reference import fit_image
from swifti2v.tiny import tiny_pipeline

COMPONENTS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae", "vae_2")
LEAVES = ("text_encoder", "image_encoder", "transformer")  # not needed once Stage I's latents are there


def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments)
    machine = gpu.Machine.of(asked)
    record = common.Record("seconds and peak GiB of every phase of a clip", asked, __file__)
    preset = presets.get(f"tiny-{asked.preset}" if asked.tiny else asked.preset)
    request = requested(asked, preset)
    pipeline = built(machine, asked)
    limited = limit(machine, asked.memory_gib)
    if asked.tiny:  # counting warms up, too
        flops = count(machine, pipeline, request)
    else:
        run(machine, pipeline, warm_up(preset, asked))
        flops = closed_flops(request, preset)
    leaving = [name for name in LEAVES if name not in asked.offload] if asked.leave else []
    results = run(machine, pipeline, request, leaving)
    results |= rates(results["phases"], flops)
    settings = {
        "preset": preset.name,
        "size": str(request.size),
        "num_frames": request.num_frames,
        "steps": request.num_inference_steps,
        "steps_2": request.num_inference_steps_2,
        "csg": [request.csg.segment_blocks, request.csg.neighbor_blocks],
        "encode": request.encode,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "weights": "random",
        "memory_gib": limited,
        "offload": asked.offload,
        "leave": leaving,
        "tiles": asked.tiles,
        "parked": asked.park,
    }
    record.finish(settings, results)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.gpu_parser(__doc__)
    parser.add_argument("--preset", choices=("wan", "wan-refine"), default="wan")
    parser.add_argument("--size", help="default: 2560x1408; tiny: 64x64")
    parser.add_argument("--num-frames", type=int, help="default: 81; tiny: 17")
    parser.add_argument("--steps", type=int, help="of Stage I (default: 4; tiny: 2)")
    parser.add_argument("--steps-2", type=int, help="of Stage II (default: 4; tiny: 2)")
    parser.add_argument("--encode", choices=("lazy", "ahead"), default="lazy")
    parser.add_argument("--memory-gib", type=float, help="no more of the card's memory than this")
    streamed = "components streamed from host memory layer by layer"
    parser.add_argument("--offload", nargs="+", choices=COMPONENTS, default=[], metavar="NAME", help=streamed)
    parser.add_argument("--leave", action="store_true", help="encoders and Stage I leave the device after their phase")
    parser.add_argument("--tiles", help="decode in ROWSxCOLUMNS exact tiles")
    parser.add_argument("--park", action="store_true", help="caches of waiting tiles in host memory")
    asked = common.parsed(parser, arguments)
    if asked.park and not asked.tiles:
        parser.error("--park is about tiles: give --tiles, too")
    defaults = ("64x64", 17, 2) if asked.tiny else ("2560x1408", 81, 4)
    asked.size, asked.num_frames = asked.size or defaults[0], asked.num_frames or defaults[1]
    asked.steps, asked.steps_2 = asked.steps or defaults[2], asked.steps_2 or defaults[2]
    return asked


def requested(asked: argparse.Namespace, preset: presets.Preset) -> Request:
    request, _ = presets.resolve(
        preset,
        prompt=common.PROMPT,
        size=asked.size,
        num_frames=asked.num_frames,
        seed=1,
        strict=True,
        num_inference_steps=asked.steps,
        num_inference_steps_2=asked.steps_2,
        encode=asked.encode,
    )
    return request


def warm_up(preset: presets.Preset, asked: argparse.Namespace) -> Request:
    """The smallest clip with two segments, a step a stage: libraries load and networks are called once."""
    small = argparse.Namespace(**{**vars(asked), "size": "64x64", "num_frames": 17, "steps": 1, "steps_2": 1})
    return requested(small, preset)


def built(machine: gpu.Machine, asked: argparse.Namespace) -> SwiftI2VPipeline:
    """The pipeline with random weights on the device, ``--offload`` and ``--tiles`` as said."""
    if asked.tiny:
        pipeline = tiny_pipeline(asked.preset).to(machine.device)
        for name in asked.offload:
            stream_from_host(machine, getattr(pipeline, name))
    else:
        parts: dict[str, Any] = {}
        for name, part in gpu.components(machine, widened=asked.preset == "wan"):
            parts[name] = part
            if name in asked.offload:  # before the next is made: together they may not fit
                stream_from_host(machine, part)
        pipeline = SwiftI2VPipeline(**parts, preset=asked.preset)
    if asked.tiles:
        rows, columns = map(int, asked.tiles.split("x"))
        parked = "cpu" if asked.park else None
        pipeline.vae_2 = WanStreamingVAE(pipeline.vae_2, tiles=(rows, columns), cache_device=parked)
    return pipeline


def stream_from_host(machine: gpu.Machine, part: nn.Module) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        part.to("cpu"),
        onload_device=machine.device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=machine.cuda,
    )
    machine.tidy()


def limit(machine: gpu.Machine, asked_gib: float | None) -> float | None:
    """Hold this process to a part of the card; None where there is no limit (a CPU has none)."""
    if asked_gib is None or not machine.cuda:
        return None
    machine.tidy()
    total = torch.cuda.get_device_properties(machine.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(asked_gib * gpu.GIB / total, 1.0), machine.device)
    return asked_gib


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
    """A call of a network enters its phase. ``post_quant_conv`` begins the decoding of every block, tiled or not."""
    large: Any = getattr(pipeline.vae_2, "vae", pipeline.vae_2)
    told = {
        pipeline.text_encoder: lambda: "text",
        pipeline.image_encoder: lambda: "image",
        pipeline.vae.encoder: lambda: "motion encode",
        pipeline.transformer: lambda: "motion",
        pipeline.vae.post_quant_conv: lambda: "motion decode",
        large.encoder: lambda: "encode",
        pipeline.transformer_2: lambda: f"refine {phases.segment}",
        large.post_quant_conv: lambda: "decode",
    }

    def enter(phase: Callable[[], str], *_: Any) -> None:
        phases.enter(phase())

    return [part.register_forward_pre_hook(partial(enter, phase)) for part, phase in told.items()]


def count(machine: gpu.Machine, pipeline: SwiftI2VPipeline, request: Request) -> dict[str, int]:
    """FLOPs of every phase, counted in a run of its own."""
    with FlopMeter() as meter:
        rows = run(machine, pipeline, request, flops=lambda: meter.count.total)["phases"]
    return {name: row["flops"] for name, row in rows.items()}


def run(
    machine: gpu.Machine,
    pipeline: SwiftI2VPipeline,
    request: Request,
    leave: Sequence[str] = (),
    flops: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Make the clip, watched. If memory runs out, ``fits`` is False and ``ended_in`` the phase it ran out in."""
    photo = fit_image(read_image(common.PHOTO).pixels, request.size, request.fit).to(machine.device)
    machine.wait()
    phases, arrived, fits = Phases(machine, flops), [], True
    begin, hooks = phases.began, watch(pipeline, phases)

    def follow(event: Event) -> None:
        phases.follow(event)
        if event.phase == "motion" and event.step == event.total:
            for name in leave:
                getattr(pipeline, name).to("meta")

    try:
        for chunk in pipeline.stream(photo, request, emit=follow):
            phases.enter("between")
            arrived.append(arrival(chunk, time.perf_counter() - begin))
            del chunk
    except torch.OutOfMemoryError:
        fits = False
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "fits": fits,
        "ended_in": phases.phase,
        "seconds": round(phases.close() - begin, 4),
        "first_frame_seconds": arrived[0]["seconds"] if arrived else None,
        "first_segment_seconds": arrived[1]["seconds"] if len(arrived) > 1 else None,
        "peak_gib": gpu.gib(max(row["peak_bytes"] for row in phases.rows.values())),
        "phases": phases.rows,
        "chunks": arrived,
    }


def arrival(chunk: Chunk, seconds: float) -> dict[str, Any]:
    return {"segment": chunk.segment, "frames": chunk.frames.shape[2], "seconds": round(seconds, 4)}


# -- FLOPs ----------------------------------------------------------------------------------------------------------


def closed_flops(request: Request, preset: presets.Preset) -> dict[str, int]:
    """FLOPs of every phase by the closed forms: together those of the plan."""
    networks: Any = costs.networks_of(preset.family, preset.folder, preset.prompt_tokens)
    planner = Planner(request, preset, networks, Calibration())
    rows = {row.phase: row.flops for row in planner.rows()}
    small, large = planner.positions
    tokens = preset.grid.stage_two.tokens_per_block(request.size)
    passes = request.num_inference_steps_2 * (2 if request.guidance_scale_2 > 1 else 1)
    flops = {
        "text": rows["text"],
        "image": networks.image.flops(),
        "motion encode": networks.vae.encode_flops(small, planner.blocks),
        "motion": rows["motion"],
        "motion decode": rows["motion decode"],
        "encode": rows["reference"] + networks.vae_2.encode_flops(large, 1),
        "decode": rows["decode"],
    }
    for number, window in enumerate(planner.stage_two_windows, 1):
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
