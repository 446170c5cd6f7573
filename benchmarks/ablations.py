"""Which of the paper's design choices can be seen on nano, and what follows for our defaults (docs/ablations.md).

    python scripts/train_ablations.py ...                        # once a checkpoint: the retrained variants
    python benchmarks/ablations.py --record --share 0/2 &        # two processes with disjoint shares of the clips
    python benchmarks/ablations.py --record --share 1/2
    python benchmarks/ablations.py --report                      # the tables in docs/ablations.md, made anew
    python benchmarks/ablations.py --pictures                    # docs/pictures/ablation_*.jpg

Stage II of nano on held-out clips of 512x256 shrunk four times, compared with the true frames; one line a (variant,
clip, seed, measures), keyed by clip, settings and weights, so that a line that is there is not made again. Latents of
all variants come first, with both seeds of the main ones; then decoded frames with seed 0, the main questions before
the others, kinds of clips in turn: whatever is stopped early is a fair part. Fine-tunes that are not there are left
out, and said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import baselines
import common
import torch
from ablation_clips import CASCADE, FAR, PLAIN, Clip, Shelf, listed, resized
from torch import Tensor

from swifti2v import metrics
from swifti2v.checkpoints import sha256
from swifti2v.evaluate.second_stage import NONE, Settings, decoded, refined
from swifti2v.models.causal_vae import encode_stream, streaming
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import CSG
from swifti2v.train.objective import channel_error
from swifti2v.train.recipes_nano import channel_weights

sys.path.insert(0, str(common.REPOSITORY / "scripts"))
import train_ablations

VERSION = 1  # of what a line means: raise it and every line is made again
WEIGHTS = train_ablations.WEIGHTS
sha256, common.commit = cache(sha256), cache(common.commit)  # asked for every line; they stay what they are
EVERY = 12  # frames: what SSIM and ST-LPIPS look at; the rest looks at all
LENGTHS, LAST = (81, 161, 321), 16  # a long clip is judged by the last 16 frames of each length
SHARED = "shared"


LATENTS, DECODED = "latents", "frames"
SHIPPED = Settings()


@dataclass(frozen=True)
class Variant:
    """``weights``: "shared" (the checkpoint all have in common), "none", or the name of a fine-tune of it. ``tier``: 1
    is decoded before 2."""

    name: str
    settings: Settings = SHIPPED
    weights: str = SHARED
    tier: int = 1


def _csg(name: str, tier: int = 2, **fields: Any) -> Variant:
    return Variant(name, Settings(csg=CSG(**fields)), tier=tier)


INFERENCE = (
    Variant("default"),
    Variant("stage II off", weights=NONE),
    Variant("carried off", Settings(carries=False)),
    Variant("both off", Settings(carries=False), NONE),
    _csg("N=0", 1, neighbor_blocks=0),
    _csg("N=2", neighbor_blocks=2),
    _csg("M=1", segment_blocks=1),
    _csg("M=2", segment_blocks=2),
    _csg("M=5", segment_blocks=5),
    Variant("un-segmented", Settings(segmented=False)),
    Variant("anchor off", Settings(anchor=False)),
    Variant("anchor and neighbors off", Settings(CSG(neighbor_blocks=0), anchor=False), tier=2),
    Variant("frame 0 not replaced", Settings(photo_first=False)),
    Variant("2 steps", Settings(steps=2), tier=2),
    Variant("4 steps", Settings(steps=4)),
    Variant("8 steps", Settings(steps=8), tier=2),
    _csg("positions: window", rope_positions="window"),
    _csg("neighbor timestep: current", neighbor_timestep="current"),
    _csg("neighbor reference: generated", neighbor_reference="generated"),
)
RETRAINED = (Variant("control", weights="control"), Variant("read-only", weights="read_only"))
TRANSITIONS = tuple(Variant(f"transition {name}", weights=name) for name in train_ablations.TRANSITIONS)
LONGER = (
    Variant("default"),
    Variant("stage II off", weights=NONE),
    _csg("positions: absolute", rope_positions="absolute"),
    Variant("un-segmented", Settings(csg=CSG(rope_positions="absolute"), segmented=False), tier=2),
    _csg("N=0", neighbor_blocks=0),
)
SEEN_THERE = ("N=0", "N=2", "M=1", "M=5", "un-segmented", "anchor off", "anchor and neighbors off", "4 steps")
SECOND = tuple(replace(v, tier=2) for v in (*INFERENCE, *RETRAINED) if v.name in (*SEEN_THERE, "control", "read-only"))
BY_USE = {PLAIN: (*INFERENCE, *RETRAINED), CASCADE: (*INFERENCE[:2], *TRANSITIONS, *SECOND), FAR: LONGER}


@dataclass(frozen=True)
class Task:
    """One line to be made."""

    clip: Clip
    variant: Variant
    seed: int
    measures: str


def tasks(clips: Sequence[Clip]) -> list[Task]:
    """In the order in which they are done."""
    both = [(clip, variant) for clip in clips for variant in BY_USE[clip.use]]
    latents = [Task(*pair, seed, LATENTS) for pair in both if pair[0].use != FAR for seed in range(3 - pair[1].tier)]
    near = sorted((pair for pair in both if pair[0].use != FAR), key=lambda pair: pair[1].tier)
    far = sorted((pair for pair in both if pair[0].use == FAR), key=lambda pair: pair[1].tier)
    first = [Task(*pair, 0, DECODED) for pair in (*near, *far)]
    again = [Task(*pair, 1, DECODED) for pair in near if pair[1].name == "default" and pair[0].use == PLAIN]
    return [*latents, *sorted(first, key=lambda task: task.variant.tier), *again]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data", help="where the fetch scripts put it")
    parser.add_argument("--stage-two", type=Path, default=train_ablations.NANO / "transformer_2", help="the checkpoint")
    parser.add_argument("--runs", type=Path, default=train_ablations.ROOT, help="where the fine-tunes are")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th clip from the i-th on")
    parser.add_argument("--uses", default=f"{PLAIN},{CASCADE},{FAR}", help="kinds of questions")
    parser.add_argument("--variants", default="", help="names, separated by commas; all of them if empty")
    parser.add_argument("--clips", type=int, help="no more clips of each use than this")
    parser.add_argument("--prepare", action="store_true", help="only make truths and references")
    parser.add_argument("--report", action="store_true", help="rewrite the tables in docs/ablations.md")
    parser.add_argument("--pictures", action="store_true", help="make the figures of docs/ablations.md")
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or 1)
    if asked.report:
        from ablation_report import report

        return report(newest(results_file(), asked.stage_two))
    pipeline = SwiftI2VPipeline.from_pretrained("nano")
    bench = Bench(Shelf(asked.data, pipeline), asked.stage_two, asked.runs)
    clips = chosen_clips(asked)
    if asked.pictures:
        from ablation_pictures import pictures

        return pictures(bench, listed(asked.data), BY_USE, lambda clip, variant: Task(clip, variant, 0, DECODED))
    if asked.prepare:
        return prepare(bench, clips)
    sweep(bench, clips, asked)


def results_file() -> Path:
    return common.RESULTS / "ablations.jsonl"


def chosen_clips(asked: argparse.Namespace) -> list[Clip]:
    first, stride = map(int, asked.share.split("/"))
    out: list[Clip] = []
    for use in asked.uses.split(","):
        own = [clip for clip in listed(asked.data) if clip.use == use]
        out += own[: asked.clips][first::stride]
    return out


def prepare(bench: Bench, clips: Sequence[Clip]) -> None:
    for clip in clips:
        for settings in {
            replace(v.settings, csg=CSG(), steps=1, anchor=True, segmented=True) for v in BY_USE[clip.use]
        }:
            bench.shelf.reference(clip, settings)
        print(clip.name, flush=True)


def sweep(bench: Bench, clips: Sequence[Clip], asked: argparse.Namespace) -> None:
    """Every line that is missing."""
    wanted = set(asked.variants.split(",")) if asked.variants else None
    done = {row["settings"]["key"] for row in baselines.recorded(results_file())}
    absent, truth = set[str](), None
    for task in tasks(clips):
        if wanted is not None and task.variant.name not in wanted:
            continue
        if not bench.folder(task.variant.weights).exists():
            absent.add(task.variant.name)
        elif (key := bench.key(task)) not in done:
            if truth is None or truth.clip != task.clip:
                truth = Truth(bench.shelf, task.clip)
            record = common.Record("what a design choice is worth on nano", asked, __file__)
            record.finish(described(key, task, bench), truth.score(bench, task))
    for clip in clips:
        if clip.use == CASCADE and wanted is None:
            likenesses(bench, clip, done, asked)
    if absent:
        print(f"no weights of {', '.join(sorted(absent))}: python scripts/train_ablations.py tune", file=sys.stderr)


def likenesses(bench: Bench, clip: Clip, done: set[str], asked: argparse.Namespace) -> None:
    """How much what stage transition makes of a clip looks like the truth, and like Stage I's output."""
    true, real = resized(bench.shelf.truth(clip)), bench.shelf.low(clip)
    for name in (*train_ablations.TRANSITIONS, "stage one"):
        variant = Variant(f"sigma {name}" if name[0] == "0" else name, weights=NONE)
        key = bench.key(task := Task(clip, variant, 0, f"low {name}"))
        if key not in done:
            made = true if name == "off" else real if name == "stage one" else bench.shelf.low(clip, float(name))
            record = common.Record("what a design choice is worth on nano", asked, __file__)
            found = {"psnr_truth": None if name == "off" else round(mean_psnr(made, true), 4)}
            found["psnr_stage_one"] = None if name == "stage one" else round(mean_psnr(made, real), 4)
            record.finish(described(key, task, bench) | {"use": "stage one"}, found)


