"""Stages at once: the same bits, bounded waiting, no thread left behind, errors and cancelling as in turn."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swifti2v import presets
from swifti2v.core import Event, Request, RunError
from swifti2v.overlap import Lanes, recorded
from swifti2v.tiny import tiny_mobile, tiny_pipeline
from swifti2v.trace import Trace

NAMES = {"reference", "denoise", "decode"}


def lanes_alive() -> set[str]:
    return NAMES & {thread.name for thread in threading.enumerate()}


def request_for(pipeline: object, **fields: object) -> tuple[Tensor, Request]:
    told = {"size": "128x64", "num_frames": 33, "seed": 1} | fields
    request, _ = presets.resolve(pipeline.preset, prompt="slow pan left", **told)  # type: ignore[attr-defined]
    return torch.rand(1, 3, 1, request.height, request.width) * 2 - 1, request


@pytest.mark.parametrize(("family", "encode"), [("nano", "lazy"), ("nano", "ahead"), ("wan", "lazy")])
def test_the_same_bits_as_in_turn(family: str, encode: str) -> None:
    pipeline = tiny_pipeline(family)
    photo, request = request_for(pipeline, encode=encode)
    plain = [chunk.frames for chunk in pipeline.stream(photo, request)]
    at_once = [chunk.frames for chunk in pipeline.stream(photo, request, lanes=Lanes(overlap=True))]
    assert len(plain) == len(at_once) > 2
    assert all(torch.equal(a, b) for a, b in zip(plain, at_once, strict=True))
    assert not any(chunk.requires_grad for chunk in at_once)
    assert not lanes_alive()


@pytest.mark.parametrize("family", ["mobile", "mobile-nano"])
def test_one_stage_has_lanes_too(family: str) -> None:
    pipeline = tiny_mobile(family)
    photo, request = request_for(pipeline, num_frames=33)
    plain = [chunk.frames for chunk in pipeline.stream(photo, request)]
    trace = Trace()
    at_once = [chunk.frames for chunk in pipeline.stream(photo, request, lanes=Lanes(True, trace))]
    assert all(torch.equal(a, b) for a, b in zip(plain, at_once, strict=True))
    assert {span.lane for span in trace.spans} >= {"denoise", "decode"}


def test_a_stage_waits_for_its_last_item_to_be_taken() -> None:
    made: list[int] = []

    def numbers() -> Iterator[Tensor]:
        for number in range(6):
            made.append(number)
            yield torch.tensor(number)

    with Lanes(overlap=True).running() as running:
        for taken, _ in enumerate(running.stage("count", numbers())):
            time.sleep(0.02)
            assert len(made) == min(taken + 2, 6)  # the one in hand, and the next
    assert made == list(range(6))


def test_stages_really_run_at_once() -> None:
    """Two stages that only get on if the other works at the same time."""
    meeting = threading.Barrier(2, timeout=10)

    def first() -> Iterator[Tensor]:
        yield torch.zeros(1)
        meeting.wait()
        yield torch.ones(1)

    with Lanes(overlap=True).running() as running:
        items = running.stage("first", first())
        next(items)
        meeting.wait()
        assert next(items) == 1


def test_an_error_in_a_stage_is_the_consumers() -> None:
    pipeline = tiny_pipeline("nano")
    photo, request = request_for(pipeline)
    with torch.no_grad():
        pipeline.transformer_2.proj_out.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        list(pipeline.stream(photo, request, lanes=Lanes(overlap=True)))
    assert not lanes_alive()


def test_closing_ends_every_stage_between_two_steps() -> None:
    pipeline = tiny_pipeline("nano")
    photo, request = request_for(pipeline, num_frames=161, num_inference_steps_2=50)
    steps: list[Event] = []

    def slowly(event: Event) -> None:
        if event.phase == "refine":
            steps.append(event)
            time.sleep(0.01)

    stream = pipeline.stream(photo, request, emit=slowly, lanes=Lanes(overlap=True))
    next(stream)
    next(stream)
    begin = time.monotonic()
    stream.close()
    seen = len(steps)
    assert time.monotonic() - begin < 0.4  # a segment takes half a second at least
    assert not lanes_alive()
    time.sleep(0.05)
    assert len(steps) == seen < steps[0].total


def test_an_error_of_the_consumer_ends_every_stage() -> None:
    pipeline = tiny_pipeline("nano")
    photo, request = request_for(pipeline, num_frames=81)
    with pytest.raises(KeyError):
        for number, _ in enumerate(pipeline.stream(photo, request, lanes=Lanes(overlap=True))):
            if number == 2:
                raise KeyError
    assert not lanes_alive()


def test_the_trace_shows_denoising_beside_decoding() -> None:
    pipeline = tiny_pipeline("wan")
    photo, request = request_for(pipeline, num_frames=65)
    trace = Trace()
    list(pipeline.stream(photo, request, lanes=Lanes(True, trace)))
    spans = {span.name: span for span in trace.spans}
    later, earlier = spans["denoise 3"], spans["decode 2"]
    assert {span.lane for span in trace.spans} == NAMES | {threading.current_thread().name}
    assert later.start < earlier.start + earlier.seconds
    in_turn = Trace()
    list(pipeline.stream(photo, request, lanes=Lanes(False, in_turn)))
    spans = {span.name: span for span in in_turn.spans}
    assert {"text", "motion", "decode 1", "denoise 1"} <= spans.keys()
    assert spans["denoise 3"].start > spans["decode 2"].start + spans["decode 2"].seconds
    assert not any(span.name.startswith("wait") for span in in_turn.spans)


def test_the_command_line_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swifti2v import cli

    tiny_pipeline("nano").save_pretrained(tmp_path / "twin")
    told = ["generate", "--image", "examples/photo.jpg", "--prompt", "zoom in", "--preset", "tiny-nano", "--seed", "1"]
    told += ["--size", "128x64", "--num-frames", "17", "--model", str(tmp_path / "twin"), "--quiet"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main([*told, *more])
        return int(end.value.code or 0)

    at_once, in_turn = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert run("--output", str(at_once), "--at-once", "--trace", str(tmp_path / "a.json")) == 0
    assert run("--output", str(in_turn), "--in-turn", "--trace", str(tmp_path / "b.json")) == 0
    assert at_once.read_bytes() == in_turn.read_bytes()
    rows = {}
    for name in ("a", "b"):
        events = json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"]
        rows[name] = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows["a"] >= NAMES | {"write"}
    assert not rows["b"] & NAMES and "write" in rows["b"]
    assert run("--output", str(tmp_path / "c.mp4"), "--trace", str(tmp_path / "a.json")) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert run("--output", str(tmp_path / "c.mp4"), "--trace", str(tmp_path / "no" / "a.json")) == 2
    assert not (tmp_path / "c.mp4").exists()


def test_a_failure_of_the_writer_ends_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v import media, produce
    from swifti2v.options import Options
    from swifti2v.order import prepare

    tiny_pipeline("nano").save_pretrained(tmp_path / "twin")
    told = {"image": "examples/photo.jpg", "prompt": "zoom in", "preset": "tiny-nano", "seed": 1, "num_frames": 161}
    options = Options(**told, size="128x64", model=str(tmp_path / "twin"), output=str(tmp_path / "clip.mp4"))
    order, written = prepare(options), media._append

    def full(file: object, init: bytes, body: bytes) -> None:
        if not init:
            raise OSError(28, "No space left on device")
        written(file, init, body)  # type: ignore[arg-type]

    monkeypatch.setattr(media, "_append", full)
    with pytest.raises(RunError, match="No space left") as failure:
        produce.start(order, lambda event: None, produce.Execution(Lanes(overlap=True)))
    assert failure.value.__traceback__ is not None and not lanes_alive()  # though the traceback still holds the stream
    kept = sorted((tmp_path / "clip.job" / "segments").iterdir())
    time.sleep(0.3)
    assert sorted((tmp_path / "clip.job" / "segments").iterdir()) == kept


def test_a_trace_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "trace.json"
    with pytest.raises(KeyError), recorded(overlap=True, trace=gone):
        raise KeyError
    with pytest.raises(OSError), recorded(overlap=True, trace=gone):
        pass
    taken = tmp_path / "taken.json"
    with pytest.raises(RunError, match="not overwritten"), recorded(overlap=False, trace=taken):
        taken.write_text("somebody's")
    assert taken.read_text() == "somebody's"
