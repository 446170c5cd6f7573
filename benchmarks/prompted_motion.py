"""Does the camera go where the sentence says? Held-out pairs of photo and prompt, motion measured by optical flow.

    python scripts/fetch_photos.py && pip install '.[evaluate]'          # once
    python benchmarks/prompted_motion.py --record

The 112 hand-written prompts of prompts_2.txt, in turn over the held-out photos; Stage I alone (81 frames at
320x192, or 192x320 for portraits, the preset's steps), decoded; the camera's path is fitted to classical flow between
the frames (``evaluate.optical_flow``) and judged by its ``agreement``. No motion word asks for a slow zoom in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from prompts import hand_written

from swifti2v import presets
from swifti2v.camera import Motion
from swifti2v.core import Size
from swifti2v.evaluate.optical_flow import agreement, motion_of
from swifti2v.images import read_image
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.reference import fit_image

SIZES = (Size(1280, 768), Size(768, 1280))  # Stage II's; Stage I works at a quarter


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data")
    parser.add_argument("--pairs", type=int, default=112)
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or 1)
    record = common.Record("In how many pairs does the camera go where the prompt says?", asked, __file__)
    with common.workplace(asked) as (_, model):
        pipeline = SwiftI2VPipeline.from_pretrained(str(model or "nano"))
        pipeline.set_progress_bar_config(disable=True)
        photos = [common.PHOTO] if asked.tiny else held_out(asked.data)
        prompts = hand_written("prompts_2")
        rows = []
        for number in range(2 if asked.tiny else asked.pairs):
            prompt, code = prompts[number % len(prompts)]
            rows.append(judged(pipeline, photos[number % len(photos)], prompt, Motion.from_code(code), asked.tiny))
    right = sum(row["right"] for row in rows)
    wrong = [row for row in rows if not row["right"]]
    settings = {"pairs": len(rows), "photos": len(photos), "frames": 9 if asked.tiny else 81}
    record.finish(settings, {"right": right, "share": round(right / len(rows), 3), "wrong": wrong})


def held_out(data: Path) -> list[Path]:
    rows = [json.loads(line) for line in (data / "photos.jsonl").read_text(encoding="utf-8").splitlines()]
    return [data / row["path"] for row in rows if row["split"] == "held_out"]


def judged(pipeline: Any, path: Path, prompt: str, told: Motion, tiny: bool) -> dict[str, Any]:
    source = read_image(path)
    size = Size(128, 64) if tiny else SIZES[int(source.size.height > source.size.width)]
    request, _ = presets.resolve(
        pipeline.preset, prompt=prompt, size=str(size), num_frames=9 if tiny else 81, seed=1, photo_size=source.size
    )
    photo = fit_image(source.pixels, request.size, request.fit)
    frames = torch.cat(list(pipeline.motion(photo, request)), dim=2)[0]
    found = motion_of(frames)
    result = agreement(found, told)
    code = [round(value, 2) for value in found.code()]
    return {
        "photo": path.name,
        "prompt": prompt,
        "asked": [round(value, 2) for value in told.code()],
        "found": code,
        "right": result.right,
    }


if __name__ == "__main__":
    main()
