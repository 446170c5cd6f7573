"""The VAE's fast layouts against the VAE as it was made, both families at tiny size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from test_causal_vae import VAES, joined, latents, pixels
from torch import nn

from swifti2v.models.causal_vae import WanStreamingVAE, decode_stream, encode_stream
from swifti2v.models.vae_layout import channels_last, compiled


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_channels_last_changes_the_layout_and_nothing_else(version: str) -> None:
    plain = VAES[version, torch.float32]
    vae = channels_last(copy.deepcopy(plain))
    weights = [part.weight for part in vae.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))]
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert {w.ndim for w in weights} == {4, 5}
    assert all(w.is_contiguous(memory_format=layouts[w.ndim]) for w in weights)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    x, z = pixels(plain, 9), latents(3)
    for tiles in (None, (1, 2)):
        stream, witness = WanStreamingVAE(vae, tiles=tiles, encoder_tiles=tiles), WanStreamingVAE(plain)
        torch.testing.assert_close(joined(encode_stream(stream, [x])), joined(encode_stream(witness, [x])))
        torch.testing.assert_close(joined(decode_stream(stream, [z])), joined(decode_stream(witness, [z])))


SLOW = pytest.mark.slow  # graphs take seconds to trace


@pytest.mark.parametrize(
    ("version", "tiles", "blocks"),
    [
        ("2.2", None, 1),
        *(pytest.param(*case, 3, marks=SLOW) for case in (("2.1", None), ("2.2", None), ("2.2", (1, 2)))),
    ],
)
def test_compiled_blocks_give_the_same(version: str, tiles: tuple[int, int] | None, blocks: int) -> None:
    """Backend eager: the graphs are what is tried, and that blocks still pass their caches on."""
    plain = VAES[version, torch.float32]
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        stream = WanStreamingVAE(compiled(copy.deepcopy(plain), counting), tiles=tiles)
        witness = WanStreamingVAE(plain, tiles=tiles)
        x, z = pixels(plain, 4 * blocks - 3), latents(blocks)
        assert torch.equal(joined(encode_stream(stream, [x])), joined(encode_stream(witness, [x])))
        assert torch.equal(joined(decode_stream(stream, [z])), joined(decode_stream(witness, [z])))
    assert graphs
