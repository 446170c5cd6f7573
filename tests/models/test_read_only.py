"""The read-only baseline: the same network but that finished blocks never see the segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.read_only import ReadOnlyTransformer

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "attention_pattern": ("linear", "softmax"),
    "patch_size": 1,
    "motion_embedding": False,
}


def networks() -> tuple[MobileTransformer3DModel, ReadOnlyTransformer]:
    torch.manual_seed(0)
    plain = MobileTransformer3DModel(**CONFIG).eval()
    nn.init.normal_(plain.proj_out.weight, std=0.2)
    read_only = ReadOnlyTransformer(**CONFIG).eval()
    read_only.load_state_dict(plain.state_dict())
    return plain, read_only


@torch.no_grad()
def test_context_never_sees_the_segment_and_the_segment_sees_the_context() -> None:
    plain, read_only = networks()
    x = torch.randn(2, 4, 4, 3, 3)
    timestep = torch.tensor([[0.0, 0.0, 500.0, 500.0]]).expand(2, -1)
    changed = x.clone()
    changed[:, :, 2:] += 1
    before, after = (read_only(value, timestep).sample for value in (x, changed))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(plain(x, timestep).sample[:, :, :2], plain(changed, timestep).sample[:, :, :2])
    context = x.clone()
    context[:, :, :2] += 1
    assert not torch.allclose(before[:, :, 2:], read_only(context, timestep).sample[:, :, 2:])


@torch.no_grad()
def test_without_context_it_is_the_plain_network() -> None:
    plain, read_only = networks()
    x, timestep = torch.randn(1, 4, 3, 3, 3), torch.full((1, 3), 700.0)
    torch.testing.assert_close(read_only(x, timestep).sample, plain(x, timestep).sample)


def test_finished_blocks_must_come_first() -> None:
    _, read_only = networks()
    with pytest.raises(ValueError, match="must come first"):
        read_only(torch.randn(1, 4, 2, 3, 3), torch.tensor([[500.0, 0.0]]))
