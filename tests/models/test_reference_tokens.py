"""The reference's half of the patch embedding, computed once a segment: equal to embedding both halves together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v import flow
from swifti2v.models.wan import PatchEmbedding, ReferenceTokens, SwiftI2VTransformer3DModel
from swifti2v.segments import CSG, windows
from swifti2v.stage_two import Sampling, Velocity, dit_velocity, refine
from swifti2v.tiny import tiny_pipeline

# Two roundings of the dtype where there was one, on values of order 1 behind two layers.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
BLOCKS, STEPS = 8, 3  # windows of 4, 5 and 3 blocks


def network(dtype: torch.dtype = torch.float32) -> SwiftI2VTransformer3DModel:
    return tiny_pipeline("wan").transformer_2.to(dtype)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls:
    """What the patch embedding was called with: channels in, and from which on."""

    def __init__(self, model: SwiftI2VTransformer3DModel) -> None:
        self.seen: list[tuple[int, int | None]] = []
        self._hook = model.patch_embedding.register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, args: Any) -> None:
        self.seen.append((args[0].shape[1], args[1] if len(args) > 1 else None))

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@torch.no_grad()
def segments(velocity: Velocity, reference: Tensor, **csg: Any) -> list[Tensor]:
    sampling = Sampling(flow.sigmas(STEPS, 5.0), 7, CSG(**csg))
    return list(refine(velocity, [reference], windows(BLOCKS), sampling))


def always_together(velocity: Velocity) -> Velocity:
    return lambda *given: velocity(*given)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rule", ["reference", "generated"])
def test_apart_equals_together(dtype: torch.dtype, rule: str) -> None:
    model, text, reference = network(dtype), drawn(1, 512, 16), drawn(1, 4, BLOCKS, 4, 8)
    velocity = dit_velocity(model, text, CSG(), trained_blocks=5)
    with Calls(model) as calls:
        fast = segments(velocity, reference, neighbor_reference=rule)
    assert calls.seen == [(4, 4), *[(4, 0)] * STEPS] * 3  # three segments, the reference once in each
    with Calls(model) as calls:
        slow = segments(always_together(velocity), reference, neighbor_reference=rule)
    assert calls.seen == [(8, None)] * 3 * STEPS
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_guidance_shares_the_half() -> None:
    model, text = network(), drawn(2, 512, 16).split(1)
    velocity = dit_velocity(model, text[0], CSG(), trained_blocks=5, guidance_scale=2.0, negative_text=text[1])
    with Calls(model) as calls:
        segments(velocity, drawn(1, 4, BLOCKS, 4, 8))
    assert calls.seen.count((4, 4)) == 3 and calls.seen.count((4, 0)) == 3 * STEPS * 2


def test_another_reference_is_embedded_anew() -> None:
    """By its being another tensor, of the same shape: nobody has to tell."""
    model, kept, x, text = network(), ReferenceTokens(), drawn(1, 4, 3, 4, 8), drawn(1, 512, 16)

    def run(reference: Tensor, tokens: ReferenceTokens | None) -> Tensor:
        with torch.no_grad():
            return model(x, torch.full((1, 3), 500.0), text, None, reference, None, tokens, return_dict=False)[0]

    first, second = (drawn(1, 4, 3, 4, 8, seed=seed) for seed in (3, 4))
    for reference in (first, second, second, first):
        torch.testing.assert_close(run(reference, kept), run(reference, None), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(run(first, kept), run(second, None), atol=1e-3)


def test_where_it_cannot_it_says_why_and_embeds_together() -> None:
    from peft import LoraConfig

    assert network().embeds_jointly is None
    plain = SwiftI2VTransformer3DModel.from_wan(tiny_pipeline("wan-refine").transformer_2, reference_channels=0)
    assert plain.embeds_jointly == "no reference channels"
    model = network()
    model.add_adapter(LoraConfig(r=2, target_modules=["patch_embedding"], init_lora_weights=False))
    assert "patch embedding has become a" in str(model.embeds_jointly)
    velocity, reference = dit_velocity(model, drawn(1, 512, 16), CSG(), trained_blocks=5), drawn(1, 4, BLOCKS, 4, 8)
    fast, slow = segments(velocity, reference), segments(always_together(velocity), reference)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloaded_weights_give_the_same_bits(kind: str) -> None:
    model, reference, text = network(), drawn(1, 4, BLOCKS, 4, 8), drawn(1, 512, 16)
    before = segments(dit_velocity(model, text, CSG(), trained_blocks=5), reference)
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    after = segments(dit_velocity(model, text, CSG(), trained_blocks=5), reference)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_weights_are_the_convolutions_own_and_no_numbers_are_drawn() -> None:
    conv = torch.nn.Conv3d(6, 5, (1, 2, 2), (1, 2, 2))
    state = torch.get_rng_state()
    made = PatchEmbedding.of(conv)
    assert torch.equal(state, torch.get_rng_state()) and made.weight is conv.weight and made.bias is conv.bias
    x = drawn(1, 6, 2, 4, 4)
    assert torch.equal(made(x), conv(x))
    tokens = conv(x).flatten(2).transpose(1, 2)
    for low, high in ((slice(0, 2), slice(2, 6)), (slice(0, 5), slice(5, 6))):
        half = made(x[:, high], high.start)
        torch.testing.assert_close(made(x[:, low], 0, half), tokens)
