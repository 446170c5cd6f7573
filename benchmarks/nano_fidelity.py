"""How close do nano's VAE and nano's Stage II come to the true frames, beside what is simpler?

    python benchmarks/nano_fidelity.py --record        # after `baselines.py --record`: same clips, same measures
    python benchmarks/baselines.py --summary           # the table of both

Methods, on the clips of baselines.py and in its results file: ``vae-photo`` (oracle: nano's VAE alone, its decoder
knowing frame 0), ``carried`` (the reference with the photo's detail, no network, no VAE), ``carried-vae`` (the same
through the VAE: what Stage II starts from), ``nano`` (Stage II as shipped).

``--photos``: instead, nano's VAE and zonal DCTs of N coefficients on single held-out photos at 1280x704, one line.
``--rate``: instead, on frames 1 to 8 of the clips, one line a clip: zonal-N; ``vae``; ``vae-photo``; ``untrained-N``,
nano's transform of N coefficients with detail carried and nothing learned. PSNR alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import common
import torch
from torch import Tensor

from swifti2v import metrics, presets
from swifti2v.checkpoints import sha256
from swifti2v.core import Size
from swifti2v.evaluate.second_stage import Settings, second_stage
from swifti2v.images import read_image
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.reference import carried_reference, fit_image
from swifti2v.train import film
from swifti2v.train.vae import WIDTHS, MovingPhotos
from swifti2v.train.zonal import Draw, Yardstick, choose

CHANNELS = (48, 96, 192)
RATE_FRAMES = 8
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--rate", action="store_true")
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data")
    parser.add_argument("--only", default="", help="methods to run, by name, with commas")
    parser.add_argument("--kinds", default="film,real,synthetic")
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or 1)
    pipeline = SwiftI2VPipeline.from_pretrained(str(asked.model or "nano"))
    folder = asked.model or presets.package_folder() / "nano"
    if asked.photos or asked.rate:
        (on_photos if asked.photos else on_clips)(pipeline, asked)
        return
    methods = [m for m in methods_of(pipeline, folder) if not asked.only or m.name in asked.only.split(",")]
    options = ["--methods", "", "--kinds", asked.kinds, "--data", str(asked.data)]
    options += ["--record"] * asked.record + (["--threads", str(asked.threads)] if asked.threads else [])
    baselines.main([*options, *(["--note", asked.note] if asked.note else [])], methods)


def methods_of(pipeline: Any, folder: Path) -> list[baselines.Method]:
    vae, stage = sha256(folder / "vae" / WEIGHTS), sha256(folder / "transformer_2" / WEIGHTS)
    code = pipeline.vae.config.latents_mean[:3]  # the same weights under another basis are another VAE
    return [
        baselines.Method("vae-photo", lambda true, photo: reconstructed(pipeline.vae, true, True), vae, oracle=True),
        baselines.Method("carried", carried_pixels, "1"),
        baselines.Method("carried-vae", lambda low, photo: second_stage(pipeline, low, photo, Settings(), "none"), vae),
        baselines.Method(
            "nano", lambda low, photo: second_stage(pipeline, low, photo, Settings()), f"{vae}{stage}{code}"
        ),
    ]


def reconstructed(vae: Any, true: Tensor, known: bool) -> Tensor:
    z = vae.encode(true[None]).latent_dist.mode()
    state = vae.decoder_state(true[None, :, :1]) if known else None
    return vae.decode_chunk(z, state)[0][0].clamp(-1, 1)


def carried_pixels(low: Tensor, photo: Tensor) -> Tensor:
    size = Size(photo.shape[2], photo.shape[1])
    return torch.cat([pair[:1] for pair in carried_reference(photo[None, :, None], [low[None]], size)], dim=2)[0]


def on_clips(pipeline: Any, asked: Any) -> None:
    """The rate curve: one line a clip."""
    draw = training_clips(asked.data)
    ways: dict[str, Any] = {f"zonal-{n}": Yardstick(draw, n) for n in CHANNELS}
    ways["vae"] = lambda x: reconstructed(pipeline.vae, x, False)
    ways["vae-photo"] = lambda x: reconstructed(pipeline.vae, x, True)
    for n in (48, 192):
        ways[f"untrained-{n}"] = partial(reconstructed, NanoVAE(**choose(draw, n, 300)).eval(), known=False)
    with torch.no_grad():
        for clip in baselines.listed(asked.data, asked.kinds.split(",")):
            record = common.Record("rate curve of nano's VAE and the zonal DCT", asked, __file__)
            x = baselines.truth_of(clip, asked.data)[:, : RATE_FRAMES + 1]
            found = {name: way(x).clamp(-1, 1)[:, 1:] for name, way in ways.items()}
            values = {name: round(float(metrics.psnr(y, x[:, 1:]).mean()), 3) for name, y in found.items()}
            record.finish({"clip": clip.name, "kind": clip.kind, "size": str(clip.size)}, values)


def training_clips(data: Path) -> Draw:
    """Film and moving photos as the VAE was trained on, 128 pixels a side."""
    photos = MovingPhotos(data / "photos.jsonl", "train", (), 0, WIDTHS)
    shots = film.load(data / "cache" / "film")

    def draw(index: int, frames: int) -> Tensor:
        rng = random.Random(f"zonal/{frames}/{index}")
        if shots and rng.random() < (0.25 if frames == 1 else 0.5):
            return film.crop(shots, rng, frames, 128)
        return photos.clip(rng, frames, 128)

    return draw


def on_photos(pipeline: Any, asked: Any) -> None:
    """Single frames: held-out photos fitted to 1280x704, none enlarged."""
    record = common.Record("nano's VAE against the zonal DCT, single photos", asked, __file__)
    lines = (asked.data / "photos.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "held_out"]
    rows = [row for row in rows if row["width"] >= 1280 and row["height"] >= 704]
    draw = training_clips(asked.data)
    ways: dict[str, Any] = {f"zonal-{n}": Yardstick(draw, n) for n in CHANNELS}
    ways["vae"] = lambda x: reconstructed(pipeline.vae, x, False)
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for row in rows:
            x = fit_image(read_image(asked.data / row["path"]).pixels, Size(1280, 704))[0]
            for name, way in ways.items():
                found[name].append(round(float(metrics.psnr(way(x).clamp(-1, 1), x)[0]), 3))
    means = {name: round(sum(values) / len(values), 3) for name, values in found.items()}
    record.finish({"photos": [row["path"] for row in rows], "size": "1280x704"}, {"mean": means, "each": found})


if __name__ == "__main__":
    main()
