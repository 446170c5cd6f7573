"""The graphs of a ``MobileI2VPipeline`` for one kind of clip, with examples of what they will see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import motion_field, presets
from ..core import Size, UsageError
from ..mobile import MobileI2VPipeline, levels
from ..models.channels_first import Equations, exportable
from ..models.ltx_vae import LTXCodec
from ..models.nano_vae import NanoVAE
from ..noise import block_noise
from ..segments import windows
from .blueprint import Blueprint
from .contracts import Layout, WindowContract
from .ltx_graphs import LatentDecoder, LatentEncoder
from .nano_graphs import NanoDecoder, NanoEncoder
from .warp import Warp

PIXELS, LATENTS = "pixels in [-1, 1]", "normalized latents, mostly within 6 of 0"
RAW = "raw latents of the VAE"
MOTION = "motion fields as latents, of a standard deviation of about 1; all zero for block 0"
FIELD = "x and y in pixels from where each of the photo's parts is to be taken at the end of the block"


@dataclass(frozen=True)
class Clip:
    """What a bundle makes: all fixed but the photo, the seed and the motion score. None: the preset's default."""

    size: Size | None = None
    num_frames: int | None = None
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A pipeline and a clip that it can make. UsageError at birth if it cannot."""

    pipeline: MobileI2VPipeline
    clip: Clip

    def __post_init__(self) -> None:
        if self.clip.steps is not None and not 1 <= self.clip.steps <= 1000:
            raise UsageError(f"{self.clip.steps} steps are not between 1 and 1000")
        if not self.grid.is_legal(self.size):
            raise UsageError(
                f"{self.size} is not a size of {self.preset.name}; the nearest is {self.grid.snap(self.size)}"
            )
        legal = self.grid.snap_frames(self.num_frames)
        if legal != self.num_frames:
            raise UsageError(f"{self.num_frames} frames are not a length of {self.preset.name}; the nearest is {legal}")

    @property
    def preset(self) -> presets.Preset:
        return self.pipeline.preset

    @property
    def grid(self) -> Any:
        return self.preset.grid

    @property
    def size(self) -> Size:
        return self.clip.size or self.grid.default_size

    @property
    def num_frames(self) -> int:
        return self.preset.num_frames if self.clip.num_frames is None else self.clip.num_frames

    @property
    def levels(self) -> tuple[float, ...]:
        asked = self.clip.steps
        steps = self.preset.defaults["num_inference_steps"] if asked is None else asked
        return levels(steps, self.preset.defaults["shift"])

    @property
    def nano(self) -> bool:
        return isinstance(self.pipeline.vae, NanoVAE)

    @property
    def windows(self) -> tuple[WindowContract, ...]:
        csg, made = self.preset.defaults["csg"], []
        cut = {"segment_blocks": csg.segment_blocks, "neighbor_blocks": csg.neighbor_blocks}
        for window in windows(self.grid.blocks(self.num_frames), **cut):
            positions = window.positions(csg.rope_positions, self.grid.trained_blocks)
            made.append(WindowContract(context=window.context, segment=window.segment, positions=positions))
        return tuple(made)

    @property
    def reach(self) -> float | None:
        """See ``Manifest``."""
        return motion_field.reach(1, 1.0, self.size.width, self.size.height) if self.nano else None

    def blueprints(
        self, layouts: Sequence[Layout], equations: Equations = "onnx", warp: Warp = "grid-sample"
    ) -> Iterator[Blueprint]:
        """One at a time, so that a large module goes before the next is made."""
        photo = example_photo(self.size)
        encoder = self._encoder(photo)
        yield encoder
        anchor, *reference = encoder.wanted()
        for number in range(len(self.windows)):
            for layout in layouts:
                yield self._denoiser(number, layout, equations, (anchor, *reference))
        yield self._nano_decoder(photo, anchor, warp) if self.nano else self._ltx_decoder(anchor)

    def _encoder(self, photo: Tensor) -> Blueprint:
        if self.nano:
            outputs = {"anchor": MOTION, "reference": "all zero, then latents mostly within 6 of 0; for every block"}
            return Blueprint("encoder", NanoEncoder(self.pipeline.vae), (photo,), {"photo": PIXELS}, outputs)
        codec = LTXCodec(self.pipeline.vae, self.pipeline.decoder, self.pipeline.config.latent_norm)
        return Blueprint("encoder", LatentEncoder(codec), (photo,), {"photo": PIXELS}, {"anchor": self.said})

    @property
    def said(self) -> str:
        """What latents are."""
        if self.nano:
            return MOTION
        return RAW if self.pipeline.config.latent_norm == "raw" else LATENTS

    def _denoiser(self, number: int, layout: Layout, equations: Equations, encoded: tuple[Tensor, ...]) -> Blueprint:
        window, (anchor, *reference) = self.windows[number], encoded
        _, c, _, h, w = anchor.shape
        blocks = (*window.context, *window.segment)
        drawn = {k: block_noise((1, c, 1, h, w), seed=0, block=k) for k in blocks}
        context = [drawn[k] if self.nano and k else anchor for k in window.context]
        latents = torch.cat([*context, *(drawn[k] for k in window.segment)], dim=2)
        examples = [latents, torch.ones(1), torch.ones(1)]
        inputs = {
            "latents": f"{self.said}: finished blocks clean, then the segment at noise level sigma",
            "sigma": "the segment's noise level, one of the manifest's levels",
            "motion_score": "mean optical flow to ask for, in [0, 100]",
        }
        network: Any = self.pipeline.transformer
        if network.config.reference_channels:
            examples.append(reference[0].expand(-1, -1, len(blocks), -1, -1).contiguous())
            inputs["reference"] = "the encoder's, once for each block"
        module = exportable(
            network,
            (len(blocks), h, w),
            layout=layout,
            frames=window.positions,
            context=len(window.context),
            equations=equations,
            half=equations == "coreml",
        )
        outputs = {"velocity": "noise - clean of the segment; x += (next sigma - sigma) * velocity"}
        return Blueprint("denoiser", module, tuple(examples), inputs, outputs, layout, number)

    def _nano_decoder(self, photo: Tensor, anchor: Tensor, warp: Warp) -> Blueprint:
        height, width = self.size.height, self.size.width
        assert self.reach is not None
        before, latents = (block_noise(shape, seed=0, block=k) for k, shape in enumerate(self._fields(anchor), 1))
        reach = torch.tensor([2 * self.reach * self.preset.defaults["motion_score"]])
        inputs = {
            "photo": PIXELS,
            "latents": f"{MOTION}; one block after block 0",
            "before": f"{FIELD} before: the last call's after, at first all zero",
            "reach": "the manifest's reach * motion score * number of the block, from 1",
        }
        outputs = {"frames": PIXELS, "after": FIELD}
        module = NanoDecoder((height, width), warp)
        return Blueprint("decoder", module, (photo, latents, reach * before, reach), inputs, outputs)

    @staticmethod
    def _fields(anchor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a field and of its latents."""
        _, c, _, h, w = anchor.shape
        return (1, 2, motion_field.CELLS * h, motion_field.CELLS * w), (1, c, 1, h, w)

    def _ltx_decoder(self, anchor: Tensor) -> Blueprint:
        t = self.grid.blocks(self.num_frames)
        codec = LTXCodec(self.pipeline.vae, self.pipeline.decoder, self.pipeline.config.latent_norm)
        module = LatentDecoder(codec, (self.size.height, self.size.width))
        latents = torch.cat([anchor, anchor.expand(-1, -1, t - 1, -1, -1)], dim=2)
        latents = latents + 0.05 * anchor.std() * block_noise(latents.shape, seed=0, block=1)
        return Blueprint("decoder", module, (latents,), {"latents": self.said}, {"frames": PIXELS})


def example_photo(size: Size) -> Tensor:
    """(1, 3, h, w) in [-1, 1]: large and small structure, the same every time."""
    layers = []
    for cell in (64, 16, 4):
        noise = block_noise((3, max(4, size.height // cell), max(4, size.width // cell)), seed=0, block=cell)
        layers.append(F.interpolate(noise[None], (size.height, size.width), mode="bicubic", align_corners=False))
    return (0.3 * torch.stack(layers).sum(0)).clamp(-1, 1)
