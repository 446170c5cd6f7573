"""What MobileI2V's networks cost, in closed form: its DiT at both sizes, LTX's VAE with either decoder, motion fields.

The same rules as ``costs``: no torch; FLOPs and peaks equal what ``meters`` counts on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .costs_nano import MobileDiTCost, NanoVAECost


@dataclass(frozen=True)
class LTXVAECost:
    """``AutoencoderKLLTXVideo`` at its published size; counts are per latent position, bytes in bfloat16.

    Only a photo is encoded; a clip is decoded whole, so that the peak grows with its blocks. Sides off the grid
    of 32 are priced as if padded to it.
    """

    parameters: int
    encode_first: int
    decode_first: int
    decode_next: int
    encode_peak: int
    decode_peak_first: int
    decode_peak_next: int
    latent_channels: int = 128

    def encode_flops(self, positions: int, blocks: int) -> int:
        """Of one photo: ``blocks`` must be 1."""
        if blocks != 1:
            raise ValueError(f"{blocks} blocks are not one photo")
        return positions * self.encode_first

    def decode_flops(self, positions: int, blocks: int) -> int:
        return positions * (self.decode_first + (blocks - 1) * self.decode_next)

    def encode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        return positions * self.encode_peak * itemsize // 2

    def decode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        return positions * (self.decode_peak_first + (blocks - 1) * self.decode_peak_next) * itemsize // 2

    def encode_state(self, positions: int, itemsize: int) -> int:
        return 0

    def decode_state(self, positions: int, itemsize: int) -> int:
        return 0


LTX_VAE = LTXVAECost(
    parameters=419_193_649,
    encode_first=1_569_876_992,
    decode_first=1_782_185_984,
    decode_next=7_087_718_400,
    encode_peak=147_456,
    decode_peak_first=122_880,
    decode_peak_next=819_200,
)
TURBO_VAE = LTXVAECost(
    parameters=180_404_353 + 41_896_023,
    encode_first=1_569_876_992,
    decode_first=356_773_888,
    decode_next=1_408_815_104,
    encode_peak=147_456,
    decode_peak_first=69_632,
    decode_peak_next=475_136,
)
MOBILE_DIT = MobileDiTCost(
    in_channels=128,
    out_channels=128,
    width=1152,
    heads=16,
    ffn=2880,
    linear_layers=14,
    softmax_layers=2,
    normalized_layers=14,
    patch=1,
    reference_channels=0,
    text_dim=0,
    text_tokens=0,
    motion=True,
    positions=False,
)


@dataclass(frozen=True)
class MotionFieldCost:
    """``motion_field``: the photo is read by nano's encoder, a quarter as large, and looked up for every frame.

    A latent position is 64x64 pixels, 16x16 of those that are encoded.
    """

    vae: NanoVAECost

    STRIDE, CELLS, GROUP = 64, 2, 4

    @property
    def parameters(self) -> int:
        """Of nano's whole VAE, which is loaded; its decoder is not used."""
        return self.vae.parameters

    def encode_flops(self, positions: int, blocks: int) -> int:
        """Of the photo, once, whatever ``blocks``."""
        return self.vae.encode_flops(positions, 1)

    def encode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        return positions * 4 * (2 * self.vae.PIXELS + 2 * (self.vae.latent_channels + 8))

    def decode_flops(self, rows: int, columns: int, blocks: int) -> int:
        """Interpolation of the fields of rows x columns positions to pixels: two products a component and a frame."""
        height, width = self.STRIDE * rows, self.STRIDE * columns
        cells = self.CELLS * rows, self.CELLS * columns
        return 2 * 2 * self.GROUP * (blocks - 1) * height * cells[1] * (cells[0] + width)

    def decode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        """The frames of ``blocks`` blocks, and one in the making: its field at every pixel, where that is, what lies
        there, and that within bounds; float32."""
        return positions * self.STRIDE**2 * 4 * (3 * self.GROUP * blocks + 12)


@dataclass(frozen=True)
class MobileNetworks:
    """One DiT and one VAE, or motion fields; there is no text."""

    transformer: MobileDiTCost
    vae: LTXVAECost | MotionFieldCost

    @property
    def stage_two(self) -> MobileDiTCost:
        """As ``costs.Networks`` names the network of the segment loop."""
        return self.transformer

    @property
    def vae_2(self) -> LTXVAECost | MotionFieldCost:
        """As ``costs.Networks`` names what the loop's latents belong to."""
        return self.vae

    def weight_bytes(self, itemsize: int) -> int:
        """Parameters of ``itemsize`` bytes, and what nano's VAE holds beside them."""
        beside = self.vae.vae.buffer_bytes if isinstance(self.vae, MotionFieldCost) else 0
        return (self.transformer.parameters + self.vae.parameters) * itemsize + beside


MOBILE = MobileNetworks(MOBILE_DIT, LTX_VAE)


def read_mobile(folder: Path, vae: Path | None = None) -> MobileNetworks:
    """The networks of a pipeline's folder, by their ``config.json``; ``vae``: where the VAE lies if not in it.

    An LTX VAE is priced at its published size. Raises OSError if a file is missing.
    """
    at = folder / "vae"
    if vae is not None and not at.is_dir():
        at = vae
    config = json.loads((at / "config.json").read_text())
    transformer = MobileDiTCost.from_config(json.loads((folder / "transformer" / "config.json").read_text()), 0)
    if "kept_image" in config:
        return MobileNetworks(transformer, MotionFieldCost(NanoVAECost.from_config(config)))
    return MobileNetworks(transformer, TURBO_VAE if (folder / "decoder").is_dir() else LTX_VAE)
