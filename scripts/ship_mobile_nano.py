"""Put a trained mobile-nano into the package (src/swifti2v/nano_mobile): bfloat16, without nano's VAE, which it shares.

python scripts/ship_mobile_nano.py runs/mobile_nano_two/export/transformer
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from swifti2v import presets
from swifti2v.mobile import MobileI2VPipeline
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transformer", type=Path)
    asked = parser.parse_args()
    preset = presets.get("mobile-nano")
    assert preset.folder is not None and preset.vae_folder is not None
    transformer = MobileTransformer3DModel.from_pretrained(asked.transformer, torch_dtype=torch.bfloat16)
    transformer.register_to_config(_name_or_path="")
    vae = NanoVAE.from_pretrained(preset.vae_folder)
    pipeline = MobileI2VPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(shift=1.0), preset=preset.name)
    pipeline.save_pretrained(preset.folder)
    shutil.rmtree(preset.folder / "vae")
    count = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{preset.folder}: {count:,} parameters; now: python -m swifti2v models verify --write")


if __name__ == "__main__":
    main()
