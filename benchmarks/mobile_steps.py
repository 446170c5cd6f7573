"""What do few steps cost mobile-nano, and what does each loss of its distillation give?

    python scripts/fetch_photos.py && python scripts/fetch_clips.py      # once
    python benchmarks/mobile_steps.py --record                           # the shipped network in 2 steps and in 1
    python benchmarks/mobile_steps.py --entry teacher=runs/mobile_nano/export/transformer:30 \
        --entry two=runs/mobile_nano_two/export/transformer:2 --record   # the first entry is the one compared with

Held-out clips of 17 frames at 640x384: film and real ones under their own measured motion score, and camera pushes
over held-out photos. Every entry gets frame 0, the score and the same noise. Against the true frames, which are one
answer of many: PSNR of frames 1 to 16, ST-LPIPS and sharpness of every fourth. Against the first entry's video: PSNR.
"motion": the motion score of what was made over the one asked for; "spread": how far apart the motions of two seeds
are, over their size (0: always the same motion; 1.41: nothing in common). "still" shows the photo 17 times, "push"
pushes into it by the score. Means with bootstrap intervals of paired differences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import common
import torch
from torch import Tensor

from swifti2v import metrics, motion_field, presets
from swifti2v.camera import camera_video
from swifti2v.core import Size
from swifti2v.evaluate import perceptual
from swifti2v.mobile import MobileI2VPipeline
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.motion_score import motion_score
from swifti2v.reference import fit_pixels
from swifti2v.tiny import tiny_mobile
from swifti2v.train.moving import SCORES, push_of
from swifti2v.train.nano import Photos
from swifti2v.train.synthetic import make_scene, render

SIZE, FRAMES, SCORED = Size(640, 384), 17, (4, 8, 12, 16)
PUSHES, PUSH_SCORES = 12, (0.6, 1.5, 3.0)
DRAWS = 2000


@dataclass(frozen=True)
class Entry:
    """A network (folder; empty: the shipped one) in so many steps."""

    name: str
    folder: str
    steps: int
    sampler: str = "euler"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """``NAME=FOLDER:STEPS[:renoise]``."""
        name, _, rest = text.partition("=")
        folder, steps, *sampler = rest.split(":")
        return cls(name, folder, int(steps), *sampler)


@dataclass(frozen=True)
class Truth:
    """A held-out clip: frames (3, 17, h, w) in [-1, 1], its motion score."""

    name: str
    kind: str
    frames: Tensor
    score: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data")
    parser.add_argument("--entry", action="append", type=Entry.parse, help="NAME=FOLDER:STEPS[:renoise]; repeat")
    parser.add_argument("--clips", type=int, help="only so many of each kind")
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or 1)
    record = common.Record("what do few steps cost mobile-nano?", asked, __file__)
    entries = asked.entry or [Entry("2 steps", "", 2), Entry("1 step", "", 1)]
    truths = [tiny_truth()] if asked.tiny else held_out(asked.data, asked.clips)
    pipelines = {entry.folder: loaded(entry.folder, asked.tiny) for entry in entries}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("still", "push", *(e.name for e in entries))}
    for number, truth in enumerate(truths):
        for name, video in plain(truth).items():
            rows[name].append(judged(video, truth, None))
        first = None
        for entry in entries:
            fields, other = (motion(pipelines[entry.folder], truth, entry, seed) for seed in (number, number + 1000))
            video = shown(fields, truth)
            first = video if first is None else first
            apart = float((fields - other).norm() / (fields.norm() * other.norm()).sqrt())
            rows[entry.name].append(judged(video, truth, first) | {"spread": apart})
    kinds = [truth.kind for truth in truths]
    results = {name: table(found, rows[entries[0].name], kinds) for name, found in rows.items()}
    settings = {"clips": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "size": str(SIZE), "frames": FRAMES}
    record.finish(settings | {"entries": {e.name: f"{e.folder} {e.steps} {e.sampler}" for e in entries}}, results)


def held_out(data: Path, limit: int | None) -> list[Truth]:
    found = []
    for kind in ("film", "real"):
        for clip in list(baselines.listed(data, [kind]))[:limit]:
            frames = baselines.truth_of(clip, data)
            fitted = torch.stack([fit_pixels(frame, SIZE) for frame in frames.unbind(1)], dim=1)
            found.append(Truth(clip.name, kind, fitted, motion_score(fitted)))
    photos = Photos(data / "photos.jsonl", "held_out")
    for number in range(PUSHES if limit is None else limit):
        score = PUSH_SCORES[number % len(PUSH_SCORES)]
        scene = make_scene(photos[number % len(photos)], SIZE, push_of(score), FRAMES - 1, random.Random(number))
        found.append(Truth(photos.names[number % len(photos)], "push", render(scene, range(FRAMES)), score))
    return found


def tiny_truth() -> Truth:
    frames = torch.rand(3, FRAMES, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Truth("noise", "noise", frames, 1.0)


def loaded(folder: str, tiny: bool) -> Any:
    if tiny:
        return tiny_mobile("mobile-nano")
    if not folder:
        return MobileI2VPipeline.from_pretrained("mobile-nano")
    return MobileI2VPipeline.from_pretrained(
        "mobile-nano", transformer=MobileTransformer3DModel.from_pretrained(folder)
    )


@torch.no_grad()
def motion(pipeline: Any, truth: Truth, entry: Entry, seed: int) -> Tensor:
    """The entry's motion fields (1, 8, 5, h, w)."""
    size = f"{truth.frames.shape[3]}x{truth.frames.shape[2]}"
    request, _ = presets.resolve(
        pipeline.preset,
        prompt="",
        size=size,
        num_frames=FRAMES,
        seed=seed,
        num_inference_steps=entry.steps,
        motion_score=asked_score(truth),
        sampler_2=entry.sampler,
    )
    return torch.cat(list(pipeline.latents(truth.frames[None, :, :1], request)), dim=2)


