"""The command line: fast help, one-line errors with the right exit code, and clips that survive interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from swifti2v import cli, media, order, origin, produce
from swifti2v.core import Event, Request
from swifti2v.segments import CSG
from swifti2v.tiny import tiny_pipeline

RUNNER = CliRunner()
FRAMES = 33
BASE = ["--prompt", "slow pan left", "--preset", "tiny-nano", "--size", "128x64", "--num-frames", str(FRAMES)]
BASE += ["--dtype", "float32"]  # auto measures, and a busy machine may answer differently each time


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny_pipeline("nano").save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a photo in it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save("photo.png")
    return tmp_path


def run(*arguments: str) -> Result:
    return RUNNER.invoke(cli.app, list(arguments), catch_exceptions=False)


def generate(weights: Path, *more: str) -> Result:
    return run("generate", "--image", "photo.png", *BASE, "--model", str(weights), "--seed", "7", *more)


def frames(path: Path | str) -> torch.Tensor:
    return torch.cat(list(media.read_video(path)), dim=2)


def assert_refused(result: Result, code: int = 2, says: str = "") -> None:
    assert result.exit_code == code, (result.exit_code, result.stderr)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    assert re.search(says, errors[0]), errors[0]
    assert "Traceback" not in result.stderr


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "swifti2v", "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - begin)
    print(f"help: {min(took):.2f} s")
    assert min(took) < 1.0  # 0.5 s is the promise; slack for a busy machine
    script = "import sys, swifti2v.cli; print({'torch', 'pydantic', 'av', 'rich.progress'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "set()"


def test_every_verb_has_help() -> None:
    verbs = ["generate", "resume", "info", "rerun", "plan", "evaluate", "doctor"]
    verbs += ["models", "models list", "models verify"]
    for verb in verbs:
        assert run(*verb.split(), "--help").exit_code == 0
    assert run().exit_code == 2 and "Usage" in run().stdout


def test_options_are_the_requests_fields() -> None:
    """What a request can be, the command line can say, under the same name and with no default of its own."""
    options = {field.name: field for field in dataclasses.fields(cli.Options)}
    decided = {"width", "height", "csg", "image_sha256", "motion_sha256"}  # by --size, the next line, and the files
    by_preset = {"shift", "shift_2", "strength_2", "sampler_2"}
    assert set(Request.model_fields) - decided - by_preset <= set(options)
    assert {"segment_blocks", "neighbor_blocks", "rope_positions"} <= set(options) & set(CSG.model_fields)
    for name in set(Request.model_fields) & set(options) - {"preset"}:
        assert options[name].default in (None, False), name


BAD = {
    "no image": (["generate", *BASE], "--image is missing"),
    "no prompt": (["generate", "--image", "photo.png"], "--prompt is missing"),
    "no such option": (["generate", "--nope"], "--nope"),
    "no such verb": (["dance"], "dance"),
    "a word for a number": (["+", "--num-frames", "many"], "--num-frames"),
    "a number for frames": (["+", "--num-frames", "8.5"], "--num-frames"),
    "no such photo": (["+", "--image", "gone.jpg"], "gone.jpg"),
    "a text for a photo": (["+", "--image", "notes.txt"], "notes.txt"),
    "a folder for a photo": (["+", "--image", "."], "folder"),
    "zero size": (["+", "--size", "0x64"], "not positive"),
    "negative size": (["+", "--size", "-64x64"], "not positive"),
    "a word for a size": (["+", "--size", "large"], "large"),
    "a huge size": (["+", "--size", "100000x64"], "over the limit"),
    "off the grid": (["+", "--size", "130x64", "--strict"], "nearest legal value: 128x64"),
    "two sizes": (["+", "--resolution", "2k"], "give one of them"),
    "frames off the grid": (["+", "--num-frames", "34", "--strict"], "nearest legal value: 33"),
    "no frames": (["+", "--num-frames", "0"], "not positive"),
    "too many frames": (["+", "--num-frames", "100000"], "over the limit"),
    "two lengths": (["+", "--duration", "5s"], "give one of them"),
    "bad fit": (["+", "--fit", "stretch"], "stretch"),
    "bad preset": (["+", "--preset", "huge"], "known presets: nano"),
    "bad steps": (["+", "--num-inference-steps", "0"], "num_inference_steps 0"),
    "bad guidance": (["+", "--guidance-scale", "0.5"], "guidance_scale 0.5"),
    "not a number": (["+", "--guidance-scale", "nan"], "guidance_scale nan"),
    "bad seed": (["+", "--seed", "-5"], "seed -5"),
    "bad fps": (["+", "--fps", "0"], "fps 0"),
    "bad segments": (["+", "--segment-blocks", "0"], "segment_blocks 0"),
    "bad neighbors": (["+", "--neighbor-blocks", "-1"], "neighbor_blocks -1"),
    "bad positions": (["+", "--rope-positions", "spiral"], "rope_positions 'spiral'"),
    "bad encode": (["+", "--encode", "never"], "encode 'never'"),
    "long prompt": (["+", "--prompt", "x" * 10_001], "10000"),
    "bad codec": (["+", "--codec", "mpeg1"], "mpeg1"),
    "bad depth": (["+", "--bit-depth", "9"], "bit_depth 9"),
    "bad crf": (["+", "--crf", "99"], "crf 99"),
    "bad dtype": (["+", "--dtype", "int3"], "int3"),
    "bad device": (["+", "--device", "toaster"], "toaster"),
    "absent device": (["+", "--device", "cuda:97"], "cuda:97"),
    "bad threads": (["+", "--threads", "0"], "threads 0"),
    "no such folder": (["+", "--output", "gone/clip.mp4"], "does not exist"),
    "wrong ending": (["+", "--output", "clip.doc"], "doc"),
    "no such model": (["+", "--model", "gone"], "no weights"),
    "a model without weights": (["+", "--model", "."], "model_index.json"),
    "no such lora": (["+", "--lora", "gone.safetensors:0.5"], "gone.safetensors"),
    "a word for a weight": (["+", "--lora", "notes.txt:much"], "much"),
    "no such motion": (["+", "--motion", "gone.mp4"], "gone.mp4"),
    "a text for motion": (["+", "--motion", "notes.txt"], "notes.txt"),
    "resume nothing": (["resume", "gone.job"], "does not exist"),
    "resume a folder": (["resume", "."], "not a job"),
    "info of nothing": (["info", "gone.mp4"], "gone.mp4"),
    "info of a photo": (["info", "photo.png"], "photo.png"),
    "rerun nothing": (["rerun", "gone.mp4"], "gone.mp4"),
    "plan nonsense": (["plan", "--size", "nonsense"], "nonsense"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line_before_anything_is_made(here: Path, weights: Path, name: str) -> None:
    (here / "notes.txt").write_text("not a picture")
    arguments, says = BAD[name]
    if arguments[0] == "+":
        given = ["generate", "--image", "photo.png", *BASE, "--model", str(weights)]
        if "--duration" not in arguments and arguments[1] in given:
            place = given.index(arguments[1])
            del given[place : place + 2]
        arguments = [*given, *arguments[1:]]
    assert_refused(run(*arguments), 2, re.escape(says))
    assert sorted(path.name for path in here.iterdir()) == ["notes.txt", "photo.png"]


def test_generate_info_rerun(here: Path, weights: Path) -> None:
    result = generate(weights)
    assert result.exit_code == 0, result.stderr
    name = f"photo_7_128x64_{FRAMES}f.mp4"
    assert result.stdout == name + "\n"
    assert sorted(path.name for path in here.iterdir()) == ["photo.png", name]
    facts = media.probe(name)
    assert (facts.frames, str(facts.size), facts.fps) == (FRAMES, "128x64", 15)

    record = json.loads(run("info", name, "--json").stdout)
    assert record["request"]["prompt"] == "slow pan left" and record["photo"] == "photo.png"
    assert record["model_hashes"] and record["versions"]["torch"] == torch.__version__
    assert str(here) not in json.dumps(record) and str(weights.parent) not in json.dumps(record)
    assert "slow pan left" in run("info", name).stdout

    (here / "photo.png").rename(here / "renamed.png")
    again = run("rerun", name, "--output", "again.mp4", "--model", str(weights))
    assert again.exit_code == 0, again.stderr
    assert "not as before" not in again.stderr
    assert torch.equal(frames("again.mp4"), frames(name))

    (here / "renamed.png").rename(here / "renamed.txt")
    assert_refused(run("rerun", name, "--model", str(weights)), 2, "--image")
    Image.new("RGB", (64, 64)).save("other.png")
    assert_refused(run("rerun", name, "--image", "other.png", "--model", str(weights)), 2, "other.png is not the photo")


def test_evaluate_finds_the_photo_and_the_segments(here: Path, weights: Path) -> None:
    assert generate(weights, "--output", "clip.mp4").exit_code == 0
    result = run("evaluate", "clip.mp4", "--json", "found.json")
    assert result.exit_code == 0, result.stderr
    clip = json.loads((here / "found.json").read_text())["clips"][0]
    assert (clip["photo"], clip["segment_frames"], clip["frames"]) == ("photo.png", 12, FRAMES)
    assert 5 < clip["first_frame"]["psnr"] < 60 and len(clip["series"]["change"]) == FRAMES - 1
    (here / "photo.png").rename(here / "photo.txt")
    assert_refused(run("evaluate", "clip.mp4"), 2, "--image")


def test_output_names_json_and_quiet(here: Path, weights: Path) -> None:
    (here / "clip.mp4").write_text("precious")
    (here / "out").mkdir()
    first = generate(weights, "--output", "clip.mp4", "--json", "--no-metadata")
    events = [json.loads(line) for line in first.stdout.splitlines()]
    fields = {field.name for field in dataclasses.fields(Event)}
    assert all(set(event) == fields for event in events) and first.stderr == ""
    assert events[-1]["type"] == "completed" and events[-1]["message"] == "clip_0001.mp4"
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    assert (here / "clip.mp4").read_text() == "precious"
    assert_refused(run("info", "clip_0001.mp4"), 2, "no swifti2v metadata")
    second = generate(weights, "--output", "out", "--quiet")
    assert (second.stdout, second.stderr) == ("", "")
    assert [path.suffix for path in (here / "out").iterdir()] == [".mp4"]
    assert generate(weights, "--output", "stills.png", "--quiet").exit_code == 0
    assert len(list((here / "stills").glob("*.png"))) == FRAMES
    assert not list(here.rglob("*.job")) and not list(here.rglob("*part*"))


class Stop:
    """An ``emit`` that fails at the n-th event: Ctrl-C, or an error, wherever the run is then."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def __call__(self, event: Event) -> None:
        if self.left == 0:
            raise self.error("stopped here")
        self.left -= 1


