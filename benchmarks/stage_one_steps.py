"""How many steps does nano's Stage I need?

    python scripts/fetch_photos.py && python benchmarks/stage_one_steps.py --record

Camera moves over held-out photos, Stage I told the true camera, 49 frames at 320x192, decoded: PSNR of frames 1 to 48
against the true render, beside the camera alone (what Stage I starts from, through the VAE), for 1, 2, 4 and 12 steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import common
import torch
from torch import Tensor

from swifti2v import metrics
from swifti2v.camera import FAST_PAN, FAST_ZOOM, Motion, camera_video
from swifti2v.core import Size
from swifti2v.models.causal_vae import decode_stream, encode_stream
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.stage_one import Conditions, MotionPlan, motion_latents
from swifti2v.train.nano import Photos
from swifti2v.train.synthetic import make_scene, render

STEPS = (1, 2, 4, 12)
FRAMES, SIZE, SHIFT = 49, Size(320, 192), 5.0
MOVES = (
    ("pan left", Motion(pan=-FAST_PAN)),
    ("zoom out", Motion(zoom=1 / FAST_ZOOM)),
    ("tilt up", Motion(tilt=FAST_PAN)),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data")
    parser.add_argument("--clips", type=int, default=9)
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or 1)
    record = common.Record("how many steps does nano's Stage I need?", asked, __file__)
    pipeline = SwiftI2VPipeline.from_pretrained(str(asked.model or "nano"))
    photos = Photos(asked.data / "photos.jsonl", "held_out")
    found: dict[str, list[float]] = {}
    for number in range(asked.clips):
        prompt, motion = MOVES[number % len(MOVES)]
        scene = make_scene(photos[number % len(photos)], SIZE, motion, FRAMES - 1, random.Random(number))
        truth = render(scene, range(FRAMES))
        for name, low in made(pipeline, truth[None, :, :1], prompt, motion):
            value = float(metrics.psnr(low[0, :, 1:].clamp(-1, 1), truth[:, 1:]).mean())
            found.setdefault(name, []).append(round(value, 3))
    means = {name: round(sum(values) / len(values), 3) for name, values in found.items()}
    record.finish({"clips": asked.clips, "frames": FRAMES, "size": str(SIZE)}, {"mean": means, "each": found})


@torch.no_grad()
def made(pipeline: SwiftI2VPipeline, photo: Tensor, prompt: str, motion: Motion) -> list[tuple[str, Tensor]]:
    vae, text = pipeline.vae, pipeline.encode_prompt(prompt)
    camera = encode_stream(vae, camera_video(photo, motion, FRAMES))
    rows = [("camera alone", torch.cat(list(decode_stream(vae, camera, photo)), dim=2))]
    for steps in STEPS:
        plan = MotionPlan((FRAMES - 1) // 4 + 1, steps, SHIFT, seed=1)
        latents = motion_latents(pipeline.transformer, vae, photo, Conditions(text, camera=motion), plan=plan)
        rows.append((f"{steps} steps", torch.cat(list(decode_stream(vae, latents, photo)), dim=2)))
    return rows


if __name__ == "__main__":
    main()
