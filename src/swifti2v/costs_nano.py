"""What nano's networks cost, in closed form, from the architecture in their ``config.json``.

The same rules as ``costs``: no torch; FLOPs equal the meter's count; peaks follow the code of
``models/mobile_dit.py`` and ``models/nano_vae.py`` as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TIMESTEP_FEATURES = 256


@dataclass(frozen=True)
class MobileDiTCost:
    """``MobileTransformer3DModel``, read from its ``config.json``; ``text_tokens`` is the prompt's length.

    ``dense``: linear attention for all heads in one product, as it runs in bfloat16 on a CPU: more FLOPs, less time.
    """

    in_channels: int
    out_channels: int
    width: int
    heads: int
    ffn: int
    linear_layers: int
    softmax_layers: int
    normalized_layers: int
    patch: int
    reference_channels: int
    text_dim: int
    text_tokens: int
    motion: bool
    positions: bool
    dense: bool = False

    POSITION_FEATURES = 39

    @classmethod
    def from_config(cls, config: dict[str, Any], text_tokens: int) -> MobileDiTCost:
        pattern = list(config["attention_pattern"])
        norm = config["qk_norm"]
        return cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            ffn=int(config["hidden_size"] * config["ffn_ratio"]),
            linear_layers=pattern.count("linear"),
            softmax_layers=pattern.count("softmax"),
            normalized_layers=len(pattern) if norm == "all" else pattern.count(norm),
            patch=config["patch_size"] ** 2,
            reference_channels=config["reference_channels"],
            text_dim=config["cross_attention_dim"] or 0,
            text_tokens=text_tokens if config["cross_attention_dim"] else 0,
            motion=config["motion_embedding"],
            positions=config["absolute_positions"],
        )

    @property
    def layers(self) -> int:
        return self.linear_layers + self.softmax_layers

    def flops(self, blocks: int, tokens: int) -> int:
        """One forward over ``blocks`` x ``tokens`` tokens."""
        d, n, text = self.width, blocks * tokens, self.text_tokens
        head = d // self.heads
        ends = n * d * self.patch * (self.in_channels + self.reference_channels + self.out_channels)
        ends += n * self.POSITION_FEATURES * d if self.positions else 0
        times = (blocks + int(self.motion)) * (TIMESTEP_FEATURES * d + 7 * d * d)
        texts = text * (self.text_dim * d + d * d) + self.text_dim * d
        layer = 4 * n * d * d + 2 * n * d * head  # projections; rotation is a product with a (head, head) matrix
        layer += n * (3 * d * self.ffn + 18 * self.ffn)
        if self.text_dim:
            layer += 2 * n * d * d + 2 * text * d * d + 2 * n * text * d
        linear, softmax = (
            2 * n * d * (d if self.dense else head) + n * (d * self.heads if self.dense else d),
            2 * n * n * d,
        )
        attention = self.linear_layers * linear + self.softmax_layers * softmax
        return 2 * (ends + times + texts + self.layers * layer + attention)

    @property
    def parameters(self) -> int:
        d, p = self.width, self.patch
        ends = (self.in_channels + self.reference_channels) * p * d + d + (d + 1) * self.out_channels * p + 2 * d
        ends += (self.POSITION_FEATURES + 1) * d if self.positions else 0
        embed = TIMESTEP_FEATURES * d + d + d * d + d + 6 * (d * d + d)
        layer = 4 * d * d + d + 6 * d + 3 * d * self.ffn + 2 * self.ffn + 18 * self.ffn + 2 * self.ffn
        layer += 4 * (d * d + d) if self.text_dim else 0
        texts = 2 * (self.text_dim * d + d) + d * d + d if self.text_dim else 0
        extra = self.softmax_layers * 3 * d + self.normalized_layers * 2 * d
        return ends + embed * (1 + int(self.motion)) + texts + self.layers * layer + extra

    def activation_bytes(self, blocks: int, tokens: int, itemsize: int) -> int:
        """Peak of a forward, its inputs not counted: in the gated convolution or, if that is thin, in attention."""
        d, n = self.width, blocks * tokens
        per_token = max(5 * self.ffn + 4 * d, 11 * d) + 2 * d // self.heads
        return itemsize * (n * per_token + self.text_tokens * d)


@dataclass(frozen=True)
class NanoVAECost:
    """``NanoVAE``, read from its ``config.json``. The transform is float32 whatever the refiner's dtype.

    Per latent position a block is 16x16 pixels in 1 or 4 frames; the refiner works on 16 cells of 4x4 pixels.
    """

    latent_channels: int
    image_width: int
    image_layers: int
    video_width: int
    video_layers: int

    PIXELS = 3 * 16 * 16
    GROUP = 4
    CELLS = 16

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NanoVAECost:
        names = ("image_width", "image_layers", "video_width", "video_layers")
        return cls(len(config["kept_image"]), *(config[name] for name in names))

    def _refiner(self, frames: int) -> tuple[int, int, int, int]:
        """Channels seen, channels out, width and layers of the refiner of a block of ``frames``."""
        cell = self.PIXELS // self.CELLS
        if frames == 1:
            return cell, cell, self.image_width, self.image_layers
        return (frames + 1) * cell, frames * cell, self.video_width, self.video_layers

    def _refine_weights(self, frames: int) -> int:
        seen, out, width, layers = self._refiner(frames)
        return 9 * width * (seen + out + 2 * layers * width) + self.latent_channels * width * self.CELLS

    @property
    def parameters(self) -> int:
        total = 0
        for frames in (1, self.GROUP):
            _, out, width, layers = self._refiner(frames)
            total += self._refine_weights(frames) + width * (1 + self.CELLS + 2 * layers) + out
        return total

    @property
    def buffer_bytes(self) -> int:
        """The transform's matrices: analysis and synthesis, of an image and of a group of frames."""
        return 4 * (2 * self.latent_channels * self.PIXELS * (1 + self.GROUP) + 2 * self.latent_channels)

    def encode_flops(self, positions: int, blocks: int) -> int:
        return 2 * positions * self.latent_channels * self.PIXELS * (1 + (blocks - 1) * self.GROUP)

    def decode_flops(self, positions: int, blocks: int) -> int:
        return positions * (self._decode(1) + (blocks - 1) * self._decode(self.GROUP))

    def encode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        """Four frames in, and their patches, in float32 whatever the refiner's dtype; blocks pass one by one."""
        return positions * 4 * (2 * self.GROUP * self.PIXELS + 2 * self.latent_channels)

    def decode_bytes(self, positions: int, blocks: int, itemsize: int) -> int:
        """Peak while a chunk of ``blocks`` is decoded, one as long before it still in the consumer's hands.

        Counted in float32 frames: the linear decoding, its cells and those with the last frame (13), then
        either the residual, unfolded and summed, or the refiner's three maps; and the frames done so far.
        At the end the chunk's frames are joined, which holds them twice.
        """
        frame, maps = 4 * self.PIXELS, 3 * self.CELLS * self.video_width * itemsize
        residual = (2 * self.GROUP + itemsize) * frame
        refining = 13 * frame + max(residual, maps) + (self.GROUP * (blocks - 1) + 1) * frame
        joining = (2 * self.GROUP * blocks + 1) * frame
        return self.decode_state(positions, itemsize) + positions * (
            self.GROUP * blocks * frame + max(refining, joining) + 4 * blocks * self.latent_channels
        )

    def encode_state(self, positions: int, itemsize: int) -> int:
        return 0

    def decode_state(self, positions: int, itemsize: int) -> int:
        """The last frame."""
        return positions * 4 * self.PIXELS

    def _decode(self, frames: int) -> int:
        _, _, width, _ = self._refiner(frames)
        inject = self.latent_channels * width * self.CELLS
        convolutions = self.CELLS * (self._refine_weights(frames) - inject)
        return 2 * (self.latent_channels * self.PIXELS * frames + inject + convolutions)
