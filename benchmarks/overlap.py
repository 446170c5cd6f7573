"""What do stages at once gain over one after another, and what do they cost in memory?

    python benchmarks/overlap.py --record                        # nano, 1280x704, 81 frames
    python benchmarks/overlap.py --size 2560x1408 --record
    python benchmarks/overlap.py --tiny                          # seconds

The real command line in fresh processes, ``--in-turn`` and ``--at-once``, round after round; the best round of each
counts. ``ratio`` is in turn over at once (above 1: at once is faster). ``own_seconds`` are of the stages' own work,
from ``--trace``, which both write: their sum over ``stages_seconds`` is how many worked at once on average.
``equal``: the files are the same bytes. Seconds are of the whole process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from swifti2v.trace import Span, own_seconds

WAYS = {"in turn": ["--in-turn"], "at once": ["--at-once"]}
STAGES = ("reference", "denoise", "decode", "write")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.add_clip_options(parser)
    parser.add_argument("--size", default="1280x704")
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=3)
    asked = common.parsed(parser, arguments)
    if asked.tiny:
        asked.size, asked.num_frames, asked.rounds = "128x64", 17, 1
    record = common.Record("seconds and peak RSS with stages at once and in turn", asked, __file__)
    ways: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    written: set[bytes] = set()
    with common.workplace(asked) as (folder, model):
        clip = common.clip_arguments(asked, model, asked.size, asked.num_frames)
        for _ in range(asked.rounds):
            for name, told in WAYS.items():
                trace = folder / "trace.json"
                more = ["--image", str(asked.image.resolve()), *clip, *told, "--trace", str(trace)]
                run = common.generate(folder, more)
                written.add(run.output.read_bytes())
                ways[name].append(facts(run, trace))
                run.output.unlink()
                trace.unlink()
                print(name, ways[name][-1], flush=True)
    best = {name: min(rows, key=lambda row: row["seconds"]) for name, rows in ways.items()}
    results = {
        "runs": ways,
        "ratio": round(best["in turn"]["seconds"] / best["at once"]["seconds"], 3),
        "stages_ratio": round(best["in turn"]["stages_seconds"] / best["at once"]["stages_seconds"], 3),
        "memory_ratio": round(best["at once"]["peak_mb"] / (best["in turn"]["peak_mb"] or 1), 3),
        "equal": len(written) == 1,
    }
    record.finish({"size": asked.size, "num_frames": asked.num_frames, "rounds": asked.rounds}, results)


def facts(run: common.CliRun, trace: Path) -> dict[str, Any]:
    """Seconds and memory of the process, the stages' own work, and from their first beginning to their last end."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    spans = [Span(e["name"], str(e["tid"]), e["ts"] / 1e6, e["dur"] / 1e6) for e in events]
    working = [span for span in spans if span.name.split()[0] in STAGES]
    return {
        "seconds": round(run.seconds, 2),
        "stages_seconds": round(max(s.end for s in working) - min(s.start for s in working), 2),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_mb": common.megabytes(run.peak_rss),
        "own_seconds": {name: round(seconds, 2) for name, seconds in own_seconds(spans).items()},
    }


if __name__ == "__main__":
    main()
