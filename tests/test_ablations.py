"""benchmarks/ablations.py and scripts/train_ablations.py at toy size: lines, resuming, tables, fine-tunes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swifti2v.models.read_only import ReadOnlyTransformer
from swifti2v.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return {name: importlib.import_module(name) for name in ("ablations", "ablation_report", "train_ablations")}


class Photo:
    """One noisy training photo."""

    def pick(self, rng: Any) -> torch.Tensor:
        return torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scenes_and_fine_tunes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    module, pipeline = scripts["train_ablations"], tiny_pipeline("nano")
    base = tmp_path / "base"
    pipeline.transformer_2.save_pretrained(base)
    size = module.Size(128, 64)
    files = [module.scene_file(tmp_path / "scenes", number, Photo(), pipeline, size, 17) for number in range(3)]
    held = torch.load(files[0], weights_only=True)
    assert set(held) == {"clean", *module.TRANSITIONS}
    assert held["off"].shape[1] == 2 * held["clean"].shape[1] and held["clean"].shape[2] == 5
    assert not torch.equal(held["off"], held["0.625"]) and torch.equal(held["off"][:, :, 0], held["0.4"][:, :, 0])

    scenes = module.Scenes(tmp_path / "scenes", "0.4")
    batches = [scenes.at(index) for index in range(2)]
    assert {batch.context for batch in batches} == {1, 2} and all(len(batch.clean) == 3 for batch in batches)

    tuned = module.fine_tune("0.4", base, tmp_path, tmp_path / "none", steps=2)
    assert tuned == module.fine_tune("0.4", base, tmp_path, tmp_path / "none", steps=2)  # not trained again
    before, after = (module.network(folder).state_dict() for folder in (base, tuned))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    masked = module.network(base, read_only=True)
    assert isinstance(masked, ReadOnlyTransformer)
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items())


def test_tasks_are_fair_when_stopped_early(scripts: dict[str, ModuleType]) -> None:
    module = scripts["ablations"]
    clips = [module.Clip(f"{use}{n}", "film", use, 49, ()) for use in ("plain", "cascade", "long") for n in range(2)]
    made = module.tasks(clips)
    assert len({(t.clip.name, t.variant.name, t.seed, t.measures) for t in made}) == len(made)
    decoded = [task.variant.tier for task in made if task.measures == "frames" and task.seed == 0]
    assert decoded == sorted(decoded)
    kinds = [task.measures for task in made]
    assert "latents" not in kinds[kinds.index("frames") :]


def line(clip: str, variant: str, results: dict[str, Any], measures: str = "frames", use: str = "plain") -> dict:
    settings = {"clip": clip, "kind": "film", "use": use, "variant": variant, "seed": 0, "measures": measures}
    return {"settings": settings | {"stage_two": "s", "vae": "v"}, "results": results}


def test_tables(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    report, rows = scripts["ablation_report"], []
    for number in range(4):
        for variant, gain in (("default", 0.0), ("N=0", -1.0 - number / 10)):
            found = {"psnr": 30 + number + gain, "ssim": 0.9, "st_lpips": 0.1, "sharpness_db": 0.0}
            rows.append(line(f"c{number}", variant, {**found, "changes": [1.0 + k % 3 for k in range(48)]}))
            rows.append(line(f"c{number}", variant, {"latent_db": 15 + gain}, "latents"))
    document = tmp_path / "doc.md"
    document.write_text("Before.\n<!-- table: segments -->\nold\n<!-- end -->\nAfter.\n")
    report.report(rows, document)
    text = document.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert "| N=0 | 4 | -1.150* [" in text
    assert "| M=1 | 0 | - |" in text
    for name in ("absolute", "seams", "noise"):
        assert report.table(name, rows).startswith("|")
    assert "| 49 | default | 4 |" in report.table("seams", rows)
    with pytest.raises(SystemExit, match="no table 'colour'"):
        report.table("colour", rows)
    with pytest.raises(SystemExit, match="nothing is recorded"):
        report.report([], document)


def test_lines_of_another_checkpoint_do_not_count(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = scripts["ablations"], tmp_path / "ablations.jsonl"
    rows = [line("a", "default", {"psnr": 1.0}), line("a", "default", {"psnr": 2.0})]
    other = line("b", "default", {"psnr": 3.0})
    other["settings"]["stage_two"] = "another"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, other]) + '\n{"cut')
    monkeypatch.setattr(module, "sha256", lambda file: "s")
    found = module.newest(path, tmp_path)
    assert [row["results"]["psnr"] for row in found] == [2.0]
