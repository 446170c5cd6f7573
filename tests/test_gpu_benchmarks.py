"""The benchmarks of Wan's networks run at toy size, and what they say of a run holds of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swifti2v import costs, presets
from swifti2v.arrangement import Arrangement, Need
from swifti2v.core import UsageError
from swifti2v.plan import plan
from swifti2v.quantize import KINDS, kind_of
from swifti2v.tiny import WAN_DIT, tiny_pipeline

FOLDER = Path(__file__).parent.parent / "benchmarks"
FIELDS = {"question", "command", "commit", "dirty", "date", "hardware", "settings", "results"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def line_of(script: ModuleType, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    script.main(["--tiny", "--device", "cpu", "--threads", "1", *more])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == FIELDS and str(FOLDER.parent) not in json.dumps(line)
    assert "device" not in line["hardware"]
    return line


# -- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_true_size_networks_have_the_parameters_that_the_plan_prices(script: ModuleType) -> None:
    wanted = {
        costs.UMT5_XXL.parameters: lambda: script.UMT5EncoderModel(script.UMT5),
        costs.CLIP_H.parameters: lambda: script.CLIPVisionModel(script.CLIP),
        costs.WAN21_I2V_14B.parameters: lambda: script.stage_one_dit(False),
        costs.WAN22_TI2V_5B.parameters: lambda: script.base_dit(False),
        costs.SWIFTI2V_5B.parameters: lambda: script.stage_two_dit(False),
        costs.WAN21_VAE.parameters: lambda: script.vae_one(False),
        costs.WAN22_VAE.parameters: lambda: script.vae_two(False),
    }
    for parameters, network in wanted.items():
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in network().parameters()) == parameters


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_a_network_made_in_bfloat16_keeps_what_its_class_keeps_in_float32(script: ModuleType) -> None:
    machine = script.Machine(torch.device("cpu"), torch.bfloat16)
    network = script.made(machine, lambda: script.stage_two_dit(True))
    assert torch.get_default_dtype() == torch.float32
    assert network.patch_embedding.weight.dtype == network.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert network.blocks[0].scale_shift_table.dtype == torch.float32
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    torch.testing.assert_close(network.rope.freqs_cos, script.stage_two_dit(True).rope.freqs_cos, rtol=0, atol=0)


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_variants_beside_plain_are_compared_and_refusals_kept_with_their_reason(script: ModuleType) -> None:
    machine, x = script.Machine(torch.device("cpu"), torch.float32), torch.arange(4096.0).view(64, 64)

    def refuses() -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    calls = {"plain": lambda: x @ x, "same": lambda: x @ x, "off": lambda: (x @ x) * 1.5, "absent": refuses}
    rows = script.beside_plain(machine, calls, rounds=2, rate=1e9)
    assert rows["plain"]["flops"] == 2 * 64**3 and len(rows["plain"]["seconds"]) == 2
    assert rows["plain"]["ratio"] == 1.0
    assert rows["same"]["equal"] and rows["same"]["max_difference"] == 0
    assert not rows["off"]["equal"] and rows["off"]["max_difference"] == pytest.approx(0.5)
    assert rows["absent"] == {"skipped": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        script.beside_plain(machine, {"plain": refuses}, rounds=1)


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_the_true_size_is_refused_on_a_cpu(script: ModuleType) -> None:
    asked = script.argparse.Namespace(tiny=False, device="cpu", threads=None)
    with pytest.raises(SystemExit, match="--tiny"):
        script.Machine.of(asked)


# -- headline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_headline_phases_add_up(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, capsys)["results"]
    phases = results["phases"]
    assert results["fits"] and results["ended_in"] == "between"
    assert sum(row["seconds"] for row in phases.values()) == pytest.approx(results["seconds"], abs=0.002)
    assert set(phases) == {
        *("between", "text", "image", "encode", "decode", "motion", "motion encode", "motion decode"),
        *("refine 1", "refine 2"),
    }
    assert [chunk["frames"] for chunk in results["chunks"]] == [1, 12, 4]
    assert results["first_frame_seconds"] < results["first_segment_seconds"] < results["seconds"]
    assert results["flops"] == sum(row["flops"] for row in phases.values())
    # Two steps over windows of 4 blocks and of 3: what was counted is the closed form of the toy network, but for the
    # reference, embedded once a segment: 4 channels of 2x2 pixels by 48, 4 tokens a block.
    names = {"heads": "num_attention_heads", "ffn": "ffn_dim", "layers": "num_layers", "head_dim": "attention_head_dim"}
    toy = {ours: WAN_DIT[theirs] for ours, theirs in names.items()}
    cost = costs.WanDiTCost(in_channels=8, out_channels=4, text_dim=16, freq_dim=32, **toy)
    assert phases["refine 1"]["flops"] == 2 * cost.flops(4, 4) - 2 * 16 * 48 * 4 * 4
    assert phases["refine 2"]["flops"] == 2 * cost.flops(3, 4) - 2 * 16 * 48 * 3 * 4


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_headline_as_arranged_for_a_card(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(script, capsys, "--profile", "24gb", "--at-once", "--num-frames", "5")
    settings, results = line["settings"], line["results"]
    assert settings["memory_gib"] is None  # a CPU has no such limit
    assert settings["at_once"] and settings["attention"] == "native"
    assert settings["encode"] == "ahead"  # as the true size has to, within 24 GB
    assert any(words.startswith("streamed layer by layer") for words in settings["arranged"])
    assert any(words.startswith("decoded in") for words in settings["arranged"])
    assert results["fits"] and len(results["chunks"]) == 2 and "phases" not in results
    assert {"text", "motion", "reference", "denoise", "decode"} <= set(results["own_seconds"])
    assert results["needs"]["whole"]["predicted_gib"] < 24


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_an_arrangement_is_carried_out_phase_by_phase(script: ModuleType) -> None:
    arranged, gpu = importlib.import_module("arranged"), importlib.import_module("gpu")
    asked = script.options(["--tiny", "--profile", "24gb", "--quantize", "int8", "--num-frames", "5"])
    way = arranged.way_of(asked, script.requested(asked, presets.get("wan"), **script.TRUE_SIZE))
    machine = gpu.Machine(torch.device("cpu"), torch.float32)
    pipeline = arranged.built(machine, asked, way)
    assert way.phased and way.streamed == ()  # in 8 bits all of them fit, one at a time
    tiling = pipeline.residency.streaming(pipeline.vae_2).tiling
    assert (tiling.rows, tiling.columns) == (way.decode.rows, way.decode.columns) != (1, 1)
    before = pipeline.transformer
    results = script.run(machine, pipeline, script.requested(asked, pipeline.preset, encode=way.encode_when))
    assert results["fits"] and {"load", "motion", "refine 1", "text"} <= set(results["phases"])
    assert pipeline.transformer is before and not before._forward_pre_hooks
    assert kind_of(before) is None  # what was loaded, in 8 bits, has gone
    assert pipeline.placement.settings()["quantize"] == "int8"


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_predictions_stand_beside_the_peaks_of_their_phases(script: ModuleType) -> None:
    arranged = importlib.import_module("arranged")
    needs = tuple(Need(phase, round(gib * 2**30), 0) for phase, gib in (("text", 3), ("motion", 5), ("refine", 12)))
    way = Arrangement(True, (), False, None, None, "lazy", False, needs, 0.0)
    peaks = {"text": 2, "image": 4, "load": 9, "motion encode": 5, "encode": 6, "decode": 10, "refine 1": 8}
    phases = {name: {"peak_gib": float(gib)} for name, gib in peaks.items()}
    rows = arranged.compared(way, {"phases": phases}, True)
    assert {name: row["peak_gib"] for name, row in rows.items()} == {"text": 4, "motion": 5, "refine": 10}
    assert rows["refine"]["ratio"] == 1.2
    ahead = dataclasses.replace(way, needs=(*needs, Need("encode", 6 * 2**30, 0)))
    assert arranged.compared(ahead, {"phases": phases}, True)["encode"]["ratio"] == 1.0
    assert "ratio" not in arranged.compared(way, {"phases": phases}, False)["text"]
    assert arranged.compared(way, {"peak_gib": 10.0}, True) == {
        "whole": {"predicted_gib": 12.0, "peak_gib": 10.0, "ratio": 1.2}
    }


@pytest.mark.parametrize("script", ["arranged"], indirect=True)
def test_a_part_that_waits_stays_where_it_is_when_its_copy_moves(script: ModuleType) -> None:
    waiting = tiny_pipeline("wan").transformer
    weight = waiting.proj_out.weight
    copy = script.beside(waiting)
    assert copy.proj_out.weight is not weight and copy.proj_out.weight.data_ptr() == weight.data_ptr()
    copy.to("meta")
    assert waiting.proj_out.weight is weight and all(p.device.type == "cpu" for p in waiting.parameters())


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_what_is_streamed_is_not_compiled(script: ModuleType) -> None:
    arranged = importlib.import_module("arranged")
    asked = script.options(["--profile", "24gb", "--compile"])
    with pytest.raises(UsageError, match="--compile"):
        arranged.way_of(asked, script.requested(asked, presets.get("wan")))


@pytest.mark.parametrize("script", ["headline"], indirect=True)
def test_running_out_of_memory_is_a_result(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = importlib.import_module("gpu")
    asked = script.options(["--tiny", "--preset", "wan-refine"])
    pipeline = tiny_pipeline("wan-refine")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    pipeline.transformer_2.register_forward_pre_hook(full)
    request = script.requested(asked, pipeline.preset)
    results = script.run(gpu.Machine(torch.device("cpu"), torch.float32), pipeline, request)
    assert not results["fits"] and len(results["chunks"]) == 1
    assert results["ended_in"] == "encode"  # Stage II was about to begin
    assert not pipeline.transformer._forward_pre_hooks


@pytest.mark.parametrize("script", ["headline"], indirect=True)
@pytest.mark.parametrize("preset", ["wan", "wan-refine"])
def test_closed_flops_of_the_phases_are_those_of_the_plan(script: ModuleType, preset: str) -> None:
    chosen = presets.get(preset)
    request = script.requested(script.options(["--preset", preset]), chosen)
    flops = script.closed_flops(request)
    assert sum(flops.values()) == plan(request, chosen).flops
    assert sum(name.startswith("refine") for name in flops) == 7
    if preset == "wan":
        assert sum(flops.values()) == pytest.approx(16.6e15, rel=0.01)


# -- networks alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["vae"], indirect=True)
def test_vae_variants_equal_the_plain_path(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, capsys, "--only", "channels_last_3d", "compiled", "tiled_parked")["results"]
    assert list(results["encode"]) == list(results["decode"])
    assert list(results["encode"]) == ["plain", "channels_last_3d", "compiled", "tiled_parked"]
    for part in ("encode", "decode"):
        assert all(row["max_difference"] < 1e-4 for row in results[part].values())
        assert all("floor_share" in row for row in results[part].values())
    assert results["encode"]["plain"]["flops"] < results["decode"]["plain"]["flops"]


@pytest.mark.parametrize("script", ["stage_two"], indirect=True)
def test_stage_two(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, capsys)["results"]
    assert set(results) == set(script.PARTS)
    for part in ("compiled", "modulation", "reference"):
        assert all(row["max_difference"] < 1e-4 for row in results[part].values())
    native = results["backends"]["_native_math"]
    assert native["max_difference"] < 1e-4
    assert results["backends"]["flash_hub"] == {"skipped": script.ELSEWHERE}
    assert all("skipped" in row or row["max_difference"] < 1e-2 for row in results["backends"].values())
    assert not results["reference"]["once a segment"]["equal"]
    assert set(results["quantized"]) == {"plain", *KINDS}
    assert not results["quantized"]["int8"]["equal"] and results["quantized"]["int8"]["max_difference"] < 0.1
    assert "8.9" in results["quantized"]["fp8-rows"]["skipped"]  # the library's own words
    windows = results["windows"]
    assert windows["M=3 N=1"]["ratio"] == 1.0 and windows["M=1 N=1"]["segments"] == 4
    assert windows["M=3 N=0"]["flops"] < windows["M=3 N=1"]["flops"] < windows["M=1 N=1"]["flops"]


@pytest.mark.parametrize("script", ["stage_two"], indirect=True)
def test_memory_of_refine_is_flat_in_the_length(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    clips = line_of(script, capsys, "--part", "length", "--frames", "33", "129")["results"]["length"]
    assert [row["segments"] for row in clips["clips"]] == [3, 11]
    assert clips["met"] and all(row["peak_bytes"] > 0 for row in clips["clips"])


@pytest.mark.parametrize("script", ["peers"], indirect=True)
def test_peers(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = line_of(script, capsys)["results"]
    denoise, decode = results["denoise"], results["decode"]
    assert list(denoise) == ["diffusers, one window", "ours, one window", "ours, M=3 N=1"]
    assert denoise["diffusers, one window"]["ratio"] == 1.0
    assert denoise["diffusers, one window"]["flops"] > denoise["ours, one window"]["flops"]  # a timestep a token
    assert decode["ours, streamed"]["equal"] and decode["ours, tiled"]["max_difference"] < 1e-4
    assert all("ratio" in row for row in (*denoise.values(), *decode.values()))


# -- the queue ------------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The queue with three items that count their runs: one does, one fails until told not to, one is too long."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("gpu_queue")
    (tmp_path / "fails.py").write_text(
        f"import pathlib, sys\npathlib.Path({str(tmp_path / 'runs')!r}).open('a').write('b')\n"
        f"sys.exit('broken' if not pathlib.Path({str(tmp_path / 'mended')!r}).exists() else 0)\n"
    )
    (tmp_path / "counts.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'runs')!r}).open('a').write('a')\n"
    )
    items = (
        module.Item("a", str(tmp_path / "counts.py"), 1),
        module.Item("b", str(tmp_path / "fails.py"), 1),
        module.Item("c", str(tmp_path / "counts.py") + " --long", 60),
        module.Item("d", "-m nothing", 1, needs="data/that/is/not/there"),
    )
    monkeypatch.setattr(module, "QUEUE", items)
    monkeypatch.setattr(module.common, "RESULTS", tmp_path / "results")
    return module


def worked(queue: ModuleType, capsys: pytest.CaptureFixture[str], *told: str) -> dict[str, list[str]]:
    try:
        queue.main(told)
    except SystemExit as ended:
        assert ended.code == 1
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_queue_goes_on_where_it_stopped(
    queue: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told, runs = ["--out", str(tmp_path / "out"), "--minutes", "5"], tmp_path / "runs"
    first = worked(queue, capsys, *told)
    assert first == {"done": ["a"], "held": [], "without data": ["d"], "left": ["c"], "failed": ["b"]}
    lines = [json.loads(text) for text in (tmp_path / "out" / "gpu_queue.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "failed"] and "broken" in lines[1]["reason"]
    (tmp_path / "mended").touch()
    again = worked(queue, capsys, *told)
    assert (again["held"], again["done"], again["left"]) == (["a"], ["b"], ["c"])
    assert worked(queue, capsys, *told)["held"] == ["a", "b"]
    assert runs.read_text() == "abb"
    assert worked(queue, capsys, *told, "--fresh", "--only", "a")["done"] == ["a"]
    assert worked(queue, capsys, "--list")["due"] == ["a", "b", "c"]
    assert runs.read_text() == "abba"


def test_the_queue_leaves_out_what_results_hold_for_this_commit_only(queue: ModuleType, tmp_path: Path) -> None:
    item, now = queue.Item("h", "benchmarks/headline.py --preset wan --at-once", 1), {"commit": "abc", "dirty": False}
    folder = tmp_path / "results"
    folder.mkdir()

    def held_by(**line: Any) -> bool:
        typed = "python benchmarks/headline.py --at-once --preset wan --record --note 'on an H100' --commit abc"
        (folder / "headline.jsonl").write_text(json.dumps({"command": typed, **now, **line}) + "\n")
        return bool(queue.held(item, False, now, [folder]))

    assert held_by() and held_by(command="python benchmarks/headline.py --preset wan --at-once --out x")
    assert not held_by(commit="abd") and not held_by(dirty=True) and not held_by(status="failed")
    assert not held_by(command="python benchmarks/headline.py --preset wan --at-once --tiny")
    assert not held_by(command="python benchmarks/headline.py --preset wan-refine --at-once")
    assert queue.held(item, True, now, [folder]) is False


def test_a_child_over_its_limit_is_stopped_with_all_it_started(queue: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    said = queue.finished([sys.executable, "-c", parent], 0.5)
    assert said.startswith("ran over its limit")
    time.sleep(4)
    assert not mark.exists()


def test_the_real_queue_names_scripts_and_recipes_that_exist() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        queue = importlib.reload(importlib.import_module("gpu_queue")).QUEUE
    finally:
        sys.path.remove(str(FOLDER))
    from swifti2v.train.recipes import makers

    assert len({item.name for item in queue}) == len(queue)
    for item in queue:
        assert item.minutes <= 8.5
        words = shlex.split(item.command)
        if item.trains:
            assert words[1] == "swifti2v.train" and words[2] in makers()
        else:
            assert (FOLDER.parent / words[0]).is_file()


def test_options_of_the_real_queue_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    headline = importlib.import_module("headline")
    for item in importlib.import_module("gpu_queue").QUEUE:
        if "headline.py" in item.command:
            headline.options(shlex.split(item.command)[1:])
