"""Every recipe by name: the two stages at Wan's size, autoencoders, and nano's own; each also at toy size.

``make("stage_two", data, base=...)`` gives a ``Recipe`` value; ``dataclasses.replace`` and ``changed`` alter it. What
the paper does not say (levels, weighting, batch) is DiffSynth's practice or the inference schedule, and a field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig

from .. import tiny as twins
from ..core import Size, UsageError
from ..models.wan import SwiftI2VTransformer3DModel
from ..presets import WAN_STAGE_ONE, WAN_STAGE_TWO
from . import recipes_nano
from .csg_source import INFERENCE_NEIGHBORS, INFERENCE_SEGMENT, Weighted, WholeClips, Windows
from .data import Clip
from .objective import Batch, FlowMatching, Levels
from .recipe import Parts, Recipe
from .shards import ShardSource
from .source import Curriculum, Source
from .vae import Clips, Reconstruction, pixel_source

LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""DiffSynth's q, k, v, o, ffn.0, ffn.2 in diffusers' names; image projections (add_k_proj, add_v_proj) stay."""
GLOBAL_BATCH = 32  # items of an optimizer step, all processes together, that the steps below are meant for
SHIFT = 5.0
TOY_CLIPS = recipes_nano.MadeUp(channels=16, count=1, context=0, image_dim=20, text=(512, 16), blocks=3)
"""What Wan2.1-I2V's twin learns from at toy size."""


@dataclass(frozen=True)
class Phase:
    """A part of a curriculum: the clips' size and how many optimizer steps of ``GLOBAL_BATCH`` items."""

    size: Size
    steps: int


CURRICULUM = (Phase(Size(1920, 1088), 6000), Phase(Size(2560, 1408), 4000))
LATENT_STRIDE = 16


@dataclass(frozen=True)
class Given:
    """What a user adds to a recipe's name: data, a base checkpoint (folder or repository), toy size or not."""

    data: tuple[Path, ...] = ()
    base: str | None = None
    tiny: bool = False


# -- Stage I at Wan's size ----------------------------------------------------------------------------------------


def with_lora(model: Any, rank: int) -> Any:
    """``model`` frozen, with a trainable float32 adapter on attention and feed-forward layers."""
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_LAYERS)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def stage_one_parts(base: str, rank: int, tiny: bool) -> Parts:
    """Wan2.1-I2V in bfloat16, frozen, under its Low-Res LoRA."""
    if tiny:
        return Parts({"transformer": with_lora(twins.wan_stage_one_dit(), rank)})
    wan = WanTransformer3DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.bfloat16)
    return Parts({"transformer": with_lora(wan, rank)})


def stage_one_lora(given: Given) -> Recipe:
    """Low-Res LoRA (paper section 3.1): Wan2.1-I2V-14B learns to work at 640x352."""
    rank = 4 if given.tiny else 32
    recipe = Recipe(
        "stage_one_lora",
        partial(stage_one_parts, given.base or WAN_STAGE_ONE, rank, given.tiny),
        partial(recipes_nano.made_up, source=TOY_CLIPS) if given.tiny else WholeShards(given.data),
        FlowMatching(Levels(SHIFT, low=0.001), network="wan_image"),
        steps=2000,
        lr=1e-4,
        decay=1,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        ema_decay=0.99,
        accumulation=4,
        gradient_checkpointing=True,
        save_every=100,
    )
    return toy(recipe, lr=1e-2) if given.tiny else recipe


# -- Stage II at Wan's size ---------------------------------------------------------------------------------------


def stage_two_parts(base: str, tiny: bool) -> Parts:
    """TI2V-5B widened by zeros for the reference, or an already widened checkpoint; float32 master weights."""
    if tiny:
        return Parts({"transformer_2": widened(twins.wan_base_dit(), 4)})
    folder = {"subfolder": "transformer"} if base.count("/") == 1 and not Path(base).exists() else {}
    config = WanTransformer3DModel.load_config(base, **folder)
    kind = SwiftI2VTransformer3DModel if config["in_channels"] == 2 * config["out_channels"] else WanTransformer3DModel
    model = kind.from_pretrained(base, torch_dtype=torch.float32, **folder)
    return Parts({"transformer_2": widened(model, config["out_channels"])})


