"""Turn a list of clips and photos into shards of latents, and give shards their stage-transition references.

    python scripts/prepare_data.py check      LIST
    python scripts/prepare_data.py shards     LIST --out FOLDER --preset nano --area 901120 --frames 49
    python scripts/prepare_data.py transition FOLDER --out FOLDER2 --preset nano --sigma 0.4 0.625

Killed at any time, the same command goes on. ``--worker 1/4`` makes every fourth shard, from the second on. What the
list may say, and what is skipped, is in docs/data.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swifti2v import presets
from swifti2v.core import RunError, Size, UsageError
from swifti2v.models.causal_vae import StreamingVAE, streaming
from swifti2v.models.ltx_vae import LTXCodec
from swifti2v.reference import carried_reference, hybrid_reference
from swifti2v.sources import load
from swifti2v.tiny import tiny_mobile, tiny_pipeline
from swifti2v.train.data import Pixels, ReferenceMaker, StageOneEncoder, StageTwoEncoder
from swifti2v.train.manifest import Buckets, Cutting, ManifestSource, Report, plan_samples, read_manifest
from swifti2v.train.mobile import ClipEncoder
from swifti2v.train.shards import PLAN, Plan, Worker, places, read_clip, write_shards
from swifti2v.train.transition import ABLATED, StageOne, Transition


def show(report: Report) -> None:
    """The report, on the screen."""
    print("\n".join(report.lines()))


def progress(done: int, of: int) -> None:
    """One line a shard."""
    print(f"shard {done} of {of}", flush=True)


def open_pipeline(options: argparse.Namespace) -> Any:
    """The preset's pipeline; ``tiny-*`` presets are random twins for trying things out."""
    if options.preset == "tiny-mobile":
        return tiny_mobile()
    if options.preset.startswith("tiny-"):
        return tiny_pipeline(options.preset.removeprefix("tiny-"))
    return load(presets.get(options.preset), model=options.model, device=options.device, threads=options.threads)


def stage_two_vae(pipeline: Any) -> StreamingVAE:
    """Stage II's VAE: one VAE may serve both stages."""
    return streaming(pipeline.vae_2 if pipeline.vae_2 is not None else pipeline.vae)


def weights(module: torch.nn.Module) -> str:
    """A short hash of a module's weights: latents of other weights are other latents."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_of(pipeline: Any, name: str) -> str:
    """``weights`` of a component, "" of one that is not there."""
    module = pipeline.components.get(name)
    return "" if module is None else weights(module)


def reference_maker(pipeline: Any) -> ReferenceMaker:
    """The hybrid reference as the preset's inference makes it."""
    return carried_reference if pipeline.preset.carries_detail else hybrid_reference


def samples_of(options: argparse.Namespace, grid: Any) -> tuple[list[Any], Report]:
    """The list's samples and what was skipped."""
    if options.size:
        sizes = tuple(Size.parse(size) for size in options.size)
        for size in sizes:
            if not grid.is_legal(size):
                raise UsageError(f"size {size} is off the grid; nearest legal size: {grid.snap(size)}")
        buckets = Buckets(sizes, options.max_upscale)
    else:
        buckets = Buckets.of(grid, options.area, max_upscale=options.max_upscale)
    cutting = Cutting(options.frames, options.hop, options.per_shot, options.fps)
    return plan_samples(read_manifest(options.list, options.split), buckets, cutting, options.list.parent / "cache")


def check(options: argparse.Namespace) -> None:
    """What the list would give, without any network."""
    samples, report = samples_of(options, presets.get(options.preset).grid)
    show(report)
    for size in sorted({sample.size for sample in samples}):
        print(f"  {size}: {sum(sample.size == size for sample in samples)} samples")


def encoder_of(pipeline: Any, stage: str) -> Callable[[Pixels], Any]:
    """What makes latents of a clip, for stage "one" or "two"; MobileI2V has one stage and hears no text."""
    if pipeline.preset.family == "mobile":
        return ClipEncoder(LTXCodec(pipeline.vae, None, pipeline.config.latent_norm))

    def text(prompt: str) -> Tensor:
        return pipeline.encode_prompt(prompt)[0]

    vae = streaming(pipeline.vae)
    if stage == "two":
        motion_size = pipeline.preset.grid.motion_size
        return StageTwoEncoder(stage_two_vae(pipeline), motion_size, vae, reference_maker(pipeline), text)
    if pipeline.image_encoder is None:
        return StageOneEncoder(vae, "camera", text)
    return StageOneEncoder(vae, "zero", text, pipeline.encode_image)


