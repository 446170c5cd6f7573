"""Two processes (gloo, CPU) make the clip that one makes; and when one of them fails, both end with its word.

Real processes, forked from a server that has done the imports; every one leaves a record that the tests read.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from swifti2v import media, parallel, presets, produce
from swifti2v.core import Event, UsageError
from swifti2v.journal import Manifest
from swifti2v.options import Options
from swifti2v.order import Order, prepare
from swifti2v.parallel import Ranks, enable_context_parallel, joined
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import CSG
from swifti2v.tiny import tiny_pipeline

WORLD, TIMEOUT, CLOSE = 2, 90, 2e-5
CLIPS: dict[str, dict[str, Any]] = {
    "wan": {"guidance_scale_2": 2.0},
    "wan-refine": {},
}
"""Windows of 5 and 4 blocks, so that two processes do not divide the blocks; positions clamped."""


# -- what the processes do -------------------------------------------------------------------------------------------


def clip(pipeline: SwiftI2VPipeline, family: str, **fields: Any) -> Tensor:
    preset = presets.get(f"tiny-{family}")
    given = CLIPS[family] | fields
    request, _ = presets.resolve(preset, prompt="slow pan", size="128x64", num_frames=33, seed=1, **given)
    photo = torch.rand(1, 3, 1, 64, 128, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return torch.cat([chunk.frames for chunk in pipeline.stream(photo, request)], dim=2)


def order(folder: Path) -> Order:
    options = Options(image=str(folder / "photo.png"), prompt="pan", preset="tiny-wan", model=str(folder / "twin"))
    options = replace(options, size="128x64", num_frames=33, seed=7, dtype="float32", keep_job=True)
    return prepare(replace(options, output=str(folder / "clip.mp4"), threads=1))


def make_clips(ranks: Ranks, folder: Path) -> dict[str, Any]:
    calls: dict[str, list[int]] = {}
    for family in CLIPS:
        pipeline = tiny_pipeline(family)
        calls[family] = counted = [0, 0]
        for number, model in enumerate((pipeline.transformer, pipeline.transformer_2)):
            model.register_forward_pre_hook(lambda *_, n=number, counts=counted: counts.__setitem__(n, counts[n] + 1))
        with enable_context_parallel(pipeline, ranks) as leads:
            if leads:
                torch.save(clip(pipeline, family), folder / f"{family}.pt")
        assert pipeline.transformer_2._parallel_config is None
        if ranks.leads and family == "wan-refine":  # as it was before
            assert torch.equal(clip(pipeline, family), clip(tiny_pipeline(family), family))
    return {"calls": calls, "as_diffusers": split_as_diffusers(ranks)}


def split_as_diffusers(ranks: Ranks) -> bool:
    """Whether a split model has the hooks that ``enable_parallelism`` gives it, and computes the same."""
    torch.accelerator.device_count = lambda: WORLD  # type: ignore[assignment]  # theirs divides by it: 0 on a CPU
    theirs, ours = tiny_pipeline("wan").transformer_2, tiny_pipeline("wan").transformer_2
    theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
    x, text = torch.randn(1, 8, 4, 4, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 512, 16)
    call = {"hidden_states": x, "timestep": torch.full((1, 4), 500.0), "encoder_hidden_states": text}

    def hooks(model: Any) -> dict[str, list[str]]:
        return {n: list(m._diffusers_hook.hooks) for n, m in model.named_modules() if hasattr(m, "_diffusers_hook")}

    with parallel._split(ours, ranks.config), torch.no_grad():
        same = hooks(ours) == hooks(theirs) and len(hooks(ours)) == 4
        same &= all(module._parallel_config is not None for module in (ours, ours.blocks[0].attn1.processor))
        return same and torch.equal(ours(**call, return_dict=False)[0], theirs(**call, return_dict=False)[0])


def interrupted(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Ctrl-C when one segment is finished."""

    def stop(event: Event) -> None:
        if event.type == "segment" and event.segment == 2:
            raise KeyboardInterrupt

    return lead_or_follow(ranks, lambda: produce.start(order(folder), stop, execution=produce.Execution(ranks=ranks)))


def resumed(ranks: Ranks, folder: Path) -> dict[str, Any]:
    steps: list[tuple[str, int]] = []

    def count(event: Event) -> None:
        if event.type == "progress" and event.phase in ("motion", "refine"):
            steps.append((event.phase, event.step))

    return lead_or_follow(ranks, lambda: go_on(folder, count, ranks)) | {"steps": steps}


def go_on(folder: Path, emit: Any, ranks: Ranks) -> Path:
    return produce.resume(folder / "clip.job", emit, execution=produce.Execution(ranks=ranks))


