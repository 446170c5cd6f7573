"""The autoregressive baseline of CSG: context that is read but never reads (docs/ablations.md).

``ReadOnlyTransformer`` has the weights and the inputs of ``MobileTransformer3DModel``; the queries of finished blocks
attend to finished blocks alone, those of the segment to everything, as a network with a cache of its past would. A
block is finished if its noise level is 0. Made for comparison: nothing ships with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mobile_dit import MobileTransformer3DModel, SelfAttention, linear_attention, rms_norm, softmax_attention
from .positions import rotate


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, n, _ = x.shape
        q, k, v = self.to_qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.linear:
            q, k = F.relu(q), F.relu(k)
        attend, cut = linear_attention if self.linear else softmax_attention, self.finished * n
        parts = [attend(q[:, cut:], k, v)]
        if cut:
            parts.insert(0, attend(q[:, :cut], k[:, :cut], v[:, :cut]))
        return self.to_out(torch.cat(parts, dim=1).reshape(b, t, n, -1))
