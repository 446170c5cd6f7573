"""Spans: nested, by thread, and as a file that Chrome's viewer reads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from swifti2v.trace import Span, Trace, own_seconds


def test_spans_of_an_iterator_cover_the_making_of_each_item() -> None:
    trace = Trace()
    assert list(trace.each("decode", iter("abc"))) == ["a", "b", "c"]
    assert [span.name for span in trace.spans] == ["decode 0", "decode 1", "decode 2", "decode 3"]
    assert {span.lane for span in trace.spans} == {threading.current_thread().name}


def test_own_seconds_leave_inner_spans_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 5.0, 10.0])
    monkeypatch.setattr("swifti2v.trace.time.perf_counter", lambda: next(times))
    trace = Trace()
    with trace.span("decode 1"), trace.span("wait for denoise"):
        pass
    assert own_seconds(trace.spans) == {"decode": 6.0, "wait": 3.0}
    assert trace.spans == [Span("wait for denoise", "MainThread", 2.0, 3.0), Span("decode 1", "MainThread", 1.0, 9.0)]


def test_a_span_that_fails_is_kept() -> None:
    trace = Trace()
    with pytest.raises(ValueError), trace.span("write 1", lane="write"):
        raise ValueError
    assert [(span.name, span.lane) for span in trace.spans] == [("write 1", "write")]


def test_the_file_is_what_chrome_reads(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("decode 1", lane="decode"):
        pass
    with trace.span("write 1", lane="write"):
        pass
    trace.write(tmp_path / "out.json")
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [(rows[event["tid"]], event["name"]) for event in spans] == [("decode", "decode 1"), ("write", "write 1")]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
