"""Flow matching on one CSG window (paper section 3.3): noise the segment, keep finished blocks, learn the velocity.

The same conventions as at inference: sigma in [0, 1], velocity = noise - clean, positions and context as ``segments``
has them. It knows windows of latents and networks that take them; no files, no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..flow import add_noise, denoised, shifted, velocity_of
from ..models.mobile_dit import MobileTransformer3DModel
from ..models.text import encode_prompts
from ..segments import CSG, Window
from .recipe import Loss, Parts

INFERENCE = CSG()
SMALL_BASE, SMALL_SIGMA = 0.02, 0.3  # below these the residual weighting stops growing
FLOOR = 0.002  # the same for the relative weighting


@dataclass(frozen=True)
class Batch:
    """Latents of one window, teacher forced.

    ``clean``, ``reference`` (b, c, t, h, w) float32, normalized; the first ``context`` blocks are finished (anchor,
    neighbors). ``frame_indices`` (t,): temporal positions as the network gets them. ``text`` (b, l, d), or ``prompts``
    to be encoded by the recipe's frozen text encoder. ``image`` (b, 257, 1280): CLIP states, for Wan2.1-I2V.
    ``motion_score`` (b,): mean optical flow, for networks that listen to it (MobileI2V).
    """

    clean: Tensor
    reference: Tensor
    frame_indices: Tensor
    context: int
    text: Tensor | None = None
    prompts: tuple[str, ...] = ()
    image: Tensor | None = None
    motion_score: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=non_blocking)

        clean, reference = self.clean.to(device), self.reference.to(device)
        rest = {name: move(getattr(self, name)) for name in ("text", "image", "motion_score", "frame_indices")}
        return replace(self, clean=clean, reference=reference, **rest)  # type: ignore[arg-type]


class ClipLike(Protocol):
    """What a window is cut from: latents (c, T, h, w) of a whole clip and its references (``train.data.Clip``)."""

    @property
    def clean(self) -> Tensor: ...
    @property
    def reference(self) -> Tensor: ...
    @property
    def transition(self) -> Tensor | None: ...
    @property
    def text(self) -> Tensor | None: ...
    @property
    def prompt(self) -> str: ...


def window_batch(
    clips: Sequence[ClipLike],
    window: Window,
    *,
    transition_share: float,
    generator: torch.Generator,
    positions: Sequence[int],
) -> Batch:
    """The blocks of ``window`` out of clips of one size, as a batch; ``positions``: of its blocks, in their order.

    Each clip that has a stage-transition reference uses it with probability ``transition_share``. The anchor's
    reference is the photo's own latent in either case. Raises ValueError if a clip is shorter than the window needs.
    """
    if len(positions) != len(window.blocks):
        raise ValueError(f"{len(positions)} positions for {len(window.blocks)} blocks")
    rows = torch.tensor(window.blocks)
    clean, reference = [], []
    for clip in clips:
        if clip.clean.shape[1] <= max(window.blocks):
            raise ValueError(f"a clip of {clip.clean.shape[1]} blocks has no block {max(window.blocks)}")
        drawn = float(torch.rand((), generator=generator)) < transition_share
        held = clip.transition if drawn and clip.transition is not None else clip.reference
        clean.append(clip.clean[:, rows].float())
        reference.append(held[:, rows].float())
    texts = [clip.text for clip in clips if clip.text is not None]
    images = [image for clip in clips if (image := getattr(clip, "image", None)) is not None]
    scores = [score for clip in clips if (score := getattr(clip, "motion_score", None)) is not None]
    return Batch(
        torch.stack(clean),
        torch.stack(reference),
        torch.tensor(tuple(positions)),
        len(window.context),
        text=torch.stack(texts) if len(texts) == len(clips) else None,
        prompts=tuple(clip.prompt for clip in clips),
        image=torch.stack(images) if len(images) == len(clips) else None,
        motion_score=torch.tensor(scores) if len(scores) == len(clips) else None,
    )


@dataclass(frozen=True)
class Levels:
    """How noise levels are drawn: evenly in [``low``, 1] before ``shift``, as samplers place them, or by ``law``
    "logit-normal" the sigmoid of a standard normal, at least ``low``, then shifted (MobileI2V, with shift 1); with
    probability ``one`` exactly 1."""

    shift: float = 5.0
    low: float = 0.03
    one: float = 0.0
    law: Literal["even", "logit-normal"] = "even"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` sigmas on the CPU."""
        if self.law == "even":
            base = self.low + (1 - self.low) * torch.rand(count, generator=generator)
        else:
            base = torch.randn(count, generator=generator).sigmoid().clamp(min=self.low)
        sure = torch.rand(count, generator=generator) < self.one
        sigma = self.shift * base / (1 + (self.shift - 1) * base)
        return torch.where(sure, torch.ones(()), sigma)


