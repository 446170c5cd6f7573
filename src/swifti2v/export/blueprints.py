"""The graphs of a ``MobileI2VPipeline`` for one kind of clip, with examples of what they will see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import presets
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
from .nano_graphs import NanoCarry, NanoEncoder, NanoFinish, NanoFirst, NanoSoft

PIXELS, LATENTS = "pixels in [-1, 1]", "normalized latents, mostly within 6 of 0"
RAW = "raw latents of the VAE"
FLOW = "x and y in pixels of the quarter-size frame; all zero for the first frame after frame 0"


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
        return self.clip.num_frames or self.preset.num_frames

    @property
    def levels(self) -> tuple[float, ...]:
        steps = self.clip.steps or self.preset.defaults["num_inference_steps"]
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

    def blueprints(self, layouts: Sequence[Layout], equations: Equations = "onnx") -> Iterator[Blueprint]:
        """One at a time, so that a large module goes before the next is made."""
        photo = example_photo(self.size)
        encoder = self._encoder(photo)
        yield encoder
        anchor, *still = encoder.wanted()
        for number in range(len(self.windows)):
            for layout in layouts:
                yield self._denoiser(number, layout, equations, (anchor, *still))
        yield from self._nano_decoders(photo, anchor, still[0]) if self.nano else self._ltx_decoder(anchor)

    def _encoder(self, photo: Tensor) -> Blueprint:
        if self.nano:
            outputs = {"anchor": LATENTS, "still": f"{LATENTS}: every later block of a video that stands still"}
            return Blueprint("encoder", NanoEncoder(self.pipeline.vae), (photo,), {"photo": PIXELS}, outputs)
        codec = LTXCodec(self.pipeline.vae, self.pipeline.decoder, self.pipeline.config.latent_norm)
        return Blueprint("encoder", LatentEncoder(codec), (photo,), {"photo": PIXELS}, {"anchor": self.said})

    @property
    def said(self) -> str:
        """What latents are."""
        return RAW if self.pipeline.config.latent_norm == "raw" else LATENTS

    def _denoiser(self, number: int, layout: Layout, equations: Equations, encoded: tuple[Tensor, ...]) -> Blueprint:
        window, (anchor, *still) = self.windows[number], encoded
        _, c, _, h, w = anchor.shape
        blocks = (*window.context, *window.segment)
        noise = torch.stack([block_noise((c, h, w), seed=0, block=k) for k in window.segment], dim=1)[None]
        context = [anchor if k == 0 else (still or [anchor])[0] for k in window.context]
        examples = [torch.cat([*context, noise], dim=2), torch.ones(1), torch.ones(1)]
        inputs = {
            "latents": f"{self.said}: finished blocks clean, then the segment at noise level sigma",
            "sigma": "the segment's noise level, one of the manifest's levels",
            "motion_score": "mean optical flow to ask for, in [0, 100]",
        }
        network: Any = self.pipeline.transformer
        if network.config.reference_channels:
            examples.append(torch.cat([anchor if k == 0 else still[0] for k in blocks], dim=2))
            inputs["reference"] = f"{self.said}: the anchor for block 0, still for every other"
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

    def _nano_decoders(self, photo: Tensor, anchor: Tensor, still: Tensor) -> Iterator[Blueprint]:
        vae, size = self.pipeline.vae, (self.size.height, self.size.width)
        first = {"latents": f"{LATENTS}: block 0"}
        yield Blueprint("decoder_first", NanoFirst(vae), (anchor,), first, {"frame": PIXELS})
        later = still + 0.05 * block_noise(still.shape, seed=0, block=1)
        soft_of = Blueprint("decoder_soft", NanoSoft(vae), (later,), {"latents": LATENTS}, {"soft": PIXELS})
        yield soft_of
        soft = soft_of.wanted()[0]
        flow = torch.zeros(1, 2, size[0] // 4, size[1] // 4)
        names = {"photo": PIXELS, "soft": f"{PIXELS}: one of decoder_soft's frames", "flow": FLOW}
        made = {"moved": PIXELS, "next_flow": FLOW}
        yield Blueprint("decoder_carry", NanoCarry(size), (photo, soft[:, :, 0], flow), names, made)
        moved = photo[:, :, None].expand(-1, -1, soft.shape[2], -1, -1).contiguous()
        names = {"latents": LATENTS, "soft": PIXELS, "moved": f"{PIXELS}: decoder_carry's, stacked"}
        yield Blueprint("decoder_finish", NanoFinish(vae, size), (later, soft, moved), names, {"frames": PIXELS})

    def _ltx_decoder(self, anchor: Tensor) -> Iterator[Blueprint]:
        t = self.grid.blocks(self.num_frames)
        codec = LTXCodec(self.pipeline.vae, self.pipeline.decoder, self.pipeline.config.latent_norm)
        module = LatentDecoder(codec, (self.size.height, self.size.width))
        latents = torch.cat([anchor, anchor.expand(-1, -1, t - 1, -1, -1)], dim=2)
        latents = latents + 0.05 * anchor.std() * block_noise(latents.shape, seed=0, block=1)
        yield Blueprint("decoder", module, (latents,), {"latents": self.said}, {"frames": PIXELS})


def example_photo(size: Size) -> Tensor:
    """(1, 3, h, w) in [-1, 1]: large and small structure, the same every time."""
    layers = []
    for cell in (64, 16, 4):
        noise = block_noise((3, max(4, size.height // cell), max(4, size.width // cell)), seed=0, block=cell)
        layers.append(F.interpolate(noise[None], (size.height, size.width), mode="bicubic", align_corners=False))
    return (0.3 * torch.stack(layers).sum(0)).clamp(-1, 1)
