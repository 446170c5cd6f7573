"""How many processes may share the transformers of one clip (``parallel``): arithmetic, before anything loads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from .core import Request, UsageError
from .costs import SWIFTI2V_5B, WAN21_I2V_14B
from .presets import Preset
from .segments import motion_windows, windows

TRANSFORMERS = ("transformer", "transformer_2")


def check_ranks(ranks: int, preset: Preset, request: Request, model: str | None = None) -> None:
    """UsageError unless ``ranks`` processes can split both transformers of a preset in every window of a request.

    Nothing is loaded: heads are read from the folders of ``model``, or are those of the public checkpoints.
    """
    if preset.family not in ("wan", "wan-refine"):
        raise UsageError(
            f"context_parallel {ranks}: {preset.name} has no Wan transformer to split; leave it out (--threads uses "
            "more cores), or use --preset wan or wan-refine"
        )
    tokens = window_tokens(preset, request)
    legal = legal_ranks([*_heads(preset, model), *tokens])
    if ranks not in legal:
        rule = "processes have to divide the heads of both transformers and the tokens of every window"
        if not legal:
            raise UsageError(f"context_parallel {ranks}: {rule}, and none do at {request.size}; leave it out")
        raise UsageError(f"context_parallel {ranks}: {rule}; nearest legal value: {nearest(ranks, legal)}")


def legal_ranks(parts: Sequence[int]) -> list[int]:
    """The numbers above 1 that divide all of ``parts``."""
    whole = math.gcd(*parts)
    return [count for count in range(2, whole + 1) if whole % count == 0]


def window_tokens(preset: Preset, request: Request) -> list[int]:
    """Tokens of every different window of a request, Stage I's (unless a video replaces it) and Stage II's."""
    grid = preset.grid
    blocks, csg = grid.blocks(request.num_frames), request.csg
    refining = windows(blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks)
    found = {len(window.blocks) * grid.stage_two.tokens_per_block(request.size) for window in refining}
    if not request.motion_sha256:
        moving = motion_windows(
            blocks,
            trained_blocks=grid.trained_blocks,
            overlap_blocks=preset.overlap_blocks,
            generates_anchor=True,
        )
        small = grid.stage_one.tokens_per_block(grid.motion_size(request.size))
        found |= {len(window.blocks) * small for window in moving}
    return sorted(found)


def nearest(ranks: int, legal: Sequence[int]) -> int:
    return min(legal, key=lambda count: (abs(count - ranks), count))


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
