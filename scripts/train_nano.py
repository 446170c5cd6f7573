"""Train nano: the text encoder alone, then Stage I with it, then (or beside it) Stage II.

    python scripts/train_nano.py text --steps 2500
    python scripts/train_nano.py one  --steps 6000
    python scripts/train_nano.py two  --steps 5000

Every batch is a function of (seed, step) and every checkpoint holds all state, so an interrupted run started
again with the same command ends with the same weights. Weights (EMA, bfloat16) go into src/swifti2v/nano/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import T5EncoderModel

from swifti2v.flow import add_noise, denoised, shifted
from swifti2v.models.camera_head import CameraHead
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.models.text import encode_prompts, nano_text_config, nano_tokenizer
from swifti2v.train.nano import Batch, Photos, stage_one_batch, stage_two_batch
from swifti2v.train.prompts import caption

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "src" / "swifti2v" / "nano"
TEXT_LENGTH = 128  # zero padding takes part in cross-attention: inference must pad to the same length
SHIFT = 5.0
EMA_DECAY = 0.995
ECHO = {"one": 2, "two": 3}
TOKENIZER = nano_tokenizer()
COMMON: dict[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "reference_channels": 48,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "ffn_ratio": 2.5,
    "patch_size": 2,
    "motion_embedding": False,
    "absolute_positions": True,
    "prediction": "residual",
}
STAGE_ONE = COMMON | {
    "attention_pattern": ("linear",) * 5,
    "cross_attention_dim": 128,
}
STAGE_TWO = COMMON | {"attention_pattern": ("linear",) * 6}


@dataclass
class Run:
    """A training run: what is learned, its average, and where it stands."""

    name: str
    modules: dict[str, nn.Module]
    lr: float
    step: int = 0
    ema: dict[str, nn.Module] = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.ema = {key: deepcopy(module).requires_grad_(False) for key, module in self.modules.items()}
        inner = [p for name, p in self.named_parameters() if ".block" in name and p.ndim == 2 and not is_table(name)]
        chosen = {id(parameter) for parameter in inner}
        others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        self.optimizers = [
            torch.optim.Muon(inner, lr=2 * self.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    @property
    def folder(self) -> Path:
        return ROOT / "runs" / f"nano_{self.name}"

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{key}.{name}", p) for key, module in self.modules.items() for name, p in module.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def update(self, loss: Tensor, rate: float) -> float:
        """One optimizer step at ``rate`` times the learning rate; returns the gradient norm."""
        for optimizer, factor in zip(self.optimizers, (2, 1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * self.lr * rate
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, module in self.modules.items():
                pairs = zip(self.ema[key].parameters(), module.parameters(), strict=True)
                for average, value in pairs:
                    average.lerp_(value, 1 - decay)
        return float(norm)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "ema": {key: module.state_dict() for key, module in self.ema.items()},
        }
        torch.save(state, self.folder / "last.tmp")
        os.replace(self.folder / "last.tmp", self.folder / "last.pt")

    def resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
            self.ema[key].load_state_dict(state["ema"][key])

    def log(self, **row: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **row}) + "\n")


def is_table(name: str) -> bool:
    """Two-dimensional parameters that are no matrices."""
    return "table" in name or "temporal" in name


def rate(step: int, steps: int, decay: int, warmup: int = 100) -> float:
    """Warm up, stay, then fall linearly over the last ``decay`` steps: the end can be moved while it runs."""
    return min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / max(1, decay)))


def sigma_of(rng: random.Random) -> float:
    """As the sampler's levels are spread: evenly before the shift, so mostly near noise."""
    return shifted(rng.uniform(0.03, 1.0), SHIFT)


def flow_loss(
    model: nn.Module, batch: Batch, text: Tensor | None, rng: random.Random, weights: Tensor, one_step: bool = False
) -> tuple[Tensor, float, float]:
    """The loss, and the segment's error of the model and of the bare reference; ``weights`` (c,) per channel."""
    noise = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
    sigma = torch.tensor([1.0 if one_step else sigma_of(rng) for _ in range(len(batch.clean))])
    levels = sigma[:, None].repeat(1, batch.clean.shape[2])
    levels[:, : batch.context] = 0
    broad = levels[:, None, :, None, None]
    x = add_noise(batch.clean, noise, broad)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            x,
            1000 * levels,
            encoder_hidden_states=text,
            reference_hidden_states=batch.reference,
            frame_indices=batch.frame_indices,
        ).sample
    error, base = (
        ((guess - batch.clean)[:, :, batch.context :].square().mean(dim=(2, 3, 4)) * weights).mean(dim=1)
        for guess in (denoised(x, velocity, broad), batch.reference)
    )
    # Between absolute and relative error: busy photos must not drown the quiet ones.
    weight = (base + 0.02).rsqrt() / sigma.clamp(min=0.3).square()
    return (weight * error).mean(), float(error.detach().mean()), float(base.mean())


def export(module: Any, folder: Path, name: str) -> None:
    """save_pretrained in bfloat16, each file replaced whole: readers never see half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        deepcopy(module).to(torch.bfloat16).save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda path: path.name == name):
            os.replace(file, folder / file.name)


def export_all(run: Run) -> None:
    for key, module in run.ema.items():
        if key.startswith("transformer"):
            export(module, NANO / key, "config.json")
    if run.name == "one":
        export(trained_text_encoder(), NANO / "text_encoder", "config.json")
        export(trained_camera(), NANO / "camera", "config.json")
        TOKENIZER.save_pretrained(NANO / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(NANO / "scheduler")


def text_states(encoder: Any, prompts: Sequence[str]) -> Tensor:
    """(b, TEXT_LENGTH, d): encoded at the longest prompt's length, then zero-padded, which is the same and cheaper."""
    longest = min(TEXT_LENGTH, max(len(prompt.encode()) for prompt in prompts) + 1)
    states = encode_prompts(TOKENIZER, encoder, prompts, longest)
    return nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - longest))


