"""Does the memory of ``generate`` stay flat as the clip grows longer?

    python benchmarks/memory_vs_length.py --record                       # 41, 81, 161, 321 frames at 1280x704
    python benchmarks/memory_vs_length.py --steps 1 --steps-2 1          # less time; less memory than full runs
    python benchmarks/memory_vs_length.py --tiny                         # half a minute

Every length is the real command line in a fresh process. Wanted: from 81 frames on the peaks lie within 10 % of
each other, and the longest clip costs under 0.2 MB a frame more than 81 frames do. 1 MB is 10^6 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common

FLAT_FROM = 81
MOST_SPREAD, MOST_MB_A_FRAME = 0.10, 0.2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.add_clip_options(parser)
    parser.add_argument("--size", default="1280x704")
    parser.add_argument("--num-frames", type=int, nargs="+", help="default: 41 81 161 321")
    asked = common.parsed(parser, arguments)
    lengths = asked.num_frames or ([81, 161] if asked.tiny else [41, 81, 161, 321])
    asked.size = "128x64" if asked.tiny else asked.size
    record = common.Record("peak RSS of generate against the length of the clip", asked, __file__)
    rows, command = [], ""
    with common.workplace(asked) as (folder, model):
        for num_frames in lengths:
            told = ["--image", str(asked.image.resolve()), *common.clip_arguments(asked, model, asked.size, num_frames)]
            run = common.generate(folder, told)
            run.output.unlink()
            command = command or common.shown(told)
            rows.append({"num_frames": num_frames, **facts(run)})
            print(rows[-1], flush=True)
    settings = {"size": asked.size, "steps": asked.steps, "steps_2": asked.steps_2, "first_command": command}
    record.finish(settings, {"runs": rows, **verdict(rows)})


def facts(run: common.CliRun) -> dict[str, float]:
    return {"peak_mb": common.megabytes(run.peak_rss), "seconds": round(run.seconds, 1)}


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spread and slope over the clips of at least ``FLAT_FROM`` frames, and whether both are small enough."""
    long = [row for row in rows if row["num_frames"] >= FLAT_FROM]
    if len(long) < 2:
        return {}
    peaks = [row["peak_mb"] for row in long]
    spread = max(peaks) / min(peaks) - 1 if min(peaks) else 0.0
    slope = (long[-1]["peak_mb"] - long[0]["peak_mb"]) / (long[-1]["num_frames"] - long[0]["num_frames"])
    return {
        "spread": round(spread, 4),
        "mb_a_frame": round(slope, 4),
        "met": spread <= MOST_SPREAD and slope < MOST_MB_A_FRAME,
    }


if __name__ == "__main__":
    main()
