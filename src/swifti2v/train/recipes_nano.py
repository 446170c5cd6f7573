"""nano's recipes: numbers of this project's own small models, as plain values.

Order of training: ``nano_vae`` first (its latents are frozen by its basis), ``nano_text``, ``nano_one`` (needs the
text encoder), ``nano_two``. ``tiny=True`` gives each at toy size with made-up data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from .. import presets
from ..core import UsageError
from ..models.camera_head import CameraHead
from ..models.mobile_dit import MobileTransformer3DModel
from ..models.nano_vae import NanoVAE
from ..models.text import nano_text_config, nano_tokenizer
from . import film
from .csg_source import Weighted, Windows
from .nano import Photos, stage_one_batch
from .objective import Batch, FlowMatching, Levels, encoded
from .prompts import caption
from .recipe import Loss, Parts, Recipe
from .samples import WindowVideos
from .shards import ShardSource
from .source import Echo, Source, seeded
from .vae import WIDTHS, Clips, MovingPhotos, Refinement, pixel_source
from .windows import Kept, Material, StageTwoWindows

Stage = Literal["one", "two"]
TEXT_LENGTH = 128  # zero padding takes part in cross-attention: inference must pad to the same length
SHIFT = 5.0
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "ffn_ratio": 2.5,
    "patch_size": 2,
    "motion_embedding": False,
    "absolute_positions": True,
    "prediction": "residual",
}
STAGE_ONE: dict[str, Any] = COMMON | {"attention_pattern": ("linear",) * 5, "cross_attention_dim": 128}
STAGE_TWO: dict[str, Any] = COMMON | {"attention_pattern": ("linear",) * 6, "prediction": "gated"}
REFERENCES = {"one": 1, "two": 2}  # Stage II: the reference, and the photo carried along the motion
TINY: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2, "attention_pattern": ("linear",)}
ECHO = {"one": 2, "two": 4}  # rendering a batch costs as much as learning from it
PASSES = 260  # batches of Stage II windows, gone through again and again
TRANSITION_SHARE = 0.5
ONE_STEP = {"one": 0.0, "two": 0.5}  # share of batches at sigma exactly 1, where a one-step sampler is
TUNING_STEPS = 1100
SAMPLE_STEPS = {"one": 4, "two": 1}
# From shards: clips a batch, then M and N with weights. Stage I: any five blocks in a row, or a whole clip.
WINDOWS: dict[Stage, tuple[int, Weighted, Weighted]] = {
    "one": (2, ((5, 0.8), (20, 0.2)), ((0, 1.0),)),
    "two": (2, ((3, 0.6), (1, 0.1), (2, 0.1), (4, 0.1), (5, 0.1)), ((1, 0.85), (0, 0.15))),
}
VAE_GROUPS = ((3, 0, 192), (2, 2, 160))
TINY_TEXT: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
STEPS = {"nano_text": 7500, "nano_one": 500, "nano_two": 2000, "nano_vae": 2600}


def package(name: str) -> Path:
    """A folder of nano's shipped weights."""
    return presets.package_folder() / "nano" / name


# -- the text encoder, with the head that reads the camera --------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Prompts and the motions (b, 5) they ask for."""

    prompts: tuple[str, ...]
    motion: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Asked:
        return Asked(self.prompts, self.motion.to(device))


@dataclass(frozen=True)
class Captions:
    """``count`` captions an item."""

    count: int
    seed: int

    def at(self, index: int) -> Asked:
        rng = random.Random(f"text/{self.seed}/{index}")
        asked = [caption(rng) for _ in range(self.count)]
        return Asked(tuple(item.prompt for item in asked), torch.tensor([item.motion.code() for item in asked]))


@dataclass(frozen=True)
class ReadsMotion:
    """How far the mean text state is from saying the motion's five amplitudes through the camera head."""

    text_length: int = TEXT_LENGTH

    def __call__(self, parts: Parts, item: Asked, generator: torch.Generator) -> Loss:
        encoder: Any = parts.modules["text_encoder"]
        states = encoded(parts.tokenizer, encoder, item.prompts, self.text_length)
        error = (parts.modules["camera"](states) - item.motion).square().mean()
        return Loss(error, error, item.motion.square().mean())


def text_parts(tiny: bool) -> Parts:
    config = nano_text_config()
    if tiny:
        config = T5Config(vocab_size=384, dropout_rate=0.0, **TINY_TEXT)
    modules = {"text_encoder": T5EncoderModel(config), "camera": CameraHead(config.d_model)}
    return Parts(modules, tokenizer=nano_tokenizer())


def captions(parts: Parts, count: int, seed: int) -> Source[Asked]:
    return Captions(count, seed)


# -- the two DiTs -------------------------------------------------------------------------------------------------


