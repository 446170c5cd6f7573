"""The held-out clips of docs/ablations.md: true frames, their low-resolution motion, and Stage II's references.

Everything is made once and kept under ``data/cache/ablations``. The choice was made before anything was measured: of
the film every third held-out shot, of real clips the first shot of the first four files, and photos by name for their
detail. It knows nothing of variants and scores nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import baselines
import numpy as np
import torch
from torch import Tensor

from swifti2v.camera import FAST_PAN, FAST_ROLL, FAST_ZOOM, Motion
from swifti2v.checkpoints import sha256
from swifti2v.core import Size
from swifti2v.evaluate.second_stage import Settings, reference_latents
from swifti2v.reference import fit_pixels, resize
from swifti2v.train.data import Pixels
from swifti2v.train.nano import Photos
from swifti2v.train.synthetic import make_scene, render
from swifti2v.train.transition import StageOne, transition_pixels

SIZE, SMALL = Size(512, 256), Size(128, 64)
FRAMES, LONG = 49, 321
MOVES = (
    Motion(pan=FAST_PAN),
    Motion(zoom=FAST_ZOOM),
    Motion(tilt=-FAST_PAN * 2 / 3, zoom=FAST_ZOOM ** (1 / 3)),
    Motion(roll=FAST_ROLL, pan=-FAST_PAN / 3),
    Motion(pan=-FAST_PAN * 2 / 3),
    Motion(zoom=1 / FAST_ZOOM),
    Motion(tilt=FAST_PAN / 3, pan=FAST_PAN / 3),
    Motion(zoom=FAST_ZOOM ** (2 / 3), roll=-FAST_ROLL / 2),
)
PHOTOS = (
    "castle-maintenon.jpg",
    "cincinnati-bridge.jpg",
    "flowers.png",
    "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "citrus-fruits.jpg",
    "panther-chameleon-female.jpg",
    "butterfly.png",
    "after-the-rain.jpg",
)
PLAIN, CASCADE, FAR = "plain", "cascade", "long"


@dataclass(frozen=True)
class Clip:
    """A true clip at 512x256. ``use``: "plain" clips are shrunk four times; of "cascade" ones Stage I makes the motion,
    told the true camera; "long" ones have 321 frames. ``recipe`` decides the pixels."""

    name: str
    kind: str
    use: str
    frames: int
    recipe: tuple[tuple[str, Any], ...]

    @property
    def digest(self) -> str:
        text = json.dumps([self.use, self.frames, str(SIZE), *self.recipe])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def listed(data: Path) -> list[Clip]:
    """Plain clips first, kinds in turn, so that the first few are a fair sample; then cascade, then long ones."""
    rows = baselines.rows_of(data / "clips.jsonl", "scripts/fetch_clips.py")
    fitting = [row for row in rows if row["end"] - row["start"] >= FRAMES]
    film = sorted((row for row in fitting if row["kind"] == "film"), key=lambda row: row["path"], reverse=True)
    real: dict[str, dict[str, Any]] = {}
    for row in fitting:
        if row["kind"] == "real":
            real.setdefault(row["path"], row)
    shots = zip(film[::3][:4], list(real.values())[:4], strict=True)
    plain = []
    for number, (one, other) in enumerate(shots):
        plain += [_shot(one), _shot(other), _camera(number, PLAIN, FRAMES)]
    cascade = [_camera(number, CASCADE, FRAMES) for number in range(len(PHOTOS))]
    return [*plain, *cascade, *(_camera(number, FAR, LONG) for number in range(4))]


def _shot(row: dict[str, Any]) -> Clip:
    start = row["start"] + (row["end"] - row["start"] - FRAMES) // 2
    recipe = (("path", row["path"]), ("sha256", row["sha256"]), ("start", start))
    return Clip(f"{Path(row['path']).stem}:{start}", row["kind"], PLAIN, FRAMES, recipe)


def _camera(number: int, use: str, frames: int) -> Clip:
    name = f"{Path(PHOTOS[number]).stem}:{use}"
    return Clip(name, "synthetic", use, frames, (("photo", PHOTOS[number]), ("move", number)))


def motion(clip: Clip) -> Motion:
    """The camera's, of a synthetic clip; long clips go half as fast, so that the photo still holds them."""
    move = MOVES[dict(clip.recipe)["move"]]
    return move.scaled(0.5) if clip.use == FAR else move


