"""What does one noise level a block save over one a token, as diffusers' own layers want it?

    python benchmarks/modulation.py --record          # nano's Stage II, one window of 2560x1408: 17,600 tokens
    python benchmarks/modulation.py --tiny

The same network twice in one run, in turn: as it is, and with every token's level embedded and modulated by itself. Peak
bytes of live tensors (``meters.LiveBytes``), seconds (the best of the rounds), and the largest difference between the
two velocities, relative to the largest value. ``stage_two.py --part modulation`` asks the same of Wan's, on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch import Tensor, nn

from swifti2v import presets
from swifti2v.core import Size
from swifti2v.memory import place
from swifti2v.meters import LiveBytes
from swifti2v.models.mobile_dit import MobileTransformer3DModel, MobileTransformerBlock, modulate
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import CSG, windows
from swifti2v.tiny import tiny_pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", default="2560x1408")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    asked = common.parsed(parser, arguments)
    if asked.tiny:
        asked.size, asked.rounds = "128x64", 1
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    record = common.Record("memory and seconds of one noise level a block against one a token", asked, __file__)
    per_block, per_token = network(asked), network(asked)
    levels_by_token(per_token)
    calls = {"per block": window(per_block, asked.size), "per token": window(per_token, asked.size)}
    rows: dict[str, dict[str, Any]] = {}
    outputs = {}
    with torch.no_grad():
        for name, call in calls.items():
            with LiveBytes() as live:
                outputs[name] = call()
            rows[name] = {"peak_mb": common.megabytes(live.peak), "seconds": []}
        for _ in range(asked.rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                rows[name]["seconds"].append(round(time.perf_counter() - begin, 4))
    blocks, tokens = outputs["per block"], outputs["per token"]
    best = {name: min(row["seconds"]) for name, row in rows.items()}
    results = {
        **rows,
        "seconds_ratio": round(best["per token"] / best["per block"], 3),
        "memory_ratio": round(rows["per token"]["peak_mb"] / rows["per block"]["peak_mb"], 3),
        "max_difference": float((blocks - tokens).abs().max() / blocks.abs().max()),
    }
    record.finish({"size": asked.size, "dtype": asked.dtype, "rounds": asked.rounds}, results)


def network(asked: Any) -> MobileTransformer3DModel:
    if asked.tiny:
        transformer = tiny_pipeline("nano").transformer_2
    else:
        transformer = SwiftI2VPipeline.from_pretrained(str(asked.model or "nano")).transformer_2
    place(transformer, torch.device("cpu"), getattr(torch, asked.dtype))
    return transformer


def window(transformer: MobileTransformer3DModel, size: str) -> Callable[[], Tensor]:
    """A velocity of the second window of M=3 N=1, half noise."""
    cut, config = list(windows(21))[1], transformer.config
    latent = presets.get("nano").grid.stage_two.latent_size(Size.parse(size))
    draw = torch.Generator().manual_seed(0)
    shape = (len(cut.blocks), latent.height, latent.width)
    given = {
        "hidden_states": torch.randn(1, config.in_channels, *shape, generator=draw).to(transformer.dtype),
        "timestep": torch.tensor([cut.sigmas(0.5, CSG())]) * 1000,
        "reference_hidden_states": torch.randn(1, config.reference_channels, *shape, generator=draw),
        "frame_indices": torch.tensor(cut.positions("clamped", 21)),
    }
    return lambda: transformer(**given, return_dict=False)[0].float()


class TokenLevels(MobileTransformer3DModel):
    """The witness: a level for each of the ``tokens`` of a block, embedded and modulated by itself."""

    tokens: int

    def _tokens(self, latents: Tensor, reference: Tensor | None, frames: Tensor, grid: tuple[int, int]) -> Tensor:
        self.tokens = grid[0] * grid[1]
        return super()._tokens(latents, reference, frames, grid)

    def _condition(self, timestep: Tensor, text: Any, motion_score: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        each = timestep.repeat_interleave(self.tokens, dim=1)
        time_, modulation, told = super()._condition(each, text, motion_score)
        # The head takes a block's level: its share is small.
        return time_[:, :: self.tokens], modulation.unflatten(1, (-1, self.tokens)), told


class TokenBlock(MobileTransformerBlock):
    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, text: Any, grid: Any) -> Tensor:
        table = (self.scale_shift_table + modulation).to(x.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(dim=3)
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a), cos, sin))
        if self.cross_attn is not None and text is not None:
            x = x + self.cross_attn(x, text)
        return torch.addcmul(x, gate_f, self.ffn(modulate(x, shift_f, scale_f), grid))


def levels_by_token(transformer: nn.Module) -> None:
    """Turn a network into its witness: the same weights, another way through them."""
    transformer.__class__ = TokenLevels
    for block in transformer.blocks:
        block.__class__ = TokenBlock


if __name__ == "__main__":
    main()
