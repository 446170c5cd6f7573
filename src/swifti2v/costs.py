"""What each network costs, in closed form: FLOPs, parameters and the peak of its activations.

Architectures are data and no torch is imported, so that ``plan`` answers before anything loads.
FLOPs are 2 a multiply-add, in matrix products, convolutions and attention. That every formula equals
what ``meters`` counts on the meta device is a test.
Activation peaks follow the code as it is written in ``models`` (which temporaries are alive at once);
they exclude kernel workspaces and allocator slack.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .core import UsageError
from .costs_nano import TIMESTEP_FEATURES, MobileDiTCost, NanoVAECost


@dataclass(frozen=True)
class WanDiTCost:
    """A Wan transformer: the 2.1 14B I2V, the 2.2 TI2V-5B, or the 5B with 48 reference channels more.

    ``timesteps``: how many the network embeds: one for the clip, one a ``block`` (ours), or one a ``token``
    (stock TI2V-5B). ``image_tokens`` of ``image_dim``: CLIP states, in the 2.1 model only.
    """

    heads: int
    layers: int
    in_channels: int
    out_channels: int
    ffn: int
    head_dim: int = 128
    text_tokens: int = 512
    text_dim: int = 4096
    freq_dim: int = TIMESTEP_FEATURES
    image_tokens: int = 0
    image_dim: int = 0
    patch: int = 4
    timesteps: str = "block"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def _embedded_timesteps(self, blocks: int, tokens: int) -> int:
        return {"clip": 1, "block": blocks, "token": blocks * tokens}[self.timesteps]

    def flops(self, blocks: int, tokens: int) -> int:
        """One forward over ``blocks`` x ``tokens`` tokens."""
        d, n, text, image = self.width, blocks * tokens, self.text_tokens, self.image_tokens
        ends = n * d * self.patch * (self.in_channels + self.out_channels)
        times = self._embedded_timesteps(blocks, tokens) * (self.freq_dim * d + 7 * d * d)
        texts = text * (self.text_dim * d + d * d)
        images = image * (self.image_dim**2 + self.image_dim * d)
        self_attention = 4 * n * d * d + 2 * n * n * d
        cross_attention = 2 * n * d * d + 2 * (text + image) * d * d + 2 * n * (text + image) * d
        layer = self_attention + cross_attention + 2 * n * d * self.ffn
        return 2 * (ends + times + texts + images + self.layers * layer)

    @property
    def parameters(self) -> int:
        d, has_image = self.width, self.image_dim > 0
        attention = 4 * (d * d + d) + 2 * d
        added = 2 * (d * d + d) + d if has_image else 0
        layer = 2 * attention + added + 2 * d + 2 * d * self.ffn + self.ffn + d + 6 * d
        times = self.freq_dim * d + d + d * d + d + 6 * (d * d + d)
        texts = self.text_dim * d + d + d * d + d
        i = self.image_dim
        images = 2 * i + i * i + i + i * d + d + 2 * d if has_image else 0
        ends = self.patch * d * (self.in_channels + self.out_channels) + d + self.patch * self.out_channels
        return ends + times + texts + images + self.layers * layer + 2 * d

    def activation_bytes(self, blocks: int, tokens: int, itemsize: int) -> int:
        """Peak of a forward, its inputs not counted: in the feed-forward layer or, if that is thin, in attention.

        Feed-forward: the hidden layer before and after its GELU beside four copies of the tokens. Attention:
        float32 temporaries of the norms. In all layers: rotary tables in float32, the concatenated input,
        and what is made of text and image.
        """
        d, n, context = self.width, blocks * tokens, self.text_tokens + self.image_tokens
        feed_forward = itemsize * (2 * self.ffn + 4 * d)
        attention = (12 + 5 * itemsize) * d
        per_token = max(feed_forward, attention) + 8 * self.head_dim
        if self.timesteps == "block":
            per_token += itemsize * self.patch * self.in_channels
        if self.timesteps == "token":  # six modulations of every token, and their float32 sum
            per_token += (7 * itemsize + 24) * d
        return n * per_token + itemsize * context * d


@dataclass(frozen=True)
class WanVAECost:
    """``AutoencoderKLWan`` in streaming use; all counts are per latent position (``wan_vae_cost`` derives them).

    FLOPs are linear in positions but for the mid block's attention, 4·channels·positions² a block. The first
    block is one frame and skips the temporal layers. Bytes are in bfloat16: the peak while a block passes,
    and the causal cache that stays.
    """

    parameters: int
    encode_first: int
    encode_next: int
    encode_attention: int
    decode_first: int
    decode_next: int
    decode_attention: int
    encode_peak: int
    encode_cache: int
    decode_peak: int
    decode_cache: int
    latent_channels: int
    stride: int

    def encode_flops(self, positions: int, blocks: int) -> int:
        linear = positions * (self.encode_first + (blocks - 1) * self.encode_next)
        return linear + blocks * 4 * self.encode_attention * positions**2

    def decode_flops(self, positions: int, blocks: int) -> int:
        linear = positions * (self.decode_first + (blocks - 1) * self.decode_next)
        return linear + blocks * 4 * self.decode_attention * positions**2

    def encode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        return positions * self.encode_peak * itemsize // 2

    def decode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        return positions * self.decode_peak * itemsize // 2

    def encode_state(self, positions: int, itemsize: int) -> int:
        return positions * self.encode_cache * itemsize // 2

    def decode_state(self, positions: int, itemsize: int) -> int:
        return positions * self.decode_cache * itemsize // 2


@dataclass(frozen=True)
class EncoderCost:
    """A transformer encoder: UMT5, nano's T5 (``gated``, no biases), or CLIP's vision tower (``image_patch``)."""

    layers: int
    width: int
    inner: int
    ffn: int
    tokens: int
    vocabulary: int = 0
    gated: bool = True
    heads: int = 1
    position_buckets: int = 0
    positions_per_layer: bool = False
    image_patch: int = 0

    def flops(self) -> int:
        """One forward over ``tokens`` tokens (CLIP: the class token and the patches)."""
        n, matrices = self.tokens, 3 if self.gated else 2
        layer = 4 * n * self.width * self.inner + matrices * n * self.width * self.ffn + 2 * n * n * self.inner
        patches = (n - 1) * self.width * 3 * self.image_patch**2 if self.image_patch else 0
        return 2 * (patches + self.layers * layer)

    @property
    def parameters(self) -> int:
        d = self.width
        matrices = 4 * d * self.inner + (3 if self.gated else 2) * d * self.ffn
        if self.image_patch:
            layer = matrices + 4 * d + self.ffn + d + 4 * d
            return d + 3 * self.image_patch**2 * d + self.tokens * d + 4 * d + self.layers * layer
        tables = self.layers if self.positions_per_layer else 1
        return self.vocabulary * d + self.layers * (matrices + 2 * d) + d + tables * self.heads * self.position_buckets

    @classmethod
    def from_t5(cls, config: dict[str, Any], tokens: int) -> EncoderCost:
        """The encoder of a T5 ``config.json``."""
        return cls(
            layers=config["num_layers"],
            width=config["d_model"],
            inner=config["num_heads"] * config["d_kv"],
            ffn=config["d_ff"],
            tokens=tokens,
            vocabulary=config["vocab_size"],
            gated=config["feed_forward_proj"].startswith("gated"),
            heads=config["num_heads"],
            position_buckets=config["relative_attention_num_buckets"],
        )

    def activation_bytes(self, itemsize: int) -> int:
        """Scores in float32 beside their softmax, or the gated hidden layer, whichever is larger."""
        scores = self.tokens**2 * self.heads * (8 + itemsize)
        return scores + self.tokens * (8 * self.width + 3 * self.ffn) * itemsize


WAN21_I2V_14B = WanDiTCost(
    heads=40, layers=40, in_channels=36, out_channels=16, ffn=13824, image_tokens=257, image_dim=1280, timesteps="clip"
)
WAN22_TI2V_5B = WanDiTCost(heads=24, layers=30, in_channels=48, out_channels=48, ffn=14336, timesteps="token")
SWIFTI2V_5B = WanDiTCost(heads=24, layers=30, in_channels=96, out_channels=48, ffn=14336)
UMT5_XXL = EncoderCost(
    layers=24,
    width=4096,
    inner=4096,
    ffn=10240,
    tokens=512,
    vocabulary=256384,
    heads=64,
    position_buckets=32,
    positions_per_layer=True,
)
CLIP_H = EncoderCost(layers=32, width=1280, inner=1280, ffn=5120, tokens=257, gated=False, heads=16, image_patch=14)
WAN21_VAE = WanVAECost(
    parameters=126_892_531,
    encode_first=426_039_296,
    encode_next=1_280_731_136,
    encode_attention=384,
    decode_first=687_882_752,
    decode_next=2_161_889_792,
    decode_attention=384,
    encode_peak=477_184,
    encode_cache=179_712,
    decode_peak=794_272,
    decode_cache=302_656,
    latent_channels=16,
    stride=8,
)
WAN22_VAE = WanVAECost(
    parameters=704_688_668,
    encode_first=1_188_800_512,
    encode_next=3_574_556_672,
    encode_attention=640,
    decode_first=5_830_775_296,
    decode_next=18_835_608_064,
    decode_attention=1024,
    encode_peak=969_984,
    encode_cache=301_312,
    decode_peak=2_750_533,
    decode_cache=913_600,
    latent_channels=48,
    stride=16,
)


Family = Literal["wan", "wan-refine", "nano", "mobile"]
DiTCost = WanDiTCost | MobileDiTCost
VAECost = WanVAECost | NanoVAECost


@dataclass(frozen=True)
class Networks:
    """The networks of a preset. ``vae`` is Stage I's, ``vae_2`` Stage II's; ``image`` sees the photo (CLIP)."""

    text: EncoderCost
    stage_one: DiTCost
    stage_two: DiTCost
    vae: VAECost
    vae_2: VAECost
    image: EncoderCost | None = None

    @property
    def parameters(self) -> int:
        """Of all networks, a shared VAE once."""
        parts = [self.text, self.stage_one, self.stage_two, self.vae, *([self.image] if self.image else [])]
        shared = self.vae == self.vae_2
        return sum(part.parameters for part in parts) + (0 if shared else self.vae_2.parameters)

    def weight_bytes(self, itemsize: int) -> int:
        """Parameters of ``itemsize`` bytes, and what nano's VAE holds beside them."""
        return self.parameters * itemsize + (self.vae.buffer_bytes if isinstance(self.vae, NanoVAECost) else 0)


