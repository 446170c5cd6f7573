"""Conditional Segment-wise Generation: reference latents in, finished latent segments out (paper section 3.2).

``refine`` is the loop both stages run; Stage I calls it with windows as long as it was trained on.
It knows blocks and noise levels; text, guidance and the network live in the ``Velocity`` it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import flow
from .core import RunError
from .models.mobile_dit import MobileTransformer3DModel
from .models.wan import ReferenceTokens, SwiftI2VTransformer3DModel, rope_frames
from .noise import blocks_noise
from .segments import CSG, Window

Velocity = Callable[[Tensor, float, Window, Tensor], Tensor]
"""(x, sigma, window, reference) -> velocity; x and reference are (b, c, len(window.blocks), h, w)."""

Witness = Callable[[Velocity, int], Velocity]
"""(velocity, number of the segment) -> the same velocity without its fast paths; says so to whoever listens."""


@dataclass(frozen=True)
class Sampling:
    """How segments are denoised: descending ``levels``, the noise's ``seed`` and ``stage``, and the CSG policy.

    ``witness``: the slow path by which a segment is made again that the fast ones left not finite; None if there are
    no fast ones. Each segment is tried the fast way first, whatever became of the ones before: a resumed run, which
    has not seen those, must choose alike.
    """

    levels: tuple[float, ...]
    seed: int
    csg: CSG
    stage: Literal["stage_one", "stage_two"] = "stage_two"
    sampler: Literal["euler", "renoise"] = "euler"
    witness: Witness | None = None


def refine(
    velocity: Velocity,
    reference: Iterable[Tensor],
    windows: Iterable[Window],
    sampling: Sampling,
    *,
    channels: int | None = None,
    initial: Iterable[Tensor] | None = None,
    finished: Iterable[Tensor] = (),
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Denoise segment by segment; yields each finished segment (b, c, len(window.segment), h, w), float32.

    ``reference``: latents (b, c, t, h, w) of the hybrid reference in any chunking, pulled as windows need
    them and dropped after; its block 0 is the anchor (E(hybrid)[0] is E(image), bit for bit).
    ``channels``: of a latent, if the reference has more: the carried photo's, behind its own.
    ``initial``: the latents a segment starts from when ``levels[0]`` is below 1 (SDEdit); the reference if
    not given. ``finished``: segments a journal already holds: yielded first, not denoised again.
    ``on_step(window number, step)`` after every denoising step. Memory is bounded by the window.
    """
    plan = list(windows)
    references = _BlockBuffer(reference)
    starts = references if initial is None else _BlockBuffer(initial)
    outputs: dict[int, Tensor] = {}
    held = iter(finished)
    for number, window in enumerate(plan):
        if window.anchor is not None and 0 not in outputs:
            outputs[0] = references.gather((0,))[:, :channels]
        kept = next(held, None)
        if kept is not None:
            segment = kept.to(outputs[0]) if 0 in outputs else kept.float()
        else:
            start = starts.gather(window.segment)[:, :channels]
            x = _Segment(window, sampling, outputs, references.gather(window.blocks), start)
            segment = x.finite(velocity, number, None if on_step is None else _bind(on_step, number))
        outputs.update(zip(window.segment, segment.split(1, dim=2), strict=True))
        yield segment
        following = plan[number + 1].context if number + 1 < len(plan) else ()
        outputs = {block: outputs[block] for block in following if block in outputs}
        references.drop_before(min((b for b in following if b > 0), default=window.segment[-1] + 1))
        if starts is not references:
            starts.drop_before(window.segment[-1] + 1)