def test_interrupted_anywhere_and_resumed(here: Path, weights: Path) -> None:
    assert generate(weights, "--output", "whole.mp4").exit_code == 0
    expected = frames("whole.mp4")
    options = cli.Options(
        image="photo.png", prompt="slow pan left", preset="tiny-nano", size="128x64", num_frames=FRAMES,
        model=str(weights), seed=7, output="clip.mp4", dtype="float32",
    )  # fmt: skip
    resumed = 0
    for after in (0, *range(3, 100, 4)):
        error = (KeyboardInterrupt, MemoryError, RuntimeError)[after % 3]
        try:
            produce.start(order.prepare(options), Stop(after, error))
            break  # fewer events than that: the clip is done
        except (KeyboardInterrupt, RuntimeError, MemoryError) as stopped:
            message = str(stopped)
        job = here / "clip.job"
        if (here / "clip.mp4").exists():
            assert not job.exists()
            break  # it was the last event, which tells of the finished file
        assert job.exists() == ("resume with: swifti2v resume clip.job" in message)
        if job.exists():
            result = run("resume", "clip.job")
            assert result.exit_code == 0, result.stderr
            assert torch.equal(frames("clip.mp4"), expected)
            resumed += 1
            (here / "clip.mp4").unlink()
        assert sorted(path.name for path in here.iterdir()) == ["photo.png", "whole.mp4"]
    assert resumed >= 2