def widened(model: Any, channels: int) -> Any:
    """With reference channels, trainable."""
    if not isinstance(model, SwiftI2VTransformer3DModel):
        model = SwiftI2VTransformer3DModel.from_wan(model, reference_channels=channels)
    return model.requires_grad_(True)


def stage_two(given: Given) -> Recipe:
    """Full fine-tune of the widened TI2V-5B on CSG windows (paper section 3.3), M and N as at inference.

    One ``data`` folder trains at its size; two are the curriculum: 1080p for its steps, then 2K.
    """
    made_up = recipes_nano.MadeUp(channels=4, count=1, context=2, text=(12, 16), blocks=5, positions=(0, 3, 4, 5, 6))
    recipe = Recipe(
        "stage_two",
        partial(stage_two_parts, given.base or WAN_STAGE_TWO, given.tiny),
        partial(recipes_nano.made_up, source=made_up) if given.tiny else ShardWindows(given.data),
        FlowMatching(Levels(SHIFT, low=0.001)),
        steps=sum(phase.steps for phase in CURRICULUM),
        lr=1e-5,
        decay=1,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        ema_decay=0.999,
        accumulation=4,
        gradient_checkpointing=True,
        save_every=100,
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe


@dataclass(frozen=True)
class ShardWindows:
    """A recipe's ``source``: windows of one folder of shards, or of several one after another by ``CURRICULUM``.

    Its fields are those of ``csg_source.Windows``, so that ``--set source.transition_share=0.25`` reaches them.
    """

    data: tuple[Path, ...]
    batch: int = 1
    segment_blocks: Weighted = INFERENCE_SEGMENT
    neighbor_blocks: Weighted = INFERENCE_NEIGHBORS
    on_grid: bool = True
    transition_share: float = 0.5
    seed: int = 0

    def __call__(self, parts: Parts) -> Source[Batch]:
        if len(self.data) not in (1, len(CURRICULUM)):
            raise UsageError(f"stage_two takes 1 --data, or {len(CURRICULUM)} for the curriculum, not {len(self.data)}")
        sources = [self._windows(folder) for folder in self.data]
        if len(sources) == 1:
            return sources[0]
        pairs = zip(sources, CURRICULUM, strict=True)
        return Curriculum(tuple((_Sized(source, phase.size), phase.steps * GLOBAL_BATCH) for source, phase in pairs))

    def _windows(self, folder: Path) -> Windows:
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "data"}
        return Windows(shards(folder, self.seed, self.batch), **options)


@dataclass(frozen=True)
class WholeShards:
    """A recipe's ``source``: whole clips of one folder of shards, for Wan2.1-I2V."""

    data: tuple[Path, ...]
    batch: int = 1
    seed: int = 0

    def __call__(self, parts: Parts) -> Source[Batch]:
        if len(self.data) != 1:
            raise UsageError(f"this recipe takes one --data, a folder of latent shards, not {len(self.data)}")
        return WholeClips(shards(self.data[0], self.seed, self.batch), self.batch)


@dataclass(frozen=True)
class _Sized:
    """Refuses windows of another area than the phase's: shards given in the wrong order."""

    source: Source[Batch]
    size: Size

    def at(self, index: int) -> Batch:
        batch = self.source.at(index)
        area = batch.clean.shape[-2] * batch.clean.shape[-1] * LATENT_STRIDE**2
        if not 0.8 < area / self.size.area < 1.25:
            raise UsageError(f"clips of {area} pixels where the curriculum is at {self.size}: give --data in its order")
        return batch


def shards(folder: Path, seed: int, batch: int) -> Source[Clip]:
    """The clips of a folder of latents."""
    return ShardSource(folder, seed, batch=batch)


# -- autoencoders -------------------------------------------------------------------------------------------------


def wan_vae_parts(base: str, tiny: bool) -> Parts:
    """Wan2.2's VAE with its encoder frozen: latents stay what every DiT knows."""
    model: Any = twins.wan_vae_two() if tiny else AutoencoderKLWan.from_pretrained(base, subfolder="vae")
    model.requires_grad_(False)
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    return Parts({"vae_2": model})


