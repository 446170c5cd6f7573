"""The job directory survives being killed at any instant, and never hands out what was not stored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swifti2v import journal
from swifti2v.core import Request, RunError, UsageError
from swifti2v.journal import Job, Manifest

PHOTO = torch.rand(1, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def manifest(seed: int = 1) -> Manifest:
    request = Request(preset="nano", prompt="slow pan", width=64, height=64, num_frames=9, seed=seed)
    return Manifest(request=request, output="clip.mp4", settings={"dtype": "float32"})


def latents(number: int, count: int = 2) -> torch.Tensor:
    return torch.randn(1, 3, count, 4, 4, generator=torch.Generator().manual_seed(number))


def store(job: Job, number: int) -> None:
    job.save_segment(number, latents(number), [1 + 2 * number, 2 + 2 * number])


def test_what_is_stored_comes_back_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "clip.job"
    odd = torch.tensor([float("-0.0"), 1e-42, 3.4e38, 1 / 3]).reshape(1, 1, 1, 2, 2)
    with Job.create(folder, manifest(), PHOTO) as job:
        assert job.is_empty
        job.save_motion(0, odd, [1])
        job.save_motion(1, odd.bfloat16(), [2])
        store(job, 0)
        store(job, 1)
        assert not job.is_empty
    with Job.open(folder) as job:
        assert torch.equal(job.photo(), PHOTO)
        assert job.manifest.request == manifest().request and job.manifest.settings == {"dtype": "float32"}
        first, second = job.motion()
        assert torch.equal(first.view(torch.int32), odd.view(torch.int32)) and torch.equal(second, odd.bfloat16())
        assert [torch.equal(a, latents(n)) for n, a in enumerate(job.segments())] == [True, True]
        assert job.notices == []


def test_remove_leaves_nothing_of_ours_and_everything_else(tmp_path: Path) -> None:
    job = Job.create(tmp_path / "a.job", manifest(), PHOTO)
    store(job, 0)
    job.remove()
    assert list(tmp_path.iterdir()) == []
    job = Job.create(tmp_path / "b.job", manifest(), PHOTO)
    (tmp_path / "b.job/notes.txt").write_text("mine")
    job.remove()
    assert [path.name for path in (tmp_path / "b.job").iterdir()] == ["notes.txt"]


def test_create_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.job").mkdir()
    Job.create(tmp_path / "a.job", manifest(), PHOTO).close()
    with pytest.raises(UsageError, match=r"a\.job exists"):
        Job.create(tmp_path / "a.job", manifest(), PHOTO)
    (tmp_path / "b.job").mkdir()
    (tmp_path / "b.job/photo.safetensors").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match=r"b\.job exists"):
        Job.create(tmp_path / "b.job", manifest(), PHOTO)
    assert (tmp_path / "b.job/photo.safetensors").read_bytes() == b"somebody's"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make"):
        Job.create(tmp_path / "file/c.job", manifest(), PHOTO)


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "manifest.json").read_text())
        change(record)
        (folder / "manifest.json").write_text(json.dumps(record))

    return apply


BROKEN = {
    "does not exist": shutil.rmtree,
    "no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "version 99": damage(lambda record: record.update(schema_version=99, later={"field": 1})),
    "request.width": damage(lambda record: record["request"].update(width=-1)),
    "surprise": damage(lambda record: record.update(surprise=1)),
    "not a JSON object": lambda folder: (folder / "manifest.json").write_text("[]"),
    "damaged: manifest.json": lambda folder: os.truncate(folder / "manifest.json", 40),
    "codec": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "lost its photo": lambda folder: (folder / "photo.safetensors").unlink(),
    "not the photo": lambda folder: (folder / "photo.safetensors").write_bytes(b"other"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_open_refuses_in_one_line(tmp_path: Path, message: str) -> None:
    folder = tmp_path / "clip.job"
    Job.create(folder, manifest(), PHOTO).close()
    BROKEN[message](folder)
    with pytest.raises(UsageError, match=message) as caught:
        Job.open(folder)
    assert "\n" not in str(caught.value)


def test_a_job_in_use_is_refused_and_a_failed_open_gives_the_lock_back(tmp_path: Path) -> None:
    folder = tmp_path / "clip.job"
    with Job.create(folder, manifest(), PHOTO), pytest.raises(UsageError, match="in use"):
        Job.open(folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        Job.open(folder)
    (folder / "manifest.json").write_text(text)
    Job.open(folder).close()


def test_another_request_and_misplaced_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.job", tmp_path / "b.job"
    for folder, seed in ((a, 1), (b, 2)):
        with Job.create(folder, manifest(seed), PHOTO) as job:
            for number in range(3):
                store(job, number)
    shutil.copy(a / "segments/0002.safetensors", a / "segments/0001.safetensors")
    with Job.open(a) as job:
        assert len(job.segments()) == 1 and "out of place" in job.notices[0]
    shutil.copy(b / "segments/0001.safetensors", a / "segments/0001.safetensors")
    with pytest.raises(UsageError, match=r"segments/0001\.safetensors in a\.job belongs to another request"):
        Job.open(a)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_reported_and_never_used(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "clip.job"
    shutil.rmtree(folder, ignore_errors=True)
    with Job.create(folder, manifest(), PHOTO) as job:
        for number in range(3):
            store(job, number)
    victim = data.draw(st.integers(0, 2))
    path = folder / f"segments/{victim:04d}.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    try:
        job = Job.open(folder)
    except UsageError as error:
        assert "another request" in str(error)  # the bit was in the request's hash
        return
    with job:
        segments = job.segments()
        assert all(torch.equal(a, latents(n)) for n, a in enumerate(segments))
        if len(segments) < 3:
            assert len(segments) == victim and len(job.notices) == 1 and f"{victim:04d}" in job.notices[0]
        store(job, len(segments) if len(segments) < 3 else 2)
        assert len(job.segments()) == 3


def test_order_and_shape_are_checked(tmp_path: Path) -> None:
    with Job.create(tmp_path / "clip.job", manifest(), PHOTO) as job:
        with pytest.raises(ValueError, match="cannot be stored before 0"):
            store(job, 1)
        with pytest.raises(ValueError, match="of 3 blocks"):
            job.save_segment(0, latents(0), [1, 2, 3])
        with pytest.raises(ValueError, match="consecutive"):
            job.save_segment(0, latents(0), [1, 3])
        with pytest.raises(ValueError, match="request cannot change"):
            job.replace_manifest(manifest(seed=2))
        job.replace_manifest(manifest().model_copy(update={"model_hashes": {"vae": "00"}}))
    with Job.open(tmp_path / "clip.job") as job:
        assert job.manifest.model_hashes == {"vae": "00"}
    with pytest.raises(ValueError, match="closed"):
        store(job, 0)


def test_a_write_that_fails_is_one_line_and_keeps_the_job(tmp_path: Path) -> None:
    """A file size limit of the kernel, the nearest thing to a full disk that needs no rights."""
    import resource

    with Job.create(tmp_path / "clip.job", manifest(), PHOTO) as job:
        store(job, 0)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(RunError, match=r"cannot write 0001\.safetensors") as caught:
                store(job, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in (tmp_path / "clip.job/segments").iterdir()) == ["0000.safetensors"]
        store(job, 1)
        assert len(job.segments()) == 2


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        with Job.create(tmp_path / "clip.job", manifest(), PHOTO) as job:
            store(job, 0)
            with pytest.raises(RunError, match=r"cannot write 0001.safetensors \(0.8 MB\): the disk is full"):
                job.save_segment(1, torch.zeros(1, 2, 1, 316, 316), [3])
            assert len(job.segments()) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Snapshots:
    """Copies the folder before every call into C that the journal makes: all states a kill could leave."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.labels = source, target, list[str]()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "c_call" and (name == journal.__file__ or "pathlib" in name):
            self.take(getattr(argument, "__name__", "?"))

    def take(self, label: str) -> None:
        sys.setprofile(None)
        if self.source.exists():
            shutil.copytree(self.source, self.target / str(len(self.labels)))
            self.labels.append(label)
        sys.setprofile(self)


