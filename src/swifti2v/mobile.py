"""MobileI2VPipeline: one photo and a number in, a short video out, in one stage (arXiv 2511.21475).

photo -> block 0, the anchor -> segments of blocks, denoised around it -> pixel chunks. The loop is Stage II's
(``stage_two.refine``); what is told is not a sentence but ``motion_score``, how much is to move. There is no text and
so nothing to guide by. Latents are those of an LTX VAE, or, for mobile-nano, how the photo moves (``motion_field``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_output import LTXPipelineOutput
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from . import flow, motion_field, presets
from .checkpoints import hash_files, read_json
from .core import Chunk, Request, UsageError
from .fast_paths import witness
from .memory import Placement
from .models.ltx_vae import LTXCodec
from .models.mobile_dit import MobileTransformer3DModel
from .models.nano_vae import NanoVAE
from .models.turbo_decoder import TurboDecoder
from .overlap import IN_TURN, Lanes
from .runs import (
    Emit,
    Journal,
    Reporter,
    asked,
    check_photo,
    chunks,
    gathered,
    saved_segments,
    segment_windows,
    without_gradients,
)
from .sources import fingerprint, local_folder, refuse_gaps
from .stage_two import Sampling, dit_velocity

logger = logging.get_logger(__name__)
FEW_STEPS = 4
"""Up to so many steps the network is a distilled one, trained at exactly these levels."""


def levels(steps: int, shift: float) -> tuple[float, ...]:
    """The noise levels of a run: ``steps`` + 1 of them, from 1 down to 0.

    Students (up to 4 steps): evenly spaced, then shifted: at shift 3 two steps are 1, .75, 0. More steps: as
    the published network was sampled, by diffusers' ``set_timesteps``, which shifts its smallest level (1/1000) twice:
    1, .9883, .9760, ... .0089, 0 for 30 (with 2 steps that grid would be 1, .0089, 0).
    """
    if steps <= FEW_STEPS:
        return flow.sigmas(steps, shift)
    lowest = flow.shifted(1 / 1000, shift)
    return (*(flow.shifted(1 + (lowest - 1) * i / (steps - 1), shift) for i in range(steps)), 0.0)


class MobileI2VPipeline(DiffusionPipeline):
    """Image-to-video with a ``MobileTransformer3DModel`` on the latents of an LTX VAE, or on motion fields.

    ``decoder``: a ``TurboDecoder`` in place of the LTX VAE's own. ``preset`` names the grid and the defaults
    (``presets.PRESETS``). ``latent_norm``: what latents the transformer was trained on, "raw" or "per_channel"
    (``LTXCodec``); None is raw for an LTX VAE (the published network). With nano's VAE, which then only shows the photo
    to the network, latents are ``motion_field``'s and know no other form than per_channel.
    Raises ValueError if the parts do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae->decoder"
    _optional_components = ["decoder"]  # noqa: RUF012

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        decoder: nn.Module | None = None,
        preset: str = "mobile",
        latent_norm: str | None = None,
    ) -> None:
        super().__init__()
        latent_norm = latent_norm or ("per_channel" if isinstance(vae, NanoVAE) else "raw")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, decoder=decoder)
        self.register_to_config(preset=preset, latent_norm=latent_norm)
        self.preset = presets.get(preset)
        _refuse_misfits(transformer, vae, decoder, self.preset, latent_norm)
        self.placement: Placement | None = None
        self.sources: tuple[Path, ...] = ()
        self.video_processor = VideoProcessor(vae_scale_factor=self.preset.grid.stage_two.stride)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MobileI2VPipeline:
        """Load a folder in diffusers layout, or a hub repository.

        A folder without ``vae/`` whose preset shares a VAE of this package is completed with that one.
        """
        folder = local_folder(str(pretrained_model_name_or_path), kwargs.get("local_files_only", False))
        sources: tuple[Path, ...] = (folder,)
        given = dict(kwargs)
        shared = _shared_vae(folder) if "vae" not in kwargs and not (folder / "vae").is_dir() else None
        if shared is not None:
            given["vae"] = NanoVAE.from_pretrained(shared)
            refuse_gaps({"vae": given["vae"]}, shared.parent)
            sources = (folder, shared)
        pipeline = super().from_pretrained(str(folder), **given)
        if "variant" not in kwargs:
            refuse_gaps({name: part for name, part in pipeline.components.items() if name not in given}, folder)
        pipeline.sources = sources
        return pipeline

    @classmethod
    def from_parts(
        cls,
        transformer: str | Path,
        vae: str | Path,
        decoder: str | Path | None = None,
        *,
        preset: str = "mobile",
        latent_norm: str = "raw",
    ) -> MobileI2VPipeline:
        """From folders in diffusers layout: a converted checkpoint, an LTX VAE, and maybe a ``TurboDecoder``.

        Raises UsageError if one is not a folder with a ``config.json``, RunError if its weights have gaps.
        """
        asked = {"transformer": (MobileTransformer3DModel, transformer), "vae": (AutoencoderKLLTXVideo, vae)}
        if decoder is not None:
            asked["decoder"] = (TurboDecoder, decoder)
        parts, sources = dict[str, Any](), []
        for name, (kind, where) in asked.items():
            folder = Path(where) / name if (Path(where) / name).is_dir() else Path(where)
            if not (folder / "config.json").is_file():
                raise UsageError(f"{str(where)!r} is not a folder with a {name} in diffusers layout (no config.json)")
            parts[name] = kind.from_pretrained(folder)
            refuse_gaps({folder.name: parts[name]}, folder.parent)
            sources.append(folder)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pipeline = cls(**parts, scheduler=scheduler, preset=preset, latent_norm=latent_norm)
        pipeline.sources = tuple(sources)
        return pipeline

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """``model_hashes``, ``versions`` and ``settings``: with these and the request, latents repeat exactly."""
        found = fingerprint(self.sources[:1], self.placement)
        for part, folder in zip(("vae", "decoder"), self.sources[1:], strict=False):
            found["model_hashes"] |= {f"{part}/{name}": digest for name, digest in hash_files(folder).items()}
        return found

    @without_gradients
    def stream(
        self,
        photo: Tensor,
        request: Request,
        *,
        job: Journal | None = None,
        motion: Iterable[Tensor] | None = None,
        emit: Emit | None = None,
        lanes: Lanes = IN_TURN,
    ) -> Iterator[Chunk]:
        """Make the clip: frame 0, then the frames of every segment.

        Arguments as ``SwiftI2VPipeline.stream``; ``motion`` must be None, there is no stage that it could replace.
        Motion fields are decoded before the next segment is denoised; an LTX decoder sees the whole clip, so that there
        all chunks come at the end. Raises ValueError if the photo has another size than the request.
        """
        check_photo(photo, request)
        if motion is not None:
            raise ValueError("motion is given: MobileI2V has one stage, which cannot be replaced by a video")
        with lanes.running() as running:
            report, photo = Reporter(emit, running), photo.to(self._execution_device, torch.float32)
            latents = running.stage("denoise", self._denoised(photo, request, job, report), photo.device)
            decoded = running.stage("decode", self._decoded(latents, photo, request, report), photo.device)
            yield from chunks(decoded, photo, request, len(segment_windows(self.preset, request)), report)

    @without_gradients
    def latents(
        self, photo: Tensor, request: Request, *, job: Journal | None = None, emit: Emit | None = None
    ) -> Iterator[Tensor]:
        """The latents alone, float32: the anchor (1, c, 1, h, w), then each finished segment (1, c, k, h, w)."""
        photo = photo.to(self._execution_device, torch.float32)
        yield from self._denoised(photo, request, job, Reporter(emit))

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        prompt: str = "",
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        motion_score: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        **request_fields: Any,
    ) -> LTXPipelineOutput | tuple[Any]:
        """All frames at once, under diffusers' argument names; ``stream`` is the same chunk by chunk.

        ``image``: a PIL image or a path. ``motion_score``: mean optical flow between frames five apart, in pixels of a
        576x320 picture, 0-100. ``prompt`` changes nothing (there is a warning); ``negative_prompt`` and a
        ``guidance_scale`` above 1 are refused. ``generator`` serves only to draw the seed when none is given. Further
        keywords are fields of ``core.Request`` (``shift``, ``csg``, ...). Raises ``core.UsageError`` for what
        cannot be made.
        """
        photo, request = asked(
            self.preset,
            image,
            generator,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            motion_score=motion_score,
            seed=seed,
            **request_fields,
        )
        if prompt:
            logger.warning(presets.unread(self.preset))
        frames = gathered(self, photo, request, callback_on_step_end)
        video = self.video_processor.postprocess_video(frames, output_type=output_type)
        return LTXPipelineOutput(frames=video) if return_dict else (video,)

    def _encoded(self, photo: Tensor) -> tuple[Tensor, Tensor]:
        """The reference (1, c or more, 1, h, w) of block 0, whose first c channels are the anchor, and of later blocks.

        Zeros for a network without one; for motion fields that nothing moves, and the photo's latents behind.
        """
        if not isinstance(self.vae, NanoVAE):
            anchor = LTXCodec(self.vae, self.decoder, self.config.latent_norm).encode(photo)
            return anchor, torch.zeros_like(anchor)
        reference = motion_field.reference(self.vae, photo)
        return reference, reference

    def _denoised(self, photo: Tensor, request: Request, job: Journal | None, report: Reporter) -> Iterator[Tensor]:
        """The anchor, then every segment, saved before it is decoded: a failure in decode loses nothing."""
        first, later = self._encoded(photo)
        channels = self.preset.grid.stage_two.channels
        velocity = dit_velocity(
            self.transformer,
            None,
            request.csg,
            trained_blocks=self.preset.grid.trained_blocks,
            motion_score=self._score(request),
        )
        grid, slow = levels(request.num_inference_steps, request.shift), witness(self.transformer, report, "refine")
        sampling = Sampling(grid, request.seed, request.csg, sampler=request.sampler_2, witness=slow)
        plan, reference = segment_windows(self.preset, request), chain([first], repeat(later))
        yield first[:, :channels]
        yield from saved_segments(velocity, reference, plan, sampling, job, report, channels)

    def _score(self, request: Request) -> float:
        score = request.motion_score
        return self.preset.defaults["motion_score"] if score is None else score

    def _decoded(
        self, latents: Iterator[Tensor], photo: Tensor, request: Request, report: Reporter
    ) -> Iterator[Tensor]:
        """Pixels, one chunk for the anchor and one for each segment, (1, 3, t, H, W) in [-1, 1]."""
        if isinstance(self.vae, NanoVAE):
            yield from motion_field.decode_stream(latents, photo, self._score(request))
            return
        codec, parts = LTXCodec(self.vae, self.decoder, self.config.latent_norm), list(latents)
        report("progress", "decode", step=0, total=1)
        pixels = codec.decode(torch.cat(parts, dim=2), *photo.shape[-2:])
        report("progress", "decode", step=1, total=1)
        yield from pixels.split([1, *(codec.temporal_stride * part.shape[2] for part in parts[1:])], dim=2)