@dataclass(frozen=True)
class Shelf:
    """Clips' tensors on disk, made when first asked for. ``photos``: the held-out ones, loaded when needed."""

    data: Path
    pipeline: Any

    def truth(self, clip: Clip) -> Tensor:
        """The true frames (3, t, h, w) in [-1, 1], to 8 bits."""
        made = self._kept(f"{clip.digest}_truth", lambda: self._frames(clip))
        return torch.from_numpy(made).float() / 127.5 - 1

    def low(self, clip: Clip, sigma: float | None = None) -> Tensor:
        """The motion at a quarter of the size (3, t, h, w): the truth shrunk or, of a cascade clip, Stage I's output;
        with ``sigma`` what stage transition makes of the truth."""
        truth = self.truth(clip)
        if clip.use != CASCADE and sigma is None:
            return resized(truth)
        # sigma 1 is Stage I from pure noise: what it gives at inference
        name = f"{clip.digest}_{self._weights('transformer')}_{1 if sigma is None else sigma}"
        return torch.from_numpy(self._kept(name, lambda: self._stage_one(clip, truth, sigma)))

    def reference(self, clip: Clip, settings: Settings) -> Tensor:
        """``second_stage.reference_latents``, remembered."""
        key = f"{clip.digest}_{self._encoder()}_{int(settings.photo_first)}{int(settings.carries)}"
        if clip.use == CASCADE:
            key += f"_{self._weights('transformer')}_{self._weights('vae')}"

        def make() -> np.ndarray:
            return reference_latents(self.pipeline, self.low(clip), self.truth(clip)[:, 0], settings).numpy()

        return torch.from_numpy(self._kept(f"{key}_reference", make))

    def _stage_one(self, clip: Clip, truth: Tensor, sigma: float | None) -> np.ndarray:
        pixels = Pixels(((truth + 1) * 127.5).round().to(torch.uint8), "", clip.name, clip.kind, motion(clip))
        nearly_one = 1 - 1e-6  # stage transition's sigma lies below 1; this leaves nothing of the truth
        chunks = transition_pixels(pixels, StageOne.of(self.pipeline), nearly_one if sigma is None else sigma, 0)
        with torch.no_grad():
            return torch.cat(list(chunks), dim=2)[0].numpy()

    def _frames(self, clip: Clip) -> np.ndarray:
        recipe = dict(clip.recipe)
        if "start" in recipe:
            frames = decoded(self.data / recipe["path"], recipe["start"], clip.frames)
        else:
            held = Photos(self.data / "photos.jsonl", "held_out")
            photo = held[held.names.index(recipe["photo"])]
            scene = make_scene(photo, SIZE, motion(clip), clip.frames - 1, random.Random(recipe["move"]))
            parts = [render(scene, range(i, min(i + 16, clip.frames))) for i in range(0, clip.frames, 16)]
            frames = torch.cat(parts, dim=1)
        return ((frames + 1) * 127.5).round().to(torch.uint8).numpy()

    def _encoder(self) -> str:
        """The encoder is fixed by lists in the config, whatever the decoder has learned."""
        config = self.pipeline.vae.config
        lists = [list(config[name]) for name in ("kept_image", "kept_video", "scale_image", "scale_video")]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:8]

    def _weights(self, part: str) -> str:
        return sha256(self.pipeline.sources[0] / part / "diffusion_pytorch_model.safetensors")[:8]

    def _kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.data / "cache" / "ablations" / f"{name}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            with open(part, "wb") as file:
                np.save(file, make())
            os.replace(part, path)
        return np.load(path)


def resized(truth: Tensor) -> Tensor:
    """Frames at a quarter of the size."""
    return torch.stack([resize(frame, SMALL) for frame in truth.unbind(1)], dim=1)


def decoded(path: Path, start: int, count: int) -> Tensor:
    """``count`` frames of a file from frame ``start`` on, filling 512x256."""
    frames: list[Tensor] = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= start:
                matrix = 1 if frame.height >= 720 else 5  # untagged files: BT.709 from 720 lines on, else BT.601
                pixels = frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
                frames.append(fit_pixels(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, SIZE))
            if len(frames) == count:
                return torch.stack(frames, dim=1)
    raise SystemExit(f"{path.name} ends before frame {start + count}")
