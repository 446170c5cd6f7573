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
    prediction: str = "velocity"
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
            prediction=config["prediction"],
        )

    @property
    def layers(self) -> int:
        return self.linear_layers + self.softmax_layers

    @property
    def predicted_channels(self) -> int:
        """Channels that leave the network: a gated one says for every output also how far to go to the carried."""
        return (2 if self.prediction == "gated" else 1) * self.out_channels

    def flops(self, blocks: int, tokens: int) -> int:
        """One forward over ``blocks`` x ``tokens`` tokens."""
        d, n, text = self.width, blocks * tokens, self.text_tokens
        head = d // self.heads
        ends = n * d * self.patch * (self.in_channels + self.reference_channels + self.predicted_channels)
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
        ends = (self.in_channels + self.reference_channels) * p * d + d + (d + 1) * self.predicted_channels * p + 2 * d
        ends += (self.POSITION_FEATURES + 1) * d if self.positions else 0
        embed = TIMESTEP_FEATURES * d + d + d * d + d + 6 * (d * d + d)
        layer = 4 * d * d + d + 6 * d + 3 * d * self.ffn + 2 * self.ffn + 18 * self.ffn + 2 * self.ffn
        layer += 4 * (d * d + d) if self.text_dim else 0
        texts = 2 * (self.text_dim * d + d) + d * d + d if self.text_dim else 0
        extra = self.softmax_layers * 3 * d + self.normalized_layers * 2 * d
        return ends + embed * (1 + int(self.motion)) + texts + self.layers * layer + extra

    def activation_bytes(self, blocks: int, tokens: int, itemsize: int) -> int:
        """Peak of a forward, its inputs not counted: in the gated convolution, if that is thin in attention, or at the
        end, where prediction and reference meet in float32."""
        d, n = self.width, blocks * tokens
        per_token = itemsize * max(5 * self.ffn + 4 * d, 11 * d)
        return n * (max(per_token, self._end_bytes(itemsize)) + itemsize * 2 * d // self.heads) + (
            itemsize * self.text_tokens * d
        )

    def _end_bytes(self, itemsize: int) -> int:
        """A token: what leaves the network, float32 copies of it, the reference and the input, and their sums."""
        out, predicted, reference = (
            self.patch * c for c in (self.out_channels, self.predicted_channels, self.reference_channels)
        )
        if self.prediction == "velocity":
            return 2 * itemsize * predicted
        copies = 0 if itemsize == 4 else 4 * (predicted + reference + out)
        return itemsize * predicted + copies + 4 * out * (3 if self.prediction == "gated" else 1)


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
        return 2 * frames * cell, frames * cell, self.video_width, self.video_layers

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
        """Peak while a chunk of ``blocks`` is decoded.

        Counted in groups of float32 frames: the linear decoding, the moved picture, and its patches on their way back
        from its own latents (4); or the sum so far beside what the refiner sees and its maps. To that the frames done
        so far. At the end the chunk's frames are joined, which holds them twice. Registration, at a sixteenth of the
        pixels, is never the peak.
        """
        group, refiner_map = 4 * self.GROUP * self.PIXELS, self.CELLS * self.video_width * itemsize
        residual = group * itemsize // 4
        maps = max(4 * refiner_map, refiner_map + 2 * residual, 2 * group)
        refining = max(4 * group, group + 2 * residual + maps) + (blocks - 1) * group
        return 2 * self.decode_state(positions, itemsize) + positions * (
            max(refining, 2 * blocks * group) + 4 * blocks * self.latent_channels
        )

    def encode_state(self, positions: int, itemsize: int) -> int:
        return 0

    def decode_state(self, positions: int, itemsize: int) -> int:
        """The trail of the picture, not itself: a pyramid and a flow, at a sixteenth of the pixels."""
        return positions * 4 * self.CELLS * (4 + 2)

    def _decode(self, frames: int) -> int:
        _, _, width, _ = self._refiner(frames)
        inject = self.latent_channels * width * self.CELLS
        convolutions = self.CELLS * (self._refine_weights(frames) - inject)
        products = 1 if frames == 1 else 3  # what is carried is encoded and decoded to see what the latents know of it
        return 2 * (products * self.latent_channels * self.PIXELS * frames + inject + convolutions)
