"""Every LoRA dialect loads exactly as merging it by hand would, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.core import UsageError
from swifti2v.lora import load_lora

RANK, WIDTH = 4, 48
NAMES = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
}
TINY: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    text_dim=16,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
    rope_max_seq_len=32,
)


def image_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY, in_channels=36, out_channels=16, image_dim=20, added_kv_proj_dim=WIDTH)
    return model.eval()


def text_model() -> WanTransformer3DModel:
    torch.manual_seed(1)
    return WanTransformer3DModel(**TINY, in_channels=16, out_channels=16).eval()


def pipeline() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, dim_mult=[1, 1, 1, 1]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=image_model(),
        transformer_2=text_model(),
    )


def output(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 36, 2, 4, 4, generator=generator)[:, : model.config.in_channels]
    text = torch.randn(1, 8, 16, generator=generator)
    image = torch.randn(1, 257, 20, generator=generator) if model.config.image_dim else None
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, image).sample


def targets(image: bool = True) -> dict[str, tuple[str, int, int]]:
    """Original name -> (diffusers name, rows, columns)."""
    found = {}
    for i in range(2):
        for attention in ("self_attn", "cross_attn"):
            for part in ("q", "k", "v", "o", *(("k_img", "v_img") if image and attention == "cross_attn" else ())):
                own = f"blocks.{i}.{NAMES[attention]}.{NAMES[part]}"
                found[f"blocks.{i}.{attention}.{part}"] = (own, WIDTH, WIDTH)
        found[f"blocks.{i}.ffn.0"] = (f"blocks.{i}.ffn.net.0.proj", 64, WIDTH)
        found[f"blocks.{i}.ffn.2"] = (f"blocks.{i}.ffn.net.2", WIDTH, 64)
    found["time_projection.1"] = ("condition_embedder.time_proj", 6 * WIDTH, WIDTH)
    found["text_embedding.0"] = ("condition_embedder.text_embedder.linear_1", WIDTH, 16)
    found["head.head"] = ("proj_out", 64, WIDTH)
    return found


class Made:
    """Random adapter tensors for all targets, spelled in any dialect, and merged by hand."""

    def __init__(self, image: bool = True, alpha: float | None = None, bias: bool = False, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.names = targets(image)
        self.alpha = alpha
        self.down = {n: torch.randn(RANK, c, generator=generator) * 0.1 for n, (_, _, c) in self.names.items()}
        self.up = {n: torch.randn(r, RANK, generator=generator) * 0.1 for n, (_, r, _) in self.names.items()}
        every_second = [n for i, n in enumerate(self.names) if i % 2] if bias else []
        self.bias = {n: torch.randn(self.names[n][1], generator=generator) * 0.1 for n in every_second}

    def spell(self, name: Callable[[str], str], down: str, up: str, bias: str = "diff_b") -> dict[str, Tensor]:
        state = {f"{name(n)}.{down}.weight": t.clone() for n, t in self.down.items()}
        state |= {f"{name(n)}.{up}.weight": t.clone() for n, t in self.up.items()}
        state |= {f"{name(n)}.{bias}": t.clone() for n, t in self.bias.items()}
        if self.alpha is not None:
            state |= {f"{name(n)}.alpha": torch.tensor(self.alpha) for n in self.down}
        return state

    def merged(self, model: WanTransformer3DModel, weight: float = 1.0) -> WanTransformer3DModel:
        scale = 1.0 if self.alpha is None else self.alpha / RANK
        for n, (own, _, _) in self.names.items():
            layer = model.get_submodule(own)
            layer.weight.data += weight * scale * self.up[n] @ self.down[n]
            if n in self.bias:
                layer.bias.data += weight * self.bias[n]
        return model


def own(made: Made) -> Callable[[str], str]:
    return lambda name: made.names[name][0]


DIALECTS: dict[str, tuple[Made, Callable[[Made], dict[str, Tensor]]]] = {
    "kijai": (
        Made(alpha=2.0, bias=True),
        lambda m: m.spell(lambda n: f"diffusion_model.{n}", "lora_down", "lora_up"),
    ),
    "diffusion_model lora_A": (Made(), lambda m: m.spell(lambda n: f"diffusion_model.{n}", "lora_A", "lora_B")),
    "model.diffusion_model": (Made(), lambda m: m.spell(lambda n: f"model.diffusion_model.{n}", "lora_A", "lora_B")),
    "diffsynth": (Made(), lambda m: m.spell(str, "lora_A.default", "lora_B.default")),
    "diffsynth pipe.dit": (Made(), lambda m: m.spell(lambda n: f"pipe.dit.{n}", "lora_A.default", "lora_B.default")),
    "bare original": (Made(), lambda m: m.spell(str, "lora_down", "lora_up")),
    "bare original, odd alpha": (Made(alpha=3.0), lambda m: m.spell(str, "lora_A", "lora_B")),
    "musubi": (
        Made(alpha=1.0),
        lambda m: m.spell(lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down", "lora_up"),
    ),
    "diffusers": (Made(), lambda m: m.spell(lambda n: f"transformer.{own(m)(n)}", "lora_A", "lora_B")),
    "diffusers with bias": (
        Made(bias=True),
        lambda m: m.spell(lambda n: f"transformer.{own(m)(n)}", "lora_A", "lora_B", "lora_B.bias"),
    ),
    "diffusers, no prefix": (Made(), lambda m: m.spell(own(m), "lora_A", "lora_B")),
    "diffusers for transformer_2": (
        Made(),
        lambda m: m.spell(lambda n: f"transformer_2.{own(m)(n)}", "lora_A", "lora_B"),
    ),
    "old diffusers": (Made(), lambda m: m.spell(own(m), "lora.down", "lora.up")),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_equals_the_hand_merge(dialect: str) -> None:
    made, spell = DIALECTS[dialect]
    weight = 0.5 if dialect == "kijai" else 1.0
    state = spell(made)
    model = image_model()
    report = load_lora(model, state, adapter_name="x", weight=weight)
    expected = output(made.merged(image_model(), weight))
    torch.testing.assert_close(output(model), expected, atol=3e-6, rtol=1e-5)
    assert not torch.allclose(expected, output(image_model()), atol=1e-3)
    assert set(report.matched) == set(state) and not report.unexpected and not report.missing
    assert "LoRA" in str(report)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_pipeline_stages(stage: str) -> None:
    made = Made(image=False)
    pipe = pipeline()
    before = output(pipe.transformer), output(pipe.transformer_2)
    state = made.spell(lambda n: f"diffusion_model.{n}", "lora_A", "lora_B")
    report = load_lora(pipe, state, adapter_name="x", stage=stage)  # type: ignore[arg-type]
    after = output(pipe.transformer), output(pipe.transformer_2)
    assert torch.equal(before[0], after[0]) == (stage == "two")
    assert torch.equal(before[1], after[1]) == (stage == "one")
    # a text-to-video LoRA leaves Stage I's image projections alone, and says so
    assert len(report.missing) == (4 if stage == "one" else 0)
    expected = output(made.merged(image_model() if stage == "one" else text_model()))
    torch.testing.assert_close(after[0 if stage == "one" else 1], expected, atol=3e-6, rtol=1e-5)


def test_a_file_for_both_stages_fills_both() -> None:
    one, two = Made(seed=1), Made(image=False, seed=2)
    state = one.spell(lambda n: f"transformer.{own(one)(n)}", "lora_A", "lora_B")
    state |= two.spell(lambda n: f"transformer_2.{own(two)(n)}", "lora_A", "lora_B")
    pipe = pipeline()
    report = load_lora(pipe, state, adapter_name="x")
    assert set(report.matched) == set(state)
    torch.testing.assert_close(output(pipe.transformer), output(one.merged(image_model())), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(output(pipe.transformer_2), output(two.merged(text_model())), atol=3e-6, rtol=1e-5)
    with pytest.raises(UsageError, match="stage='two'"):
        second = {k: v for k, v in state.items() if k.startswith("transformer_2.")}
        load_lora(pipeline(), second, adapter_name="x")


def test_two_adapters_stack_and_unload() -> None:
    few, low = Made(alpha=2.0, bias=True, seed=1), Made(image=False, seed=2)
    pipe = pipeline()
    load_lora(pipe, few.spell(str, "lora_down", "lora_up"), adapter_name="few_step", weight=0.75)
    load_lora(pipe, low.spell(lambda n: f"pipe.dit.{n}", "lora_A.default", "lora_B.default"), adapter_name="low_res")
    assert pipe.get_active_adapters() == ["few_step", "low_res"]
    both = output(low.merged(few.merged(image_model(), 0.75)))
    torch.testing.assert_close(output(pipe.transformer), both, atol=5e-6, rtol=1e-5)
    pipe.set_adapters(["low_res"], [1.0])
    torch.testing.assert_close(output(pipe.transformer), output(low.merged(image_model())), atol=5e-6, rtol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer), output(image_model()))
    load_lora(pipe, few.spell(str, "lora_down", "lora_up"), adapter_name="few_step")


def test_a_bfloat16_model_and_file(tmp_path: Path) -> None:
    made = Made(alpha=2.0)
    state = {k: v.bfloat16() for k, v in made.spell(str, "lora_A", "lora_B").items()}
    save_file(state, tmp_path / "l.safetensors")
    model = image_model()
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and ".norm" not in name and "scale_shift" not in name:
            parameter.data = parameter.data.bfloat16()
    report = load_lora(model, tmp_path / "l.safetensors", adapter_name="x")
    assert len(report.matched) == len(state) and list(report.files) == ["l.safetensors"]


def test_scales_kept_beside_the_tensors_are_honoured(tmp_path: Path) -> None:
    made = Made()
    made.alpha = 8.0
    plain = Made().spell(lambda n: f"transformer.{own(made)(n)}", "lora_A", "lora_B")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})}
    save_file(plain, tmp_path / "meta.safetensors", metadata=metadata)
    peft = Made().spell(lambda n: f"base_model.model.{own(made)(n)}", "lora_A", "lora_B")
    (tmp_path / "peft").mkdir()
    save_file(peft, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        load_lora(image_model(), tmp_path / "peft", adapter_name="x")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    for path in (tmp_path / "meta.safetensors", tmp_path / "peft"):
        model = image_model()
        load_lora(model, path, adapter_name="x")
        torch.testing.assert_close(output(model), output(made.merged(image_model())), atol=5e-6, rtol=1e-5)


def test_what_diffusers_saves_comes_back(tmp_path: Path) -> None:
    model = image_model()
    load_lora(model, Made(alpha=3.0).spell(str, "lora_A", "lora_B"), adapter_name="x")
    model.save_lora_adapter(tmp_path, adapter_name="x")
    again = image_model()
    load_lora(again, tmp_path, adapter_name="x")
    assert torch.equal(output(again), output(model))


def broken(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    state = Made().spell(lambda n: f"diffusion_model.{n}", "lora_A", "lora_B")
    change(state)
    return state


KEY = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "patch on the patch embedding": (
        lambda s: s.update({"diffusion_model.patch_embedding.diff": torch.ones(48, 36, 1, 2, 2)}),
        "patch_embedding.diff",
    ),
    "patch on a norm": (
        lambda s: s.update({"diffusion_model.blocks.0.norm3.diff": torch.ones(48)}),
        r"blocks\.0\.norm3\.diff",
    ),
    "bias without halves": (
        lambda s: s.update({"diffusion_model.time_embedding.0.diff_b": torch.ones(48)}),
        "time_embedding",
    ),
    "down without up": (lambda s: s.pop(KEY.replace("lora_A", "lora_B")), r"self_attn\.q\.lora_A"),
    "unknown layer": (lambda s: s.update({"diffusion_model.blocks.7.self_attn.q.lora_A.weight": s[KEY]}), r"blocks\.7"),
    "dora": (lambda s: s.update({KEY.replace("lora_A.weight", "dora_scale"): torch.ones(48)}), "dora_scale"),
    "lokr": (lambda s: s.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(2, 2)}), "lokr"),
    "another width": (lambda s: s.update({KEY: torch.ones(4, 64)}), "another model"),
    "two ranks in one layer": (lambda s: s.update({KEY: torch.ones(3, 48)}), "not one rank"),
    "not a matrix": (lambda s: s.update({KEY: torch.ones(4)}), "not one rank"),
    "integers": (lambda s: s.update({KEY: torch.ones(4, 48, dtype=torch.int64)}), "finite floating point"),
    "not finite": (lambda s: s[KEY].fill_(float("nan")), "finite floating point"),
    "twice the same": (
        lambda s: s.update({"pipe.dit.blocks.0.self_attn.q.lora_A.default.weight": s[KEY]}),
        "another key",
    ),
    "no LoRA at all": (
        lambda s: (s.clear(), s.update({"text_model.weight": torch.ones(2)})),
        "text_model",
    ),
    "alpha is a list": (lambda s: s.update({KEY.replace("lora_A.weight", "alpha"): torch.ones(2)}), "not one number"),
    "nothing": (lambda s: s.clear(), "no tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_attached_is_refused_by_name(case: str) -> None:
    change, words = BAD[case]
    model = image_model()
    before = output(model)
    with pytest.raises(UsageError, match=words) as caught:
        load_lora(model, broken(change), adapter_name="x")
    assert "\n" not in str(caught.value)
    assert torch.equal(output(model), before) and not getattr(model, "peft_config", {})


def test_extras_are_ignored_on_request_and_zero_patches_always() -> None:
    change, _ = BAD["patch on a norm"]
    report = load_lora(image_model(), broken(change), adapter_name="x", ignore_extra=True)
    assert report.unexpected == ("diffusion_model.blocks.0.norm3.diff",)
    zero = broken(lambda s: s.update({"diffusion_model.blocks.0.norm3.diff": torch.zeros(48)}))
    assert load_lora(image_model(), zero, adapter_name="x").unexpected == ("diffusion_model.blocks.0.norm3.diff",)


def test_bad_arguments() -> None:
    state = Made().spell(str, "lora_A", "lora_B")
    model = image_model()
    for wrong in ({"adapter_name": "a.b"}, {"adapter_name": ""}, {"weight": float("nan")}, {"stage": "three"}):
        with pytest.raises(UsageError):
            load_lora(model, state, **{"adapter_name": "x", **wrong})
    load_lora(model, state, adapter_name="x")
    with pytest.raises(UsageError, match="loaded already"):
        load_lora(model, state, adapter_name="x")


def test_mobile_takes_peft_only() -> None:
    mobile = pytest.importorskip("swifti2v.models.mobile_dit")
    torch.manual_seed(0)
    model = mobile.MobileTransformer3DModel(
        in_channels=4, out_channels=4, hidden_size=32, num_attention_heads=2, attention_pattern=("linear", "softmax")
    ).eval()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n)
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    expected = layer.weight.detach() + up @ down
    state = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    load_lora(model, state, adapter_name="x")
    model.fuse_lora()
    torch.testing.assert_close(model.get_submodule(name).base_layer.weight, expected)
    with pytest.raises(UsageError, match="MobileTransformer3DModel"):
        load_lora(model, Made().spell(str, "lora_A", "lora_B"), adapter_name="y")
