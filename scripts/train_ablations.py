"""The retrained variants of docs/ablations.md: short fine-tunes of nano's Stage II, all from one checkpoint.

    python scripts/train_ablations.py scenes --first 0 --stride 2 &      # two processes share the scenes
    python scripts/train_ablations.py scenes --first 1 --stride 2
    python scripts/train_ablations.py tune control read_only             # each until its last step; again = resume
    python scripts/train_ablations.py tune off 0.25 0.4 0.625 0.8333

``control`` and ``read_only`` learn from Stage II's own training windows (``--windows``, as ``train.windows`` keeps
them); read_only with the mask of ``models.read_only``. The others learn from scenes: a camera over a training photo at
512x256, 49 frames, and references made of it by stage transition at a sigma, or (``off``) by shrinking alone. Every
scene holds all five references, so that the fine-tunes differ in nothing else. Fine-tunes lie in
``runs/ablations/BASE/NAME``, BASE the first digits of the checkpoint's hash: a new checkpoint gets new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swifti2v.checkpoints import read_tensors, sha256
from swifti2v.core import Size
from swifti2v.evaluate.second_stage import Settings, reference_latents
from swifti2v.models.causal_vae import encode_stream, streaming
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.models.read_only import ReadOnlyTransformer
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.reference import resize
from swifti2v.segments import Window, windows
from swifti2v.train.data import Pixels
from swifti2v.train.export import export
from swifti2v.train.loop import train
from swifti2v.train.nano import TRAINED_BLOCKS, Photos
from swifti2v.train.objective import Batch, FlowMatching, Levels
from swifti2v.train.prompts import caption
from swifti2v.train.recipe import Parts, Recipe
from swifti2v.train.recipes_nano import channel_weights
from swifti2v.train.synthetic import make_scene, render
from swifti2v.train.transition import ABLATED, StageOne, transition_pixels
from swifti2v.train.windows import Kept

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = REPOSITORY / "runs" / "ablations"
NANO = REPOSITORY / "src" / "swifti2v" / "nano"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE, FRAMES, SCALE = Size(512, 256), 49, 4
SCENES, TOGETHER = 24, 3  # scenes in all, and in a batch
TRANSITIONS = ("off", *map(str, ABLATED))
NAMES = ("control", "read_only", *TRANSITIONS)
STEPS, LR = 80, 3e-4


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("scenes", help="make the scenes that are not there yet")
    make.add_argument("--first", type=int, default=0)
    make.add_argument("--stride", type=int, default=1)
    tune = verbs.add_parser("tune", help="fine-tune")
    tune.add_argument("names", nargs="+", choices=NAMES)
    tune.add_argument("--base", type=Path, default=NANO / "transformer_2")
    tune.add_argument("--windows", type=Path, default=REPOSITORY / "runs" / "windows")
    tune.add_argument("--steps", type=int, default=STEPS)
    for verb in (make, tune):
        verb.add_argument("--root", type=Path, default=ROOT)
        verb.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    if asked.verb == "scenes":
        photos = Photos(REPOSITORY / "data" / "photos.jsonl", "train")
        pipeline = SwiftI2VPipeline.from_pretrained("nano")
        for number in range(asked.first, SCENES, asked.stride):
            scene_file(asked.root / "scenes", number, photos, pipeline)
    else:
        for name in asked.names:
            print(name, fine_tune(name, asked.base, asked.root, asked.windows, asked.steps), flush=True)


# --- scenes -----------------------------------------------------------------------------------------------------


def scene_file(folder: Path, number: int, photos: Any, pipeline: Any, size: Size = SIZE, frames: int = FRAMES) -> Path:
    """Scene ``number`` on disk: clean latents and the references by name (float16), made if not there."""
    path = folder / f"{number:03d}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(scene_latents(number, photos, pipeline, size, frames), temporary)
        os.replace(temporary, path)
        print(path.name, flush=True)
    return path


@torch.no_grad()
def scene_latents(number: int, photos: Any, pipeline: Any, size: Size, frames: int) -> dict[str, Tensor]:
    """A camera over a random training photo, seen in the five ways: latents (1, c or 2c, blocks, h, w)."""
    rng = random.Random(f"ablations/{number}")
    asked = caption(rng)
    motion = asked.motion.scaled(rng.uniform(0.5, 1.1))
    truth = render(make_scene(photos.pick(rng), size, motion, frames - 1, rng), range(frames))
    pixels = Pixels(((truth + 1) * 127.5).round().to(torch.uint8), asked.prompt, f"scene {number}", "synthetic", motion)
    made = {"clean": torch.cat(list(encode_stream(streaming(pipeline.vae), [truth[None]])), dim=2).half()}
    stage_one = StageOne.of(pipeline)
    small = Size(size.width // SCALE, size.height // SCALE)
    for name in TRANSITIONS:
        low = torch.stack([resize(frame, small) for frame in truth.unbind(1)], dim=1)
        if name != "off":
            low = torch.cat(list(transition_pixels(pixels, stage_one, float(name), number)), dim=2)[0]
        made[name] = reference_latents(pipeline, low, truth[:, 0], Settings()).half()
    return made


@dataclass(frozen=True)
class Scenes:
    """Batches of the same window of three scenes, with the references called ``name``; the order is reshuffled every
    time around. Only scenes that exist count."""

    folder: Path
    name: str
    _kept: dict[Path, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def at(self, index: int) -> Batch:
        files = sorted(self.folder.glob("*.pt"))
        if len(files) < TOGETHER:
            raise SystemExit(f"{len(files)} scenes in {self.folder}, not {TOGETHER}: make them first")
        plan = list(windows(self._read(files[0])["clean"].shape[2]))
        per_round = len(files) // TOGETHER * len(plan)
        lap, place = divmod(index, per_round)
        rng = random.Random(f"scenes/{lap}")
        rng.shuffle(files)
        order = list(range(per_round))
        rng.shuffle(order)
        group, number = divmod(order[place], len(plan))
        chosen = [self._read(file) for file in files[group * TOGETHER : (group + 1) * TOGETHER]]
        return self._batch(chosen, plan[number])

    def _batch(self, chosen: list[dict[str, Tensor]], window: Window) -> Batch:
        rows = torch.tensor(window.blocks)
        clean, reference = (
            torch.cat([item[key][:, :, rows] for item in chosen]).float() for key in ("clean", self.name)
        )
        positions = torch.tensor(window.positions("clamped", TRAINED_BLOCKS))
        return Batch(clean, reference, positions, len(window.context))

    def _read(self, file: Path) -> dict[str, Tensor]:
        if file not in self._kept:
            held = torch.load(file, weights_only=True)
            self._kept[file] = {key: held[key] for key in ("clean", self.name)}
        return self._kept[file]


@dataclass(frozen=True)
class Shuffled:
    """Stage II's own training windows, as many as there are, reshuffled every time around."""

    folder: Path
    count: int

    def at(self, index: int) -> Batch:
        lap, place = divmod(index, self.count)
        order = list(range(self.count))
        random.Random(f"windows/{lap}").shuffle(order)
        return Kept(None, self.folder).at(order[place])