def test_preview_then_resume(here: Path, weights: Path) -> None:
    assert generate(weights, "--output", "whole.mp4").exit_code == 0
    result = generate(weights, "--output", "clip.mp4", "--preview")
    assert result.exit_code == 0 and "resume clip.job" in result.stderr, result.stderr
    assert result.stdout == "clip_preview.mp4\n" and str(media.probe("clip_preview.mp4").size) == "32x16"
    assert run("resume", "clip.job").exit_code == 0
    assert torch.equal(frames("clip.mp4"), frames("whole.mp4")) and not (here / "clip.job").exists()


def test_motion_from_a_file(here: Path, weights: Path) -> None:
    """A video in place of stage I; its length and rate are the clip's unless others are asked for."""
    low = torch.linspace(-1, 1, 32 * 16 * 20).reshape(1, 1, 20, 16, 32).expand(1, 3, -1, -1, -1)
    media.write_video("low.mp4", [low], fps=12)
    base = [
        "generate",
        "--image",
        "photo.png",
        *BASE[:6],
        "--model",
        str(weights),
        "--seed",
        "1",
        "--motion",
        "low.mp4",
    ]
    assert run(*base, "--output", "clip.mp4").exit_code == 0
    assert (media.probe("clip.mp4").frames, media.probe("clip.mp4").fps) == (17, 12)
    assert_refused(run(*base, "--num-frames", "33"), 2, "--motion has 17 frames, 33 are asked for")


