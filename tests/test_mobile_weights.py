"""MobileI2V's published checkpoint: a synthetic file of exactly its keys and shapes, and what may be wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.core import UsageError
from swifti2v.mobile_weights import fake_checkpoint, is_published, key_table, load_mobile
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.weights import write_diffusers

QKV = "blocks.3.attn.qkv.weight"


def write(path: Path, state: dict[str, Tensor], wrapped: bool = True) -> Path:
    """Tensors of one number each: a small file with the shapes of a large one."""
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    assert path.stat().st_size < 1_000_000
    return path


def test_the_ledger_of_the_published_file() -> None:
    state = fake_checkpoint()
    with torch.device("meta"):
        table = key_table(MobileTransformer3DModel())
    assert state.keys() == table.keys() and len(state) == 199
    trained = {key for key, entry in table.items() if entry.trained}
    assert len(trained) == 196
    assert sum(state[k].numel() for k in trained) == 267_218_048
    assert sum(state[k].numel() for k in trained if table[k].ours) == 264_855_296
    # The released file has 1,074,370,038 bytes, 105 kB of them the archive's own.
    assert 4 * sum(tensor.numel() for tensor in state.values()) == 1_074_265_088
    assert "blocks.7.attn.qkv.bias" in state and "blocks.6.attn.qkv.bias" not in state  # 7 and 15 are softmax
    assert "blocks.6.attn.q_norm.weight" in state and "blocks.15.attn.q_norm.weight" not in state


def test_every_tensor_lands_in_its_place(tmp_path: Path) -> None:
    state = {key: torch.full((), float(i)).expand(t.shape) for i, (key, t) in enumerate(fake_checkpoint().items())}
    state["pos_embed"] = state["pos_embed"][None]
    file = write(tmp_path / "hybrid_371.pth", state)
    model, report = load_mobile(file, allow_pickle=True)
    with torch.device("meta"):
        table = key_table(MobileTransformer3DModel())
    ours = model.state_dict()
    for key, entry in table.items():
        if entry.ours is not None:
            assert bool((ours[entry.ours] == state[key].flatten()[0]).all()), key
    assert len(report.matched) == len(ours) and report.coverage == 1
    assert set(report.unexpected) == {key for key, entry in table.items() if entry.ours is None}
    assert not model.training and list(report.files) == ["hybrid_371.pth"]


def test_other_wrappings_and_absent_buffers(tmp_path: Path) -> None:
    state = fake_checkpoint(0.5)
    for name in ("pos_embed", "pos_embed_temporal", "y_embedder.y_embedding"):
        del state[name]
    file = write(tmp_path / "bare.pth", {f"module.{k}": v for k, v in state.items()}, wrapped=False)
    assert is_published(file, allow_pickle=True)
    model, report = load_mobile(file, allow_pickle=True)
    assert report.layout == "MobileI2V, prefix module." and len(report.unexpected) == 5
    assert model.patch_embed.weight.shape == (1152, 128)


def test_a_pickle_is_opened_only_when_allowed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.pth", fake_checkpoint())
    for opened in (load_mobile, is_published):
        with pytest.raises(UsageError, match="--allow-pickle"):
            opened(file)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(key)


def with_(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: tensor})


WRONG = {
    "missing": (without(QKV), f"lacks 1 key: {QKV}"),
    "missing dead text": (without("attention_y_norm.weight"), "lacks 1 key: attention_y_norm.weight"),
    "surplus": (with_("blocks.16.attn.qkv.weight", torch.zeros(1)), "does not have: 1 key: blocks.16.attn.qkv.weight"),
    "misshapen": (with_(QKV, torch.zeros(()).expand(3456, 1151)), rf"{QKV} is \[3456, 1151\], .* \[3456, 1152\]"),
    "flat convolution": (with_("x_embedder.proj.weight", torch.zeros(()).expand(1152, 128)), "x_embedder.proj.weight"),
    "another position table": (with_("pos_embed", torch.zeros(()).expand(1, 768, 1152)), r"pos_embed is \[1, 768"),
    "integers": (with_(QKV, torch.zeros((), dtype=torch.int32).expand(3456, 1152)), "floating point"),
    "fp8": (with_(QKV, torch.zeros((), dtype=torch.float8_e4m3fn).expand(3456, 1152)), "floating point"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    change, says = WRONG[name]
    state = fake_checkpoint()
    change(state)
    file = write(tmp_path / "x.pth", state)
    with pytest.raises(UsageError, match=says) as caught:
        load_mobile(file, allow_pickle=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("x.pth")


def test_other_checkpoints_are_not_taken_for_it(tmp_path: Path) -> None:
    save_file({"patch_embedding.weight": torch.zeros(2, 2)}, tmp_path / "wan.safetensors")
    assert not is_published(tmp_path / "wan.safetensors")


@pytest.mark.slow
def test_the_true_file_converted_and_loaded(tmp_path: Path) -> None:
    """One gigabyte in, one out; also from safetensors."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in fake_checkpoint().items()}
    torch.save({"state_dict": state}, tmp_path / "hybrid_371.pth")
    model, _ = load_mobile(tmp_path / "hybrid_371.pth", allow_pickle=True)
    again = MobileTransformer3DModel.from_pretrained(write_diffusers(model, tmp_path / "transformer"))
    assert torch.equal(again.blocks[5].ffn.expand.weight, state["blocks.5.mlp.inverted_conv.conv.weight"][..., 0, 0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save_file(state, tmp_path / "same.safetensors")
    third, _ = load_mobile(tmp_path / "same.safetensors")
    assert torch.equal(third.proj_out.weight, again.proj_out.weight)