def _refuse_misfits(transformer: Any, vae: Any, decoder: Any, preset: presets.Preset, latent_norm: str) -> None:
    config, nano = transformer.config, isinstance(vae, NanoVAE)
    if preset.family != "mobile":
        raise ValueError(f"preset {preset.name!r} is not one of MobileI2V's")
    if not config.motion_embedding or config.cross_attention_dim is not None:
        raise ValueError("a MobileI2V transformer has a motion embedding and no text (cross_attention_dim)")
    if nano and (decoder is not None or latent_norm != "per_channel"):
        raise ValueError("motion fields have no decoder and no other latent_norm than per_channel; leave both out")
    if nano:
        references = motion_field.CHANNELS + vae.latent_channels
        grid = (motion_field.TOKEN, motion_field.FRAMES, motion_field.CHANNELS)
    else:
        codec, references = LTXCodec(vae, decoder, latent_norm), 0
        grid = (codec.spatial_stride, codec.temporal_stride, codec.latent_channels)
    if config.in_channels != grid[2] or config.reference_channels != references:
        raise ValueError(
            f"the transformer takes {config.in_channels} channels and {config.reference_channels} of a reference, "
            f"there are {grid[2]} and {references}"
        )
    lattice = preset.grid.stage_two
    if grid != (lattice.stride, preset.grid.temporal_stride, lattice.channels):
        raise ValueError(f"strides and channels {grid} are not those of preset {preset.name!r}")


def _shared_vae(folder: Path) -> Path | None:
    """The VAE that a saved pipeline's preset shares, if it does. A damaged index fails where it is loaded."""
    index = folder / "model_index.json"
    name = read_json(index).get("preset") if index.is_file() else None
    return presets.PRESETS[name].vae_folder if name in presets.PRESETS else None