def mean_psnr(a: Tensor, b: Tensor) -> float:
    return float(metrics.psnr(a[:, 1:], b[:, 1:]).mean())


def described(key: str, task: Task, bench: Bench) -> dict[str, Any]:
    clip = task.clip
    own = {"key": key, "clip": clip.name, "kind": clip.kind, "use": clip.use, "variant": task.variant.name}
    own |= {"seed": task.seed, "measures": task.measures, "frames": clip.frames}
    return {**own, "stage_two": bench.base, "vae": bench.vae}


@dataclass(frozen=True)
class Bench:
    """The networks of a sweep: ``shelf`` with the pipeline, ``checkpoint`` (folder) and its fine-tunes in ``runs``."""

    shelf: Shelf
    checkpoint: Path
    runs: Path

    @cached_property
    def base(self) -> str:
        return sha256(self.checkpoint / WEIGHTS)[:16]

    @cached_property
    def vae(self) -> str:
        return sha256(self.shelf.pipeline.sources[0] / "vae" / WEIGHTS)[:16]

    @cached_property
    def stage_one(self) -> str:
        return sha256(self.shelf.pipeline.sources[0] / "transformer" / WEIGHTS)[:16]

    @cached_property
    def _networks(self) -> dict[str, Any]:
        return {NONE: NONE}

    def folder(self, weights: str) -> Path:
        if weights in (SHARED, NONE):
            return self.checkpoint
        return train_ablations.tuned_folder(weights, self.checkpoint, self.runs) / "export" / "transformer_2"

    def network(self, weights: str) -> Any:
        if weights not in self._networks:
            self._networks[weights] = train_ablations.network(self.folder(weights), weights == "read_only").eval()
        return self._networks[weights]

    def key(self, task: Task) -> str:
        """What decides a line."""
        clip, variant = task.clip, task.variant
        settings = asdict(replace(variant.settings, csg=None)) | {"csg": variant.settings.csg.model_dump()}
        held = NONE if variant.weights == NONE else sha256(self.folder(variant.weights) / WEIGHTS)
        parts = [VERSION, clip.digest, settings, held, self.vae, task.seed, variant.weights, task.measures]
        if clip.use == CASCADE:
            parts.append(self.stage_one)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def latents(self, task: Task) -> Tensor:
        """Stage II's latents of a variant."""
        settings = replace(task.variant.settings, seed=task.seed)
        reference = self.shelf.reference(task.clip, settings)
        return refined(self.shelf.pipeline, reference, settings, self.network(task.variant.weights))

    def frames(self, task: Task, latents: Tensor) -> Tensor:
        return decoded(self.shelf.pipeline, latents, self.shelf.truth(task.clip)[:, 0], task.variant.settings)


