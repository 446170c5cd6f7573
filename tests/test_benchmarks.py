"""Every benchmark runs at toy size through the real command line, and says what a record has to say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from swifti2v.tiny import tiny_pipeline

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny_pipeline("nano").save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def line_of(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The JSON line of a tiny run; checked for what every record has."""
    script.main(["--tiny", "--model", str(weights), "--threads", "1", *more])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == {"question", "command", "commit", "dirty", "date", "hardware", "settings", "results"}
    assert line["command"].startswith(f"python benchmarks/{script.__name__}.py --tiny")
    assert {"cpu", "cores", "threads", "torch", "load"} <= set(line["hardware"])
    assert str(weights.parent) not in json.dumps(line) and str(FOLDER.parent) not in json.dumps(line)
    return line


@pytest.mark.parametrize("script", ["memory_vs_length"], indirect=True)
def test_memory_vs_length(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, weights, capsys, "--steps", "1", "--num-frames", "17")["results"]
    assert [row["num_frames"] for row in results["runs"]] == [17]


@pytest.mark.parametrize("script", ["memory_vs_length"], indirect=True)
@pytest.mark.parametrize(("peaks", "met"), [((500, 700, 705, 710), True), ((500, 700, 730, 760), False)])
def test_the_verdict_leaves_short_clips_out(script: ModuleType, peaks: tuple[int, ...], met: bool) -> None:
    rows = [{"num_frames": n, "peak_mb": peak} for n, peak in zip((41, 81, 161, 321), peaks, strict=True)]
    assert script.verdict(rows)["met"] is met
    assert script.verdict(rows[:2]) == {}


@pytest.mark.parametrize("script", ["nano_clip"], indirect=True)
def test_nano_clip(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(script, weights, capsys)
    results = line["results"]
    assert line["settings"]["dtype"] in ("float32", "bfloat16") and line["settings"]["threads"] == "1"
    assert results["segments"] == 3
    assert sum(results["phases"].values()) == pytest.approx(results["seconds"], abs=0.5)
    assert 0 < results["first_frame_seconds"] < results["seconds"]


@pytest.mark.parametrize("script", ["nano_clip"], indirect=True)
def test_bytes_that_are_no_video_hold_no_frames(script: ModuleType) -> None:
    assert script.playable_frames(b"") == script.playable_frames(b"free" * 100) == 0


@pytest.mark.parametrize("script", ["first_frame"], indirect=True)
def test_first_frame(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = line_of(script, weights, capsys)["results"]
    assert 5 < results["worst_db"] == results["mean_db"] < 60
    with pytest.raises(SystemExit, match="fetch_photos"):
        script.held_out(tmp_path, 10)


@pytest.mark.parametrize("script", ["plan_accuracy"], indirect=True)
def test_plan_accuracy(
    script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from swifti2v.calibration import Calibration

    monkeypatch.setattr(script, "calibrated", Calibration)  # to measure takes longer than the run
    row = line_of(script, weights, capsys)["results"]["sizes"][0]
    assert row["size"] == "128x64"
    assert row["live_mb"] > 0 and row["planned_live_mb"] > 0


@pytest.mark.parametrize("script", ["prompts"], indirect=True)
def test_prompts(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(script, weights, capsys)["results"]["prompts_1"]["of"] == 9


@pytest.mark.parametrize("script", ["prompted_motion"], indirect=True)
def test_prompted_motion(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, weights, capsys)["results"]
    assert 0 <= results["right"] <= 2 and results["share"] == results["right"] / 2


@pytest.mark.parametrize("script", ["mobile"], indirect=True)
def test_mobile(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, weights, capsys)["results"]
    assert [row["tokens"] for row in results["layers"]["softmax"]] == [16, 64]
    assert set(results["network"]) == {"reference", "channels-first"}
    assert all(row["best"] > 0 and 20 < row["peak_mb"] < 2000 for row in results["network"].values())
    rows = [{"tokens": n, "best": 1e-6 * n**1.5} for n in (100, 200, 400)]
    assert script.exponents(rows) == {"fitted": 1.5, "between": [1.5, 1.5]}


@pytest.mark.parametrize("script", ["mobile_steps"], indirect=True)
def test_mobile_steps(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    results = line_of(script, weights, capsys)["results"]
    assert set(results) == {"still", "push", "2 steps", "1 step"}
    assert results["still"]["motion"]["all"] < 0.05 < results["push"]["motion"]["all"]
    # The twin's network has random weights: every seed's noise goes through almost as it came.
    assert 0.5 < results["2 steps"]["spread"]["all"] < 1.6
    assert results["2 steps"]["psnr_to_first"]["all"] == 99 > results["1 step"]["psnr_to_first"]["all"]


@pytest.mark.parametrize("script", ["tiles"], indirect=True)
def test_tiles(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(script, weights, capsys)
    for verb in ("encode", "decode"):
        row = line["results"][verb]
        assert row["max_difference"] <= 1e-5 * row["largest"]
        for run in (row["whole"], row["tiled"]):
            # Peaks are of the clip's first blocks and of all that came out, too: at toy size that shows.
            assert run["live_mb"] == pytest.approx(run["planned_mb"], rel=0.15)


@pytest.mark.parametrize("script", ["fast_profile"], indirect=True)
def test_fast_profile(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "plain,M 5,light decoder,int8,fp8-rows"
    results = line_of(script, weights, capsys, "--only", only)["results"]
    assert list(results) == only.split(",") and results["M 5"]["fields"] == {"csg": {"segment_blocks": 5}}
    refused, plain = results.pop("fp8-rows"), results.pop("plain")
    assert "compute capability" in refused["skipped"] and "seconds" not in refused
    assert set(plain["ratio"].values()) == {1} and 0 < plain["seconds"]["stage_two"] < plain["seconds"]["whole"]
    apart = {name: row["psnr_to_plain"]["given"]["worst"] for name, row in results.items()}
    assert apart.pop("light decoder") == 99  # what it leaves out has learned nothing in the twin
    assert all(20 < worst < 99 for worst in apart.values())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["context_parallel"], indirect=True)
def test_context_parallel(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny"
    tiny_pipeline("wan").save_pretrained(model)
    results = line_of(script, model, capsys)["results"]
    ways = results["ways"]
    assert list(ways) == list(script.WAYS) and results["met"]
    assert ways[script.PLAIN]["max_latent_difference"] == 0
    assert ways[script.SHARED]["max_latent_difference"] < 1e-5 and ways[script.SHARED]["max_pixel_difference"] <= 1
    assert all(row["seconds"] > row["step_seconds"] > 0 for row in ways.values())


@pytest.mark.parametrize("script", ["overlap"], indirect=True)
def test_overlap(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, weights, capsys, "--steps", "1")["results"]
    assert results["equal"] and results["ratio"] > 0
    assert {"denoise", "decode", "write"} <= results["runs"]["at once"][0]["own_seconds"].keys()


@pytest.mark.parametrize("script", ["modulation"], indirect=True)
def test_modulation(script: ModuleType, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, weights, capsys)["results"]
    assert results["max_difference"] < 1e-5 and results["seconds_ratio"] > 0 and results["memory_ratio"] > 0
