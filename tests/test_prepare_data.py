"""scripts/prepare_data.py on little films: a list is checked, shards are made, go on where they stopped, and train."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("cv2")

from swifti2v.train.mobile import MobileShards
from swifti2v.train.recipe import Parts
from swifti2v.train.shards import ShardSource
from tests.train.films import film

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("prepare_data")


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    film(tmp_path / "a.mp4", (40,), height=80, width=144)
    film(tmp_path / "b.mp4", (5,), height=80, width=144)
    rows = [{"video": "a.mp4", "prompt": "pan left", "motion_score": 3.5}, {"video": "b.mp4", "prompt": "short"}]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    script.main()


def test_a_list_becomes_shards_that_mobile_trains_on(
    script: ModuleType,
    listing: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = ("shards", listing, "--out", tmp_path / "shards", "--preset", "tiny-mobile", "--area", 128 * 64)
    run(script, monkeypatch, *told, "--frames", 17)
    said = capsys.readouterr().out
    assert "has 5 frames, 17 are needed" in said  # b.mp4 is reported, not dropped in silence
    source = ShardSource(tmp_path / "shards")
    assert len(source) >= 1 and source.at(0).clean.shape[:2] == (8, 3) and source.at(0).motion_score == 3.5
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
    run(script, monkeypatch, *told, "--frames", 17)  # nothing is made twice
    assert files and {path: path.stat().st_mtime_ns for path in files} == files
    batch = MobileShards((tmp_path / "shards",), batch=1)(Parts({})).at(0)
    assert batch.motion_score is not None and batch.motion_score.tolist() == [3.5]


def test_a_list_is_checked_without_a_model(
    script: ModuleType, listing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, monkeypatch, "check", listing, "--preset", "tiny-mobile", "--area", 128 * 64, "--frames", 17)
    said = capsys.readouterr().out
    assert "2 samples, 1 skipped" in said and "has 5 frames, 17 are needed" in said
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "check", listing.parent / "none.jsonl")