WAN = Networks(UMT5_XXL, WAN21_I2V_14B, SWIFTI2V_5B, WAN21_VAE, WAN22_VAE, CLIP_H)
WAN_REFINE = Networks(UMT5_XXL, WAN21_I2V_14B, WAN22_TI2V_5B, WAN21_VAE, WAN22_VAE, CLIP_H)


def read_nano(folder: Path, text_tokens: int) -> Networks:
    """Nano's networks from the ``config.json`` files of a folder in diffusers layout. OSError if one is missing."""

    def config(component: str) -> dict[str, Any]:
        return json.loads((folder / component / "config.json").read_text())

    vae = NanoVAECost.from_config(config("vae"))
    return Networks(
        text=EncoderCost.from_t5(config("text_encoder"), text_tokens),
        stage_one=MobileDiTCost.from_config(config("transformer"), text_tokens),
        stage_two=MobileDiTCost.from_config(config("transformer_2"), text_tokens),
        vae=vae,
        vae_2=vae,
    )


def networks_of(family: Family, folder: Path | None, text_tokens: int) -> Networks:
    """The networks of a preset's family; ``folder`` None (the tiny twins for tests): those of its full-size model.

    Raises UsageError if one of nano's ``config.json`` files is missing.
    """
    if family == "wan":
        return WAN
    if family == "wan-refine":
        return WAN_REFINE
    try:
        return read_nano(folder or Path(__file__).parent / "nano", text_tokens)
    except OSError as error:
        raise UsageError(f"nano's weights are not complete: {error.filename} is missing") from None
