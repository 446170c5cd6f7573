"""benchmarks/baselines.py at toy size: its line, its table, and that a method joins by being a function."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("baselines")


def test_tiny_records_resumes_and_sums_up(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.common, "RESULTS", tmp_path)

    def stays(low: torch.Tensor, photo: torch.Tensor) -> torch.Tensor:
        return photo[:, None].expand(-1, low.shape[1], -1, -1)

    methods = [
        script.Method("still", stays),
        script.Method("truth", lambda frames, photo: frames, oracle=True),
    ]
    script.main(["--tiny", "--record"], methods)
    lines = [json.loads(line) for line in (tmp_path / "baselines.jsonl").read_text().splitlines()]
    by_name = {line["settings"]["method"]: line["results"] for line in lines}
    assert list(by_name) == ["bicubic", "still", "truth"]
    assert by_name["truth"]["psnr"] == 100 and by_name["still"]["psnr"] < by_name["bicubic"]["psnr"] < 40
    assert by_name["bicubic"]["sharpness_db"] < -1 and len(by_name["bicubic"]["each"]["ssim"]) == 3
    assert lines[0]["command"].startswith("python benchmarks/baselines.py --tiny")

    with (tmp_path / "baselines.jsonl").open("a") as file:
        file.write('{"question": "cut sho')
    capsys.readouterr()
    script.main(["--tiny", "--record"], methods)
    assert capsys.readouterr().out == ""
    script.main(["--summary"])
    assert "| synthetic | bicubic | 1 | " in capsys.readouterr().out
    gap = script.paired(lines, "truth", "bicubic", "psnr")
    assert gap["clips"] == 1 and gap["mean"] > 60


def test_sizes_stay_inside_their_source(script: ModuleType) -> None:
    for source, expected in (((1280, 720), "1280x704"), ((640, 272), "640x256"), ((1920, 1080), "1280x704")):
        assert str(script.size_within(*source)) == expected
