"""Choose the fixed transform of nano's VAE: which DCT coefficients are kept, and their scales.

    python scripts/fetch_photos.py && python scripts/fetch_clips.py
    python scripts/choose_nano_basis.py --out runs/nano_basis

Writes an untrained VAE. Every DiT is trained on the latents that this freezes, so a folder that exists is refused.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from swifti2v.models.nano_vae import NanoVAE
from swifti2v.train import film
from swifti2v.train.recipes_nano import film_shots
from swifti2v.train.vae import WIDTHS, MovingPhotos
from swifti2v.train.zonal import choose

SIDE = 128
CLIPS = 600


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=96)
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} is there already; latents are frozen by it, give another --out")
    torch.manual_seed(0)
    photos, shots = MovingPhotos(asked.data / "photos.jsonl", "train", (), 0, WIDTHS), film_shots(asked.data)

    def draw(index: int, frames: int) -> Tensor:
        rng = random.Random(f"basis/{frames}/{index}")
        if shots and rng.random() < (0.25 if frames == 1 else 0.5):
            return film.crop(shots, rng, frames, SIDE)
        return photos.clip(rng, frames, SIDE)

    NanoVAE(**choose(draw, asked.channels, CLIPS)).to(torch.bfloat16).save_pretrained(asked.out)


if __name__ == "__main__":
    main()
