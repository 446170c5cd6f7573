"""Lists read as DiffSynth writes them, checked at the door; nothing skipped in silence; windows inside shots."""

from __future__ import annotations

import csv
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from films import film
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.core import Grid, Lattice, Size, UsageError
from swifti2v.train.data import upscale
from swifti2v.train.manifest import Buckets, Cutting, ManifestSource, plan_samples, read_manifest
from swifti2v.train.shots import Shot

GRID = Grid(Lattice(16, 2, 48), Lattice(16, 2, 48), scale=2)
BUCKETS = Buckets((Size(64, 48), Size(48, 64), Size(64, 64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("manifest")
    film(made / "film.mp4", (12, 3, 11))
    film(made / "wide.mp4", (9,), height=64, width=160)
    film(made / "small.mp4", (9,), height=32, width=32)
    (made / "broken.mp4").write_bytes((made / "film.mp4").read_bytes()[:2000])
    noise = torch.randint(0, 255, (120, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.numpy()).save(made / "photo.png")
    return made


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_three_formats_say_the_same(folder: Path) -> None:
    rows = [
        {"video": "film.mp4", "prompt": 'a, "b"\nc', "fancy": "7"},
        {"video": "wide.mp4", "prompt": "", "fancy": ""},
    ]
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "m.json").write_text(json.dumps(rows))
    lists = [read_manifest(path) for path in (write_csv(folder / "m.csv", rows), folder / "m.jsonl", folder / "m.json")]
    assert lists[0] == lists[1] == lists[2]
    assert lists[0][0].path == folder / "film.mp4" and lists[0][0].extra == {"fancy": "7"}


def test_clips_jsonl_is_a_manifest_too(folder: Path) -> None:
    rows = [{"path": "film.mp4", "start": 2, "end": 11, "kind": "real", "split": s} for s in ("train", "held_out")]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (entry,) = read_manifest(folder / "clips.jsonl", "held_out")
    assert entry.shot == Shot(2, 11) and entry.kind == "real" and not entry.is_photo
    with pytest.raises(UsageError, match="held_out, train"):
        read_manifest(folder / "clips.jsonl", "test")


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "lists nothing"), ('{"prompt": "x"}', "row 1 names no file"), ("{", "not a readable list"), ("[]", "objects"),
     ('{"video": "a.mp4", "start": 5, "end": 5}', "no frames"), ('{"video": "a.mp4", "end": "x"}', "no frames")],
)  # fmt: skip
def test_lists_that_are_none_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UsageError, match=says):
        read_manifest(tmp_path / "m.jsonl")


def test_everything_left_out_is_in_the_report(folder: Path, tmp_path: Path) -> None:
    names = ("film.mp4", "broken.mp4", "missing.mp4", "small.mp4", "wide.mp4", "broken.mp4")
    entries = read_manifest(write_csv(folder / "all.csv", [{"video": name, "prompt": "p"} for name in names]))
    samples, report = plan_samples(entries, BUCKETS, Cutting(5))
    assert [(s.name, s.size) for s in samples] == [
        ("film.mp4@0", Size(64, 48)), ("film.mp4@5", Size(64, 48)), ("film.mp4@15", Size(64, 48)),
        ("film.mp4@20", Size(64, 48)), ("wide.mp4@0", Size(64, 48)),
    ]  # fmt: skip
    reasons = {(Path(skip.path).name, skip.reason.split(",")[0]) for skip in report.skipped}
    assert ("film.mp4", "shot 12-15 has 3 frames") in reasons
    assert {name for name, _ in reasons} == {"film.mp4", "broken.mp4", "missing.mp4", "small.mp4"}
    assert any("enlarged 2.00 times" in reason for _, reason in reasons)
    assert report.samples == 5 and len(report.skipped) == 5 and len(report.lines()) == 6
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["skipped"][0]["path"].endswith("film.mp4")


def test_shots_asked_for_are_cut_where_the_pixels_cut(folder: Path) -> None:
    (folder / "shots.jsonl").write_text(
        "\n".join(json.dumps({"video": "film.mp4", "start": a, "end": b}) for a, b in ((2, 26), (10, 99)))
    )
    samples, report = plan_samples(read_manifest(folder / "shots.jsonl"), BUCKETS, Cutting(9))
    assert [s.start for s in samples] == [2, 15]
    assert [skip.reason for skip in report.skipped] == [
        "shot 12-15 has 3 frames, 9 are needed", "frames 10 to 99 are asked for, 26 are there",
    ]  # fmt: skip


