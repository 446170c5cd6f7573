"""Ways to make a Wan VAE faster that keep its arithmetic: the layout of its weights, its blocks as compiled graphs.

Both change the module that they are given, in place, and give it back; the VAE as it was loaded is the witness. Sums
may be formed in another order: results agree up to rounding. This module never decides which of them pays where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

VAE = TypeVar("VAE", bound=nn.Module)


def channels_last(vae: VAE) -> VAE:
    """The weights of convolutions with channels innermost (``channels_last_3d``, for pictures ``channels_last``).

    Kernels that follow a weight's layout then need no transposed copies. Activations are left to them.
    """
    for part in vae.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last_3d if isinstance(part, nn.Conv3d) else torch.channels_last
            part.weight.data = part.weight.data.contiguous(memory_format=layout)
    return vae


def compiled(vae: Any, backend: str | Callable[..., Any] = "inductor") -> Any:
    """Every block of encoder and decoder a graph of its own, which serves clips of any length, whole or in tiles.

    The first call, the second and the later ones of a stream are different graphs, and so is each shape of tile:
    dynamo's limit of graphs a function has to leave room for them.
    """
    for part in (*vae.encoder.down_blocks, vae.encoder.mid_block, vae.decoder.mid_block, *vae.decoder.up_blocks):
        part.compile(backend=backend, dynamic=False)
    return vae
