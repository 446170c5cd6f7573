"""The autoregressive baseline of CSG: context that is read but never reads (docs/ablations.md).

``ReadOnlyTransformer`` has the weights and the inputs of ``MobileTransformer3DModel``; the queries of finished blocks
attend to finished blocks alone, those of the segment to everything, as a network with a cache of its past would. A
block is finished if its noise level is 0. Made for comparison: nothing ships with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mobile_dit import MobileTransformer3DModel, SelfAttention


class ReadOnlyTransformer(MobileTransformer3DModel):
    """``MobileTransformer3DModel`` whose finished blocks do not see the segment."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        for block in self.blocks:
            block.attn.__class__ = ReadOnlyAttention

    def forward(self, hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the base class; ValueError unless the finished blocks come first, the same for every item."""
        finished = timestep == 0
        count = int(finished[0].sum())
        if not bool((finished == (torch.arange(timestep.shape[1], device=timestep.device) < count)).all()):
            raise ValueError("finished blocks (timestep 0) must come first and be the same for every item")
        for attention in self.modules():
            if isinstance(attention, ReadOnlyAttention):
                attention.finished = count
        return super().forward(hidden_states, timestep, *args, **kwargs)


class ReadOnlyAttention(SelfAttention):
    """Attention in two parts: finished blocks among themselves, the segment over all."""

    finished: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        cut, attend = self.finished * tokens, super().attend
        parts = [attend(q[:, cut:], k, v, tokens)]
        if cut:
            parts.insert(0, attend(q[:, :cut], k[:, :cut], v[:, :cut], tokens))
        return torch.cat(parts, dim=1)