# --- fine-tunes -------------------------------------------------------------------------------------------------


def fine_tune(name: str, base: Path, root: Path, kept: Path, steps: int = STEPS) -> Path:
    """The folder of the fine-tuned network ``name``, trained if it is not there."""
    out = tuned_folder(name, base, root)
    made = out / "export" / "transformer_2"
    if not made.exists():
        source: Any = Scenes(root / "scenes", name)
        if name in ("control", "read_only"):
            source = Shuffled(kept, _consecutive(kept))
        recipe = Recipe(
            f"ablation_{name}",
            partial(_build, str(base), name == "read_only"),
            partial(_given, source),
            FlowMatching(Levels(5.0, low=0.03, one=0.7), "relative"),
            steps=steps,
            lr=LR,
            warmup=max(1, steps // 12),
            decay=max(1, steps * 2 // 3),
            optimizer="muon",
            ema_decay=0.98,
            log_every=max(1, steps // 8),
            save_every=steps,
        )
        done = train(recipe, out, quiet=True)
        if done.reason != "finished":
            raise SystemExit(f"{name} was stopped at step {done.step} of {steps}: start again to go on")
        export(recipe, out, out / "export")
    return made


def tuned_folder(name: str, base: Path, root: Path = ROOT) -> Path:
    return root / sha256(base / WEIGHTS)[:8] / name


def network(folder: Path, read_only: bool = False) -> MobileTransformer3DModel:
    """The network in ``folder``, float32; with the mask of ``models.read_only`` if asked for."""
    if not read_only:
        return MobileTransformer3DModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    made = ReadOnlyTransformer(**{key: value for key, value in config.items() if not key.startswith("_")})
    made.load_state_dict(read_tensors(folder / WEIGHTS))
    return made.float().eval()


def _build(base: str, read_only: bool) -> Parts:
    weights = channel_weights(NanoVAE.load_config(NANO / "vae")["scale_video"])
    model = network(Path(base), read_only)
    if model.config.out_channels != len(weights):  # a toy: its own VAE's weights are not worth having
        weights = torch.ones(model.config.out_channels)
    return Parts({"transformer_2": model.train()}, constants={"channel_weights": weights})


def _given(source: Any, parts: Parts) -> Any:
    return source


def _consecutive(folder: Path) -> int:
    count = next(number for number in _naturals() if not (folder / f"{number:06d}.npz").exists())
    if not count:
        raise SystemExit(f"no windows in {folder}: Stage II's training leaves them there")
    return count


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


if __name__ == "__main__":
    main()