def dit_velocity(
    transformer: Any,
    text: Tensor | None,
    csg: CSG,
    *,
    trained_blocks: int,
    guidance_scale: float = 1.0,
    negative_text: Tensor | None = None,
    motion_score: float | None = None,
) -> DitVelocity:
    """The velocity of a Stage II DiT (or nano's Stage I): per-block timesteps, block positions, reference channels.

    A DiT without reference channels (the public TI2V-5B) is given none. ``guidance_scale`` above 1 runs the
    network a second time with ``negative_text`` and extrapolates, as diffusers does. ``motion_score``: how much is to
    move, for a ``MobileTransformer3DModel`` that was built to be told.
    """
    takes_reference = transformer.config.in_channels != transformer.config.out_channels or getattr(
        transformer.config, "reference_channels", 0
    )
    predict: Callable[..., Tensor] = _with_positions if isinstance(transformer, POSITIONED) else _stock
    splits = isinstance(transformer, SwiftI2VTransformer3DModel) and transformer.embeds_jointly is None

    def field(x: Tensor, sigma: float, window: Window, reference: Tensor, kept: ReferenceTokens | None) -> Tensor:
        positions = window.positions(csg.rope_positions, trained_blocks)
        timestep = _timesteps(window.sigmas(sigma, csg), x, csg)
        extra = reference if takes_reference else None
        told: dict[str, Any] = {"reference_tokens": kept} if kept is not None and splits else {}
        if motion_score is not None:
            told["motion_score"] = x.new_full(x.shape[:1], motion_score, dtype=torch.float32)

        def run(embeds: Tensor | None) -> Tensor:
            return predict(transformer, x, timestep, embeds, positions, extra, **told).float()

        return guided(run, text, negative_text, guidance_scale)

    return DitVelocity(field)


class DitVelocity:
    """A DiT's velocity: a ``Velocity`` that remembers nothing, and one for each segment that keeps what stays the same.

    What stays is the reference's half of the patch embedding: the same for all steps of a segment, with guidance for
    both passes. A 2K window of 17,600 tokens saves 21 GFLOP of 271 TFLOP a pass, and holds 108 MB of bf16. That is
    next to nothing; what pays is that each half is a matrix product, where the whole is a convolution.
    """

    def __init__(self, field: Callable[[Tensor, float, Window, Tensor, ReferenceTokens | None], Tensor]) -> None:
        self._field = field

    def __call__(self, x: Tensor, sigma: float, window: Window, reference: Tensor) -> Tensor:
        """The slow witness: everything anew in every step."""
        return self._field(x, sigma, window, reference, None)

    def for_segment(self) -> Velocity:
        """The same for the steps of one segment. What it keeps dies with it."""
        kept = ReferenceTokens()
        return lambda x, sigma, window, reference: self._field(x, sigma, window, reference, kept)


def guided(
    run: Callable[[Tensor | None], Tensor], text: Tensor | None, negative_text: Tensor | None, scale: float
) -> Tensor:
    """Classifier-free guidance: negative + scale * (positive - negative); one pass when ``scale`` is 1."""
    positive = run(text)
    if scale == 1.0 or negative_text is None:
        return positive
    negative = run(negative_text)
    return negative + scale * (positive - negative)


POSITIONED = (SwiftI2VTransformer3DModel, MobileTransformer3DModel)


def _with_positions(
    transformer: Any,
    x: Tensor,
    timestep: Tensor,
    text: Tensor | None,
    positions: tuple[int, ...],
    reference: Tensor | None,
    **told: Any,
) -> Tensor:
    dtype = model_dtype(transformer)
    if reference is not None and "reference_tokens" not in told:  # those know it by its being the same tensor
        reference = reference.to(dtype)
    return transformer(
        hidden_states=x.to(dtype),
        timestep=timestep,
        encoder_hidden_states=None if text is None else text.to(x.device, dtype),
        reference_hidden_states=reference,
        frame_indices=torch.tensor(positions, device=x.device),
        return_dict=False,
        **told,
    )[0]


