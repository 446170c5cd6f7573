"""Shards of latents: the same bytes however the job was interrupted or shared out, read back by number."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.camera import Motion
from swifti2v.core import RunError, UsageError
from swifti2v.train.data import Clip
from swifti2v.train.shards import Plan, ShardSource, Worker, places, read_clip, write_shards

PLAN = Plan(11, 3, "float16", {"vae": "abc"})


def clip(number: int) -> Clip:
    """A clip of one of two shapes, a function of its number."""
    height = 2 + number % 2
    clean, reference = torch.randn(2, 4, 3, height, 2, generator=torch.Generator().manual_seed(number))
    text = torch.full((2, 3), float(number)) if number % 3 else None
    transition = clean + 1 if number % 4 == 1 else None
    motion = Motion(pan=0.1, zoom=1.2) if number % 2 else None
    return Clip(
        clean.half().float(), reference.half().float(), transition, text, f"ä {number}", f"n{number}", "film", motion
    )


def damaged(number: int) -> Clip:
    if number in (2, 4):
        raise UsageError(f"file {number} is damaged")
    return clip(number)


class Calls:
    """Counts what is made, and dies at a given call."""

    def __init__(self, dies_at: int = -1) -> None:
        self.made: list[int] = []
        self.dies_at = dies_at

    def __call__(self, number: int) -> Clip:
        self.made.append(number)
        if len(self.made) == self.dies_at:
            raise KeyboardInterrupt
        return clip(number)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "whole"
    assert write_shards(folder, PLAN, clip).samples == 11
    return folder


def equal(a: Clip, b: Clip) -> bool:
    same = all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y.half().float()))
        for x, y in ((a.clean, b.clean), (a.reference, b.reference), (a.transition, b.transition), (a.text, b.text))
    )
    return same and (a.prompt, a.name, a.kind, a.motion) == (b.prompt, b.name, b.kind, b.motion)


def test_clips_come_back_as_they_were(whole: Path) -> None:
    held = places(whole)
    assert len(held) == 11 and all(equal(read_clip(whole, place), clip(i)) for i, place in enumerate(held))


@pytest.mark.parametrize("dies_at", [1, 3, 5, 11])
def test_an_interrupted_job_goes_on_and_ends_with_the_same_bytes(whole: Path, tmp_path: Path, dies_at: int) -> None:
    first, second = Calls(dies_at), Calls()
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", PLAN, first)
    write_shards(tmp_path / "s", PLAN, second)
    assert contents(tmp_path / "s") == contents(whole)
    twice = set(first.made) & set(second.made)
    assert len({number // PLAN.per_shard for number in twice}) == 1  # only the shard in progress
    write_shards(tmp_path / "s", PLAN, third := Calls())
    assert third.made == []


def stuck(number: int) -> Clip:
    if number == 4:
        time.sleep(600)
    return clip(number)


def test_a_killed_process_leaves_a_job_that_goes_on(whole: Path, tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=write_shards, args=(tmp_path / "s", PLAN, stuck))
    child.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob(".shard-00001.tar.*.tmp")):
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    assert any(name.endswith(".tmp") for name in contents(tmp_path / "s"))
    write_shards(tmp_path / "s", PLAN, calls := Calls())
    assert contents(tmp_path / "s") == contents(whole) and min(calls.made) == 3


def test_workers_share_the_shards(whole: Path, tmp_path: Path) -> None:
    made = []
    for number in (2, 0, 1):
        calls = Calls()
        write_shards(tmp_path / "s", PLAN, calls, worker=Worker(number, 3))
        made += calls.made
        if number != 1:
            with pytest.raises(UsageError, match="not made yet"):
                places(tmp_path / "s")
    assert sorted(made) == list(range(11)) and contents(tmp_path / "s") == contents(whole)


def test_damaged_samples_are_skipped_and_reported(tmp_path: Path) -> None:
    report = write_shards(tmp_path / "s", PLAN, damaged)
    assert report.samples == 9 and [skip.reason for skip in report.skipped] == [
        "file 2 is damaged",
        "file 4 is damaged",
    ]
    assert len(json.loads((tmp_path / "s" / "report.json").read_text())["skipped"]) == 2
    assert [place.key for place in places(tmp_path / "s")][:3] == ["00000000", "00000001", "00000003"]


def test_other_settings_and_other_folders_are_refused(whole: Path, tmp_path: Path) -> None:
    for plan, says in (
        (Plan(11, 3, "float16", {"vae": "xyz"}), "vae 'abc', now 'xyz'"),
        (Plan(11, 4, "float16", {"vae": "abc"}), "per_shard 3, now 4"),
    ):
        with pytest.raises(UsageError, match=says):
            write_shards(whole, plan, clip)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write_shards(tmp_path, PLAN, clip)
    with pytest.raises(UsageError, match="holds no shards"):
        ShardSource(tmp_path)


def test_bad_plans_and_workers_are_refused() -> None:
    for make in (lambda: Plan(0), lambda: Plan(3, 0), lambda: Plan(3, dtype="int8"), lambda: Worker(3, 3)):
        with pytest.raises(UsageError):
            make()


def test_damage_is_noticed_and_overflow_too(whole: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", PLAN, clip)
    tar = tmp_path / "s" / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[places(tmp_path / "s")[4].offset + 400] ^= 1
    tar.write_bytes(data)
    with pytest.raises(RunError, match="00000004 is damaged"):
        read_clip(tmp_path / "s", places(tmp_path / "s")[4])
    huge = Clip(torch.full((1, 1, 1, 1), 1e6), torch.zeros(1, 1, 1, 1), None, None, "", "huge", "film")
    with pytest.raises(RunError, match="not finite"):
        write_shards(tmp_path / "t", Plan(1), lambda number: huge)


@given(st.integers(0, 5), st.integers(0, 60))
def test_every_clip_comes_once_an_epoch_in_an_order_of_its_own(whole: Path, seed: int, index: int) -> None:
    source = ShardSource(whole, seed)
    names = [source.at(len(source) * (index // 11) + i).name for i in range(11)]
    assert sorted(names) == sorted(f"n{i}" for i in range(11))
    assert ShardSource(whole, seed).at(index).name == names[index % 11]


def test_epochs_and_seeds_differ(whole: Path) -> None:
    orders = [
        [ShardSource(whole, seed).at(11 * epoch + i).name for i in range(11)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_batches_have_one_shape(whole: Path, batch: int) -> None:
    source = ShardSource(whole, 3, batch=batch)
    assert len(source) == sum(n // batch * batch for n in (6, 5))
    for start in range(0, 2 * len(source), batch):
        assert len({source.at(start + i).clean.shape for i in range(batch)}) == 1
    with pytest.raises(UsageError, match="for a batch"):
        ShardSource(whole, batch=7)


def test_one_shape_can_be_asked_for(whole: Path) -> None:
    source = ShardSource(whole, shape=(4, 3, 2, 2))
    assert len(source) == 6 and source.at(0).clean.shape == (4, 3, 2, 2)
    with pytest.raises(UsageError):
        ShardSource(whole, shape=(9, 9, 9, 9))


def test_shards_are_ordinary_tars(whole: Path) -> None:
    with tarfile.open(whole / "shard-00003.tar") as tar:
        assert tar.getnames() == [f"{n:08d}.{e}" for n in (9, 10) for e in ("safetensors", "json")]
        meta = json.load(tar.extractfile("00000009.json"))  # type: ignore[arg-type]
    assert meta["name"] == "n9" and meta["prompt"] == "ä 9" and meta["shape"] == [4, 3, 3, 2]


def test_webdataset_reads_them(whole: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset([str(whole / f"shard-0000{i}.tar") for i in range(4)], shardshuffle=False))
    assert [item["__key__"] for item in found] == [f"{i:08d}" for i in range(11)]
    assert json.loads(found[3]["json"])["name"] == "n3" and len(found[3]["safetensors"]) == places(whole)[3].size