def failing(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The second process runs out of memory in the middle of a call, while the first waits for it."""
    counted = [0]

    def fail(*_: Any) -> None:
        counted[0] += 1
        if counted[0] == 5:
            raise MemoryError("nothing left to hold layer 1")

    def load(manifest: Manifest) -> SwiftI2VPipeline:
        pipeline = SwiftI2VPipeline.from_pretrained(folder / "twin")
        pipeline.transformer_2.blocks[1].register_forward_pre_hook(fail)
        return pipeline

    if ranks.leads:
        return {"path": str(produce.start(order(folder), lambda event: None, execution=produce.Execution(ranks=ranks)))}
    ranks.follow(load)
    return {}


def lead_or_follow(ranks: Ranks, lead: Callable[[], Path]) -> dict[str, Any]:
    if ranks.leads:
        return {"path": str(lead())}
    produce.follow(ranks)
    return {}


def other_weights(ranks: Ranks, folder: Path) -> dict[str, Any]:
    with enable_context_parallel(tiny_pipeline("wan", seed=ranks.rank), ranks):
        return {}


def odd_tokens(ranks: Ranks, folder: Path) -> dict[str, Any]:
    pipeline = tiny_pipeline("wan")
    hidden, text = torch.zeros(1, 8, 3, 2, 2), torch.zeros(1, 512, 16)
    with enable_context_parallel(pipeline, ranks) as leads:
        if leads:
            pipeline.transformer_2(
                hidden_states=hidden, timestep=torch.zeros(1, 3), encoder_hidden_states=text, return_dict=False
            )
    return {}


def silent(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The second process stops answering, but does not end."""
    pipeline = tiny_pipeline("wan")
    with enable_context_parallel(pipeline, ranks) if ranks.leads else nullcontext():
        if ranks.leads:
            clip(pipeline, "wan")
        time.sleep(10)
    return {}


def too_many(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return {}


def work(rank: int, port: int, folder: Path, job: Callable[[Ranks, Path], dict[str, Any]], count: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    place["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as under torchrun, whose store outlives the processes
    os.environ.update({key: str(value) for key, value in place.items()})
    timeout = timedelta(seconds=5) if job is silent else parallel.TIMEOUT
    try:
        with joined(count, device="cpu", timeout=timeout) as ranks:
            record = job(ranks, folder)
    except (RuntimeError, ValueError, MemoryError, KeyboardInterrupt) as error:
        record = {"error": type(error).__name__, "message": str(error)}
    (folder / f"{job.__name__}_{rank}.json").write_text(json.dumps(record))


def together(
    job: Callable[[Ranks, Path], dict[str, Any]], folder: Path, count: int = WORLD
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run ``job`` in two processes to their end; their records."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.set_forkserver_preload(["swifti2v.parallel", "swifti2v.tiny", "swifti2v.produce"])
    context = mp.start_processes(
        work, (store.port, folder, job, count), nprocs=WORLD, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{job.__name__}: not done after {TIMEOUT} s")
    first, second = (json.loads((folder / f"{job.__name__}_{rank}.json").read_text()) for rank in range(WORLD))
    return first, second


# -- one clip --------------------------------------------------------------------------------------------------------


def test_two_processes_make_the_clip_of_one(tmp_path: Path) -> None:
    first, second = together(make_clips, tmp_path)
    for family in CLIPS:
        alone, shared = clip(tiny_pipeline(family), family), torch.load(tmp_path / f"{family}.pt")
        assert float((alone - shared).abs().max()) < CLOSE
        assert float((alone - clip(tiny_pipeline(family), family, csg=other_positions(family))).abs().max()) > 5 * CLOSE
        assert second["calls"][family][0] > 0 and second["calls"][family][1] > 0, "the second process had nothing to do"
    assert "error" not in first | second
    assert first["as_diffusers"] and second["as_diffusers"]


def other_positions(family: str) -> dict[str, Any]:
    """The clip depends on positions, so that it would show if the processes did not agree on them."""
    base = presets.get(f"tiny-{family}").defaults.get("csg", CSG())
    return {**base.model_dump(), "rope_positions": "window"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_pipeline("wan").save_pretrained(tmp_path / "twin")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(tmp_path / "photo.png")
    return tmp_path


def frames(path: str | Path) -> Tensor:
    return torch.cat(list(media.read_video(Path(path))), dim=2)


def test_a_job_interrupted_in_two_processes_is_resumed_in_two(place: Path) -> None:
    first, second = together(interrupted, place)
    assert first["error"] == "Interrupted" and "resume with: swifti2v resume" in first["message"]
    assert second["error"] == "Ended" and second["message"].startswith("process 0: interrupted")
    job = place / "clip.job"
    assert json.loads((job / "manifest.json").read_text())["settings"]["context_parallel"] == "2"
    kept = {path: path.read_bytes() for path in job.glob("*/*.safetensors")}
    assert len(list(job.glob("segments/*.safetensors"))) == 2

    with pytest.raises(UsageError, match="context_parallel was 2, is absent"):
        produce.resume(job, lambda event: None)
    assert {path: path.read_bytes() for path in job.glob("*/*.safetensors")} == kept

    first, second = together(resumed, place)
    assert "error" not in first | second, (first, second)
    assert first["steps"] == [["refine", 5], ["refine", 6]]  # of the third segment alone
    alone = produce.start(order(place), lambda event: None)
    assert alone != Path(first["path"])
    assert frames(first["path"]).shape == frames(alone).shape
    for kind in ("motion", "segments"):
        for file in sorted((place / f"{alone.stem}.job" / kind).iterdir()):
            wanted, found = load_file(file)["latents"], load_file(job / kind / file.name)["latents"]
            assert float((wanted - found).abs().max()) < CLOSE


# -- when something fails --------------------------------------------------------------------------------------------


def test_the_failure_of_another_process_is_told_and_leaves_a_job(place: Path) -> None:
    begin = time.monotonic()
    first, second = together(failing, place)
    assert time.monotonic() - begin < 40
    assert second == {"error": "MemoryError", "message": "nothing left to hold layer 1"}
    assert first["error"] == "Unfinished"
    assert first["message"].startswith("process 1: nothing left to hold layer 1; resume with: swifti2v resume")
    assert len(list((place / "clip.job").glob("segments/*.safetensors"))) == 2  # two calls each


def test_other_weights_and_odd_tokens_are_refused(tmp_path: Path) -> None:
    first, second = together(other_weights, tmp_path)
    assert second["error"] == "RunError" and "is not as in process 0" in second["message"]
    assert first["error"] == "Ended" and "is not as in process 0" in first["message"]
    first, second = together(odd_tokens, tmp_path)
    assert first["error"] == "UsageError" and "does not divide the 3 tokens" in first["message"]
    assert second["error"] == "Ended" and "does not divide the 3 tokens" in second["message"]


@pytest.mark.slow  # it waits
def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    first, _ = together(silent, tmp_path)
    assert first == {"error": "Ended", "message": "another of 2 processes does not answer (killed? stopped?)"}


def test_the_number_of_processes_is_that_of_torchrun(tmp_path: Path) -> None:
    first, second = together(too_many, tmp_path, count=4)
    assert first == {
        "error": "UsageError",
        "message": "context_parallel 4: 2 processes were started; use --nproc-per-node 4",
    }
    assert second["error"] == "Ended"


def test_without_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2"), joined(2):
        pass


def test_only_wan_is_split() -> None:
    with pytest.raises(UsageError, match="MobileTransformer3DModel is none"):
        parallel._check_model(tiny_pipeline("nano").transformer, 2)
    with pytest.raises(UsageError, match="context_parallel 3 does not divide 2 heads; nearest legal value: 2"):
        parallel._check_model(tiny_pipeline("wan").transformer, 3)


def test_a_level_a_block_becomes_one_a_piece() -> None:
    model = tiny_pipeline("wan").transformer_2
    call = {"hidden_states": torch.zeros(1, 4, 5, 4, 8), "timestep": torch.arange(5.0)[None]}
    split = parallel._divisible(model, call, 4)["timestep"]
    assert torch.equal(split, torch.arange(5.0).repeat_interleave(4)[None])
    assert parallel._divisible(model, call, 5)["timestep"].shape == (1, 5)
    one = {**call, "timestep": torch.zeros(1)}
    assert parallel._divisible(model, one, 4) is one


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_under_torchrun(place: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "swifti2v"]
    asked = ["generate", "--image", "photo.png", "--prompt", "pan", "--preset", "tiny-wan", "--model", "twin"]
    asked += ["--size", "128x64", "--num-frames", "9", "--seed", "7", "--dtype", "float32", "--json"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launch, *asked, *more], cwd=place, capture_output=True, text=True, timeout=120, check=False
        )

    done = run("--context-parallel", "2", "--output", "two.mp4")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]  # of one process, and nothing else
    assert sum(event["type"] == "completed" for event in events) == 1 and not (place / "two.job").exists()
    assert frames(place / "two.mp4").shape[2] == 9
    refused = run("--context-parallel", "3")
    assert refused.returncode != 0 and refused.stderr.count("error: ") >= 1
    assert "context_parallel 3: 2 processes were started" in refused.stderr and not list(place.glob("*.job"))