def test_samples_become_pixels_again_and_again(folder: Path) -> None:
    rows = [{"image": "photo.png", "video": "", "prompt": ""}, {"image": "", "video": "film.mp4", "prompt": "film"}]
    samples, _ = plan_samples(read_manifest(write_csv(folder / "both.csv", rows)), BUCKETS, Cutting(5, per_shot=1))
    source, again = ManifestSource(tuple(samples), 1), ManifestSource(tuple(samples), 1)
    assert [source.at(i).kind for i in range(3)] == ["photo", "film", "film"]
    for index in (2, 0, 1, 3):
        item = source.at(index)
        assert torch.equal(item.frames, again.at(index).frames) and item.size == samples[index % 3].size
    assert source.at(0).motion is not None and source.at(0).prompt and source.at(1).prompt == "film"


def test_a_motion_score_in_the_list_goes_with_its_clips(folder: Path) -> None:
    rows = [{"video": "film.mp4", "prompt": "", "motion_score": score} for score in ("3.5", "", "much", "-1")]
    listed = read_manifest(write_csv(folder / "scored.csv", rows))
    samples, report = plan_samples(listed, BUCKETS, Cutting(5, per_shot=1))
    source = ManifestSource(tuple(samples))
    assert sorted({str(source.at(i).motion_score) for i in range(len(samples))}) == ["3.5", "None"]
    reasons = [skip.reason for skip in report.skipped if "motion_score" in skip.reason]
    assert len(reasons) == 2 and "'much' is not a number" in " ".join(reasons)


def test_a_photo_is_filmed_as_its_prompt_says(folder: Path) -> None:
    rows = [{"image": "photo.png", "prompt": "pan right"}, {"image": "photo.png", "prompt": "static shot"}]
    samples, _ = plan_samples(read_manifest(write_csv(folder / "photos.csv", rows)), BUCKETS, Cutting(5))
    moved, still = (ManifestSource(tuple(samples)).at(i) for i in range(2))
    assert moved.motion is not None and moved.motion.pan > 0
    assert torch.equal(still.frames[:, 0], still.frames[:, 4]) and not torch.equal(
        moved.frames[:, 0], moved.frames[:, 4]
    )


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True), st.integers(0, 5), st.integers(1, 3),
       st.one_of(st.none(), st.integers(1, 12)), st.one_of(st.none(), st.integers(1, 3)))  # fmt: skip
def test_windows_never_cross_a_cut(cuts: list[int], k: int, step: int, hop: int | None, most: int | None) -> None:
    cutting = Cutting(4 * k + 1, hop, most)
    for start, end in pairwise(sorted({0, *cuts, 61})):
        shot = Shot(start, end)
        starts = cutting.starts(shot, step)
        assert all(start <= s and s + 4 * k * step < end for s in starts)
        assert bool(starts) == (shot.frames > 4 * k * step) and (most is None or len(starts) <= most)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.3, 3))
def test_buckets_fill_within_the_factor_and_nothing_nearer_would(width: int, height: int, most: float) -> None:
    buckets = Buckets.of(GRID, (320 * 192, 640 * 384), max_upscale=most)
    size = Size(width, height)
    assert all(GRID.is_legal(bucket) for bucket in buckets.sizes)
    fitting = [bucket for bucket in buckets.sizes if upscale(size, bucket) <= most]
    if not fitting:
        with pytest.raises(UsageError, match="enlarged"):
            buckets.of_clip(size)
        return
    chosen = buckets.of_clip(size)
    ratio = {b: max(b.aspect / size.aspect, size.aspect / b.aspect) for b in fitting}
    assert chosen in fitting and ratio[chosen] <= min(ratio.values()) * (1 + 1e-9)


def test_a_rate_is_reached_by_leaving_out_frames() -> None:
    assert [Cutting(5, fps=16).step(fps) for fps in (16, 24, 30, 50, 10)] == [1, 2, 2, 3, 1]
    for bad in ({"frames": 4}, {"frames": 5, "hop": 0}, {"frames": 5, "fps": 0.0}, {"frames": 5, "per_shot": 0}):
        with pytest.raises(UsageError):
            Cutting(**bad)  # type: ignore[arg-type]
    for sizes, most in (((), 1.0), ((Size(64, 64),), 0.0)):
        with pytest.raises(UsageError):
            Buckets(sizes, most)


def test_rows_in_any_order_give_the_same_samples(folder: Path) -> None:
    rows = [{"video": name, "prompt": name} for name in ("film.mp4", "wide.mp4", "broken.mp4")]
    one, _ = plan_samples(read_manifest(write_csv(folder / "o.csv", rows)), BUCKETS, Cutting(5))
    random.Random(0).shuffle(rows)
    two, _ = plan_samples(read_manifest(write_csv(folder / "o.csv", rows)), BUCKETS, Cutting(5))
    assert sorted(one, key=str) == sorted(two, key=str)