def make_shards(options: argparse.Namespace) -> None:
    """Encode the list."""
    pipeline = open_pipeline(options)
    samples, report = samples_of(options, pipeline.preset.grid)
    show(report)
    if not samples:
        raise UsageError(f"{options.list}: nothing is left to encode")
    source = ManifestSource(tuple(samples), options.seed, options.list.parent / "cache")
    encode = encoder_of(pipeline, options.stage)
    listed = hashlib.sha256(json.dumps([sample.__dict__ for sample in samples], sort_keys=True).encode()).hexdigest()
    settings = {
        "list": listed,
        "stage": options.stage,
        "carried": pipeline.preset.carries_detail,
        "seed": options.seed,
        "vae": weights(pipeline.vae),
        "vae_2": weights_of(pipeline, "vae_2"),
        "text_encoder": weights_of(pipeline, "text_encoder"),
    }
    plan = Plan(len(samples), options.per_shard, options.dtype, settings)
    with torch.no_grad():
        made = write_shards(options.out, plan, lambda i: encode(source.at(i)), worker=options.worker, on_shard=progress)
    full = Report(made.samples, (*report.skipped, *made.skipped))
    full.write(options.out / "report.json")
    show(full)


def make_transition(options: argparse.Namespace) -> None:
    """Copy shards, with a transition reference in every clip."""
    pipeline = open_pipeline(options)
    held = places(options.list)
    one = StageOne.of(pipeline, options.steps)
    job = Transition(one, stage_two_vae(pipeline), tuple(options.sigma), options.seed, reference_maker(pipeline))
    given = json.loads((options.list / PLAN).read_bytes())
    settings = {
        **job.settings(),
        "clips": hashlib.sha256("".join(place.sha256 for place in held).encode()).hexdigest(),
        "carried": pipeline.preset.carries_detail,
        "stage_one": weights(pipeline.transformer),
    }
    plan = Plan(len(held), given["per_shard"], given["dtype"], settings)

    def make(number: int) -> Any:
        return job.clip(number, read_clip(options.list, held[number]))

    with torch.no_grad():
        show(write_shards(options.out, plan, make, worker=options.worker, on_shard=progress))


def worker_of(text: str) -> Worker:
    """``1/4``: worker 1 of 4, counted from 0."""
    number, _, count = text.partition("/")
    return Worker(int(number), int(count))


def parser() -> argparse.ArgumentParser:
    """The three verbs and what they take."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(required=True)
    for name, run in (("check", check), ("shards", make_shards), ("transition", make_transition)):
        verb = verbs.add_parser(name, help=(run.__doc__ or "").strip())
        verb.set_defaults(run=run)
        verb.add_argument("list", type=Path, help="the list of clips and photos, or (transition) the shards")
        verb.add_argument("--preset", default="nano")
        if name != "transition":
            verb.add_argument("--split", help="only rows whose column split says this")
            verb.add_argument("--area", type=int, nargs="+", default=[1280 * 704], help="pixels of a frame")
            verb.add_argument("--size", nargs="+", help="WIDTHxHEIGHT buckets instead of areas")
            verb.add_argument("--max-upscale", type=float, default=1.0)
            verb.add_argument("--frames", type=int, default=49)
            verb.add_argument("--hop", type=int, help="frames from one window to the next; side by side without it")
            verb.add_argument("--per-shot", type=int, help="at most so many windows of a shot")
            verb.add_argument("--fps", type=float, help="leave out frames to come near this rate")
        if name != "check":
            verb.add_argument("--out", type=Path, required=True)
            verb.add_argument("--model", help="folder or repository of weights; the preset's own without it")
            verb.add_argument("--device")
            verb.add_argument("--threads", type=int)
            verb.add_argument("--seed", type=int, default=0)
            verb.add_argument("--worker", type=worker_of, help="NUMBER/COUNT, from 0")
        if name == "shards":
            verb.add_argument("--stage", choices=("one", "two"), default="two")
            verb.add_argument("--per-shard", type=int, default=64)
            verb.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
        if name == "transition":
            verb.add_argument("--sigma", type=float, nargs="+", default=[ABLATED[1]])
            verb.add_argument("--steps", type=int, default=4, help="of a whole Stage I run from noise")
    return made


def main() -> None:
    """Run a verb; what can be said in a line is said in a line."""
    options = parser().parse_args()
    try:
        options.run(options)
    except (UsageError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
