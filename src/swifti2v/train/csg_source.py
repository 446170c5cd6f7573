"""Clips cut into CSG windows for training: which segment, how many neighbors, which reference; a function of the index.

It knows latents and windows, not where clips come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import UsageError
from ..segments import RopePositions, Window, windows
from .objective import Batch, ClipLike, window_batch
from .source import Source, seeded

Weighted = tuple[tuple[int, float], ...]
INFERENCE_SEGMENT: Weighted = ((3, 1.0),)
INFERENCE_NEIGHBORS: Weighted = ((1, 1.0),)


@dataclass(frozen=True)
class Windows:
    """One window of ``batch`` clips an index.

    ``segment_blocks`` (M) and ``neighbor_blocks`` (N): values with weights, drawn for every item; the defaults are
    those of inference. ``on_grid``: segments start where inference cuts them, else anywhere. ``transition_share``:
    probability of a clip's stage-transition reference, where it has one.
    """

    clips: Source[ClipLike]
    batch: int = 1
    segment_blocks: Weighted = INFERENCE_SEGMENT
    neighbor_blocks: Weighted = INFERENCE_NEIGHBORS
    on_grid: bool = True
    transition_share: float = 0.0
    rope_positions: RopePositions = "clamped"
    trained_blocks: int = 21
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.transition_share <= 1:
            raise UsageError(f"transition_share {self.transition_share} is not in [0, 1]")
        if self.batch < 1:
            raise UsageError(f"batch {self.batch} is below 1")

    def at(self, index: int) -> Batch:
        generator = seeded(self.seed, index, "window")
        clips = [self.clips.at(index * self.batch + place) for place in range(self.batch)]
        if len({clip.clean.shape[2:] for clip in clips}) > 1:
            sizes = sorted({f"{clip.clean.shape[3]}x{clip.clean.shape[2]}" for clip in clips})
            raise UsageError(f"clips of several latent sizes in one batch: {', '.join(sizes)}; use batch 1 or one size")
        window = self.window(min(clip.clean.shape[1] for clip in clips), generator)
        positions = window.positions(self.rope_positions, self.trained_blocks)
        share = self.transition_share
        return window_batch(clips, window, transition_share=share, generator=generator, positions=positions)

    def window(self, blocks: int, generator: torch.Generator) -> Window:
        """A window of a clip of ``blocks`` latent blocks."""
        if blocks < 2:
            raise UsageError(f"a clip of {blocks} latent block has nothing to generate; use at least 5 frames")
        segment, neighbors = (_draw(values, generator) for values in (self.segment_blocks, self.neighbor_blocks))
        segment = min(segment, blocks - 1)
        if self.on_grid:
            choices = list(windows(blocks, segment_blocks=segment, neighbor_blocks=neighbors))
            return choices[int(torch.randint(len(choices), (), generator=generator))]
        start = int(torch.randint(1, blocks - segment + 1, (), generator=generator))
        return Window(0, tuple(range(max(1, start - neighbors), start)), tuple(range(start, start + segment)))


@dataclass(frozen=True)
class WholeClips:
    """All blocks of a clip as one segment with block 0 in it, as Wan2.1-I2V's Stage I denoises them.

    The clips' reference is its condition: latents of the photo followed by empty frames.
    """

    clips: Source[ClipLike]
    batch: int = 1

    def at(self, index: int) -> Batch:
        clips = [self.clips.at(index * self.batch + place) for place in range(self.batch)]
        count = min(clip.clean.shape[1] for clip in clips)
        window = Window(None, (), tuple(range(count)))
        nothing = torch.Generator()
        return window_batch(clips, window, transition_share=0.0, generator=nothing, positions=range(count))


def _draw(values: Weighted, generator: torch.Generator) -> int:
    weights = torch.tensor([weight for _, weight in values])
    return values[int(torch.multinomial(weights, 1, generator=generator))][0]
