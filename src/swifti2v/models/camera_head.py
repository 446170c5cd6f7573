"""Reads from the text states of a prompt how the camera should move: five numbers, learned with nano's text encoder."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

CODES = 5  # pan, tilt, zoom, roll, shake, in units of their fast speed (camera.Motion.code)


class CameraHead(ModelMixin, ConfigMixin):
    """A linear map of the mean text state to ``camera.Motion.code``."""

    @register_to_config
    def __init__(self, text_dim: int = 128) -> None:
        super().__init__()
        self.read = nn.Linear(text_dim, CODES)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """Text states (b, l, text_dim), zero after the prompt's end -> (b, 5), about within [-1, 1]."""
        length = (encoder_hidden_states != 0).any(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1)
        pooled = encoder_hidden_states.sum(dim=1) / length
        return self.read(pooled.to(self.read.weight.dtype)).to(torch.float32)
