"""What a clip of MobileI2V costs: ``plan`` for presets with one stage and no text.

It mirrors ``MobileI2VPipeline.stream``: the photo is encoded, segments are denoised, and with an LTX VAE the whole
clip is decoded at once. Seconds are known for mobile-nano alone, whose machine ``doctor`` has measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core import UsageError
from .costs_mobile import MOBILE, MobileNetworks, MotionFieldCost, read_mobile
from .plan import FRAME_BYTES, Phase, Planner, Row

WARP_TRAFFIC = 30  # looking a frame up, as copies of it (FRAME_BYTES a pixel)


def networks_of_mobile(preset: Any) -> MobileNetworks:
    """A preset's networks; those of full-size MobileI2V unless they ship with the package. UsageError if incomplete."""
    if preset.folder is None:
        return MOBILE
    try:
        return read_mobile(preset.folder, preset.vae_folder)
    except OSError as error:
        name = Path(error.filename or "").name
        raise UsageError(f"{preset.name}'s weights are not in this installation: {name} is missing") from None


@dataclass(frozen=True)
class MobilePlanner(Planner):
    """Rows of one stage; ``networks`` is a ``MobileNetworks``."""

    @property
    def nano(self) -> bool:
        return isinstance(self.networks.vae_2, MotionFieldCost)

    @property
    def chunk_blocks(self) -> int:
        """An LTX decoder takes the whole clip, whose pixels then wait to be written."""
        return super().chunk_blocks if self.nano else self.blocks

    def rows(self) -> tuple[Row, ...]:
        return self._image(), self._refine(), self._decode(), self._write()

    def _image(self) -> Row:
        """The photo's latents: the anchor, or what motion fields start from."""
        vae, positions = self.networks.vae_2, self.positions[1]
        flops = vae.encode_flops(positions, 1)
        return Row(
            "image",
            forwards=1,
            flops=flops,
            weight_bytes=vae.parameters * self.itemsize,
            activation_bytes=vae.encode_bytes(positions, 1, self.itemsize),
            seconds=self._seconds(flops, self.request.size.area * FRAME_BYTES * 6),
        )

    def _refine(self) -> Row:
        tokens = self.preset.grid.stage_two.tokens_per_block(self.request.size)
        steps = self.request.num_inference_steps
        return self._denoising("refine", self.networks.stage_two, self.stage_two_windows, tokens, (steps, 1.0))

    def _decode(self) -> Row:
        if not self.nano:
            return super()._decode()
        fields: Any = self.networks.vae_2
        grid, frames = self.preset.grid.stage_two.latent_size(self.request.size), self.request.num_frames - 1
        flops = fields.decode_flops(grid.height, grid.width, self.blocks)
        return Row(
            "decode",
            forwards=frames,
            flops=flops,
            activation_bytes=fields.decode_bytes(self.positions[1], self.chunk_blocks, self.itemsize),
            seconds=self._seconds(flops, frames * self.request.size.area * FRAME_BYTES * WARP_TRAFFIC),
        )

    def _latent_bytes(self, phase: Phase, longest: int) -> int:
        held = super()._latent_bytes(phase, longest)
        whole = 0 if self.nano else 2 * self.blocks  # an LTX decoder waits for all, and they are joined for it
        return held + self.positions[1] * self.preset.grid.stage_two.channels * 4 * whole

    def _job_bytes(self) -> int:
        latents = (self.blocks - 1) * self.positions[1] * self.preset.grid.stage_two.channels * 4
        return latents + 3 * self.request.size.area


def planner_of(
    request: Any, preset: Any, calibration: Any, networks: MobileNetworks | None, overlap: bool
) -> MobilePlanner:
    """What prices ``request``; ``networks``: other ones than the preset's own."""
    known: Any = networks or networks_of_mobile(preset)
    return MobilePlanner(request, preset, known, calibration, overlap)
