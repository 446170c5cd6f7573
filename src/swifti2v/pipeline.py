"""SwiftI2VPipeline: the only place that knows both stages. ``stream`` is the whole system, read top to bottom.

photo, request -> text -> Stage I motion -> hybrid reference -> CSG segments -> pixel chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn

from . import flow, presets
from .camera import Motion
from .core import Chunk, Request, RunError
from .embeddings import Embeddings
from .fast_paths import witness
from .memory import Placement
from .models.causal_vae import StreamingVAE, decode_stream, encode_pairs, encode_stream, streaming
from .models.text import encode_prompts, truncated_prompt
from .overlap import IN_TURN, Lanes, Running
from .reference import carried_reference, hybrid_reference, shrink
from .residency import Residency
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
from .sources import assemble_wan, fingerprint, local_folder, refuse_gaps
from .stage_one import Conditions, MotionPlan, motion_latents
from .stage_two import Sampling, dit_velocity

MOTION_BLOCKS = 3  # decoded together: more would hold more pixels and gain nothing


class SwiftI2VPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """One photo and a sentence to a high-resolution video, in two stages (arXiv 2605.06356).

    ``transformer`` and ``vae`` are Stage I's, ``transformer_2`` and ``vae_2`` Stage II's (``vae_2`` None: the
    same VAE); both stages share ``text_encoder``. ``camera`` (nano) reads the camera's motion from the prompt.
    ``preset`` names the grid and defaults (``presets.PRESETS``).
    """

    model_cpu_offload_seq = "text_encoder->camera->image_encoder->transformer->vae->transformer_2->vae_2"
    _optional_components = ["image_encoder", "image_processor", "vae_2", "text_encoder", "tokenizer", "camera"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: nn.Module,
        transformer_2: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        vae_2: nn.Module | None = None,
        image_encoder: Any = None,
        image_processor: Any = None,
        camera: nn.Module | None = None,
        preset: str = "nano",
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            transformer_2=transformer_2,
            vae=vae,
            vae_2=vae_2,
            scheduler=scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
            camera=camera,
        )
        self.register_to_config(preset=preset)
        self.preset = presets.get(preset)
        self.placement: Placement | None = None
        self.residency = Residency()
        self.embeddings: Embeddings | None = None
        self.sources: tuple[Path, ...] = ()
        self.video_processor = VideoProcessor(vae_scale_factor=self.preset.grid.stage_two.stride)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> SwiftI2VPipeline:
        """Load a preset that ships with the package ("nano"), a folder in diffusers layout, or a hub repository."""
        folder = local_folder(str(pretrained_model_name_or_path), kwargs.get("local_files_only", False))
        pipeline = super().from_pretrained(str(folder), **kwargs)
        if "variant" not in kwargs:
            refuse_gaps({name: part for name, part in pipeline.components.items() if name not in kwargs}, folder)
        pipeline.sources = (folder,)
        return pipeline

    @classmethod
    def from_wan(cls, stage_one: Any, stage_two: Any, *, preset: str = "wan", **kwargs: Any) -> SwiftI2VPipeline:
        """Assemble public base checkpoints: Wan2.1-I2V-14B as Stage I and Wan2.2-TI2V-5B as Stage II.

        Each is a folder in diffusers layout, a hub repository, or a loaded ``WanImageToVideoPipeline``. With preset
        "wan" Stage II's input is widened for the reference by zeros: it equals the base model and ignores its
        reference, so it is marked untrained and ``stream`` refuses it until it is trained. "wan-refine" keeps the
        base model as it is and runs today.
        """
        components, sources = assemble_wan(stage_one, stage_two, widen=presets.get(preset).family == "wan", **kwargs)
        pipeline = cls(**components, preset=preset)
        pipeline.sources = sources
        return pipeline

    @property
    def _execution_device(self) -> torch.device:
        apart = self.placement.vae_device if self.placement is not None else None
        return apart or self.residency.device or super()._execution_device

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """``model_hashes``, ``versions`` and ``settings``: with these and the request, latents repeat exactly."""
        return fingerprint(self.sources, self.placement)

    @without_gradients
    def stream(
        self,
        photo: Tensor,
        request: Request,
        *,
        job: Journal | None = None,
        motion: Iterable[Tensor] | None = None,
        emit: Emit | None = None,
        conditions: Conditions | None = None,
        lanes: Lanes = IN_TURN,
    ) -> Iterator[Chunk]:
        """Make the clip chunk by chunk: frame 0 at once, then each segment before the next is denoised.

        ``photo`` (1, 3, 1, H, W) in [-1, 1], already of the request's size (``reference.fit_image``). ``job`` keeps
        every finished window and segment, and what it holds is not made again. ``motion``: low-resolution pixel
        chunks (1, 3, t, h, w) in place of Stage I. ``conditions``: precomputed embeddings. ``lanes``: whether
        reference, denoising and decoding run at once, a segment apart, in threads. Closing the iterator cancels between
        steps and frees everything. Raises RunError if Stage II is untrained or a segment is not finite, ValueError if
        the photo has another size.
        """
        self._check(photo, request)
        with self.residency.until_the_end(self), lanes.running() as running:
            report, photo = Reporter(emit, running), photo.to(self._execution_device, torch.float32)
            latents = self._latents(photo, request, job, motion, report, conditions, running)
            decoded = decode_stream(self._large_vae(), running.stage("denoise", latents, photo.device), photo)
            total = len(segment_windows(self.preset, request))
            yield from chunks(running.stage("decode", decoded, photo.device), photo, request, total, report)

    def _latents(
        self,
        photo: Tensor,
        request: Request,
        job: Journal | None,
        motion: Iterable[Tensor] | None,
        report: Reporter,
        conditions: Conditions | None,
        running: Running,
    ) -> Iterator[Tensor]:
        """The anchor, then Stage II's segments; a phase's networks are entered when it begins."""
        vae, fitted = self._large_vae(), self.residency.arrangement is not None
        anchor = next(iter(encode_stream(vae, [photo])))
        if not fitted:  # else no decoder yet: text and motion leave no room for its caches
            yield anchor
        with report.span("text"):
            told = conditions or self.encode(photo, request, report)
        low = motion if motion is not None else self._decoded_motion(photo, request, told, job, report)
        self.residency.enter("encode", self)
        if self.preset.carries_detail:
            reference = encode_pairs(vae, carried_reference(photo, low, request.size))
        else:
            reference = encode_stream(vae, hybrid_reference(photo, low, request.size))
        if request.encode == "ahead":
            reference = iter(list(reference))
        self.residency.enter("refine", self)
        if fitted:
            yield anchor
        reference = running.stage("reference", reference, photo.device)
        yield from self._segments(reference, request, told, job, report)

    def _large_vae(self) -> StreamingVAE:
        return self.residency.streaming(self.vae_2 if self.vae_2 is not None else self.vae)

    @without_gradients
    def motion(
        self, photo: Tensor, request: Request, *, job: Journal | None = None, emit: Emit | None = None
    ) -> Iterator[Tensor]:
        """Stage I alone: low-resolution pixel chunks (1, 3, t, h, w) in [-1, 1]."""
        report = Reporter(emit)
        photo = photo.to(self._execution_device, torch.float32)
        with self.residency.until_the_end(self):
            yield from self._decoded_motion(photo, request, self.encode(photo, request, report), job, report)

    def encode(self, photo: Tensor, request: Request, report: Reporter) -> Conditions:
        """Text and image embeddings of a request; a notice if the prompt is too long for the text encoder."""
        report("progress", "text", step=0, total=1)
        cut = truncated_prompt(self.tokenizer, request.prompt, self.preset.prompt_tokens)
        if cut:
            message = f"the prompt is over {self.preset.prompt_tokens} tokens; not read: {cut!r}"
            report("notice", "text", message=message)
        guided = max(request.guidance_scale, request.guidance_scale_2) > 1
        text = self.encode_prompt(request.prompt)
        negative = self.encode_prompt(request.negative_prompt) if guided else None
        image_embeds = self.encode_image(photo) if self.image_encoder is not None else None
        report("progress", "text", step=1, total=1)
        camera = Motion.from_code(self.camera(text)[0].tolist()) if self.camera is not None else None
        return Conditions(text, negative, image_embeds, request.guidance_scale, camera)

    def encode_prompt(self, prompt: str) -> Tensor:
        """Text states (1, tokens, d), zero after the prompt's end."""
        tokens = self.preset.prompt_tokens

        def make() -> Tensor:
            self.residency.enter("text", self)
            return encode_prompts(self.tokenizer, self.text_encoder, [prompt], tokens)

        return make() if self.embeddings is None else self.embeddings.text(prompt, tokens, make)

    def encode_image(self, photo: Tensor) -> Tensor:
        """CLIP states (1, 257, d) of the photo: the last layer but one, as Wan2.1-I2V was trained."""

        def make() -> Tensor:
            self.residency.enter("text", self)
            pixels = ((photo[0, :, 0].permute(1, 2, 0).float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
            inputs = self.image_processor(images=Image.fromarray(pixels), return_tensors="pt")
            parameter = next(self.image_encoder.parameters())
            inputs = inputs.to(parameter.device, parameter.dtype)
            return self.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]

        return make() if self.embeddings is None else self.embeddings.image(photo, make)

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        prompt: str = "",
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        **request_fields: Any,
    ) -> WanPipelineOutput | tuple[Any]:
        """All frames at once, under diffusers' argument names; ``stream`` is the same without holding them.

        ``image``: a PIL image or a path. ``generator`` serves only to draw the seed when none is given. Further
        keywords are fields of ``core.Request`` (``num_inference_steps_2``, ``guidance_scale_2``, ``csg``, ...).
        Returns ``WanPipelineOutput`` with ``frames`` as diffusers' video processor makes them of ``output_type``
        ("np", "pt", "pil"). Raises ``core.UsageError`` for what cannot be made.
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
            seed=seed,
            **request_fields,
        )
        frames = gathered(self, photo, request, callback_on_step_end)
        video = self.video_processor.postprocess_video(frames, output_type=output_type)
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def _check(self, photo: Tensor, request: Request) -> None:
        check_photo(photo, request)
        if self.preset.family == "wan" and getattr(self.transformer_2.config, "reference_is_untrained", False):
            raise RunError(
                "Stage II is freshly widened and ignores its reference: train it (docs/architecture.md), "
                "or use the preset wan-refine, which runs on the public weights"
            )

    def _decoded_motion(
        self, photo: Tensor, request: Request, told: Conditions, job: Journal | None, report: Reporter
    ) -> Iterator[Tensor]:
        """Stage I, all of it, now; the latents wait in the journal if there is one, and are decoded lazily."""
        vae, small = streaming(self.vae), shrink(photo, self.preset.grid.motion_size(request.size))
        latents: list[Tensor] = []
        with report.span("motion"):
            self._denoised_motion(small, request, told, job or latents, report)

        def few_at_a_time() -> Iterator[Tensor]:
            for window in latents if job is None else job.stream("motion"):
                yield from window.split(MOTION_BLOCKS, dim=2)

        return decode_stream(vae, few_at_a_time(), small)

    def _denoised_motion(
        self, small: Tensor, request: Request, told: Conditions, kept: Journal | list[Tensor], report: Reporter
    ) -> None:
        """Stage I's windows into ``kept``; what a journal holds already is not made again, nor its network loaded."""
        grid, job = self.preset.grid, None if isinstance(kept, list) else kept
        plan = MotionPlan(
            grid.blocks(request.num_frames),
            request.num_inference_steps,
            request.shift,
            request.seed,
            grid.trained_blocks,
            self.preset.overlap_blocks,
            round_timesteps_bf16=request.csg.round_timesteps_bf16,
        )
        finished = job.motion() if job is not None else []
        if len(finished) == plan.num_windows:
            return
        self.residency.enter("motion", self)
        plan = replace(plan, witness=witness(self.transformer, report, "motion"))
        total = plan.num_windows * request.num_inference_steps

        def on_step(window: int, step: int) -> None:
            done = window * request.num_inference_steps + step
            report("progress", "motion", segment=window + 1, step=done, total=total)

        windows_of_latents = motion_latents(
            self.transformer, streaming(self.vae), small, told, plan=plan, finished=finished, on_step=on_step
        )
        block = 0
        for number, window in enumerate(windows_of_latents):
            if isinstance(kept, list):
                kept.append(window)
            elif number >= len(finished):
                kept.save_motion(number, window, range(block, block + window.shape[2]))
            block += window.shape[2]

    def _segments(
        self, reference: Iterable[Tensor], request: Request, told: Conditions, job: Journal | None, report: Reporter
    ) -> Iterator[Tensor]:
        """Stage II, saving every segment before it is decoded: a failure in decode loses nothing."""
        plan = segment_windows(self.preset, request)
        levels = flow.sigmas(request.num_inference_steps_2, request.shift_2, start=request.strength_2)
        slow = witness(self.transformer_2, report, "refine")
        sampling = Sampling(levels, request.seed, request.csg, sampler=request.sampler_2, witness=slow)
        velocity = dit_velocity(
            self.transformer_2,
            told.text,
            request.csg,
            trained_blocks=self.preset.grid.trained_blocks,
            guidance_scale=request.guidance_scale_2,
            negative_text=told.negative_text,
        )
        channels = self.preset.grid.stage_two.channels
        yield from saved_segments(velocity, reference, plan, sampling, job, report, channels)
