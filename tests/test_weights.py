"""Every checkpoint layout loads to the same tensors; partial files overlay; saving is whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from tiny_checkpoints import HEADS, TINY, original, same, swift
from torch import Tensor

from swifti2v.core import RunError, UsageError
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.weights import (
    LoadReport,
    load_transformer,
    load_vae,
    sha256,
    write_diffusers,
)


def forward(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 12 * 3 * 4 * 4).reshape(1, 12, 3, 4, 4)
    with torch.no_grad():
        time = torch.tensor([[0.0, 500.0, 500.0]])
        return model(x, time, torch.ones(1, 5, 16), reference_hidden_states=x, return_dict=False)[0]


# -------------------------------------------------------------------------------------------- layouts

PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "model.", "module.", "transformer."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "module.model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_single_files(tmp_path: Path, prefix: str, layout: str) -> None:
    model = swift()
    spell = original if layout == "original" else lambda s, p: {p + k: v for k, v in s.items()}
    file = tmp_path / "dit.safetensors"
    save_file(spell(model.state_dict(), prefix), file)
    loaded, report = load_transformer(file, config=HEADS)
    assert type(loaded) is SwiftI2VTransformer3DModel and same(loaded, model) and not loaded.training
    assert torch.equal(forward(loaded), forward(model))
    assert report.layout.startswith(layout) and (not prefix or report.layout.endswith(prefix))
    assert set(report.matched) == model.state_dict().keys() and report.coverage == 1
    assert report.files == {"dit.safetensors": sha256(file)}
    assert "100.0%" in str(report)


def test_image_conditioned_original_file_and_stock_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY, image_dim=20, added_kv_proj_dim=48).eval()
    save_file(original(model.state_dict()), tmp_path / "i2v.safetensors")
    loaded, _ = load_transformer(tmp_path / "i2v.safetensors", config=HEADS, cls=WanTransformer3DModel)
    assert type(loaded) is WanTransformer3DModel and same(loaded, model)
    assert (loaded.config.image_dim, loaded.config.added_kv_proj_dim) == (20, 48)


def test_folders_sharded_or_not(tmp_path: Path) -> None:
    model = swift()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("whole", "shards"):
        loaded, report = load_transformer(tmp_path / name)
        assert same(loaded, model) and report.layout == "diffusers folder" and "config.json" in report.files
        assert loaded.config.rope_max_seq_len == 32
    index = next((tmp_path / "shards").glob("*.index.json"))
    assert same(load_transformer(index, config=tmp_path / "whole")[0], model)
    assert same(load_transformer(index, config=tmp_path / "whole" / "config.json")[0], model)


@pytest.mark.parametrize(
    "cut", [(3072, 48, 14336, 30, 24), (5120, 36, 13824, 40, 40), (1536, 16, 8960, 30, 12)], ids=["5B", "14B", "1.3B"]
)
def test_real_shapes_are_told_apart(cut: tuple[int, int, int, int, int]) -> None:
    from swifti2v.weights import _infer_dit

    width, channels, ffn, layers, heads = cut
    with torch.device("meta"):
        model = WanTransformer3DModel(
            in_channels=channels, ffn_dim=ffn, num_layers=layers, num_attention_heads=heads, text_dim=4096
        )
    config = _infer_dit(model.state_dict())
    assert (config["num_attention_heads"], config["num_layers"], config["ffn_dim"]) == (heads, layers, ffn)
    assert config["in_channels"] == channels and width == heads * config["attention_head_dim"]


def test_dtype_keeps_the_float32_islands(tmp_path: Path) -> None:
    model = swift()
    model.save_pretrained(tmp_path / "m")
    loaded, _ = load_transformer(tmp_path / "m", dtype=torch.bfloat16)
    reference = SwiftI2VTransformer3DModel.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in reference.state_dict().items()
    }
    assert same(loaded, reference)


def test_a_class_that_is_not_wan(tmp_path: Path) -> None:
    mobile = pytest.importorskip("swifti2v.models.mobile_dit").MobileTransformer3DModel
    torch.manual_seed(0)
    model = mobile(in_channels=4, out_channels=4, hidden_size=32, num_attention_heads=2, attention_pattern=("linear",))
    model.save_pretrained(tmp_path / "m")
    assert same(load_transformer(tmp_path / "m", cls=mobile)[0], model)
    with pytest.raises(UsageError, match="holds a MobileTransformer3DModel, not a Swift"):
        load_transformer(tmp_path / "m")


# -------------------------------------------------------------------------------------------- partial


def test_partial_files_overlay_a_base(tmp_path: Path) -> None:
    base, trained = swift(), swift()
    for parameter in trained.parameters():
        parameter.data += 1
    part = {k: v for k, v in original(trained.state_dict(), "pipe.dit.").items() if ".self_attn." in k}
    save_file(part, tmp_path / "step-10.safetensors")
    base.save_pretrained(tmp_path / "base")
    total, held = len(base.state_dict()), len(part)
    with pytest.raises(UsageError, match=r"step-10\S* lacks \d+ keys: .*base=CHECKPOINT"):
        load_transformer(tmp_path / "step-10.safetensors", config=HEADS)
    with pytest.raises(UsageError, match=f"lacks {total - held} keys"):
        load_transformer(tmp_path / "step-10.safetensors", config=tmp_path / "base")
    loaded, report = load_transformer(tmp_path / "step-10.safetensors", base=tmp_path / "base")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, (trained if ".attn1." in key else base).state_dict()[key])
    assert (len(report.matched), len(report.missing)) == (held, total - held)
    assert report.coverage == pytest.approx(held / total) and "step-10.safetensors" in report.files
    save_file({**part, "pipe.dit.blocks.9.self_attn.q.weight": torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError, match=r"base does not have: 1 key: blocks\.9"):
        load_transformer(tmp_path / "odd.safetensors", base=tmp_path / "base")


def test_a_trained_patch_embedding_widens_an_untrained_base(tmp_path: Path) -> None:
    base = swift(in_channels=12)
    base.register_to_config(reference_is_untrained=True)
    base.save_pretrained(tmp_path / "base")
    save_file({"patch_embedding.weight": torch.ones(48, 24, 1, 2, 2)}, tmp_path / "t.safetensors")
    loaded, _ = load_transformer(tmp_path / "t.safetensors", base=tmp_path / "base")
    assert loaded.config.in_channels == 24 and not loaded.config.reference_is_untrained


# -------------------------------------------------------------------------------------------- VAEs

WAN21: dict[str, Any] = dict(base_dim=8, z_dim=16)
WAN22: dict[str, Any] = dict(
    base_dim=8,
    decoder_base_dim=16,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)


def original_vae(state: dict[str, Tensor], residual: bool) -> dict[str, Tensor]:
    """diffusers -> Wan's own names, written from the structure of Wan's modules."""
    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    inside = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    renamed = {}
    for key, value in state.items():
        name = key.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
        for ours, theirs in (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2")):
            name = name.replace(f"coder.{ours}", f"coder.{theirs}")
        for ours, theirs in middle.items():
            name = name.replace(f"mid_block.{ours}", f"middle.{theirs}")
        if "block" in name or ".middle." in name:
            for ours, theirs in inside.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            name = name.replace("conv_shortcut", "shortcut")
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            stem = "downsamples" if parts[1] == "down_blocks" else "upsamples"
            count = 3 if stem == "upsamples" else 2
            if residual:
                place = [parts[2], stem, *(parts[4:] if parts[3] == "resnets" else [str(count), *parts[4:]])]
            elif stem == "downsamples":
                place = parts[2:]
            else:
                flat = 4 * int(parts[2]) + (int(parts[4]) if parts[3] == "resnets" else 3)
                place = [str(flat), *parts[5:]]
            name = ".".join([parts[0], stem, *place])
        renamed[name] = value.clone()
    return renamed


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@pytest.mark.parametrize("prefix", ["", "vae.", "model."])
def test_original_vaes(tmp_path: Path, kind: str, prefix: str) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**(WAN21 if kind == "2.1" else WAN22)).eval()
    state = {prefix + k: v for k, v in original_vae(vae.state_dict(), kind == "2.2").items()}
    assert (
        prefix
        + (
            "encoder.downsamples.0.downsamples.0.residual.0.gamma"
            if kind == "2.2"
            else "decoder.upsamples.4.residual.0.gamma"
        )
        in state
    )
    save_file(state, tmp_path / "vae.safetensors")
    loaded, report = load_vae(tmp_path / "vae.safetensors")
    assert same(loaded, vae) and report.layout.startswith(f"original Wan{kind} VAE")
    assert len(loaded.config.latents_mean) == len(loaded.config.latents_std) == loaded.config.z_dim
    statistics = {"latents_mean", "latents_std"} if kind == "2.2" else set()
    assert all(loaded.config[key] == vae.config[key] for key in vae.config if key[0] != "_" and key not in statistics)


def test_diffusers_vaes_and_damage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, config in (("a", WAN21), ("b", WAN22)):
        vae = AutoencoderKLWan(**config)
        vae.save_pretrained(tmp_path / name)
        assert same(load_vae(tmp_path / name)[0], vae)
        assert same(load_vae(tmp_path / name / "diffusion_pytorch_model.safetensors")[0], vae)
        state = original_vae(vae.state_dict(), name == "b")
        for key in ("decoder.head.2.bias", "conv1.weight", "encoder.conv1.weight"):
            save_file({k: v for k, v in state.items() if k != key}, tmp_path / "cut.safetensors")
            with pytest.raises(UsageError, match="lacks 1 key"):
                load_vae(tmp_path / "cut.safetensors")
        save_file({**state, "encoder.odd": torch.ones(1)}, tmp_path / "odd.safetensors")
        with pytest.raises(UsageError, match=r"does not have: 1 key: encoder\.odd"):
            load_vae(tmp_path / "odd.safetensors")
    save_file(original(swift().state_dict()), tmp_path / "dit.safetensors")
    with pytest.raises(UsageError, match="not a Wan VAE"):
        load_vae(tmp_path / "dit.safetensors")


# -------------------------------------------------------------------------------------------- saving


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    model = swift()
    folder = write_diffusers(model, tmp_path / "deep" / "model")
    assert same(load_transformer(folder)[0], model)
    with pytest.raises(UsageError, match="exists"):
        write_diffusers(model, folder)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_diffusers(model, tmp_path / "file" / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


def test_reports_print(tmp_path: Path) -> None:
    report = LoadReport("f", "original", ("a",), tuple("bcdef"), ("z",), {"f": "0" * 64})
    assert str(report).splitlines() == [
        "f (original): 1 keys matched (16.7%)",
        "  not in this file: 5 keys: b, c, d, ...",
        "  ignored: 1 key: z",
        f"  sha256 {'0' * 64}  f",
    ]


def test_models_convert_writes_what_it_read(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from swifti2v.cli import app
    from swifti2v.tiny import wan_base_dit

    model = wan_base_dit()
    model.save_pretrained(tmp_path / "in")
    done = CliRunner().invoke(app, ["models", "convert", str(tmp_path / "in"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    again, report = load_transformer(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not report.missing and not report.unexpected
    twice = CliRunner().invoke(app, ["models", "convert", str(tmp_path / "in"), str(tmp_path / "out")])
    assert twice.exit_code == 2 and "exists" in twice.stderr