def _stock(
    transformer: Any,
    x: Tensor,
    timestep: Tensor,
    text: Tensor | None,
    positions: tuple[int, ...],
    reference: Tensor | None,
) -> Tensor:
    """diffusers' own Wan class: a timestep per token, positions through its rope buffer."""
    _, p_h, p_w = transformer.config.patch_size
    tokens = (x.shape[-2] // p_h) * (x.shape[-1] // p_w)
    dtype = model_dtype(transformer)
    joined = x if reference is None else torch.cat([x, reference], dim=1)
    with rope_frames(transformer, torch.tensor(positions, device=x.device)):
        return transformer(
            hidden_states=joined.to(dtype),
            timestep=timestep.repeat_interleave(tokens, dim=1),
            encoder_hidden_states=None if text is None else text.to(x.device, dtype),
            return_dict=False,
        )[0]


def model_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a DiT computes in: that of its largest floating parameters, whatever stays in float32 beside them."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _timesteps(sigmas: tuple[float, ...], x: Tensor, csg: CSG) -> Tensor:
    timestep = torch.tensor([sigmas], dtype=torch.float32, device=x.device).expand(x.shape[0], -1) * 1000
    return timestep.bfloat16().float() if csg.round_timesteps_bf16 else timestep


def _bind(on_step: Callable[[int, int], None], number: int) -> Callable[[int], None]:
    return lambda step: on_step(number, step)


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


class _Segment:
    """One segment being denoised inside its window."""

    def __init__(
        self, window: Window, sampling: Sampling, outputs: dict[int, Tensor], reference: Tensor, start: Tensor
    ) -> None:
        self.window, self.sampling, self.reference, self.start = window, sampling, reference, start
        self.context = [outputs[block] for block in window.context]
        if sampling.csg.neighbor_reference == "generated" and self.context:
            first = 0 if window.anchor is None else 1
            generated = [
                block.repeat(1, reference.shape[1] // block.shape[1], 1, 1, 1) for block in self.context[first:]
            ]
            parts = [reference[:, :, :first], *generated, reference[:, :, len(self.context) :]]
            self.reference = torch.cat(parts, dim=2)

    def finite(self, velocity: Velocity, number: int, on_step: Callable[[int], None] | None) -> Tensor:
        """The segment, made a second time by the witness if it is not finite. RunError if it is not even so."""
        segment = self.denoise(velocity, on_step)
        if not _is_finite(segment) and self.sampling.witness is not None:
            segment = self.denoise(self.sampling.witness(velocity, number), on_step)
        if not _is_finite(segment):
            raise RunError(f"segment {number + 1} is not finite (NaN or infinity); try --dtype float32")
        return segment

    def denoise(self, velocity: Velocity, on_step: Callable[[int], None] | None) -> Tensor:
        sampling = self.sampling
        velocity = velocity.for_segment() if isinstance(velocity, DitVelocity) else velocity
        noise = self._noise(self.window.segment)
        x = flow.add_noise(self.start, noise, sampling.levels[0])

        def field(x: Tensor, sigma: float) -> Tensor:
            context = self._context_at(sigma)
            v = velocity(torch.cat([*context, x], dim=2), sigma, self.window, self.reference)
            return v[:, :, len(context) :]  # only the segment is updated; finished blocks never are

        if sampling.sampler == "renoise":
            return flow.renoise(field, x, sampling.levels, lambda i: self._noise(self.window.segment, i), on_step)
        return flow.euler(field, x, sampling.levels, on_step)

    def _noise(self, blocks: tuple[int, ...], step: int = 0) -> Tensor:
        b, c, _, h, w = self.start.shape
        seed, stage = self.sampling.seed, self.sampling.stage
        return blocks_noise((b, c, h, w), blocks, seed=seed, stage=stage, step=step).to(self.start.device)

    def _context_at(self, sigma: float) -> list[Tensor]:
        renoised = self.sampling.csg.renoised
        if renoised == "none" or not self.context:
            return self.context
        kept = 1 if renoised == "neighbors" and self.window.anchor is not None else 0
        noisy = [
            flow.add_noise(clean, self._noise((block,)), sigma)
            for block, clean in zip(self.window.context[kept:], self.context[kept:], strict=True)
        ]
        return [*self.context[:kept], *noisy]


class _BlockBuffer:
    """Latent blocks by index, pulled from a stream on demand; block 0 stays, others are dropped when told."""

    def __init__(self, stream: Iterable[Tensor]) -> None:
        self._stream = iter(stream)
        self._blocks: dict[int, Tensor] = {}
        self._pulled = 0
        self._floor = 0

    def gather(self, blocks: tuple[int, ...]) -> Tensor:
        while self._pulled <= max(blocks):
            chunk = next(self._stream, None)
            if chunk is None:
                raise RunError(f"the reference ends after {self._pulled} blocks; block {max(blocks)} is needed")
            for block in chunk.split(1, dim=2):
                if self._pulled == 0 or self._pulled >= self._floor:
                    self._blocks[self._pulled] = block.float()
                self._pulled += 1
        return torch.cat([self._blocks[block] for block in blocks], dim=2)

    def drop_before(self, block: int) -> None:
        self._floor = block
        self._blocks = {index: kept for index, kept in self._blocks.items() if index >= block or index == 0}
