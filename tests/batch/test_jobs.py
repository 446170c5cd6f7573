"""A jobs file is checked whole before anything starts, and its state refuses what no longer fits it. No worker runs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from clips import SAID, furnish, write_jobs
from typer.testing import CliRunner

from swifti2v import cli
from swifti2v.batch.command import places_of
from swifti2v.batch.planning import Batch, plan_batch
from swifti2v.batch.state import LEDGER, Held, Record, State
from swifti2v.batch.words import Capacity
from swifti2v.core import UsageError
from swifti2v.options import BatchOptions


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("batch"))


@pytest.fixture
def here(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the photo; elsewhere than the current folder, so that paths must be the file's own."""
    (tmp_path / "jobs").mkdir()
    for name in ("photo.png", "weights"):
        (tmp_path / "jobs" / name).symlink_to(furnished / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "jobs"


def planned(jobs: Path) -> Batch:
    with State(jobs) as state:
        return plan_batch(jobs, state, str(jobs.parent / "weights"))


def refusal(jobs: Path) -> str:
    with pytest.raises(UsageError) as refused:
        planned(jobs)
    return str(refused.value)


def test_every_bad_line_is_named_at_once_and_nothing_is_planned(here: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ({"sead": 1}, "did you mean seed"),
        ({"seed": "1"}, "seed '1': .*integer"),
        ({"seed": True}, "seed True"),
        ({"threads": 2}, "threads is not a line's to say: give --workers"),
        ({"preview": True}, "preview"),
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"seed": 1, "seed": 2}', "twice"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": None}, "--image is missing"),
        ({"size": "0x64"}, "not positive"),
        ({"preset": "tiny"}, "preset 'tiny' is not known"),
        ({"output": "no/such/folder/c.mp4"}, "does not exist"),
        ({"codec": "vp9"}, "vp9"),
        ({"fps": float("nan")}, "fps"),
        ({"lora": ["x.safetensors"]}, "LoRA"),
    ]
    jobs = write_jobs(here, {"seed": 1, "output": "good.mp4"}, *(line for line, _ in bad))
    told = refusal(jobs)
    said = dict(re.findall(r"line (\d+): (.*?)(?=; line \d+: |$)", told))
    assert said.keys() == {str(number) for number in range(2, 2 + len(bad))}
    for number, (_, reason) in enumerate(bad, 2):
        assert re.search(reason, said[str(number)]), (number, reason, told)
    assert not (here / "jobs.state" / LEDGER).exists() and not list(here.glob("*.mp4"))


def test_errors_are_bounded(here: Path) -> None:
    told = refusal(write_jobs(here, *("{" + "x" * 5000 for _ in range(500))))
    assert len(told) < 8000 and told.endswith("and 480 more lines")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{}\n"])
def test_files_that_are_none(here: Path, content: bytes) -> None:
    (here / "jobs.jsonl").write_bytes(content)
    assert re.search("has no jobs|line 1: is not JSON", refusal(here / "jobs.jsonl"))


def test_two_lines_with_one_name_are_refused(here: Path) -> None:
    (here / "sub").mkdir()
    jobs = write_jobs(here, {"output": "a.mp4"}, {"output": "sub/../a.mp4"}, {"output": "a.m4v"}, {"output": "b.mp4"})
    told = refusal(jobs)
    assert "line 2: output a.mp4 is that of line 1 too" in told and "line 3: output a.m4v" in told
    assert "line 4" not in told


@pytest.mark.parametrize("name", ["c.mp4", "c.job", "c.part.mp4"])
def test_what_lies_there_is_not_overwritten(here: Path, name: str) -> None:
    (here / name).touch()
    assert f"{name} exists and is not this batch's" in refusal(write_jobs(here, {"output": "c.mp4"}))


def test_names_and_seeds_are_drawn_once(here: Path) -> None:
    jobs = write_jobs(here, {}, {"seed": 3}, {"output": "sub"}, {"output": "d.mp4", "seed": 4})
    (here / "sub").mkdir()
    first = planned(jobs)
    assert [clip.target.name for clip in first.clips[1:2]] == ["photo_0002_3_128x64_25f.mp4"]
    assert first.clips[2].target.parent == here / "sub"
    assert all(clip.options.seed == clip.request.seed for clip in first.clips)
    assert all(Path(clip.options.image or "").is_absolute() for clip in first.clips)
    second = planned(jobs)
    assert [clip.request for clip in second.clips] == [clip.request for clip in first.clips]
    assert [clip.target for clip in second.clips] == [clip.target for clip in first.clips]
    assert all(clip.staged for clip in first.clips)


def test_a_changed_line_is_refused_and_an_added_one_is_planned(here: Path) -> None:
    planned(write_jobs(here, {"seed": 1, "output": "a.mp4"}))
    jobs = write_jobs(here, {"seed": 2, "output": "a.mp4"}, {"seed": 2, "output": "b.mp4"})
    assert "line 1: is not what it was when it was planned: seed was 1, is 2" in refusal(jobs)
    jobs = write_jobs(here, {"seed": 1, "output": "a.mp4"}, {"seed": 2, "output": "b.mp4"})
    assert [clip.line for clip in planned(jobs).clips] == [1, 2]
    batch = planned(write_jobs(here, {"seed": 1, "output": "a.mp4"}))
    assert "line 2 is no longer in jobs.jsonl" in batch.notices[0]
    (here / "photo.png").unlink()
    photo = furnish_photo(here)
    assert "image_sha256 was" in refusal(jobs) and photo.exists()


