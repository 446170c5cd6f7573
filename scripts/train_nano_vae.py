"""Make nano's VAE: choose its fixed basis, train its refiner, measure it against the zonal DCT.

    python scripts/train_nano_vae.py basis    --out src/swifti2v/nano/vae      # once: latents are frozen from here on
    python scripts/train_nano_vae.py train    --minutes 18                     # resumes from --run if it exists
    python scripts/train_nano_vae.py evaluate

Reads data/photos.jsonl (scripts/fetch_photos.py). Motion is synthetic: pans, zooms and turns of photos.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.models.nano_vae import BLOCK, COLORS, GROUP, DecoderState, NanoVAE, dct, opponent_colors

WIDTHS = (2560, 1810, 1280, 905, 640)  # the sizes nano works at: photos are learnt from as sharp as they will be used
PEAK_SQUARED = 4.0  # pixels are in [-1, 1]
BT601 = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Picture:
    """One photo at one size: ``pixels`` (3, h, w) uint8."""

    name: str
    pixels: Tensor


def photos(data: Path, split: str) -> list[Path]:
    """Paths of a split, in the order of photos.jsonl."""
    lines = [json.loads(line) for line in (data / "photos.jsonl").read_text(encoding="utf-8").splitlines()]
    return [data / line["path"] for line in lines if line["split"] == split]


def load(path: Path, width: int) -> Picture | None:
    """A photo scaled down to ``width`` over its longer side's share of 16:9, never up; None if it is too small."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = max(width / image.width, width * 0.55 / image.height)
    if scale > 1.0:
        return None
    size = (max(width, round(image.width * scale)), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return Picture(path.stem, torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())


def fitted(path: Path, width: int, height: int, enlarge: bool = False) -> Tensor | None:
    """A photo covering (3, height, width), center crop, in [-1, 1]; None if that needs enlarging and it may not."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = max(width / image.width, height / image.height)
    if scale > 1.0 and not enlarge:
        return None
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def library(data: Path) -> list[list[Picture]]:
    """Training photos by width, in WIDTHS' order."""
    paths = photos(data, "train")
    return [[p for path in paths if (p := load(path, width)) is not None] for width in WIDTHS]


def motion(rng: random.Random, frames: int, size: int) -> Tensor:
    """A camera path for ``affine_grid``, (frames, 2, 3): frame 0 is the identity, one path in five stands still."""
    kind = rng.random()
    speed = 0.0 if kind < 0.2 else 2 * math.exp(rng.uniform(math.log(0.2), math.log(6.0))) / size
    angle = rng.uniform(0, 2 * math.pi)
    zoom = rng.gauss(0, 0.004) if kind > 0.5 else 0.0
    turn = rng.gauss(0, 0.004) if kind > 0.8 else 0.0
    steps = torch.arange(frames, dtype=torch.float32)
    scale, theta = torch.exp(zoom * steps), turn * steps
    rows = [scale * theta.cos(), -scale * theta.sin(), speed * math.cos(angle) * steps]
    rows += [scale * theta.sin(), scale * theta.cos(), speed * math.sin(angle) * steps]
    return torch.stack(rows, dim=-1).reshape(frames, 2, 3)


def clip(pictures: list[list[Picture]], rng: random.Random, frames: int, size: int) -> Tensor:
    """One synthetic clip (3, frames, size, size) in [-1, 1]: a camera moving over a random photo at a random scale."""
    scale = rng.choices(range(len(WIDTHS)), weights=(3, 3, 3, 1, 1))[0]
    picture = rng.choice(pictures[scale]).pixels
    margin = min(64, (min(picture.shape[1:]) - size) // 2)
    side = size + 2 * margin
    top, left = rng.randint(0, picture.shape[1] - side), rng.randint(0, picture.shape[2] - side)
    window = picture[:, top : top + side, left : left + side].float() / 127.5 - 1
    if rng.random() < 0.5:
        window = window.flip(2)
    if rng.random() < 0.25:
        window = window.transpose(1, 2)
    if frames == 1:
        return window[:, None, margin : margin + size, margin : margin + size]
    grid = F.affine_grid(motion(rng, frames, size), [frames, 3, size, size], align_corners=False)
    grid = grid * (size / side)
    moved = F.grid_sample(
        window.expand(frames, -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return moved.clamp(-1, 1).transpose(0, 1)


# -- the fixed basis ------------------------------------------------------------------------------------------------


def to_coefficients(x: Tensor, colors: Tensor) -> Tensor:
    """Pixels (3, t, h, w) -> DCT coefficients (blocks, 3*t*256), flat (color, t, v, u), after a 3x3 color matrix."""
    y = torch.einsum("cr,rthw->cthw", colors, x)
    blocks = rearrange(y, "c t (h p) (w q) -> h w c t p q", p=BLOCK, q=BLOCK)
    spatial, temporal = dct(BLOCK).float(), dct(x.shape[1]).float()
    return torch.einsum("hwcfyx,tf,vy,ux->hwctvu", blocks, temporal, spatial, spatial).flatten(2).flatten(0, 1)


def to_pixels(coefficients: Tensor, colors: Tensor, frames: int, height: int) -> Tensor:
    """The inverse of ``to_coefficients`` for orthonormal DCTs and any invertible color matrix."""
    shape = {"h": height // BLOCK, "c": COLORS, "t": frames, "v": BLOCK}
    blocks = rearrange(coefficients, "(h w) (c t v u) -> h w c t v u", **shape)
    spatial, temporal = dct(BLOCK).float(), dct(frames).float()
    y = torch.einsum("hwctvu,tf,vy,ux->hwcfyx", blocks, temporal, spatial, spatial)
    return torch.einsum("rc,cthw->rthw", colors.inverse(), rearrange(y, "h w c t p q -> c t (h p) (w q)"))


def energies(pictures: list[list[Picture]], frames: int, clips: int, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every DCT coefficient (3*frames*256,) over clips: frame 0, or the four frames after it."""
    rng, kinds = random.Random(frames), COLORS * frames * BLOCK**2
    total, squares, count = torch.zeros(kinds), torch.zeros(kinds), 0
    for _ in range(clips):
        x = clip(pictures, rng, 1 if frames == 1 else 1 + GROUP, 128)[:, -frames:]
        values = to_coefficients(x, colors)
        total, squares, count = total + values.sum(0), squares + values.square().sum(0), count + len(values)
    mean = total / count
    return mean, squares / count - mean.square()


def choose(pictures: list[list[Picture]], channels: int, clips: int) -> dict[str, list[int] | list[float]]:
    """The VAE's lists: kept coefficients, channel by channel alike where possible, and half-whitening scales."""
    (mean_image, image), (_, video) = (
        energies(pictures, frames, clips, opponent_colors().float()) for frames in (1, GROUP)
    )
    kept_image, kept_video = (set(v.topk(channels).indices.tolist()) for v in (image, video))
    still = {i: i // 256 * 256 * GROUP + i % 256 for i in kept_image}  # (color, v, u) at temporal frequency 0
    shared = sorted((i for i in kept_image if still[i] in kept_video), key=lambda i: -float(image[i]))
    lone_image = sorted(kept_image - set(shared), key=lambda i: -float(image[i]))
    lone_video = sorted(kept_video - {still[i] for i in shared}, key=lambda i: -float(video[i]))
    kept_image, kept_video = shared + lone_image, [still[i] for i in shared] + lone_video
    # A motionless clip's coefficient at temporal frequency 0 is sqrt(GROUP) times the photo's: undo that everywhere.
    gain = math.sqrt(GROUP)
    std_image, std_video = image[kept_image].sqrt(), video[kept_video].sqrt() / gain
    common = torch.cat([std_image[: len(shared)], torch.zeros(len(lone_image))])
    halves = [torch.where(common > 0, common, std).rsqrt() for std in (std_image, std_video)]
    rms = math.sqrt(float((std_image * halves[0]).square().mean() + (std_video * halves[1]).square().mean()) / 2)
    scale_image, scale_video = halves[0] / rms, halves[1] / rms / gain
    mean = torch.where(common > 0, mean_image[kept_image] * scale_image, torch.zeros(channels))
    print(f"{len(shared)} of {channels} coefficients are common to block 0 and later blocks")
    return {
        "kept_image": kept_image,
        "kept_video": kept_video,
        "scale_image": [round(s, 6) for s in scale_image.tolist()],
        "scale_video": [round(s, 6) for s in scale_video.tolist()],
        "latents_mean": [round(m, 4) if i < 3 or abs(m) > 0.05 else 0.0 for i, m in enumerate(mean.tolist())],
        "latents_std": [1.0] * channels,
    }


# -- training the refiner -------------------------------------------------------------------------------------------


def log_mse(x: Tensor, target: Tensor) -> Tensor:
    """Mean over (sample, frame) of log MSE: what PSNR averages, so that easy and hard crops count alike.

    Crops beyond 50 dB hardly count: their gradients, 1/MSE, would drown all others and teach the refiner to be silent.
    """
    return ((x - target).square().mean(dim=(1, 3, 4)) + 4e-5).log().mean()


def unrolled(vae: NanoVAE, z: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Each block's log MSE over the transform alone, decoded in turn; the state is cut off: memory is one block's."""
    state, start = None, 0
    for block in z.split(1, dim=2):
        decoded, state = vae.decode_chunk(block, state)
        state = DecoderState(state.last.detach())
        frames = x[:, :, start : start + decoded.shape[2]]
        with torch.no_grad():
            alone = log_mse(vae.decode_linear(block[:, :, 0], first=start == 0), frames)
        yield log_mse(decoded, frames) - alone
        start += decoded.shape[2]


def batch(pictures: list[list[Picture]], rng: random.Random, blocks: int, size: int, count: int) -> Tensor:
    """(count, 3, 1+4*blocks, size, size)."""
    return torch.stack([clip(pictures, rng, 1 + GROUP * blocks, size) for _ in range(count)])


def disturbed(z: Tensor, rng: random.Random) -> Tensor:
    """Latents as a DiT will deliver them: a quarter of the batches gets a little noise."""
    return z + rng.uniform(0.0, 0.08) * torch.randn_like(z) if rng.random() < 0.25 else z


def train(args: argparse.Namespace) -> None:
    """Train the refiner for --minutes of wall time in all, keep a checkpoint in --run, save the VAE to --out."""
    torch.manual_seed(0)
    pictures, vae = library(args.data), NanoVAE.from_pretrained(args.out, torch_dtype=torch.float32)
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    args.run.mkdir(parents=True, exist_ok=True)
    checkpoint, step, spent = args.run / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    rng, begun, mark = random.Random(step), time.monotonic() - spent, time.monotonic()
    while (spent := time.monotonic() - begun) < 60 * args.minutes:
        rate = (
            args.rate
            * min(1.0, (step + 1) / 100)
            * (0.02 + 0.98 * math.cos(math.pi / 2 * spent / (60 * args.minutes)) ** 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = train_step(vae, optimizer, pictures, rng)
        step += 1
        if step % 50 == 0:
            gains = [round(-10 / math.log(10) * loss, 3) for loss in losses]
            print(json.dumps({"step": step, "seconds": round(spent), "rate": rate, "gains_db": gains}), flush=True)
        if time.monotonic() - mark > 120:
            mark = time.monotonic()
            save_checkpoint(checkpoint, vae, optimizer, step, spent)
    save_checkpoint(checkpoint, vae, optimizer, step, spent)
    # Weights only: the config beside them is frozen, and save_pretrained would write this machine's path into it.
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, args.out / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def train_step(
    vae: NanoVAE, optimizer: torch.optim.Optimizer, pictures: list[list[Picture]], rng: random.Random
) -> list[float]:
    """One update from single photos (block 0) and clips (later blocks); the losses of block 0, 0 again, 1, 2."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for x in (batch(pictures, rng, 0, 192, 4), batch(pictures, rng, 2, 144, 3)):
        with torch.no_grad():
            z = disturbed(vae.encode(x).latent_dist.mode(), rng)
        with torch.autocast("cpu", torch.bfloat16):
            for loss in unrolled(vae, z, x):
                loss.backward()
                losses.append(loss.item())
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return losses


def save_checkpoint(path: Path, vae: NanoVAE, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    """Replace the checkpoint in one rename."""
    temporary = path.with_suffix(".tmp")
    state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, temporary)
    temporary.rename(path)


# -- measuring ------------------------------------------------------------------------------------------------------


def psnr(x: Tensor, target: Tensor) -> float:
    """Decibels over all pixels, peak to peak 2."""
    return 10 * math.log10(PEAK_SQUARED / float((x.clamp(-1, 1) - target).square().mean()))


class Yardstick:
    """Zonal DCT in BT.601 YCbCr: the ``channels`` coefficients of largest variance over the training photos' clips."""

    def __init__(self, pictures: list[list[Picture]], channels: int, clips: int = 300) -> None:
        self.colors = torch.tensor(BT601)
        self.kept: dict[int, Tensor] = {}
        for frames in (1, GROUP):
            variance = energies(pictures, frames, clips, self.colors)[1]
            self.kept[frames] = torch.zeros(len(variance)).index_fill_(0, variance.topk(channels).indices, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Code and decode (3, 1+4k, h, w) with the VAE's causal split."""
        groups = [x[:, :1], *(group for group in x[:, 1:].split(GROUP, dim=1) if group.shape[1])]
        return torch.cat([self._block(group) for group in groups], dim=1)

    def _block(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        return to_pixels(to_coefficients(x, self.colors) * self.kept[frames], self.colors, frames, x.shape[2])


def pan(photo: Tensor, frames: int, step: tuple[int, int]) -> Tensor:
    """Whole-pixel pan over (3, h, w): (3, frames, h', w') with the largest sides that fit and divide by 16."""
    dx, dy = step
    height, width = (
        (side - (frames - 1) * d) // BLOCK * BLOCK for side, d in zip(photo.shape[1:], (dy, dx), strict=True)
    )
    return torch.stack([photo[:, i * dy : i * dy + height, i * dx : i * dx + width] for i in range(frames)], dim=1)


def reconstructed(vae: NanoVAE, x: Tensor, refined: bool = True) -> Tensor:
    """(3, 1+4k, h, w) coded and decoded, with or without the refiner."""
    z = vae.encode(x[None]).latent_dist.mode()
    if refined:
        return vae.decode(z).sample[0]
    return torch.cat([vae.decode_linear(block, first=i == 0)[0] for i, block in enumerate(z.unbind(2))], dim=1)


def evaluate(args: argparse.Namespace) -> None:
    """Print a table of PSNR over the held-out photos: yardstick, our transform alone, with the refiner."""
    vae = NanoVAE.from_pretrained(args.out, torch_dtype=torch.bfloat16).eval()
    yardstick = Yardstick(library(args.data), vae.latent_channels)
    paths = photos(args.data, "held_out")
    print(
        "| material | photos | zonal DCT mean / worst | transform alone | NanoVAE mean / worst |\n|---|---|---|---|---|"
    )
    tests = {
        "1280x704 single frame": (1280, 704, None),
        "1280x704 still, frames 1-12": (1280, 704, (0, 0)),
        "1280x704 pan 1 px a frame, frames 1-12": (1280, 704, (1, 0)),
        "1280x704 pan (3, 1) px a frame, frames 1-12": (1280, 704, (3, 1)),
        "2560x1408 single frame (small photos enlarged)": (2560, 1408, None),
    }
    for name, (width, height, step) in tests.items():
        found = [fitted(path, width, height, enlarge=width == 2560 and "lxqt" in str(path)) for path in paths]
        rows = []
        for photo in (photo for photo in found if photo is not None):
            x, skip = (photo[:, None], 0) if step is None else (pan(photo, 13, step), 1)
            outputs = (yardstick(x), reconstructed(vae, x, refined=False), reconstructed(vae, x))
            rows.append([psnr(y[:, skip:], x[:, skip:]) for y in outputs])
        mean, worst = np.mean(rows, axis=0), np.min(rows, axis=0)
        cells = [f"{m:.2f} / {w:.2f}" for m, w in zip(mean, worst, strict=True)]
        print(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |", flush=True)


def make_basis(args: argparse.Namespace) -> None:
    """Choose the lists and save an untrained VAE. Refuses to replace one: every DiT trained on it would be lost."""
    if (args.out / "config.json").exists():
        raise SystemExit(f"{args.out} already holds a VAE; its latents are frozen, give another --out")
    vae = NanoVAE(**choose(library(args.data), channels=48, clips=300))
    vae.to(torch.bfloat16).save_pretrained(args.out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("basis", "train", "evaluate"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("src/swifti2v/nano/vae"))
    parser.add_argument("--run", type=Path, default=Path("runs/nano_vae"))
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "evaluate":
        with torch.inference_mode():
            evaluate(args)
    else:
        {"basis": make_basis, "train": train}[args.command](args)


if __name__ == "__main__":
    main()
