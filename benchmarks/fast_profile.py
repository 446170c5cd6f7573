"""What does each choice of the fast profile save on nano, and what does it cost in quality?

    python scripts/fetch_photos.py && python scripts/fetch_clips.py      # once
    python benchmarks/fast_profile.py --record
    python benchmarks/fast_profile.py --only "plain,M 5" --rounds 9      # some of them, timed longer

One choice changed at a time beside plain nano, then several together (nano's own ``--fast`` is refused for what this
measures).
Everything is made by ``pipeline.stream`` in the dtype that the command line would take. Seconds: one whole clip of
``--size`` (the example photo; no file is written), and of it the forwards of each stage's network; all variants in turn
in every round, ratios to plain within the round, medians over rounds; ``whole_cpu``: the processor's seconds, which a
busy machine disturbs less. Quality, on held-out clips of docs/ablations.md
that no network was trained on (512x256, 49 frames): "given", Stage II on true clips shrunk four times; "camera", both
stages over held-out photos, Stage I told the true camera. PSNR of frames 1 to 48 and ST-LPIPS (lower is better) of
every 12th against the true frames, as differences from plain's (mean, and the clip that loses most); PSNR to plain's
own frames (99: the same). What this machine cannot run has ``skipped``, the reason.

nano's Stage II runs in one step already: 2 and 4 steps say what more would buy. nano has no distilled light decoder
(the recipe for ``TurboDecoder`` knows LTX's VAE alone); "light decoder" leaves the learned refiners of its own out: the
transform inverted, the photo's detail carried along, nothing learned.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import baselines
import common
import torch
from ablation_clips import CASCADE, FRAMES, PLAIN, Shelf, listed, motion
from torch import Tensor, nn

from swifti2v import metrics, presets
from swifti2v.camera import Motion
from swifti2v.core import Request, Size, UsageError
from swifti2v.images import read_image
from swifti2v.memory import FastPaths, place
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.reference import fit_image, resize
from swifti2v.segments import CSG
from swifti2v.sources import load
from swifti2v.stage_one import Conditions

GIVEN, CAMERA = "given", "camera"
EVERY, SAME = 12, 99.0
TIMED = ("whole", "whole_cpu", "stage_one", "stage_two")


@dataclass(frozen=True)
class Variant:
    """``fields``: of the request. ``quantize``: a kind of ``quantize.KINDS``. ``light``: decode without refiners."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    light: bool = False


@dataclass(frozen=True)
class Truth:
    """A held-out clip (3, t, h, w) in [-1, 1]. ``camera``: what Stage I is told; without, the motion is given."""

    use: str
    name: str
    frames: Tensor
    camera: Motion | None = None


