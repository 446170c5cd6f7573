"""Measure nano's two networks on held-out photos: does the picture move as asked, and is Stage II worth its time?

    python scripts/evaluate_nano.py one --photos 4 --sheet runs/sheet_one.png
    python scripts/evaluate_nano.py two --photos 6

Stage I: 81 frames in 12 steps; the motion found in frame 80 against the prompt's, and PSNR over frames 1..80 against
the true warp beside those of the unmoved photo and of the photo moved by the camera alone. Stage II: over CSG
windows; PSNR against the true frames beside the enlarged reference and the VAE's own reconstruction. One JSON line a
result.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from swifti2v.camera import Motion, camera_video
from swifti2v.core import Size
from swifti2v.flow import euler, sigmas
from swifti2v.models.causal_vae import streaming
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.noise import blocks_noise
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import Window, windows
from swifti2v.stage_one import Conditions, MotionPlan, motion_latents
from swifti2v.train.nano import TRAINED_BLOCKS, Photos, block_frames, encode_blocks, low_resolution
from swifti2v.train.prompts import motion_of, parse
from swifti2v.train.synthetic import Scene, make_scene, render

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "src" / "swifti2v" / "nano"
STEPS = 1  # of Stage II, as the preset has it
PROMPTS = (
    "pan left",
    "the camera pans right quickly",
    "slow zoom in",
    "zoom out, a wooden house",
    "a mountain lake at dawn, tilt up",
    "roll clockwise",
    "static shot",
    "the camera gently zooms in and pan to the right",
)


def decode(vae: NanoVAE, latents: Tensor) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    return vae.decode_chunk(latents * vae.latents_std.view(shape) + vae.latents_mean.view(shape))[0][0].clamp(-1, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    return round(10 * math.log10(4 / max(1e-9, float((a - b).square().mean()))), 2)


def measured(photo: Tensor, frame: Tensor) -> Motion:
    """The pan, tilt, zoom and roll that best carry ``photo`` (3, h, w) into ``frame``, by descent from no motion."""
    small = [F.interpolate(x[None], scale_factor=0.25, mode="bicubic", antialias=True) for x in (photo, frame)]
    aspect = photo.shape[2] / photo.shape[1]
    values = torch.zeros(4, requires_grad=True)  # view x, y (in widths, heights), log scale, angle
    with torch.enable_grad():
        for blur in (6, 3, 1):
            a, b = (F.avg_pool2d(x, blur, 1, blur // 2) if blur > 1 else x for x in small)
            optimizer = torch.optim.Adam([values], lr=0.004 if blur > 1 else 0.001)
            for _ in range(80):
                x, y, log_scale, angle = values
                cos, sin = angle.cos() * log_scale.exp(), angle.sin() * log_scale.exp()
                theta = torch.stack([torch.stack([cos, -sin / aspect, 2 * x]), torch.stack([sin * aspect, cos, 2 * y])])
                grid = F.affine_grid(theta[None], list(a.shape), align_corners=False)
                inside = (grid.abs().amax(dim=-1) < 0.97).float()[:, None]
                error = ((F.grid_sample(a, grid, align_corners=False) - b).square() * inside).sum() / inside.sum()
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
    x, y, log_scale, angle = values.detach().tolist()
    return Motion(round(x, 4), round(-y, 4), round(math.exp(-log_scale), 4), round(math.degrees(angle), 3))


def stage_one(asked: argparse.Namespace) -> None:
    pipeline = SwiftI2VPipeline.from_pretrained(NANO)
    vae, dit = pipeline.vae, pipeline.transformer.to(torch.bfloat16)
    photos, size = Photos(ROOT / "data" / "photos.jsonl", asked.split), Size.parse(asked.size)
    rows: list[Tensor] = []
    totals: dict[str, list[float]] = {}
    for prompt in PROMPTS[: asked.prompts]:
        text = pipeline.encode_prompt(prompt)
        heard = Motion.from_code(pipeline.camera(text)[0].tolist())
        for index in range(asked.photos):
            photo = photos[index * len(photos) // asked.photos]
            scene = make_scene(photo, size, parse(prompt), 80, random.Random(index))
            picture, started = scene.photo[None, :, None], time.time()
            told = Conditions(text, camera=heard)
            latents = list(motion_latents(dit, streaming(vae), picture, told, plan=MotionPlan(21, 12, 5.0, seed=0)))
            seconds = time.time() - started
            clip, truth = decode(vae, torch.cat(latents, dim=2)), render(scene, range(81))
            moved = torch.cat(list(camera_video(picture, heard, 81)), dim=2)[0]
            found, wanted = measured(scene.photo, clip[:, 80]), scene.motion
            scores = {
                "psnr": psnr(clip[:, 1:], truth[:, 1:]),
                "camera_alone": psnr(moved[:, 1:], truth[:, 1:]),
                "still": psnr(scene.photo[:, None], truth[:, 1:]),
            }
            codes = {"asked": wanted.code(), "found": found.code()}
            rounded = {key: [round(value, 2) for value in code] for key, code in codes.items()}
            print(json.dumps({"prompt": prompt, "photo": index, "seconds": round(seconds, 1), **scores, **rounded}))
            for key, value in scores.items():
                totals.setdefault(key, []).append(value)
            if index == asked.show:
                rows.append(torch.cat([clip[:, k] for k in (0, 27, 54, 80)] + [truth[:, 80]], dim=2))
    print(json.dumps({key: round(sum(values) / len(values), 2) for key, values in totals.items()}))
    if asked.sheet:
        save(torch.cat(rows, dim=1), asked.sheet)


def stage_two_clip(model: Any, vae: NanoVAE, scene: Scene, blocks: int) -> dict[str, float]:
    frames = [frame for block in range(blocks) for frame in block_frames(block)]
    truth = render(scene, frames)
    low = low_resolution(vae, truth, random.Random(1))  # this seed does not soften
    clean = encode_blocks(vae, truth[:, :1], truth[:, 1:])
    reference = encode_blocks(vae, truth[:, :1], low[:, 1:])
    done, started = reference[:, :, :1], time.time()
    for window in windows(blocks):
        known = torch.cat([done[:, :, list(window.context)], reference[:, :, list(window.segment)]], dim=2)
        made = known_reference(model, reference, known, window)
        done = torch.cat([done, made], dim=2)
    seconds = time.time() - started
    return {
        "seconds": round(seconds, 1),
        "made": psnr(decode(vae, done)[:, 1:], truth[:, 1:]),
        "bicubic": psnr(low[:, 1:], truth[:, 1:]),
        "reference_decoded": psnr(decode(vae, reference)[:, 1:], truth[:, 1:]),
        "vae": psnr(decode(vae, clean)[:, 1:], truth[:, 1:]),
        "latent_error": round(float((done - clean)[:, :, 1:].square().mean()), 5),
        "latent_error_reference": round(float((reference - clean)[:, :, 1:].square().mean()), 5),
    }


def known_reference(model: Any, reference: Tensor, known: Tensor, window: Window) -> Tensor:
    """The window's segment; its context enters as generated, its reference as rendered."""
    context = len(window.context)
    noise = blocks_noise((1, reference.shape[1], *reference.shape[3:]), window.segment, seed=0)
    positions = torch.tensor(window.positions("clamped", TRAINED_BLOCKS))

    def velocity(x: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((1, len(window.blocks)), 1000 * sigma)
        timestep[:, :context] = 0
        whole = torch.cat([known[:, :, :context], x], dim=2)
        hint = reference[:, :, list(window.blocks)]
        return model(whole, timestep, reference_hidden_states=hint, frame_indices=positions).sample[:, :, context:]

    return euler(velocity, noise, sigmas(STEPS, 5.0))


def stage_two(asked: argparse.Namespace) -> None:
    vae = NanoVAE.from_pretrained(NANO / "vae", torch_dtype=torch.float32)
    model = MobileTransformer3DModel.from_pretrained(NANO / "transformer_2", torch_dtype=torch.bfloat16)
    photos, size = Photos(ROOT / "data" / "photos.jsonl", asked.split), Size.parse(asked.size)
    totals: dict[str, list[float]] = {}
    for index in range(asked.photos):
        motion = motion_of((("left", "in", "up", "clockwise")[index % 4],), 1)
        scene = make_scene(photos[index * len(photos) // asked.photos], size, motion, 80, random.Random(index))
        scores = stage_two_clip(model, vae, scene, asked.blocks)
        print(json.dumps({"photo": index, **scores}), flush=True)
        for key, value in scores.items():
            totals.setdefault(key, []).append(value)
    print(json.dumps({key: round(sum(values) / len(values), 4) for key, values in totals.items()}))


def save(picture: Tensor, path: str) -> None:
    array = ((picture.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    Image.fromarray(array).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("one", "two"))
    parser.add_argument("--size", default="640x352")
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--show", type=int, default=0, help="the photo on the contact sheet")
    parser.add_argument("--sheet", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        (stage_one if asked.stage == "one" else stage_two)(asked)


if __name__ == "__main__":
    main()
