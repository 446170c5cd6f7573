"""Attention kernels: tried before they are used, set for a model and for nothing else, refused with what would work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from swifti2v import attention
from swifti2v.attention import (
    AttentionChoice,
    attention_of,
    choose_attention,
    known_attention,
    native_attention,
    probe,
    takes_attention,
    use_attention,
)
from swifti2v.core import UsageError
from swifti2v.tiny import tiny_pipeline

CPU = torch.device("cpu")
FLASH = AttentionBackendName.FLASH


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """diffusers' "flash" as if its package were here; the kernel is ``held["kernel"]``."""
    held: dict[str, Any] = {"kernel": lambda q, k, v: native(q, k, v)}

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return held["kernel"](query, key, value)

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, FLASH, kernel)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, FLASH, {"query", "key", "value"})
    monkeypatch.setitem(attention.PREFERRED, "cpu", ("_flash_3", "flash", "native"))
    yield held


def native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash"])
def test_torchs_own_kernels_pass_the_probe(name: str, dtype: torch.dtype) -> None:
    assert probe(name, CPU, dtype, 24, 128) is None
    assert choose_attention(name, CPU, dtype, 24) == AttentionChoice(name, "asked for")


def test_auto_takes_the_first_that_is_there_and_right(flash: dict[str, Any]) -> None:
    chosen = choose_attention("auto", CPU, torch.float32)
    assert chosen.name == "flash" and "_flash_3 (Flash Attention 3 backend" in chosen.reason
    flash["kernel"] = lambda q, k, v: native(q, k, v) * 1.01
    chosen = choose_attention("auto", CPU, torch.float32)
    assert (
        chosen.name == "native"
        and "flash (its relative error against torch's own is 0.01, over 0.0001)" in chosen.reason
    )
    assert choose_attention("auto", CPU, torch.bfloat16).name == "flash"  # within that dtype's rounding


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (lambda q, k, v: native(q, k, v) * float("nan"), "relative error against torch's own is inf"),
        (lambda q, k, v: native(q, k, v).roll(1, dims=1), "relative error"),
        (lambda q, k, v: native(q, k, v)[:, 1:], r"gives \(1, 149, 2, 128\)"),
        (lambda q, k, v: 1 / 0 if q.shape == k.shape else q.nothing, "nothing"),
    ],
)
def test_a_wrong_kernel_is_refused_with_what_works(flash: dict[str, Any], kernel: Any, says: str) -> None:
    flash["kernel"] = kernel
    with pytest.raises(UsageError, match=rf"(?s)'flash' cannot be used on cpu: .*{says}.*; 'native' works here"):
        choose_attention("flash", CPU, torch.float32)


@pytest.mark.parametrize("name", ["sage", "_flash_3", "xformers", "flash_hub", "_native_cudnn"])
def test_a_kernel_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' cannot be used on cpu: .*; 'native' works here") as refused:
        choose_attention(name, CPU, torch.float32)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_unknown_names_are_refused_with_near_ones() -> None:
    assert known_attention("AUTO") == "auto" and known_attention("Native") == "native"
    with pytest.raises(UsageError, match=r"'cudnn' is not known; use auto, _native_cudnn"):
        known_attention("cudnn")
    for name in ("", "fast"):
        with pytest.raises(UsageError, match="use auto, native, flash"):
            known_attention(name)


def test_a_kernel_is_set_for_these_models_alone() -> None:
    one, two, other = (tiny_pipeline("wan").transformer_2 for _ in range(3))
    before = _AttentionBackendRegistry.get_active_backend()
    use_attention([one, two], AttentionChoice("_native_math", "asked for"))
    assert (attention_of(one), attention_of(two), attention_of(other)) == ("_native_math", "_native_math", "native")
    assert _AttentionBackendRegistry.get_active_backend() == before
    with native_attention(one):
        assert (attention_of(one), attention_of(two)) == ("native", "_native_math")
    assert attention_of(one) == "_native_math"


def test_the_kernel_that_is_set_runs_and_the_witness_does_without(flash: dict[str, Any]) -> None:
    model, called = tiny_pipeline("wan").transformer_2, []
    flash["kernel"] = lambda q, k, v: called.append(q.shape) or native(q, k, v)
    x, text = torch.randn(1, 8, 3, 4, 8), torch.randn(1, 512, 16)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x, torch.full((1, 3), 500.0), text, return_dict=False)[0]

    plain = run()
    assert not called
    use_attention([model], AttentionChoice("flash", "asked for"))
    torch.testing.assert_close(run(), plain)
    assert len(called) == 2 * 2  # two layers, self- and cross-attention
    with native_attention(model):
        assert torch.equal(run(), plain)
    assert len(called) == 4


def test_nanos_transformers_have_no_dispatcher() -> None:
    assert takes_attention(tiny_pipeline("wan").transformer)
    assert not takes_attention(tiny_pipeline("nano").transformer)
