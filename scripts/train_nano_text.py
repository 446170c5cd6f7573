"""Train nano's reader of prompts further, from the shipped weights: text encoder and camera head on fresh captions.

    python scripts/train_nano_text.py --steps 9000 --decay 3000

Every batch is a function of (seed, step) and the checkpoint holds all state, so an interrupted run started again with
the same command ends with the same weights. Beside ``last.pt`` it
writes ``export/text_encoder`` and ``export/camera``, bfloat16: the average of the weights where that errs less on 512
captions of its own seed, else the weights as they stand. Nothing under src/ is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from swifti2v.models.camera_head import CameraHead
from swifti2v.models.text import encode_prompts, nano_tokenizer
from swifti2v.train.prompts import Caption, caption

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "src" / "swifti2v" / "nano"
TEXT_LENGTH = 128
EMA_DECAY = 0.998
TYPOS = 0.25
CHUNK = 16
TOKENIZER = nano_tokenizer()


def started(folder: Path) -> nn.ModuleDict:
    """The weights of a nano folder as modules ``text_encoder`` and ``head``."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    camera = CameraHead.from_pretrained(folder / "camera", torch_dtype=torch.float32)
    return nn.ModuleDict({"text_encoder": encoder, "head": camera.read}).train()


def read(modules: nn.ModuleDict, captions: list[Caption]) -> Tensor:
    """The head's reading (b, 5) of the mean state, as ``CameraHead`` takes it."""
    longest = min(TEXT_LENGTH, max(len(item.prompt.encode()) for item in captions) + 1)
    states = encode_prompts(TOKENIZER, modules["text_encoder"], [item.prompt for item in captions], longest).float()
    length = (states != 0).any(dim=-1).sum(dim=-1, keepdim=True)
    return modules["head"](states.sum(dim=1) / length)


def error_of(modules: nn.ModuleDict, captions: list[Caption]) -> Tensor:
    target = torch.tensor([item.motion.code() for item in captions])
    return (read(modules, captions) - target).square().mean()


def learned(modules: nn.ModuleDict, captions: list[Caption]) -> float:
    """The mean error; adds its gradient. In chunks of like length: padding costs as much as words."""
    captions = sorted(captions, key=lambda item: len(item.prompt.encode()))
    total = 0.0
    for at in range(0, len(captions), CHUNK):
        chunk = captions[at : at + CHUNK]
        with torch.autocast("cpu", torch.bfloat16):
            loss = error_of(modules, chunk) * (len(chunk) / len(captions))
        loss.backward()
        total += float(loss.detach())
    return total


def optimizers_of(modules: nn.ModuleDict, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices at twice the rate, AdamW for the rest."""
    named = list(modules.named_parameters())
    inner = [p for name, p in named if ".block" in name and p.ndim == 2 and "bias" not in name]
    chosen = {id(parameter) for parameter in inner}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    muon = torch.optim.Muon(inner, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def export(modules: nn.ModuleDict, folder: Path) -> None:
    """``save_pretrained`` in bfloat16, each file replaced whole."""
    camera = CameraHead(text_dim=modules["head"].in_features)
    camera.read.load_state_dict(modules["head"].state_dict())
    for key, module in (("text_encoder", deepcopy(modules["text_encoder"])), ("camera", camera)):
        (folder / key).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            module.to(torch.bfloat16).save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / key / file.name)


@torch.no_grad()
def checked(modules: nn.ModuleDict) -> float:
    """Mean squared error over that of reading nothing, on 512 captions that training does not draw."""
    rng = random.Random("check")
    captions = [caption(rng, TYPOS) for _ in range(512)]
    codes = torch.tensor([item.motion.code() for item in captions])
    with torch.autocast("cpu", torch.bfloat16):
        errors = [error_of(modules, captions[at : at + 64]) for at in range(0, 512, 64)]
    return round(float(torch.stack(errors).mean() / codes.square().mean()), 4)


@dataclass
class Run:
    """What is learned, its average, and where it stands; ``last.pt`` holds all of it."""

    path: Path
    modules: nn.ModuleDict
    average: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "ema": {key: module.state_dict() for key, module in self.average.items()},
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.step = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for key in self.modules:
            self.modules[key].load_state_dict(state["modules"][key])
            self.average[key].load_state_dict(state["ema"][key])

    def update(self, captions: list[Caption], rate: float) -> float:
        """One step of AdamW at ``rate`` and of Muon at twice that; returns the error."""
        self.modules.zero_grad(set_to_none=True)
        error = learned(self.modules, captions)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer, times in zip(self.optimizers, (2, 1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * rate
            optimizer.step()
        self.step += 1
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(value, 1 - min(EMA_DECAY, (1 + self.step) / (10 + self.step)))
        return error


def train(asked: argparse.Namespace) -> None:
    modules = started(asked.start)
    average = deepcopy(modules).requires_grad_(False)
    run = Run(asked.out / "last.pt", modules, average, optimizers_of(modules, asked.lr))
    if run.path.exists():
        run.resume()
    begun, errors, saved_at = time.time(), [], time.time()
    while run.step < asked.steps:
        rng = random.Random(f"text2/{asked.seed}/{run.step}")
        factor = min(1.0, (run.step + 1) / 100, max(0.02, (asked.steps - run.step) / asked.decay))
        errors.append(run.update([caption(rng, TYPOS) for _ in range(asked.batch)], asked.lr * factor))
        ended = run.step == asked.steps
        if run.step % 100 == 0 or ended:
            row = {"step": run.step, "loss": round(sum(errors) / len(errors), 5), "s": round(time.time() - begun)}
            print(json.dumps(row), flush=True)
            errors.clear()
        if time.time() - saved_at > 60 or ended:
            run.save()
            saved_at = time.time()
        if run.step % 500 == 0 or ended:
            ratios = {"ratio": checked(modules), "ratio_ema": checked(average)}
            print(json.dumps({"step": run.step, **ratios}), flush=True)
            export(average if ratios["ratio_ema"] <= ratios["ratio"] else modules, asked.out / "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=int, default=3000, help="steps at the end over which the rate falls")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon learns at twice that")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, default=NANO, help="a folder with text_encoder and camera")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "nano_text2")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train(asked)


if __name__ == "__main__":
    main()
