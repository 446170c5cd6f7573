"""How many processes may share the transformers of one clip (``parallel``): arithmetic, before anything loads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .core import Request, UsageError
from .costs import SWIFTI2V_5B, WAN21_I2V_14B
from .presets import Preset
from .segments import motion_windows, windows

TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Split:
    """The transformers that processes share (names in a pipeline), and what is to be said about the others."""

    parts: tuple[str, ...]
    notices: tuple[str, ...] = ()


def split_of(ranks: int, preset: Preset, request: Request, model: str | None = None) -> Split:
    """What ``ranks`` processes can share of a request. UsageError if they cannot share Stage II.

    They have to divide a transformer's heads and the tokens of each of its windows. Where that fails in Stage I alone
    (wan-refine's own size has an odd number of tokens), the first process computes Stage I by itself, and this is said.
    Nothing is loaded: heads are read from the folders of ``model``, or are those of the public checkpoints.
    """
    if preset.family not in ("wan", "wan-refine"):
        raise UsageError(
            f"context_parallel {ranks}: {preset.name} has no Wan transformer to split; leave it out (--threads uses "
            "more cores), or use --preset wan or wan-refine"
        )
    one, two = (
        [count, *tokens] for count, tokens in zip(_heads(preset, model), window_tokens(preset, request), strict=True)
    )
    legal = legal_ranks(two)
    if ranks not in legal:
        rule = f"processes have to divide Stage II's {two[0]} heads and the tokens of its windows, {_listed(two[1:])}"
        said = f"nearest legal value: {nearest(ranks, legal)}" if legal else "none do; leave it out"
        raise UsageError(f"context_parallel {ranks}: {rule}; {said}")
    if len(one) == 1 or ranks in legal_ranks(one):
        return Split(TRANSFORMERS)
    why = f"{ranks} processes do not divide Stage I's {one[0]} heads and the tokens of its windows, {_listed(one[1:])}"
    return Split(TRANSFORMERS[1:], (f"{why}: the first process computes Stage I by itself",))


def legal_ranks(parts: Sequence[int]) -> list[int]:
    """The numbers above 1 that divide all of ``parts``."""
    whole = math.gcd(*parts)
    return [count for count in range(2, whole + 1) if whole % count == 0]


def nearest(ranks: int, legal: Sequence[int]) -> int:
    return min(legal, key=lambda count: (abs(count - ranks), count))


def window_tokens(preset: Preset, request: Request) -> tuple[list[int], list[int]]:
    """Tokens of every different window of a request: Stage I's (none if a video replaces it) and Stage II's."""
    grid, csg = preset.grid, request.csg
    blocks = grid.blocks(request.num_frames)
    moving = motion_windows(
        blocks,
        trained_blocks=grid.trained_blocks,
        overlap_blocks=preset.overlap_blocks,
        generates_anchor=True,
    )
    refining = windows(blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks)
    small = grid.stage_one.tokens_per_block(grid.motion_size(request.size))
    large = grid.stage_two.tokens_per_block(request.size)
    one = set() if request.motion_sha256 else {len(window.blocks) * small for window in moving}
    return sorted(one), sorted({len(window.blocks) * large for window in refining})


def _listed(tokens: Sequence[int]) -> str:
    return " and ".join(map(str, tokens))


def _heads(preset: Preset, model: str | None) -> Iterator[int]:
    """Attention heads of both transformers."""
    public = (WAN21_I2V_14B.heads, SWIFTI2V_5B.heads)
    if model is not None and "," in model:
        files = [Path(part) / "transformer" for part in model.split(",", 1)]
    else:
        files = [Path(model) / name for name in TRANSFORMERS] if model is not None else []
    if not all((file / "config.json").is_file() for file in files):
        files = []  # on a hub, or not there, which is found out elsewhere
    for file in files:
        try:
            yield int(json.loads((file / "config.json").read_bytes())["num_attention_heads"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"--model: {file.name} has an unusable config.json: {error}") from None
    if not files:
        yield from public