def dit_parts(stage: Stage, tiny: bool, vae: Path, text_encoder: Path, base: str | None = None) -> Parts:
    """A new network under the pipeline's name, or the one in ``base``; the frozen text encoder that Stage I hears."""
    scale = [1.0, 2.0, 4.0, 8.0] if tiny else list(NanoVAE.load_config(str(vae))["scale_video"])
    config = (STAGE_ONE if stage == "one" else STAGE_TWO) | dict.fromkeys(("in_channels", "out_channels"), len(scale))
    config["reference_channels"] = REFERENCES[stage] * len(scale)
    if tiny:
        config = config | TINY | ({"cross_attention_dim": TINY_TEXT["d_model"]} if stage == "one" else {})
    if base is None:
        model = MobileTransformer3DModel(**config)
    else:
        model = MobileTransformer3DModel.from_pretrained(base, torch_dtype=torch.float32)
    frozen: dict[str, Any] = {}
    if stage == "one":
        frozen["text_encoder"] = (
            text_parts(tiny=True).modules["text_encoder"] if tiny else T5EncoderModel.from_pretrained(text_encoder)
        )
    name = "transformer" if stage == "one" else "transformer_2"
    return Parts({name: model}, frozen, {"channel_weights": channel_weights(scale)}, nano_tokenizer())


def channel_weights(scale: list[float]) -> Tensor:
    """Half-way from latent to pixel error: a coefficient weighs as much as the VAE's scale made it small."""
    weights = 1 / torch.tensor(scale)
    return weights / weights.mean()


class Rendered:
    """Batches of Stage I, rendered from photos: a function of (seed, index)."""

    def __init__(self, vae: NanoVAE, photos: Photos, seed: int, amplitude: float = 1.0) -> None:
        self.vae, self.photos, self.seed, self.amplitude = vae, photos, seed, amplitude

    def at(self, index: int) -> Batch:
        rng = random.Random(f"one/{self.seed}/data/{index}")
        return stage_one_batch(self.vae, self.photos, rng, self.amplitude)


@dataclass(frozen=True)
class Passes:
    """The first ``count`` items of a source, in order and then in a new order every pass."""

    source: Source[Batch]
    count: int

    def at(self, index: int) -> Batch:
        turn, place = divmod(index, self.count)
        order = list(range(self.count))
        if turn:
            random.Random(turn).shuffle(order)
        return self.source.at(order[place])


def rendered(parts: Parts, stage: Stage, data: Path, vae: Path, seed: int) -> Source[Batch]:
    """Batches from a folder of latent shards, or rendered from the photos of a listing (Stage II: and the film beside
    it, if scripts/fetch_clips.py has been there; its windows are kept in ``cache/windows``)."""
    if data.is_dir():
        count, segments, neighbors = WINDOWS[stage]
        clips = ShardSource(data, seed, batch=count)
        share = 0.0 if stage == "one" else TRANSITION_SHARE
        return Windows(clips, count, segments, neighbors, on_grid=False, transition_share=share, seed=seed)
    photos = Photos(data, "train")
    if stage == "one":
        return Echo(Rendered(load_vae(vae), photos, seed), ECHO[stage])
    source = StageTwoWindows(Material(load_vae(vae), photos, film_shots(data.parent)), seed)
    return Echo(Passes(Kept(source, data.parent / "cache" / "windows"), PASSES), ECHO[stage])


def film_shots(data: Path) -> list[film.Shot]:
    """The training shots of ``data``/clips.jsonl, decoded once; none if it is not there."""
    if not (data / "clips.jsonl").exists():
        return []
    film.prepare(data / "clips.jsonl", "train", data / "cache" / "film")
    return film.load(data / "cache" / "film")


# -- the VAE ------------------------------------------------------------------------------------------------------


def vae_parts(tiny: bool, basis: Path) -> Parts:
    """A VAE with the shipped transform (its lists are in the config) and a new refiner."""
    config = dict(NanoVAE.load_config(str(basis)))
    if tiny:
        config |= {"image_width": 16, "image_layers": 1, "video_width": 16, "video_layers": 1}
    return Parts({"vae": NanoVAE.from_config(config)})


def pixels(parts: Parts, data: tuple[Path, ...], seed: int) -> Source[Clips]:
    """Moving photos, or what else ``pixel_source`` knows; with the film beside a photos.jsonl, half of each."""
    source = pixel_source(data, VAE_GROUPS, WIDTHS, seed)
    shots = film_shots(data[0].parent) if isinstance(source, MovingPhotos) else []
    return film.FilmAndPhotos(source, shots, seed) if shots and isinstance(source, MovingPhotos) else source


