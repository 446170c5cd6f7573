"""A bundle makes torch's video with onnxruntime, numpy and pillow; one that does not is not written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swifti2v.core import Size, UsageError
from swifti2v.export import Clip, Manifest, ParityError, export, read_manifest, runner
from swifti2v.export import blueprint as blueprints
from swifti2v.export import bundle as bundles
from swifti2v.export import onnx as onnx_export
from swifti2v.export.blueprints import Plan
from swifti2v.export.bundle import torch_clip
from swifti2v.images import read_image
from swifti2v.mobile import MobileI2VPipeline
from swifti2v.noise import block_noise
from swifti2v.reference import fit_image
from swifti2v.tiny import tiny_mobile

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLIP = Clip(Size(192, 128), 9, 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "nano"
    export(tiny_mobile("mobile-nano"), folder, CLIP)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((310, 200), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b.astype(float)).mean())))


@pytest.mark.parametrize("shape", [(96, 4, 8), (3, 5, 7), (4, 2, 2), (1, 4, 5)])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_numpy_draws_torchs_noise(shape: tuple[int, ...], seed: int) -> None:
    wanted = block_noise(shape, seed=seed, block=3).numpy()
    np.testing.assert_allclose(runner.block_noise(shape, seed, 3), wanted, atol=3e-6)


@pytest.mark.parametrize("size", [Size(128, 64), Size(64, 192), Size(320, 192)])
def test_the_runner_fits_a_photo_as_the_library_does(photo: Path, size: Size) -> None:
    wanted = fit_image(read_image(photo).pixels, size)[:, :, 0].numpy()
    np.testing.assert_allclose(runner.read_photo(photo, size.width, size.height), wanted, atol=1e-4)


@pytest.mark.parametrize("layout", ["reference", "channels-first"])
def test_the_runner_makes_torchs_video(bundle: Path, photo: Path, tmp_path: Path, layout: str) -> None:
    runner.main([str(photo), str(tmp_path / "clip"), "--bundle", str(bundle), "--seed", "5", "--layout", layout])
    made = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "clip").iterdir())])
    plan = Plan(tiny_mobile("mobile-nano"), CLIP)
    frames = torch_clip(plan, fit_image(read_image(photo).pixels, plan.size)[:, :, 0], seed=5)
    wanted = ((frames[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()
    assert made.shape == (9, 128, 192, 3)
    assert psnr(made, wanted) > 40
    assert psnr(made[0], made[8]) < 60  # something moves


def test_manifest_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.model_validate_json((bundle / "manifest.json").read_text()) == manifest
    assert manifest.levels == (1.0, 0.75, 0.0) and manifest.latent_shape == (8, 3, 2, 3)
    assert manifest.clip_psnr is not None and manifest.clip_psnr > 40
    assert manifest.layout_for["onnxruntime-cpu"] == "reference" and manifest.layout_for["phone"] == "channels-first"
    denoiser = manifest.find("denoiser", layout="channels-first")
    assert [t.name for t in denoiser.inputs] == ["latents", "sigma", "motion_score", "reference"]
    assert denoiser.operators.get("Transpose", 0) == 0
    assert all(g.parity.error is not None and g.parity.error <= g.parity.limit for g in manifest.graphs)
    assert str(Path.home()) not in (bundle / "manifest.json").read_text()


def test_changed_bundles_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with open(copy / "encoder.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"encoder\.onnx is missing or is not what was exported"):
        read_manifest(copy)
    values: dict[str, Any] = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**values, "levels": [1.0, 0.5]}))
    with pytest.raises(UsageError, match="is not an exported bundle"):
        read_manifest(copy)


@pytest.mark.parametrize("layout", ["reference", "channels-first"])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_fewer_bits_pass_their_gates_and_save_space(bundle: Path, tmp_path: Path, precision: Any, layout: Any) -> None:
    plan = Plan(tiny_mobile("mobile-nano"), CLIP)
    blueprint = next(b for b in plan.blueprints((layout,)) if b.role == "denoiser")
    graph = onnx_export.write(blueprint, tmp_path, precision)
    assert graph.parity.error is not None and 1e-7 < graph.parity.error <= graph.parity.limit
    whole, small = (bundle / graph.file).stat().st_size, (tmp_path / graph.file).stat().st_size
    assert small < 0.75 * whole


def test_fewer_bits_leave_exact_constants_whole(tmp_path: Path) -> None:
    for blueprint in Plan(tiny_mobile("mobile-nano"), CLIP).blueprints(()):
        graph = onnx_export.write(blueprint, tmp_path, "int8")
        assert graph.parity.error is not None and graph.parity.error < 1e-5


def test_what_misses_the_gate_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blueprints.LIMITS, "float32", 1e-12)
    with pytest.raises(ParityError, match="off torch"):
        export(tiny_mobile("mobile-nano"), tmp_path / "bundle", CLIP)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_mobile("mobile-nano")
    with pytest.raises(UsageError, match="100x64 is not a size of tiny-mobile-nano"):
        export(pipeline, tmp_path / "a", Clip(Size(100, 64)))
    with pytest.raises(UsageError, match="10 frames are not a length"):
        export(pipeline, tmp_path / "a", Clip(Size(128, 64), 10))
    with pytest.raises(UsageError, match=r"format .* is not among onnx, coreml, executorch"):
        export(pipeline, tmp_path / "a", CLIP, formats=("tflite",))  # type: ignore[arg-type]
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        export(pipeline, tmp_path / "b", CLIP)


@pytest.mark.parametrize("turbo", [False, True])
def test_a_bundle_on_an_ltx_vae(tmp_path: Path, turbo: bool) -> None:
    manifest = export(tiny_mobile("mobile", turbo=turbo), tmp_path / "ltx", Clip(Size(64, 64), 9, 1))
    assert manifest.family == "ltx" and manifest.reach is None and manifest.find("decoder")
    assert manifest.clip_psnr is not None and manifest.clip_psnr > 40


def test_later_segments_and_their_neighbors(tmp_path: Path) -> None:
    manifest = export(tiny_mobile("mobile-nano"), tmp_path / "long", Clip(Size(128, 64), 25, 1), layouts=("reference",))
    assert [window.context for window in manifest.windows] == [(0,), (0, 4)]
    assert manifest.clip_psnr is not None and manifest.clip_psnr > 40


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numbers that float16 does not have
def test_core_ml_graphs_say_that_they_were_not_run(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    manifest = export(tiny_mobile("mobile-nano"), tmp_path / "coreml", CLIP, formats=("coreml",))
    assert [(g.role, g.weights) for g in manifest.graphs] == [
        ("encoder", "float16"),
        ("denoiser", "float16"),
        ("decoder", "float32"),
    ]
    assert manifest.find("decoder").operators["gather"] == 64  # 16 taps of 4 frames
    assert all(g.parity.error is None and (tmp_path / "coreml" / g.file).is_dir() for g in manifest.graphs)
    assert any("not run" in note for note in manifest.notes) and manifest.clip_psnr is None
    read_manifest(tmp_path / "coreml")


def test_executorch_runs_what_it_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch")
    from swifti2v.export import xnnpack

    encoder = next(Plan(tiny_mobile("mobile-nano"), CLIP).blueprints(("reference",), warp="taps"))
    graph = xnnpack.write(encoder, tmp_path)
    assert graph.parity.error is not None and graph.parity.error < 1e-5
    assert graph.operators["executorch_call_delegate"] > 0
    monkeypatch.setitem(blueprints.LIMITS, "float32", 1e-12)
    with pytest.raises(ParityError, match="off torch"):
        xnnpack.write(encoder, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pte"]


@pytest.mark.slow
def test_executorch_makes_torchs_video(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    manifest = export(tiny_mobile("mobile-nano"), tmp_path / "pte", CLIP, formats=("executorch",))
    assert [g.file for g in manifest.graphs] == ["encoder.pte", "denoiser-reference.pte", "decoder.pte"]
    assert all(g.parity.error is not None and g.parity.error < 1e-5 for g in manifest.graphs)
    assert all(g.operators["executorch_call_delegate"] for g in manifest.graphs)
    assert manifest.clip_psnr is not None and manifest.clip_psnr > 40
    assert not (tmp_path / "pte" / "run.py").exists()
    read_manifest(tmp_path / "pte")


@pytest.mark.parametrize("fields", [{"steps": 0}, {"steps": -1}, {"steps": 5000}, {"num_frames": 0}])
def test_clips_that_cannot_be_made_are_refused_before_anything_is_written(fields: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export(tiny_mobile("mobile-nano"), tmp_path / "bundle", Clip(**fields))
    assert not list(tmp_path.iterdir())


def test_run_py_knows_the_rule_of_the_score(bundle: Path, photo: Path, tmp_path: Path) -> None:
    for score in ("-3", "101", "nan"):
        with pytest.raises(SystemExit):
            runner.main([str(photo), str(tmp_path / "clip"), "--bundle", str(bundle), "--motion-score", score])
    assert not (tmp_path / "clip").exists()


@pytest.mark.slow
def test_the_layout_is_one_that_its_format_has(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    told = {"formats": ("onnx", "executorch"), "layouts": ("channels-first",)}
    manifest = export(tiny_mobile("mobile-nano"), tmp_path / "bundle", CLIP, **told)  # type: ignore[arg-type]
    assert manifest.layout_for["onnxruntime-cpu"] == "channels-first"
    assert manifest.layout_for["executorch"] == "reference"


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundles.NEEDED, "executorch", ("no_such_module",))
    with pytest.raises(UsageError, match="no_such_module is not installed: pip install"):
        export(tiny_mobile("mobile-nano"), tmp_path / "bundle", CLIP, formats=("executorch",))


@pytest.mark.slow
def test_a_fresh_environment_is_enough(photo: Path, tmp_path: Path) -> None:
    """onnxruntime, numpy and pillow alone, and the weights that ship, at their own size."""
    pipeline = MobileI2VPipeline.from_pretrained("mobile-nano")
    bundle = tmp_path / "bundle"
    export(pipeline, bundle)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "pillow"], check=True)
    script = [python, str(bundle / "run.py"), str(photo), str(tmp_path / "clip"), "--seed", "5"]
    subprocess.run(script, check=True, cwd=tmp_path)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    made = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "clip").iterdir())])
    plan = Plan(pipeline, Clip())
    frames = torch_clip(plan, fit_image(read_image(photo).pixels, plan.size)[:, :, 0], seed=5)
    assert made.shape == (17, 704, 1280, 3)
    assert psnr(made, ((frames[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()) > 40
