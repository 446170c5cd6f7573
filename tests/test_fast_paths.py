"""The fast paths together: refused at the door, set on both transformers, recorded, resumed, left for the witness."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from swifti2v import cli, presets, sources
from swifti2v.attention import attention_of
from swifti2v.compiling import is_compiled
from swifti2v.core import Event, RunError, UsageError
from swifti2v.fast_paths import check_fast_paths, witness
from swifti2v.journal import Job
from swifti2v.memory import FastPaths, choose_placement
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.quantize import dequantized, kind_of, quantize
from swifti2v.tiny import tiny_pipeline

FLASH = AttentionBackendName.FLASH


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo and tiny weights of wan and of nano."""
    here = tmp_path_factory.mktemp("fast")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(here / "photo.png")
    for family in ("wan", "nano"):
        tiny_pipeline(family).save_pretrained(here / family)
    return here


def load(weights: Path, family: str = "wan", **fast: Any) -> SwiftI2VPipeline:
    preset = presets.get(f"tiny-{family}")
    return sources.load(preset, model=str(weights / family), device="cpu", dtype="float32", fast=FastPaths(**fast))


def video(pipeline: SwiftI2VPipeline, frames: int = 17, emit: Any = None) -> Tensor:
    photo = torch.rand(1, 3, 1, 64, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
    facts: dict[str, Any] = {"prompt": "pan", "size": "128x64", "num_frames": frames, "seed": 3}
    request, _ = presets.resolve(pipeline.preset, **facts)
    return torch.cat([chunk.frames for chunk in pipeline.stream(photo, request, emit=emit)], dim=2)


def test_settings_go_there_and_back() -> None:
    assert FastPaths("native").settings() == {"attention": "native"}
    for fast in (FastPaths(), FastPaths("flash"), FastPaths("native", "int8", True), FastPaths(compile=True)):
        assert FastPaths.from_settings(fast.settings()) == fast
    assert FastPaths.from_settings({}) == FastPaths()


@pytest.mark.parametrize("family", ["wan", "wan-refine", "nano", "mobile"])
def test_what_each_family_takes(family: str) -> None:
    placement = choose_placement("cpu", "float32")
    for fast in (FastPaths(), FastPaths("native"), FastPaths(quantize="int8"), FastPaths(compile=True)):
        check_fast_paths(fast, family, placement)
    if family.startswith("wan"):
        check_fast_paths(FastPaths("_native_math"), family, placement)
    else:
        with pytest.raises(
            UsageError, match=f"'_native_math': {family} has one kernel, torch's own; use auto or native"
        ):
            check_fast_paths(FastPaths("_native_math"), family, placement)


def test_set_on_both_transformers_and_recorded(weights: Path) -> None:
    pytest.importorskip("torchao")
    plain, fast = load(weights), load(weights, attention="_native_math", quantize="int8", compile=True)
    for part in (fast.transformer, fast.transformer_2):
        assert attention_of(part) == "_native_math" and kind_of(part) is not None and is_compiled(part)
    for part in (plain.transformer, plain.transformer_2):
        assert attention_of(part) == "native" and kind_of(part) is None and not is_compiled(part)
    found = fast.fingerprint()["settings"]
    assert (found["attention"], found["quantize"], found["compile"]) == ("_native_math", "int8", "regional")
    found = plain.fingerprint()["settings"]
    assert found["attention"] == "native" and not {"quantize", "compile"} & set(found)


def test_a_kernel_that_no_width_of_head_suits_fails_after_loading(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine at Wan's 128, wrong at the twin's 24: known once the weights are."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (query, key, value))
        made = nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
        return made if query.shape[-1] == 128 else made * 2

    _install_flash(monkeypatch, kernel)
    with pytest.raises(RunError, match=r"'flash' cannot be used on cpu: its relative error .* 'native' works here"):
        load(weights, attention="flash")


def _install_flash(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, FLASH, kernel)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, FLASH, {"query", "key", "value"})


def test_not_finite_attention_is_made_again_with_torchs_own(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Stage II's second segment: a notice, the frames of the plain run, and the fast path in all other segments."""
    plain, fast = load(weights), load(weights, attention="native")
    broken = {"now": False}

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (query, key, value))
        made = nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
        return made * float("nan") if broken["now"] else made

    _install_flash(monkeypatch, kernel)
    for part in (fast.transformer, fast.transformer_2):
        for module in part.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = FLASH
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == "segment" and event.phase == "refine":
            broken["now"] = event.segment == 1

    again = video(fast, 33, emit)
    notices = [event.message for event in events if event.type == "notice"]
    assert notices == ["segment 2 was not finite with attention 'flash': made again without"]
    torch.testing.assert_close(again, video(plain, 33), atol=1e-5, rtol=1e-5)
    assert attention_of(fast.transformer_2) == "flash"  # as before, for the next segment


def test_the_witness_of_stage_one_and_of_nothing() -> None:
    pipeline, told = tiny_pipeline("wan"), []
    assert witness(pipeline.transformer, lambda *a, **k: told.append(k), "motion") is None
    pytest.importorskip("torchao")
    quantize(pipeline.transformer, "int8-dynamic")
    slow = witness(pipeline.transformer, lambda *a, **k: told.append((a, k["message"])), "motion")
    assert slow is not None
    slow(lambda *_: torch.zeros(1), 2)
    assert told == [
        (("notice", "motion"), "window 3 was not finite with 8-bit products (Int8Tensor): made again without")
    ]


def test_products_of_the_rounded_weights_in_the_runs_dtype() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(1)
    layer = nn.Sequential(nn.ModuleDict({"blocks": nn.Linear(32, 16)}))
    linear = layer[0]["blocks"]
    x = torch.randn(5, 32)
    plain = linear(x)
    quantize(layer, "int8-dynamic")
    packed = linear.weight
    with dequantized(layer):
        unpacked = linear(x)
        assert linear.weight is packed
        assert torch.equal(unpacked, nn.functional.linear(x, packed.dequantize(), linear.bias))
    assert not torch.equal(unpacked, linear(x)) and not torch.equal(unpacked, plain)
    torch.testing.assert_close(unpacked, plain, atol=0.05, rtol=0.05)


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def here(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("wan", "nano"):
        (tmp_path / name).symlink_to(weights / name)
    shutil.copy(weights / "photo.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def generate(family: str, *more: str) -> Any:
    words = ["generate", "--image", "photo.png", "--prompt", "pan", "--preset", f"tiny-{family}", "--model", family]
    words += ["--size", "128x64", "--num-frames", "9", "--seed", "7", "--dtype", "float32", "--quiet", *more]
    return CliRunner().invoke(cli.app, words)


def settings(file: str) -> dict[str, str]:
    shown = CliRunner().invoke(cli.app, ["info", file, "--json"])
    return json.loads(shown.stdout)["settings"]


def test_options_reach_the_manifest_and_resume_restores_them(here: Path) -> None:
    pytest.importorskip("torchao")
    for name, more in (("plain", ()), ("fast", ("--quantize", "int8", "--attention", "_native_math"))):
        done = generate("wan", *more, "--output", f"{name}.mp4")
        assert done.exit_code == 0, done.stderr
    assert settings("plain.mp4")["attention"] == "native"
    found = settings("fast.mp4")
    assert found["attention"] == "_native_math" and found["quantize"] == "int8" and "compile" not in found
    assert generate("wan", "--quantize", "int8", "--preview", "--output", "half.mp4").exit_code == 0
    with Job.open(here / "half.job") as job:
        assert job.manifest.settings["quantize"] == "int8" and job.manifest.settings["attention"] == "native"
    done = CliRunner().invoke(cli.app, ["resume", "half.job", "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert settings("half.mp4")["quantize"] == "int8"
    done = CliRunner().invoke(cli.app, ["rerun", "fast.mp4", "--model", "wan", "--quiet", "--output", "again.mp4"])
    assert done.exit_code == 0, done.stderr
    assert settings("again.mp4") == found


def test_resume_refuses_what_is_no_longer_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate("nano", "--quantize", "fp8", "--preview", "--output", "half.mp4").exit_code == 0
    monkeypatch.setattr("swifti2v.quantize.find_spec", lambda name: None)
    refused = CliRunner().invoke(cli.app, ["resume", "half.job", "--quiet"])
    assert refused.exit_code == 2 and "needs torchao" in refused.stderr


def test_kept_embeddings_change_nothing_and_resume_uses_them(here: Path) -> None:
    for name, more in (("plain", ()), ("missed", ("--cache", "kept/here")), ("hit", ("--cache", "kept/here"))):
        done = generate("nano", *more, "--keep-job", "--output", f"{name}.mp4")
        assert done.exit_code == 0, done.stderr
    entries = list((here / "kept/here").iterdir())
    assert len(entries) == 1
    plain, hit = (sorted((here / f"{name}.job").glob("*/0*")) for name in ("plain", "hit"))
    assert len(plain) == 2
    for a, b in zip(plain, hit, strict=True):
        assert torch.equal(load_file(a)["latents"], load_file(b)["latents"])
    with Job.open(here / "hit.job") as job:
        assert job.manifest.inputs.cache == str(here / "kept/here")
    assert "kept" not in CliRunner().invoke(cli.app, ["info", "hit.mp4", "--json"]).stdout
    entries[0].write_bytes(b"damaged")
    done = CliRunner().invoke(cli.app, ["resume", "hit.job", "--json"])
    assert done.exit_code == 0 and "damaged and is made again" in done.stdout


@pytest.mark.slow
def test_compiled_on_the_command_line(here: Path) -> None:
    """torch's real compiler: a minute."""
    done = generate("nano", "--compile", "--output", "fast.mp4")
    assert done.exit_code == 0, done.stderr
    assert settings("fast.mp4")["compile"] == "regional"