def asked_score(truth: Truth) -> float:
    """The network knows no score below those it was trained with."""
    return max(truth.score, SCORES[0])


def shown(fields: Tensor, truth: Truth) -> Tensor:
    """The clip (3, 17, h, w) of motion fields."""
    chunks = motion_field.decode_stream([fields], truth.frames[None, :, :1], asked_score(truth))
    return torch.cat(list(chunks), dim=2)[0]


def plain(truth: Truth) -> dict[str, Tensor]:
    """What needs no network: the photo held still, and pushed into."""
    photo = truth.frames[None, :, :1]
    pushed = torch.cat(list(camera_video(photo, push_of(truth.score), FRAMES)), dim=2)[0]
    return {"still": truth.frames[:, :1].expand(-1, FRAMES, -1, -1), "push": pushed}


def judged(video: Tensor, truth: Truth, first: Tensor | None) -> dict[str, float]:
    some, true = video[:, SCORED], truth.frames[:, SCORED]
    row = {
        "psnr": float(metrics.psnr(video[:, 1:], truth.frames[:, 1:]).mean()),
        "sharpness_db": float(metrics.decibels(*(metrics.high_frequency_energy(x) for x in (some, true))).mean()),
        "motion": motion_score(video) / asked_score(truth),
    }
    if truth.kind != "noise":  # toy size: no picture to judge, and no weights needed
        row["st_lpips"] = float(perceptual.st_lpips(some, true).mean())
    return row if first is None else row | {"psnr_to_first": float(metrics.psnr(video[:, 1:], first[:, 1:]).mean())}


def table(rows: list[dict[str, float]], first: list[dict[str, float]], kinds: list[str]) -> dict[str, Any]:
    """Means over all clips and by kind; the difference from the first entry with its 95 % interval."""
    found: dict[str, Any] = {}
    for measure in rows[0]:
        values = torch.tensor([row[measure] for row in rows]).clamp(max=99)
        found[measure] = {"all": mean(values)} | {
            kind: mean(values[torch.tensor([k == kind for k in kinds])]) for kind in sorted(set(kinds))
        }
        if rows is not first and measure in first[0]:
            gap = values - torch.tensor([row[measure] for row in first]).clamp(max=99)
            drawn = torch.randint(len(gap), (DRAWS, len(gap)), generator=torch.Generator().manual_seed(0))
            low, high = gap[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
            found[measure]["against_first"] = [mean(gap), round(low, 4), round(high, 4)]
    return found


def mean(values: Tensor) -> float:
    return round(float(values.mean()), 4)


if __name__ == "__main__":
    main()