# -- made-up data for toy sizes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeUp:
    """Windows of smooth random latents with a blurred reference, as ``Batch``; toy size."""

    channels: int = 4
    blocks: int = 4
    side: int = 4
    count: int = 2
    context: int = 1
    image_dim: int = 0
    text: tuple[int, int] | None = None
    positions: tuple[int, ...] = ()
    references: int = 1
    scored: bool = False

    def at(self, index: int) -> Batch:
        generator = seeded(0, index, "made up")
        shape = (self.count, self.channels, self.blocks, self.side, self.side)
        clean = torch.randn(shape, generator=generator)
        reference = clean + 0.5 * torch.randn(shape, generator=generator)
        reference[:, :, : self.context] = clean[:, :, : self.context]
        reference = torch.cat([reference, *(0.8 * reference for _ in range(self.references - 1))], dim=1)
        text = torch.randn(self.count, *self.text, generator=generator) if self.text else None
        image = torch.randn(self.count, 257, self.image_dim, generator=generator) if self.image_dim else None
        prompts = tuple(f"pan left, picture {index} {item}" for item in range(self.count))
        frames = torch.tensor(self.positions or tuple(range(self.blocks)))
        score = 3 * torch.rand(self.count, generator=generator) if self.scored else None
        return Batch(clean, reference, frames, self.context, text, prompts, image, score)


@dataclass(frozen=True)
class MadeUpClips:
    """Noise blurred in space and carried along in time, (1, 3, 1 + 4k, side, side), and single frames of it."""

    side: int = 32
    blocks: int = 1

    def at(self, index: int) -> Clips:
        generator = seeded(0, index, "made up clips")
        frames = 1 + 4 * self.blocks
        wide = torch.rand(1, 3, self.side, self.side + frames, generator=generator) * 2 - 1
        soft = torch.nn.functional.avg_pool2d(wide, 3, 1, 1, count_include_pad=False)
        clip = torch.stack([soft[..., i : i + self.side] for i in range(frames)], dim=2)
        return Clips((clip[:, :, :1], clip))


def made_up(parts: Parts, source: Source[Any]) -> Source[Any]:
    return source


# -- the recipes --------------------------------------------------------------------------------------------------


def nano_text(data: tuple[Path, ...] = (), tiny: bool = False) -> Recipe:
    """nano's text encoder and camera head, alone: prompts are made up, there is no data."""
    return Recipe(
        "nano_text",
        partial(text_parts, tiny),
        partial(captions, count=8 if tiny else 32, seed=0),
        ReadsMotion(),
        steps=STEPS["nano_text"],
        lr=1e-3,
        optimizer="muon",
        precision="float32",
    )


def nano_stage(stage: Stage, data: tuple[Path, ...] = (), tiny: bool = False, base: str | None = None) -> Recipe:
    """nano's Stage I, on photos under moving cameras, or Stage II, on windows of film and such photos.

    Stage II was trained twice: from nothing, then from that (``base``) with every clip counting alike.
    """
    name, vae = f"nano_{stage}", package("vae")
    given = Path() if tiny else data[0] if len(data) == 1 and data[0].is_dir() else _listing(data, name)
    source = partial(rendered, stage=stage, data=given, vae=vae, seed=0)
    return Recipe(
        name,
        partial(dit_parts, stage, tiny, vae, package("text_encoder"), base),
        partial(made_up, source=MadeUp(references=REFERENCES[stage])) if tiny else source,
        FlowMatching(
            Levels(SHIFT, low=0.03, one=ONE_STEP[stage]),
            "residual" if base is None or stage == "one" else "relative",
            text_length=TEXT_LENGTH,
        ),
        steps=STEPS[name] if base is None else TUNING_STEPS,
        lr=1e-3 if base is None else 5e-4,
        decay=900,
        optimizer="muon",
        sample=WindowVideos(partial(load_vae, vae), steps=SAMPLE_STEPS[stage], shift=SHIFT),
    )


def load_vae(folder: Path) -> NanoVAE:
    return NanoVAE.from_pretrained(folder, torch_dtype=torch.float32).eval()


def nano_vae(data: tuple[Path, ...] = (), tiny: bool = False) -> Recipe:
    """nano's VAE: the refiner behind the frozen transform, from photos that a camera moves over."""
    source = partial(made_up, source=MadeUpClips())
    return Recipe(
        "nano_vae",
        partial(vae_parts, tiny, package("vae")),
        source if tiny else partial(pixels, data=data, seed=0),
        Refinement(),
        steps=STEPS["nano_vae"],
        lr=6e-4,
        betas=(0.9, 0.98),
        decay=1800,
    )


def _listing(data: tuple[Path, ...], name: str) -> Path:
    if len(data) != 1 or data[0].suffix != ".jsonl":
        raise UsageError(f"{name} takes one --data: a photos.jsonl (scripts/fetch_photos.py), or a folder of shards")
    return data[0]
