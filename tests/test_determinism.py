"""Same request, same latents and frames: whole, streamed, killed at any instant and resumed, out of memory in decode.

Kills are real: SIGKILL to a real process that runs the real command line. One subprocess imports torch once and forks
a child for every run, so that a kill costs a run of the tiny model and not seconds of imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from swifti2v import cli, media, order
from swifti2v.core import Request
from swifti2v.journal import Job
from swifti2v.models.causal_vae import decode_stream, encode_stream
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.tiny import tiny_pipeline

STEPS, WINDOWS, SEGMENTS = 6, 3, 3  # 33 frames: 9 blocks, Stage I windows of 5 blocks, Stage II segments of 3
GOOD = ["generate", "--image", "photo.png", "--prompt", "slow pan left", "--preset", "tiny-nano", "--model", "weights"]
GOOD += ["--size", "128x64", "--num-frames", "33", "--seed", "7", "--dtype", "float32", "--threads", "1"]
GOOD += ["--num-inference-steps", str(STEPS), "--num-inference-steps-2", str(STEPS), "--json", "--keep-job"]

FORKER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)  # a child of a process with worker threads would wait for them for ever
from swifti2v import cli, order, pipeline, produce, progress

def run(arguments, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        cli.main(arguments)
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code or 0)
    os._exit(99)

def events(log):
    return open(log, "rb").read().count(b"\\n") if os.path.exists(log) else 0

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    begin, child = time.monotonic(), os.fork()
    if child == 0:
        run(task["arguments"], task["log"])
    status = None
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - begin >= task["seconds"] or events(task["log"]) >= task["events"]:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.001)
    print(json.dumps({"code": status, "seconds": time.monotonic() - begin}), flush=True)
"""


class Machine:
    """Runs the command line in forked children of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, text=True
        )
        assert self._line() == "ready"

    def run(
        self, *arguments: str, seconds: float = 1e9, events: float = 1e9
    ) -> tuple[int, float, list[dict[str, Any]]]:
        """Exit code (negative: the signal), seconds, and the events told; killed after so many of either."""
        task = {"arguments": arguments, "log": "log", "seconds": seconds, "events": events}
        assert self.process.stdin is not None
        (self.folder / "log").write_bytes(b"")
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._line())
        lines = (self.folder / "log").read_text().splitlines()
        told = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        assert answer["code"] in (0, -signal.SIGKILL), (answer, lines)
        return answer["code"], answer["seconds"], told

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A folder with a photo, weights and the undisturbed clip ``whole.mp4`` with its job."""
    here = tmp_path_factory.mktemp("determinism")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(here / "photo.png")
    tiny_pipeline("nano").save_pretrained(here / "weights")
    machine = Machine(here)
    machine.run(*GOOD, "--output", "whole.mp4")
    yield machine
    assert machine.process.stdin is not None
    machine.process.stdin.close()
    machine.process.wait()


def frames(path: Path) -> Tensor:
    return torch.cat(list(media.read_video(path)), dim=2)