def variants() -> tuple[Variant, ...]:
    """Plain first."""
    return (
        Variant("plain"),
        Variant("stage II in 2 steps", {"num_inference_steps_2": 2}),
        Variant("stage II in 4 steps", {"num_inference_steps_2": 4}),
        Variant("M 5", {"csg": CSG(segment_blocks=5)}),
        Variant("M 10", {"csg": CSG(segment_blocks=10)}),
        Variant("M 20", {"csg": CSG(segment_blocks=20)}),
        Variant("stage I in 2 steps", {"num_inference_steps": 2}),
        Variant("stage I in 1 step", {"num_inference_steps": 1}),
        Variant("light decoder", light=True),
        Variant("int8", quantize="int8"),
        Variant("int8-dynamic", quantize="int8-dynamic"),
        Variant("fp8", quantize="fp8"),
        Variant("fp8-rows", quantize="fp8-rows"),
        Variant("together", {"num_inference_steps": 2, "csg": CSG(segment_blocks=5)}, "int8", light=True),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data", help="where the fetch scripts put it")
    parser.add_argument("--size", default="640x384", help="of the clip that is timed")
    parser.add_argument("--num-frames", type=int, default=41, help="of the clip that is timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=2, help="held-out clips of each use")
    parser.add_argument("--only", default="", help="variants by name, with commas; plain has to be there")
    asked = common.parsed(parser, arguments)
    if asked.tiny:
        asked.size, asked.num_frames, asked.rounds = "128x64", 17, 1
    record = common.Record("what does the fast profile save on nano, and what does it cost?", asked, __file__)
    with common.workplace(asked) as (_, model):
        preset = presets.get("tiny-nano" if asked.tiny else "nano")
        bench = Bench(preset, model, asked.threads)
        rows: dict[str, dict[str, Any]] = {}
        for variant in variants():
            if not asked.only or variant.name in asked.only.split(","):
                rows[variant.name] = bench.admitted(variant)
        truths = [tiny_truth()] if asked.tiny else held_out(asked.data, bench.plain, asked.clips)
        timings = timed(bench, asked)
        qualities = [judged(bench, truth, number, asked.tiny) for number, truth in enumerate(truths)]
    for name in bench.ready:
        rows[name] |= timings[name] | quality(name, truths, qualities)
    assert bench.plain.placement is not None
    settings = {"timed": f"{asked.size}, {asked.num_frames} frames", "rounds": asked.rounds}
    settings |= {"clips": {truth.name: truth.use for truth in truths}} | bench.plain.placement.settings()
    record.finish(settings, rows)


class Bench:
    """The pipelines of all variants that this machine can run; those that differ in the request alone share one."""

    def __init__(self, preset: presets.Preset, model: Path | None, threads: int | None) -> None:
        self.preset, self.model, self.threads = preset, model, threads
        self.ready: dict[str, Variant] = {}
        self._loaded: dict[tuple[str | None, bool], SwiftI2VPipeline] = {}

    @property
    def plain(self) -> SwiftI2VPipeline:
        return self.pipeline(Variant("plain"))

    def admitted(self, variant: Variant) -> dict[str, Any]:
        """The beginning of a variant's row; one that cannot run is not ``ready``, and the row says why."""
        said = {"fields": plainly(variant.fields)} if variant.fields else {}
        said |= {"quantize": variant.quantize} if variant.quantize else {}
        try:
            self.pipeline(variant)
        except (UsageError, ValueError) as refused:
            return {**said, "skipped": str(refused)}
        self.ready[variant.name] = variant
        return said

    def pipeline(self, variant: Variant) -> SwiftI2VPipeline:
        key = (variant.quantize, variant.light)
        if key not in self._loaded:
            model = None if self.model is None else str(self.model)
            fast = FastPaths(quantize=variant.quantize)
            made: Any = load(self.preset, model=model, device="cpu", threads=self.threads, fast=fast)
            self._loaded[key] = lightened(made) if variant.light else made
        return self._loaded[key]

    def request(self, variant: Variant, size: Size | str, num_frames: int, seed: int) -> Request:
        fields = {"size": str(size), "num_frames": num_frames, "seed": seed, **variant.fields}
        return presets.resolve(self.preset, prompt=common.PROMPT, **fields)[0]


def plainly(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON, of CSG's choices those that are not the default's."""
    return {k: v.model_dump(exclude_defaults=True) if isinstance(v, CSG) else v for k, v in fields.items()}


def lightened(pipeline: SwiftI2VPipeline) -> SwiftI2VPipeline:
    """``pipeline`` whose decoder of Stage II has learned nothing: refiners one channel wide that give zeros."""
    nothing = {"image_width": 1, "image_layers": 0, "video_width": 1, "video_layers": 0}
    config = {k: v for k, v in pipeline.vae.config.items() if not k.startswith("_")}
    vae, placement = NanoVAE(**{**config, **nothing}).eval().requires_grad_(False), pipeline.placement
    assert placement is not None
    place(vae, placement.device, placement.dtype)
    made = SwiftI2VPipeline(**{**pipeline.components, "vae_2": vae}, preset=pipeline.preset.name)
    made.placement, made.sources = placement, pipeline.sources
    return made


# --- seconds ----------------------------------------------------------------------------------------------------------


def timed(bench: Bench, asked: Any) -> dict[str, dict[str, Any]]:
    """Medians over rounds of every variant's seconds, and of their ratios to plain's of the same round."""
    photo = fit_image(read_image(common.PHOTO).pixels, Size.parse(asked.size))
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(asked.rounds + 1):  # the first warms up
        row = {}
        for name, variant in bench.ready.items():
            request = bench.request(variant, asked.size, asked.num_frames, seed=1)
            row[name] = seconds(bench.pipeline(variant), photo, request)
            print(f"round {number}: {name}: {row[name]['whole']:.1f} s", file=sys.stderr, flush=True)
        rounds += [row] if number else []
    found = {}
    for name in bench.ready:
        took = {part: round(median(row[name][part] for row in rounds), 3) for part in TIMED}
        ratio = {part: round(median(row[name][part] / row["plain"][part] for row in rounds), 3) for part in TIMED}
        found[name] = {"seconds": took, "ratio": ratio}
    return found


def seconds(pipeline: SwiftI2VPipeline, photo: Tensor, request: Request) -> dict[str, float]:
    with watched(pipeline.transformer) as one, watched(pipeline.transformer_2) as two:
        begin, worked = time.perf_counter(), time.process_time()
        for chunk in pipeline.stream(photo, request):
            del chunk
        whole, cpu = time.perf_counter() - begin, time.process_time() - worked
        return {"whole": whole, "whole_cpu": cpu, "stage_one": sum(one), "stage_two": sum(two)}


@contextmanager
def watched(network: nn.Module) -> Iterator[list[float]]:
    """Seconds of each of a network's forwards."""
    took: list[float] = []
    began: list[float] = []
    handles = (
        network.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
        network.register_forward_hook(lambda *_: took.append(time.perf_counter() - began.pop())),
    )
    try:
        yield took
    finally:
        for handle in handles:
            handle.remove()


# --- quality ----------------------------------------------------------------------------------------------------------


def held_out(data: Path, pipeline: SwiftI2VPipeline, count: int) -> list[Truth]:
    shelf, found = Shelf(data, pipeline), []
    for use, said in ((PLAIN, GIVEN), (CASCADE, CAMERA)):
        for clip in [clip for clip in listed(data) if clip.use == use][:count]:
            found.append(Truth(said, clip.name, shelf.truth(clip), motion(clip) if use == CASCADE else None))
    assert all(truth.frames.shape[1] == FRAMES for truth in found)
    return found


def tiny_truth() -> Truth:
    frames = torch.rand(3, 17, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Truth(GIVEN, "noise", frames)


def judged(bench: Bench, truth: Truth, seed: int, tiny: bool) -> dict[str, dict[str, float]]:
    """Every variant's measures on one clip."""
    scored = list(range(EVERY, truth.frames.shape[1], EVERY))
    known = None if tiny else baselines.features(truth.frames[:, scored])
    rows: dict[str, dict[str, float]] = {}
    plain: Tensor | None = None
    print(f"clip {truth.name}", file=sys.stderr, flush=True)
    for name, variant in bench.ready.items():
        frames = made(bench, variant, truth, seed)
        plain = frames if plain is None else plain
        rows[name] = {"psnr": decibels(frames, truth.frames), "psnr_to_plain": min(SAME, decibels(frames, plain))}
        if known is not None:
            pairs = zip(frames[:, scored].unbind(1), known, strict=True)
            rows[name]["st_lpips"] = float(torch.cat([baselines.distance(*pair) for pair in pairs]).mean())
    return rows


def made(bench: Bench, variant: Variant, truth: Truth, seed: int) -> Tensor:
    """The variant's frames (3, t, h, w)."""
    size = Size(truth.frames.shape[3], truth.frames.shape[2])
    pipeline, photo = bench.pipeline(variant), truth.frames[None, :, :1]
    request, given = bench.request(variant, size, truth.frames.shape[1], seed), None
    told = Conditions(pipeline.encode_prompt(""), camera=truth.camera)
    if truth.camera is None:
        small = bench.preset.grid.motion_size(size)
        given = [torch.stack([resize(frame, small) for frame in truth.frames.unbind(1)], dim=1)[None]]
    return torch.cat([chunk.frames[0] for chunk in pipeline.stream(photo, request, motion=given, conditions=told)], 1)


def decibels(frames: Tensor, other: Tensor) -> float:
    return float(metrics.psnr(frames[:, 1:], other[:, 1:]).mean())


def quality(name: str, truths: Sequence[Truth], rows: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """By use: differences from plain's values, mean and worst; plain's own values for plain."""
    found: dict[str, Any] = {}
    for measure, worst in (("psnr", min), ("st_lpips", max), ("psnr_to_plain", min)):
        if measure not in rows[0][name] or (name == "plain" and measure == "psnr_to_plain"):
            continue
        own = name == "plain" or measure == "psnr_to_plain"
        for use in dict.fromkeys(truth.use for truth in truths):
            kept = [row for row, truth in zip(rows, truths, strict=True) if truth.use == use]
            values = [row[name][measure] - (0 if own else row["plain"][measure]) for row in kept]
            numbers = {"mean": sum(values) / len(values), "worst": worst(values)}
            found.setdefault(measure, {})[use] = {k: round(v, 4) for k, v in numbers.items()}
    return found


if __name__ == "__main__":
    main()