def furnish_photo(here: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (300, 180), "red").save(here / "photo.png")
    return here / "photo.png"


def test_what_was_made_is_left_alone_while_it_is_there(here: Path) -> None:
    jobs = write_jobs(here, {"seed": 1, "output": "a.mp4"}, {"seed": 2, "output": "b.mp4"})
    planned(jobs)
    with State(jobs) as state:
        state.append(Record(what="begun", line=1, attempt=1, held=Held()))
        state.append(Record(what="made", line=1, attempt=1, output="a.mp4"))
    assert planned(jobs).there == ()
    (here / "a.mp4").touch()
    batch = planned(jobs)
    assert batch.there == (1,) and [clip.line for clip in batch.clips] == [2]


def test_the_ledger_survives_a_torn_line_and_refuses_damage(here: Path) -> None:
    jobs = write_jobs(here, {"output": "a.mp4"})
    seed = planned(jobs).clips[0].request.seed
    path = here / "jobs.state" / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"what":"begun","li')
    assert planned(jobs).clips[0].request.seed == seed
    assert path.read_bytes() == whole
    path.write_bytes(b"nonsense\n" + whole)
    assert "damaged in line 1" in refusal(jobs)


def test_two_runs_at_once_are_refused(here: Path) -> None:
    jobs = write_jobs(here, {"output": "a.mp4"})
    with State(jobs), pytest.raises(UsageError, match=r"batch jobs.state is in use by another swifti2v process"):
        State(jobs)
    State(jobs).close()


# --- what the command can be told ---------------------------------------------------------------------------------


def test_places() -> None:
    two = Capacity(cpus=8, gpus=0, cpus_each=8)
    assert [(p.device, p.threads, p.stage) for p in places_of(BatchOptions("j", workers=2), two)] == [
        ("cpu", 4, "whole")
    ] * 2
    staged = places_of(BatchOptions("j", stage_workers="1,2"), two)
    assert [(p.stage, p.threads) for p in staged] == [("motion", 2), ("rest", 2), ("rest", 2)]
    gpus = Capacity(cpus=8, gpus=4, cpus_each=8)
    cluster = Capacity(cpus=24, gpus=0, cpus_each=4)
    assert [p.threads for p in places_of(BatchOptions("j", engine="ray", workers=3), cluster)] == [4, 4, 4]
    assert [p.device for p in places_of(BatchOptions("j"), gpus)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [p.device for p in places_of(BatchOptions("j", engine="ray"), gpus)] == ["cuda"] * 4
    assert [p.device for p in places_of(BatchOptions("j", devices="cpu"), gpus)] == ["cpu"]
    with pytest.raises(UsageError, match="5 workers are more than the 4 devices; ask for 4"):
        places_of(BatchOptions("j", workers=5), gpus)
    with pytest.raises(UsageError, match="9 workers are more than the 8 CPUs that Ray has"):
        places_of(BatchOptions("j", engine="ray", workers=9), two)
    with pytest.raises(UsageError, match="cuda:77"):
        places_of(BatchOptions("j", devices="cuda:77"), gpus)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engine", "spark"], "engine 'spark' is not known; use local or ray"),
        (["--workers", "0"], "workers 0 is not between 1 and 1024"),
        (["--stage-workers", "3"], "stage workers '3' are not two numbers"),
        (["--stage-workers", "0,1"], "stage workers '0,1'"),
        (["--stage-workers", "1,1", "--workers", "2"], "both say how many"),
        (["--address", "here:1"], "use it with --engine ray"),
        (["--engine", "ray", "--devices", "cuda:0"], "--devices is for --engine local"),
        (["--attempts", "0"], "attempts 0"),
        ([], "does not exist"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], reason: str) -> None:
    done = CliRunner().invoke(cli.app, ["batch", str(tmp_path / "none.jsonl"), *arguments])
    assert done.exit_code == 2 and reason in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ray_missing_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    jobs = write_jobs(here, {"output": "a.mp4"})
    arguments = ["batch", str(jobs), "--engine", "ray", "--model", str(here / "weights")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and 'pip install "swifti2v[ray]"' in done.stderr
    assert not os.path.exists(here / "a.job")


def test_a_finished_batch_says_so_without_workers(here: Path) -> None:
    jobs = write_jobs(here, {"seed": 1, "output": "a.mp4"})
    planned(jobs)
    with State(jobs) as state:
        state.append(Record(what="made", line=1, attempt=1, output="a.mp4"))
    (here / "a.mp4").touch()
    done = CliRunner().invoke(cli.app, ["batch", str(jobs), "--model", str(here / "weights")])
    assert done.exit_code == 0 and done.stdout == "1 made, 0 failed\n"
    assert json.loads(jobs.read_text())["preset"] == SAID["preset"]