def latents(job: Path) -> dict[str, tuple[dict[str, str], bytes]]:
    """Every latent file of a job: what it says of itself, and its latents byte for byte."""
    found = {}
    for path in sorted(job.glob("*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[str(path.relative_to(job))] = (file.metadata(), file.get_tensor("latents").numpy().tobytes())
    return found


def worked_on(events: list[dict[str, Any]]) -> dict[tuple[str, int], int]:
    """Denoising steps by (phase, window or segment)."""
    steps: dict[tuple[str, int], int] = {}
    for event in events:
        if event["type"] == "progress" and event["phase"] in ("motion", "refine"):
            place = (event["phase"], event["segment"])
            steps[place] = steps.get(place, 0) + 1
    return steps


def assert_same(machine: Machine, name: str) -> None:
    here = machine.folder
    assert latents(here / f"{name}.job") == latents(here / "whole.job")
    assert torch.equal(frames(here / f"{name}.mp4"), frames(here / "whole.mp4"))


def clean(machine: Machine) -> None:
    for path in machine.folder.glob("k*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill_and_resume(machine: Machine, **when: float) -> str:
    """Kill a run and finish it; returns how far it had come. The result and the work repeated are checked."""
    clean(machine)
    here = machine.folder
    code, _, before = machine.run(*GOOD, "--output", "k.mp4", **when)
    if (here / "k.mp4").exists():
        assert_same(machine, "k")
        return "finished"
    assert code == -signal.SIGKILL
    if not (here / "k.job/manifest.json").is_file():
        # Killed before the job was born: nothing is lost, and the same command works (beside an empty reservation).
        assert not before or all(event["phase"] == "image" for event in before)
        code, _, _ = machine.run(*GOOD, "--output", "k.mp4")
        made = next(path.stem for path in here.glob("k*.mp4") if ".part" not in path.name)
        assert_same(machine, made)
        return "not begun"
    kept = latents(here / "k.job")
    code, _, after = machine.run("resume", "k.job", "--json")
    assert code == 0
    assert_same(machine, "k")
    done, again = worked_on(before), worked_on(after)
    assert len(again) == WINDOWS + SEGMENTS - len(kept) and all(steps == STEPS for steps in again.values())
    assert len(done.keys() & again.keys()) <= 1, (done, again)
    assert sorted(path.name for path in here.glob("k*")) == ["k.job", "k.mp4"]
    return f"{len(kept)} kept"


def test_whole_again_is_identical(machine: Machine) -> None:
    clean(machine)
    machine.run(*GOOD, "--output", "k.mp4")
    assert len(latents(machine.folder / "whole.job")) == WINDOWS + SEGMENTS
    assert_same(machine, "k")


@pytest.mark.parametrize("events", [4 + STEPS, 6 + WINDOWS * STEPS + STEPS + STEPS // 2])
def test_killed_once_and_resumed(machine: Machine, events: int) -> None:
    """In the second Stage I window, and in the second Stage II segment."""
    assert kill_and_resume(machine, events=events).endswith("kept")


def test_killed_again_and_again(machine: Machine) -> None:
    """Every run dies after some work; each adds what it finished, and the end is the same."""
    clean(machine)
    code, _, _ = machine.run(*GOOD, "--output", "k.mp4", events=5 + STEPS)
    runs, held = 0, -1
    while code != 0:
        now = len(latents(machine.folder / "k.job"))
        assert now > held or runs == 1
        held, runs = now, runs + 1
        code, _, _ = machine.run("resume", "k.job", "--json", events=5 + 2 * STEPS)
        assert runs < 12
    assert runs >= 2
    assert_same(machine, "k")


@pytest.mark.slow
def test_killed_at_20_random_instants_and_resumed(machine: Machine) -> None:
    _, whole, _ = machine.run(*GOOD, "--output", "timing.mp4")
    instants = random.Random(2605)
    told = [kill_and_resume(machine, seconds=instants.uniform(0, whole)) for _ in range(20)]
    print(f"one run takes {whole:.2f} s; killed with: {', '.join(told)}")
    assert sum("kept" in outcome for outcome in told) >= 8


# --- streamed and whole, in process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(machine: Machine) -> SwiftI2VPipeline:
    pipeline = SwiftI2VPipeline.from_pretrained(machine.folder / "weights")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ordered(machine: Machine, monkeypatch: pytest.MonkeyPatch, output: str = "k.mp4") -> order.Order:
    monkeypatch.chdir(machine.folder)
    return order.prepare(
        cli.Options(
            image="photo.png", prompt="slow pan left", preset="tiny-nano", model="weights", size="128x64",
            num_frames=33, seed=7, dtype="float32", num_inference_steps=STEPS, num_inference_steps_2=STEPS,
            output=output,
        )
    )  # fmt: skip


def test_streamed_equals_whole(machine: Machine, loaded: SwiftI2VPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, all at once, lazily or ahead, and as one decode of the journal's latents."""
    made = ordered(machine, monkeypatch)
    request: Request = made.manifest.request
    streamed = torch.cat([chunk.frames for chunk in loaded.stream(made.photo, request)], dim=2)
    ahead = request.model_copy(update={"encode": "ahead"})
    assert torch.equal(streamed, torch.cat([chunk.frames for chunk in loaded.stream(made.photo, ahead)], dim=2))
    shutil.copytree("whole.job", "copy.job", dirs_exist_ok=True)
    with Job.open("copy.job") as job, torch.no_grad():
        assert job.manifest.request == request
        anchor = next(iter(encode_stream(loaded.vae, [made.photo])))
        at_once = list(decode_stream(loaded.vae, [torch.cat([anchor, *job.segments()], dim=2)], made.photo))
    assert torch.equal(streamed, torch.cat(at_once, dim=2))
    called = loaded(
        image="photo.png", prompt="slow pan left", height=64, width=128, num_frames=33, seed=7, output_type="pt",
        num_inference_steps=STEPS, num_inference_steps_2=STEPS,
    ).frames  # fmt: skip
    assert torch.equal(called[0].transpose(0, 1), (streamed[0] / 2 + 0.5).clamp(0, 1))


class Hungry(NanoVAE):
    """A decoder that runs out of memory at its ``limit``-th chunk."""

    limit = 0

    def decode_chunk(self, z: Tensor, state: Any) -> Any:
        if self.limit == 0:
            raise MemoryError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 TB")
        self.limit -= 1
        return super().decode_chunk(z, state)


@pytest.mark.parametrize("segment", [1, 3])
def test_out_of_memory_in_decode_leaves_a_job_to_resume(
    machine: Machine, loaded: SwiftI2VPipeline, monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    clean(machine)
    made = ordered(machine, monkeypatch)
    hungry = Hungry.from_config(loaded.vae.config)
    hungry.load_state_dict(loaded.vae.state_dict())
    hungry.limit = segment  # the first chunk is the photo's own
    monkeypatch.setattr(loaded, "vae_2", hungry)
    manifest = made.manifest.model_copy(update={"keep_job": True})
    with Job.create("k.job", manifest, made.photo) as job:
        chunks = loaded.stream(job.photo(), manifest.request, job=job)
        with pytest.raises(MemoryError):
            media.write_video("k.mp4", (chunk.frames for chunk in chunks), fps=15)
        assert len(job.segments()) == segment and len(job.motion()) == WINDOWS
    assert media.probe("k.part.mp4").frames == 1 + 12 * (segment - 1)
    result = CliRunner().invoke(cli.app, ["resume", "k.job", "--json"])
    assert result.exit_code == 0, result.stderr
    again = worked_on([json.loads(line) for line in result.stdout.splitlines()])
    assert set(again) == {("refine", number) for number in range(segment + 1, SEGMENTS + 1)}
    assert latents(Path("k.job")) == latents(Path("whole.job"))
    assert torch.equal(frames(Path("k.mp4")), frames(Path("whole.mp4")))
    assert os.listdir("k.job/motion")
