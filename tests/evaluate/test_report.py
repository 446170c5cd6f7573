"""A made-up clip measured whole: table, JSON and picture, by function and by command line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from swifti2v import cli, media, motion_score
from swifti2v.camera import FAST_PAN, Motion
from swifti2v.core import Size, UsageError
from swifti2v.evaluate import perceptual, picture, report
from swifti2v.train.synthetic import make_scene, render

PHOTO = Path(__file__).parents[2] / "examples" / "photo.jpg"
SIZE = Size(128, 64)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    scene = make_scene(media.read_image(PHOTO).pixels, SIZE, Motion(pan=FAST_PAN), 80, random.Random(0))
    return render(scene, range(41))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: torch.Tensor) -> Path:
    """A folder with a clip, the same with seams, and their photo."""
    monkeypatch.chdir(tmp_path)
    media.write_video("good.mp4", [frames[None]], fps=15)
    media.write_video("seams.mp4", [with_seams(frames)[None]], fps=15)
    pixels = ((frames[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.png")
    return tmp_path


def with_seams(frames: torch.Tensor) -> torch.Tensor:
    """Every segment of 8 frames has a grain and a warmth of its own."""
    spoilt = frames.clone()
    for index in range(1, frames.shape[1]):
        segment = (index - 1) // 8
        grain = torch.randn(3, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(segment))
        spoilt[:, index] += 0.03 * grain + 0.03 * segment * torch.tensor([1.0, 0, -1]).view(3, 1, 1)
    return spoilt.clamp(-1, 1)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["evaluate", *arguments], catch_exceptions=False)


def test_good_and_spoilt_clips(frames: torch.Tensor) -> None:
    good = report.evaluate_clip(frames.unbind(1), frames[:, 0], segment_frames=8, reference=frames.unbind(1))
    assert (good.frames, good.size, good.first_frame.psnr, good.first_frame.ssim) == (41, SIZE, 100, 1)
    assert good.reference is not None and good.reference.psnr == 100
    assert len(good.series.change) == 40 and len(good.series.flicker) == 39 and len(good.stills) == 41
    spoilt = report.evaluate_clip(with_seams(frames).unbind(1), frames[:, 0], segment_frames=8)
    seams = {(signal, seam.against): seam for signal, seam in spoilt.seams}
    assert seams["detail", "block"].distinguishable and seams["detail", "block"].ratio > 1.5
    assert not any(seam.distinguishable for signal, seam in good.seams if signal != "warping")
    assert spoilt.color.change > good.color.change + 1
    if good.motion is not None:
        assert good.motion.code()[0] == pytest.approx(1, abs=0.1)
        assert good.followed_color is not None and good.followed_color.largest < 0.6


def test_what_is_missing_is_said(frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (perceptual, motion_score):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    scores = report.evaluate_clip(frames[:, :6].unbind(1), frames[:, 0])
    assert scores.first_frame.st_lpips is None and scores.motion is None and scores.seams == ()
    assert [text.split()[0] for text in scores.missing] == ["ST-LPIPS", "optical", "seams:"]
    assert json.loads(json.dumps(scores.record()))["camera"] is None
    assert picture.draw(scores, frames[:, 0], "a short clip").width == picture.WIDTH
    with pytest.raises(UsageError, match="128x64 where the photo was fitted to 96x64"):
        report.evaluate_clip(frames.unbind(1), frames[:, 0, :, :96])
    with pytest.raises(UsageError, match="no frames"):
        report.evaluate_clip([], frames[:, 0])


def test_one_clip_from_the_command_line(here: Path) -> None:
    told = ["good.mp4", "--image", "photo.png", "--segment-frames", "8", "--json", "out.json", "--picture", "out.png"]
    result = run(*told, "--reference", "good.mp4")
    assert result.exit_code == 0, result.stderr
    assert "frame 0, PSNR" in result.stdout and "reference, PSNR" in result.stdout
    record = json.loads((here / "out.json").read_text())
    assert record["clips"][0]["file"] == "good.mp4" and record["clips"][0]["frames"] == 41
    assert record["clips"][0]["first_frame"]["psnr"] > 35 and str(here) not in json.dumps(record)
    shown = np.asarray(Image.open("out.png"))
    assert shown.shape[1] == picture.WIDTH and shown.std() > 20
    again = run(*told)
    assert again.exit_code == 2 and "out.json exists and is not overwritten" in again.stderr
    assert run(*told, "--overwrite").exit_code == 0
    assert sorted(path.name for path in here.iterdir()) == [
        "good.mp4", "out.json", "out.png", "photo.png", "seams.mp4",
    ]  # fmt: skip


def test_a_folder_from_the_command_line(here: Path) -> None:
    result = run(".", "--image", "photo.png", "--segment-frames", "8", "--json", "all.json", "--picture", "pictures")
    assert result.exit_code == 0, result.stderr
    assert "worst" in result.stdout
    record = json.loads((here / "all.json").read_text())
    assert [clip["file"] for clip in record["clips"]] == ["good.mp4", "seams.mp4"]
    assert record["seams"][0]["count"] == 2 * record["clips"][0]["seams"][0]["count"]
    assert sorted(path.name for path in (here / "pictures").iterdir()) == ["good.png", "seams.png"]


BAD = {
    "no such clip": (["gone.mp4"], "gone.mp4: no such video file"),
    "an empty folder": (["empty"], "holds no video"),
    "a photo for a clip": (["photo.png", "--image", "photo.png"], "photo.png"),
    "a clip that tells nothing": (["good.mp4"], "give its photo with --image"),
    "no such photo": (["good.mp4", "--image", "gone.png"], "gone.png: no such image file"),
    "a clip for a photo": (["good.mp4", "--image", "good.mp4"], "good.mp4"),
    "odd segments": (["good.mp4", "--image", "photo.png", "--segment-frames", "10"], "nearest legal value: 8"),
    "no such reference": (["good.mp4", "--image", "photo.png", "--reference", "gone.mp4"], "gone.mp4"),
    "a reference for many": ([".", "--image", "photo.png", "--reference", "good.mp4"], "goes with one clip"),
    "JSON by another name": (["good.mp4", "--image", "photo.png", "--json", "out.txt"], "does not end in .json"),
    "nowhere to write": (["good.mp4", "--image", "photo.png", "--picture", "no/out.png"], "no does not exist"),
    "one picture of many": ([".", "--image", "photo.png", "--picture", "out.png"], "is no folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(here: Path, name: str) -> None:
    (here / "empty").mkdir()
    before = sorted(path.name for path in here.rglob("*"))
    arguments, says = BAD[name]
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert sorted(path.name for path in here.rglob("*")) == before


def test_refused_before_torch_is_loaded() -> None:
    script = (
        "import sys, swifti2v.cli as c\n"
        "try: c.main(['evaluate', 'gone.mp4'])\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'av', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()"