def vae(given: Given) -> Recipe:
    """Decoder fine-tune of Wan2.2's VAE on photos under moving cameras (photos.jsonl), film (clips.jsonl), or both."""
    recipe = Recipe(
        "vae",
        partial(wan_vae_parts, given.base or WAN_STAGE_TWO, given.tiny),
        partial(recipes_nano.made_up, source=recipes_nano.MadeUpClips(16))
        if given.tiny
        else partial(pixels, data=given.data),
        Reconstruction(),
        steps=5000,
        lr=2e-5,
        ema_decay=0.999,
    )
    return toy(recipe, lr=3e-3) if given.tiny else recipe


def pixels(parts: Parts, data: tuple[Path, ...]) -> Source[Clips]:
    return pixel_source(data, ((2, 0, 256), (1, 4, 256)), (1280, 905))


# -- by name ------------------------------------------------------------------------------------------------------


def toy(recipe: Recipe, *, lr: float) -> Recipe:
    """The same recipe at a size of seconds: a few steps, float32, every step logged."""
    short = {"steps": 40, "warmup": 2, "decay": 1, "accumulation": 1, "ema_decay": 0.9}
    often = {"log_every": 1, "save_every": 20, "sample_every": 0}
    return replace(recipe, lr=lr, precision="float32", **short, **often)  # type: ignore[arg-type]


def nano_vae(given: Given) -> Recipe:
    """nano's VAE: the refiner behind its frozen transform, on photos under moving cameras (photos.jsonl)."""
    recipe = recipes_nano.nano_vae(given.data, given.tiny)
    return toy(recipe, lr=2e-3) if given.tiny else recipe


def nano_text(given: Given) -> Recipe:
    """nano's text encoder and the head that reads the camera from it; prompts are made up, no data."""
    recipe = recipes_nano.nano_text(given.data, given.tiny)
    return toy(recipe, lr=3e-3) if given.tiny else recipe


def nano_one(given: Given) -> Recipe:
    """nano's Stage I: what a camera uncovers (photos.jsonl)."""
    recipe = recipes_nano.nano_stage("one", given.data, given.tiny)
    return toy(recipe, lr=3e-3) if given.tiny else recipe


def nano_two(given: Given) -> Recipe:
    """nano's Stage II: detail, in one step from pure noise (photos.jsonl)."""
    recipe = recipes_nano.nano_stage("two", given.data, given.tiny, given.base)
    return toy(recipe, lr=3e-3) if given.tiny else recipe


Maker = Callable[[Given], Recipe]
MAKERS: tuple[Maker, ...] = (stage_one_lora, stage_two, vae, nano_vae, nano_text, nano_one, nano_two)
RECIPES: dict[str, Maker] = {maker.__name__: maker for maker in MAKERS}


def makers() -> dict[str, Maker]:
    """Every recipe by name, those defined in terms of the ones here too."""
    from .distill import DISTILLATIONS
    from .mobile import mobile
    from .mobile_distill import STUDENTS
    from .mobile_nano import mobile_nano
    from .turbo import turbo

    own = {"mobile": mobile, "mobile_nano": mobile_nano, "turbo": turbo}
    return RECIPES | own | DISTILLATIONS | STUDENTS


def make(name: str, data: tuple[Path, ...] = (), *, base: str | None = None, tiny: bool = False) -> Recipe:
    """The recipe of that name. ``data``: what it trains on; ``base``: weights it starts from, if not its default."""
    known = makers()
    if name not in known:
        raise UsageError(f"recipe {name!r} is not known; known: {', '.join(known)}")
    for path in data:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    return known[name](Given(data, base, tiny))


def changed(value: Any, name: str, text: str) -> Any:
    """A copy of a recipe (or any dataclass value) with field ``name`` (dotted for nested ones) read from ``text``."""
    head, _, rest = name.partition(".")
    known = [item.name for item in fields(value)]
    if head not in known:
        raise UsageError(f"{name!r} is no field of a {type(value).__name__}; known: {', '.join(known)}")
    old = getattr(value, head)
    if rest:
        if not is_dataclass(old):
            raise UsageError(f"{head} has no fields of its own")
        return replace(value, **{head: changed(old, rest, text)})
    return replace(value, **{head: _read(old, text, head)})


def _read(old: Any, text: str, name: str) -> Any:
    try:
        new = json.loads(text)
    except ValueError:
        new = text
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if isinstance(old, tuple) and isinstance(new, list):
        new = _tuples(new)
    if type(new) is not type(old):
        raise UsageError(f"{name}={text} is not {type(old).__name__}, as {old!r} is")
    return new


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
