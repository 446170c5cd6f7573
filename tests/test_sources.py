"""Where weights come from: found or refused in one line, complete or refused, hashed, with LoRA attached."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swifti2v import presets, sources
from swifti2v.checkpoints import sha256
from swifti2v.core import RunError, UsageError
from swifti2v.memory import choose_placement
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.tiny import tiny_pipeline

TINY = presets.get("tiny-nano")
ONE, TWO = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_2"))
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_pipeline("nano").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def change(file: Path, **tensors: Tensor | None) -> None:
    """Put tensors into a file, or take them out (None); dots in names are double underscores."""
    held = {key: value.clone() for key, value in load_file(file).items()}
    for key, value in tensors.items():
        held.pop(key.replace("__", "."), None)
        if value is not None:
            held[key.replace("__", ".")] = value
    save_file(held, file, {"format": "pt"})


def load(folder: Path, **more: Any) -> SwiftI2VPipeline:
    return sources.load(TINY, model=str(folder), device="cpu", dtype="float32", **more)


# --- folders --------------------------------------------------------------------------------------------------------


def test_folders_found(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.local_folder("nano") == presets.package_folder() / "nano"
    assert sources.local_folder(str(saved)) == saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert sources.local_folder("nano") == Path("nano")  # a folder of that name is what is meant


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wan", "ships no weights; give --model FOLDER"),
        ("wan-refine", f"give --model {presets.WAN_STAGE_ONE},{presets.WAN_STAGE_TWO}"),
        ("gone", "neither a preset, a folder"),
        ("a/b/c", "neither a preset, a folder"),
        (__file__, "neither a preset, a folder"),
    ],
)
def test_folders_refused(name: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        sources.local_folder(name)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_hub_repository_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(?s).+"):
        sources.local_folder("nobody-of-this-name/nothing", local_files_only=True)


def test_presets_without_public_weights() -> None:
    with pytest.raises(UsageError, match="no public weights"):
        sources.load(presets.get("wan"), device="cpu", dtype="float32")


# --- complete -------------------------------------------------------------------------------------------------------


def test_loaded_placed_and_named(saved: Path) -> None:
    pipeline = load(saved)
    assert pipeline.preset is TINY and pipeline.sources == (saved,)
    assert pipeline.placement is not None and pipeline.placement.dtype == torch.float32
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}


def test_weights_of_another_preset_are_refused(saved: Path) -> None:
    with pytest.raises(RunError, match=r"tiny-nano, not of nano"):
        sources.load(presets.get("nano"), model=str(saved), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("file", "tensors", "says"),
    [
        (ONE, {"proj_out__weight": None}, "transformer/.* lacks 1 key: proj_out.weight"),
        (TWO, {"proj_out__weight": None, "proj_out__bias": None}, "transformer_2/.* lacks 2 keys"),
        (ONE, {"more": torch.ones(1)}, "MobileTransformer3DModel does not have: 1 key: more"),
        (TEXT, {"encoder__final_layer_norm__weight": None}, "text_encoder/.* lacks 1 key"),
        (TEXT, {"shared__weight": None}, "text_encoder/.* lacks"),
    ],
)
def test_gaps_in_the_weights_are_not_filled_at_random(
    copy: Path, file: str, tensors: dict[str, Tensor | None], says: str
) -> None:
    """diffusers and transformers warn and draw the missing numbers; here that is an error."""
    change(copy / file, **tensors)
    with pytest.raises(RunError, match=says):
        load(copy)
    with pytest.raises(RunError, match=says):
        SwiftI2VPipeline.from_pretrained(copy)


def test_components_given_by_hand_are_not_looked_for(copy: Path) -> None:
    change(copy / ONE, proj_out__weight=None)
    mine = tiny_pipeline("nano").transformer
    assert SwiftI2VPipeline.from_pretrained(copy, transformer=mine).transformer is mine


def test_two_public_checkpoints_are_checked_too(tmp_path: Path) -> None:
    parts = tiny_pipeline("wan-refine")
    for name, used in (("one", ("transformer", "vae")), ("two", ("transformer_2", "vae_2"))):
        for folder, component in zip(("transformer", "vae"), used, strict=True):
            getattr(parts, component).save_pretrained(tmp_path / name / folder)
    preset = presets.get("tiny-wan-refine")
    model = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    made = sources.load(preset, model=model, device="cpu", dtype="float32")
    assert made.preset is preset and made.sources == (tmp_path / "one", tmp_path / "two")
    hashes = made.fingerprint()["model_hashes"]
    assert {name.split("/")[0] for name in hashes} == {"stage_1", "stage_2"}
    change(tmp_path / "two" / "transformer" / "diffusion_pytorch_model.safetensors", proj_out__bias=None)
    with pytest.raises(RunError, match=r"lacks 1 key: proj_out.bias"):
        sources.load(preset, model=model, device="cpu", dtype="float32")


def test_every_twin_saved_is_whole_when_loaded(tmp_path: Path) -> None:
    for family in ("nano", "wan", "wan-refine"):
        tiny_pipeline(family).save_pretrained(tmp_path / family)
        assert SwiftI2VPipeline.from_pretrained(tmp_path / family).preset.family == family


# --- fingerprint ----------------------------------------------------------------------------------------------------


def test_fingerprint_names_files_libraries_and_settings(copy: Path) -> None:
    placement = choose_placement("cpu", "float32", 1)
    before = sources.fingerprint([copy], placement)
    assert before["model_hashes"][ONE] == sha256(copy / ONE) and str(copy) not in str(before)
    assert before["versions"]["torch"] == torch.__version__ and set(sources.LIBRARIES) < set(before["versions"])
    assert before["settings"] | {"attention": ""} == placement.settings() | {"attention": ""}
    assert before["settings"]["attention"]
    change(copy / TWO, proj_out__bias=torch.ones(load_file(copy / TWO)["proj_out.bias"].shape))
    after = sources.fingerprint([copy], placement)["model_hashes"]
    assert {name for name in after if after[name] != before["model_hashes"][name]} == {TWO}
    assert sources.fingerprint([], None)["model_hashes"] == {}


# --- LoRA -----------------------------------------------------------------------------------------------------------


def lora(file: Path, layer: str, inner: int, outer: int) -> Path:
    generator = torch.Generator().manual_seed(1)
    held = {f"transformer.{layer}.lora_A.weight": torch.randn(2, inner, generator=generator)}
    held[f"transformer.{layer}.lora_B.weight"] = torch.randn(outer, 2, generator=generator)
    save_file(held, file)
    return file


def test_loras_for_either_stage_and_several(saved: Path, tmp_path: Path) -> None:
    plain = load(saved)
    files = {}
    for stage in ("transformer", "transformer_2"):
        linear = getattr(plain, stage).proj_out
        path = lora(tmp_path / f"{stage}.safetensors", "proj_out", linear.in_features, linear.out_features)
        files[stage] = str(path)
    for stage, option in (("transformer_2", "loras_2"), ("transformer", "loras")):
        pipeline = load(saved, **{option: [(files[stage], 1.0)]})
        other = {"transformer": "transformer_2", "transformer_2": "transformer"}[stage]
        x = torch.randn(3, linear.in_features)
        assert not torch.allclose(getattr(pipeline, stage).proj_out(x), getattr(plain, stage).proj_out(x))
        assert torch.equal(getattr(pipeline, other).proj_out(x), getattr(plain, other).proj_out(x))
    file = files["transformer"]
    added = [load(saved, loras=pair).transformer.proj_out(x) for pair in ([(file, 0.75)], [(file, 0.25), (file, 0.5)])]
    torch.testing.assert_close(*added)


@pytest.mark.parametrize("layer", ["nowhere.to_q", "proj_out"])
def test_a_lora_that_does_not_fit_is_a_failure_after_loading(saved: Path, tmp_path: Path, layer: str) -> None:
    file = lora(tmp_path / "a.safetensors", layer, 7, 9)
    with pytest.raises(RunError, match=r"a.safetensors") as refused:
        load(saved, loras=[(str(file), 1.0)])
    assert "\n" not in str(refused.value)