def text_loss(run: Run, rng: random.Random, count: int) -> tuple[Tensor, float, float]:
    """How far the pooled states are from saying the motion's five amplitudes through a linear head."""
    asked = [caption(rng) for _ in range(count)]
    target = torch.tensor([item.motion.code() for item in asked])
    states = text_states(run.modules["text_encoder"], [item.prompt for item in asked])
    length = (states != 0).any(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1)
    error = (run.modules["head"](states.sum(dim=1) / length) - target).square().mean()
    return error, float(error.detach()), float(target.square().mean())


def make_run(stage: str, lr: float) -> Run:
    torch.manual_seed(0)
    if stage == "text":
        return Run(stage, {"text_encoder": T5EncoderModel(nano_text_config()), "head": nn.Linear(128, 5)}, lr)
    if stage == "two":
        return Run(stage, {"transformer_2": MobileTransformer3DModel(**STAGE_TWO)}, lr)
    return Run(stage, {"transformer": MobileTransformer3DModel(**STAGE_ONE)}, lr)


def trained_text_encoder() -> T5EncoderModel:
    """Frozen: trained on beside Stage I at its rates it forgot how to read (error 0.06 -> 0.3 of the variance)."""
    state = torch.load(ROOT / "runs" / "nano_text" / "last.pt", weights_only=True)
    encoder = T5EncoderModel(nano_text_config()).requires_grad_(False)
    encoder.load_state_dict(state["modules"]["text_encoder"])
    return encoder


def trained_camera() -> CameraHead:
    """The linear head that the text encoder was trained with."""
    state = torch.load(ROOT / "runs" / "nano_text" / "last.pt", weights_only=True)["modules"]["head"]
    camera = CameraHead(text_dim=state["weight"].shape[1])
    camera.read.load_state_dict(state)
    return camera


@dataclass
class Source:
    """Batches of a stage as a function of (seed, step); each serves ``ECHO`` steps with fresh noise: rendering costs
    as much as learning."""

    stage: str
    seed: int
    vae: NanoVAE
    photos: Photos
    encoder: T5EncoderModel | None = None
    amplitude: float = 1.0
    key: int = -1
    batch: Batch | None = None

    @property
    def weights(self) -> Tensor:
        """Half-way from latent to pixel error: a coefficient weighs as much as the VAE's scale made it small."""
        scale = torch.tensor(self.vae.config.scale_video)
        return (1 / scale) / (1 / scale).mean()

    def at(self, step: int) -> Batch:
        key = step // ECHO[self.stage]
        if self.batch is None or key != self.key:
            rng = random.Random(f"{self.stage}/{self.seed}/data/{key}")
            if self.stage == "one":
                self.batch = stage_one_batch(self.vae, self.photos, rng, self.amplitude)
            else:
                self.batch = stage_two_batch(self.vae, self.photos, rng)
            self.key = key
        return self.batch


def loss_of(run: Run, source: Source | None, seed: int) -> tuple[Tensor, float, float]:
    """Loss, error and the reference's error of the run's next step."""
    rng = random.Random(f"{run.name}/{seed}/{run.step}")
    if source is None:
        return text_loss(run, rng, 32)
    batch = source.at(run.step)
    text = text_states(source.encoder, batch.prompts) if source.encoder is not None else None
    (model,) = run.modules.values()
    return flow_loss(model, batch, text, rng, source.weights, one_step=run.name == "two")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("text", "one", "two"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=int, default=1000, help="steps at the end over which the rate falls")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amplitude", type=float, default=1.0, help="Stage I: times the motions that prompts name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=400)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    run = make_run(asked.stage, asked.lr)
    run.resume()
    print({key: sum(p.numel() for p in module.parameters()) for key, module in run.modules.items()}, run.step)
    source = None
    if asked.stage != "text":
        vae = NanoVAE.from_pretrained(NANO / "vae", torch_dtype=torch.float32)
        photos = Photos(ROOT / "data" / "photos.jsonl", "train")
        encoder = trained_text_encoder() if asked.stage == "one" else None
        source = Source(asked.stage, asked.seed, vae, photos, encoder, asked.amplitude)
    started, sums = time.time(), [0.0, 0.0, 0.0]
    while run.step < asked.steps:
        loss, error, base = loss_of(run, source, asked.seed)
        norm = run.update(loss, rate(run.step, asked.steps, asked.decay))
        sums = [old + new for old, new in zip(sums, (float(loss.detach()), error, base), strict=True)]
        if run.step % 50 == 0:
            mean = [round(value / 50, 5) for value in sums]
            run.log(loss=mean[0], error=mean[1], base=mean[2], ratio=round(sums[1] / sums[2], 4), norm=round(norm, 3))
            print(run.step, mean, "ratio", round(sums[1] / sums[2], 4), round(time.time() - started), "s", flush=True)
            sums = [0.0, 0.0, 0.0]
        if run.step % asked.save_every == 0 or run.step == asked.steps:
            run.save()
        if asked.stage != "text" and (run.step % asked.export_every == 0 or run.step == asked.steps):
            export_all(run)


if __name__ == "__main__":
    main()