def test_resume_restores_or_refuses(here: Path, weights: Path) -> None:
    copy = shutil.copytree(weights, here / "weights")
    assert generate(copy, "--output", "clip.mp4", "--keep-job").exit_code == 0
    assert run("resume", "clip.job").stdout == "clip_0001.mp4\n"
    assert torch.equal(frames("clip_0001.mp4"), frames("clip.mp4"))
    assert json.loads(run("info", "clip_0001.mp4", "--json").stdout)["settings"]["dtype"] == "float32"
    copy.rename(here / "moved")
    assert_refused(run("resume", "clip.job"), 2, "no weights")
    assert run("resume", "clip.job", "--model", "moved").exit_code == 0
    copy = here / "moved"
    text = (copy / "transformer/config.json").read_text()
    (copy / "transformer/config.json").write_text(text + "\n")
    assert_refused(run("resume", "clip.job"), 2, "transformer/config.json was .* use --force")
    forced = run("resume", "clip.job", "--force")
    assert forced.exit_code == 0 and "not as before: transformer/config.json" in forced.stderr


def test_broken_weights_fail_in_one_line_and_leave_nothing(here: Path, weights: Path) -> None:
    stage_two = "transformer_2/diffusion_pytorch_model.safetensors"
    for name, code in ((stage_two, 1), ("model_index.json", 1), ("vae/config.json", 2)):
        copy = shutil.copytree(weights, here / "broken")
        os.truncate(copy / name, (copy / name).stat().st_size // 2)
        assert_refused(generate(copy), code, "cannot load the model|unusable config.json")
        shutil.rmtree(copy)
        assert sorted(path.name for path in here.iterdir()) == ["photo.png"]


def test_killed_for_real(here: Path, weights: Path) -> None:
    """kill -9, then Ctrl-C, then to the end: as real processes; the same frames as in one go."""
    assert generate(weights, "--output", "whole.mp4", "--num-inference-steps-2", "40", "--threads", "1").exit_code == 0
    more = ["--model", str(weights), "--seed", "7", "--num-inference-steps-2", "40", "--threads", "1"]
    more += ["--output", "clip.mp4"]
    process = start_process("generate", "--image", "photo.png", *BASE, *more)
    assert wait_for(here / "clip.job/segments/0000.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert media.probe("clip.part.mp4").frames >= 1
    process = start_process("resume", "clip.job")
    assert wait_for(here / "clip.job/segments/0001.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; resume with: swifti2v resume clip.job"
    assert run("resume", "clip.job").exit_code == 0
    assert torch.equal(frames("clip.mp4"), frames("whole.mp4"))
    assert sorted(path.name for path in here.iterdir()) == ["clip.mp4", "photo.png", "whole.mp4"]


def start_process(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "swifti2v", *arguments]

    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores them, and so would its children

    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=hear_interrupts
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> bool:
    while process.poll() is None:
        if path.exists():
            return True
        time.sleep(0.002)
    raise AssertionError(f"ended without {path.name}: {process.communicate()[1]}")


def test_find_photo_stays_in_its_folders(here: Path) -> None:
    secret = here / "elsewhere/photo.png"
    secret.parent.mkdir()
    (here / "photo.png").rename(secret)
    digest = media.read_image(secret).sha256
    request = Request(preset="nano", prompt="", width=64, height=64, num_frames=5, seed=0, image_sha256=digest)
    wanted = origin.Origin(request=request, photo="elsewhere/photo.png")
    with pytest.raises(ValueError, match="--image"):
        origin.find_photo(wanted, [here])
    assert origin.find_photo(wanted, [here, secret.parent]) == secret


def test_plan_models_doctor(here: Path, weights: Path) -> None:
    model = ["--preset", "tiny-nano", "--model", str(weights)]
    for more in ([], ["--image", "photo.png"], ["--size", "640x384", "--num-frames", "9"]):
        assert run("plan", *model, *more).stdout.count("\n") > 3
    assert json.loads(run("plan", "--preset", "wan", "--json").stdout)["flops"] > 1e15
    assert generate(weights, "--dry-run").exit_code == 0 and [path.name for path in here.iterdir()] == ["photo.png"]
    listed = json.loads(run("models", "list", "--json").stdout)
    assert [row["preset"] for row in listed] == ["nano", "wan", "wan-refine", "mobile", "mobile-nano"]
    checks = json.loads(run("doctor", "--quick", "--json").stdout)
    assert {"torch", "h264", "conv3d", "disk free here"} <= {row["check"] for row in checks}