class Truth:
    """A clip's true frames and what comparisons need of them, made when first needed."""

    def __init__(self, shelf: Shelf, clip: Clip) -> None:
        self.shelf, self.clip = shelf, clip

    @cached_property
    def frames(self) -> Tensor:
        return self.shelf.truth(self.clip)

    @cached_property
    def latents(self) -> Tensor:
        return torch.cat(list(encode_stream(streaming(self.shelf.pipeline.vae), [self.frames[None]])), dim=2)

    @cached_property
    def features(self) -> list[list[Tensor]]:
        return baselines.features(self.frames[:, self.looked_at])

    @cached_property
    def energy(self) -> Tensor:
        return torch.cat([metrics.high_frequency_energy(part) for part in self.frames.split(16, dim=1)])

    @property
    def looked_at(self) -> list[int]:
        """The frames of the dear measures."""
        if self.clip.use == FAR:
            return [length - 1 for length in LENGTHS]
        return list(range(EVERY, self.clip.frames, EVERY))

    def score(self, bench: Bench, task: Task) -> dict[str, Any]:
        latents = bench.latents(task)
        if task.measures == LATENTS:
            return {"latent_db": round(self._latent_error(latents), 4)}
        made = bench.frames(task, latents)
        pairs = zip(made.split(16, dim=1), self.frames.split(16, dim=1), strict=True)
        psnr = torch.cat([metrics.psnr(*both) for both in pairs])
        sharp, changes = self._sharpness(made)
        dear = made[:, self.looked_at]
        ssim = metrics.ssim(dear, self.frames[:, self.looked_at])
        features = zip(dear.unbind(1), self.features, strict=True)
        lpips = torch.cat([baselines.distance(frame, known) for frame, known in features])
        found: dict[str, Any] = {"changes": rounded(changes, 3)}
        if self.clip.use == FAR:
            ends = [slice(length - LAST, length) for length in LENGTHS]
            color = metrics.delta_e(made[:, ::8], self.frames[:, ::8], cell=32)
            found |= {
                name: rounded(torch.stack([row[end].mean() for end in ends]))
                for name, row in (("psnr", psnr), ("sharpness_db", sharp))
            }
            return found | {"ssim": rounded(ssim), "st_lpips": rounded(lpips, 5), "delta_e": rounded(color, 3)}
        means = {"psnr": psnr[1:], "ssim": ssim, "st_lpips": lpips, "sharpness_db": sharp[1:]}
        return {**found, **{name: round(float(values.mean()), 5) for name, values in means.items()}}

    def _sharpness(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """Sharpness against the truth's, in dB, and the change of detail from each frame to the next."""
        planes = torch.cat([metrics.detail(part) for part in made.split(16, dim=1)])
        changes = metrics.plane_change(planes[:-1], planes[1:])
        return metrics.decibels(metrics.plane_energy(planes), self.energy), changes

    def _latent_error(self, latents: Tensor) -> float:
        """The latents' mean squared error, channels weighed as in training, in dB below 1."""
        weights = channel_weights(self.shelf.pipeline.vae.config["scale_video"])
        error = channel_error(latents[:, :, 1:], self.latents[:, :, 1:], weights)
        return float(-10 * error.log10())


def rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def newest(path: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of ``checkpoint`` (and its fine-tunes), the newest of every (use, clip, variant, seed, measures)."""
    base = sha256(checkpoint / WEIGHTS)[:16]
    without = {variant.name for variants in BY_USE.values() for variant in variants if variant.weights == NONE}
    rows = [
        row
        for row in baselines.recorded(path)
        if row["settings"]["stage_two"] == base
        or row["settings"]["variant"] in without
        or row["settings"]["use"] == "stage one"
    ]
    vaes = [row["settings"]["vae"] for row in rows]
    kept = {}
    for row in rows:
        own = row["settings"]
        if own["vae"] == vaes[-1]:
            kept[own["use"], own["clip"], own["variant"], own["seed"], own["measures"]] = row
    return list(kept.values())


if __name__ == "__main__":
    main()