def whole_life(folder: Path) -> None:
    job = Job.create(folder, manifest(), PHOTO)
    job.save_motion(0, latents(10), [1, 2])
    job.save_motion(1, latents(11), [3, 4])
    store(job, 0)
    store(job, 1)
    job.remove()


def check_state(folder: Path, last: int) -> int:
    """What a new process sees after a kill: a whole job, or none (then a new one can start there).

    Returns how much is stored; -1: not yet born or already dead.
    """
    try:
        job = Job.open(folder)
    except UsageError as error:
        assert "no manifest.json" in str(error)
        Job.create(folder, manifest(), PHOTO).remove()
        assert not folder.exists()
        return -1
    with job:
        motion, segments = job.motion(), job.segments()
        assert all(torch.equal(a, latents(10 + n)) for n, a in enumerate(motion))
        assert all(torch.equal(a, latents(n)) for n, a in enumerate(segments))
        assert job.notices == [] and len(motion) + len(segments) >= last
        assert not [path for path in folder.rglob(".*.tmp")]
    return len(motion) + len(segments)


def test_killed_between_any_two_calls(tmp_path: Path) -> None:
    folder = tmp_path / "clip.job"
    snapshots = Snapshots(folder, tmp_path / "states")
    sys.setprofile(snapshots)
    try:
        whole_life(folder)
    finally:
        sys.setprofile(None)
    assert len(snapshots.labels) > 60 and not folder.exists()
    for name in ("open", "fsync", "replace"):
        assert snapshots.labels.count(name) >= 6
    seen = 0
    counts = []
    for index in range(len(snapshots.labels)):
        state = tmp_path / "states" / str(index)
        for stray in state.rglob(".*.tmp"):  # a write cut anywhere
            torn = tmp_path / "torn.job"
            for length in {0, 1, stray.stat().st_size // 2, max(0, stray.stat().st_size - 1)}:
                shutil.copytree(state, torn)
                os.truncate(torn / stray.relative_to(state), length)
                check_state(torn, seen)
                shutil.rmtree(torn, ignore_errors=True)
        count = check_state(state, seen if seen < 4 else -1)
        seen = max(seen, count)
        counts.append(count)
    assert {0, 1, 2, 3, 4, -1} == set(counts)


def test_killed_in_earnest(tmp_path: Path) -> None:
    """kill -9 of a writing process at random instants: at most the item being written is lost."""
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); import test_journal as t\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "job = t.Job.open(folder); n = len(job.segments())\n"
        "print('ready', flush=True)\n"
        "for number in range(n, n + 10**6): t.store(job, number); print(number, flush=True)\n"
    )
    folder = tmp_path / "clip.job"
    Job.create(folder, manifest(), PHOTO).close()
    before = 0
    for delay in (0.0, 0.004, 0.013):
        command = [sys.executable, "-c", script, str(folder), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match="in use"):
            Job.open(folder)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().splitlines()
        process.wait()
        with Job.open(folder) as job:
            segments = job.segments()
            assert job.notices == [] and all(torch.equal(a, latents(n)) for n, a in enumerate(segments))
        promised = int(told[-1]) + 1 if told and told[-1].isdigit() else before
        assert promised <= len(segments) <= promised + 1
        before = len(segments)