@dataclass(frozen=True)
class Noisy:
    """A batch as the network sees it: ``x`` (b, c, t, h, w), ``levels`` (b, t) it is told, the ``noise`` and the
    segment's ``sigma`` (b,); ``reference`` with what CSG puts into it."""

    x: Tensor
    levels: Tensor
    noise: Tensor
    sigma: Tensor
    reference: Tensor


def noised(batch: Batch, sigma: Tensor, noise: Tensor, csg: CSG) -> Noisy:
    """Noise the segment to ``sigma`` (b,); the context is clean at level 0, or as ``csg`` says."""
    sigma, noise = sigma.to(batch.clean), noise.to(batch.clean)
    count, anchors = batch.context, min(1, batch.context)
    truly, told = (sigma[:, None].repeat(1, batch.clean.shape[2]) for _ in range(2))
    again = {"none": count, "neighbors": anchors, "context": 0}[csg.renoised]
    truly[:, :again] = 0
    told[:, : anchors if again and csg.neighbor_timestep == "current" else again] = 0
    reference = batch.reference
    if csg.neighbor_reference == "generated" and count > anchors:
        generated = batch.clean[:, :, anchors:count].repeat(1, reference.shape[1] // batch.clean.shape[1], 1, 1, 1)
        parts = (reference[:, :, :anchors], generated, reference[:, :, count:])
        reference = torch.cat(parts, dim=2)
    x = add_noise(batch.clean, noise, truly[:, None, :, None, None])
    return Noisy(x, told, noise, sigma, reference)


Network = Literal["window", "wan_image"]


def predict(model: nn.Module, noisy: Noisy, batch: Batch, text: Tensor | None, network: Network) -> Tensor:
    """The network's velocity, float32. "window": a level and a position a block and reference channels (both kinds
    of Stage II, nano's Stage I), but for a MobileI2V without any. "wan_image": Wan2.1-I2V with 16 noise + 4 mask + 16
    condition channels, one level for all blocks, CLIP states; the reference holds the condition's latents."""
    if network == "window":
        bare = isinstance(model, MobileTransformer3DModel) and model.reference_channels == 0
        listens = {} if batch.motion_score is None else {"motion_score": batch.motion_score}
        return model(
            hidden_states=noisy.x,
            timestep=1000 * noisy.levels,
            encoder_hidden_states=text,
            reference_hidden_states=None if bare else noisy.reference,
            frame_indices=batch.frame_indices,
            return_dict=False,
            **listens,
        )[0].float()
    if batch.image is None:
        raise ValueError("the batch has no CLIP states of the photo, which Wan2.1-I2V needs")
    b, _, t, h, w = noisy.x.shape
    known = torch.zeros(t, device=noisy.x.device)
    known[: max(1, batch.context)] = 1
    mask = known.view(1, 1, t, 1, 1).expand(b, 4, t, h, w)
    return model(
        hidden_states=torch.cat([noisy.x, mask, noisy.reference], dim=1),
        timestep=1000 * noisy.sigma,
        encoder_hidden_states=text,
        encoder_hidden_states_image=batch.image,
        return_dict=False,
    )[0].float()


@dataclass(frozen=True)
class FlowMatching:
    """The objective of every DiT here.

    ``weighting``: "velocity" is the mean squared error of the velocity; "bell" weighs it by sigma as DiffSynth does;
    "residual" is for networks that predict what the reference lacks: the error of the clean estimate, between
    absolute and relative (busy photos must not drown quiet ones), by channel weights if there are any; "relative"
    weighs an item by one over its reference's error, as a mean of decibels does.
    ``model``: the key of the trained network, or "" if there is one alone. ``text_dropout``: share of items that get
    ``constants["null_text"]`` (zeros without it) instead of their text. ``csg``: what finished blocks look like.
    Error and base, for the log: mean squared error of the clean estimate and of the bare reference, on the segment.
    """

    levels: Levels = Levels()
    weighting: Literal["velocity", "bell", "residual", "relative"] = "velocity"
    network: Network = "window"
    model: str = ""
    text_dropout: float = 0.0
    text_length: int = 128
    csg: CSG = INFERENCE

    def __call__(self, parts: Parts, item: Batch, generator: torch.Generator) -> Loss:
        sigma = self.levels.draw(len(item.clean), generator)
        noise = torch.randn(item.clean.shape, generator=generator)
        noisy = noised(item, sigma, noise, self.csg)
        text = text_states(parts, item, self.text_length, self.text_dropout, generator)
        velocity = predict(sole(parts, self.model), noisy, item, text, self.network)
        return self.loss(parts, item, noisy, velocity)

    def loss(self, parts: Parts, batch: Batch, noisy: Noisy, velocity: Tensor) -> Loss:
        """From the predicted ``velocity``; only the segment counts."""
        count = batch.context
        broad = noisy.sigma[:, None, None, None, None]
        guess = denoised(noisy.x[:, :, count:], velocity[:, :, count:], broad)
        error, base = (
            channel_error(value, batch.clean[:, :, count:], parts.constants.get("channel_weights"))
            for value in (guess, batch.reference[:, : guess.shape[1], count:])
        )
        if self.weighting in ("residual", "relative"):
            share = (base + SMALL_BASE).rsqrt() if self.weighting == "residual" else (base + FLOOR).reciprocal()
            weight = share / noisy.sigma.clamp(min=SMALL_SIGMA).square()
            value = (weight * error).mean()
        else:
            target = velocity_of(batch.clean, noisy.noise)[:, :, count:]
            each = (velocity[:, :, count:] - target).square().mean(dim=(1, 2, 3, 4))
            value = (each * bell(noisy.sigma, self.levels.shift)).mean() if self.weighting == "bell" else each.mean()
        return Loss(value, error.detach().mean(), base.detach().mean())


def sole(parts: Parts, key: str) -> nn.Module:
    """The trained network called ``key``, or the only one that is not there for the training alone."""
    if key:
        return parts.modules[key]
    (model,) = (module for name, module in parts.modules.items() if name not in parts.inner)
    return model


def channel_error(guess: Tensor, clean: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of each item (b,) of (b, c, t, h, w), channels weighed by ``weights`` (c,) with mean 1."""
    error = (guess - clean).square().mean(dim=(2, 3, 4))
    return (error if weights is None else error * weights.to(error)).mean(dim=1)


def bell(sigma: Tensor, shift: float) -> Tensor:
    """DiffSynth's weight of a level: exp(-2 (sigma - 1/2)^2) above its value at 1, mean 1 over the shifted grid."""
    return ((-2 * (sigma - 0.5).square()).exp() - _bell_floor()) / _bell_mean(shift)


def _bell_floor() -> float:
    return float(torch.tensor(-0.5).exp())


@cache
def _bell_mean(shift: float) -> float:
    grid = torch.tensor([shifted(1 - i / 1000, shift) for i in range(1000)])
    return float(((-2 * (grid - 0.5).square()).exp() - _bell_floor()).mean())


def text_states(
    parts: Parts, batch: Batch, length: int, dropout: float = 0.0, generator: torch.Generator | None = None
) -> Tensor | None:
    """The batch's text states; encoded in float32 by ``parts.frozen["text_encoder"]`` if it only has prompts.

    None if there is neither text nor an encoder. Prompts are encoded at their own longest length and zero-padded to
    ``length``, which is the same and cheaper.
    """
    states = batch.text
    encoder: Any = parts.frozen.get("text_encoder")
    if states is None and encoder is not None and batch.prompts:
        states = encoded(parts.tokenizer, encoder, batch.prompts, length)
    if states is None or dropout == 0.0 or generator is None:
        return states
    dropped = torch.rand(len(states), generator=generator) < dropout
    null = parts.constants.get("null_text", torch.zeros(())).to(states)
    return torch.where(dropped.to(states.device)[:, None, None], null, states)


def encoded(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    """(b, length, d), without autocast; gradients flow to an encoder that wants them."""
    longest = min(length, max(len(prompt.encode()) for prompt in prompts) + 1)
    with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
        states = encode_prompts(tokenizer, encoder, prompts, longest)
    return nn.functional.pad(states, (0, 0, 0, length - longest))
