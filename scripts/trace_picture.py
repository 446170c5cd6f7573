"""Traces of ``generate --trace`` as one picture: a row for every lane, all traces on the same scale of seconds.

python scripts/trace_picture.py docs/pictures/overlap.png in_turn.json at_once.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, ROW, HEAD = 1400, 140, 30, 34
COLORS = {
    "text": "#8c6bb1",
    "motion": "#d6604d",
    "reference": "#f4a582",
    "denoise": "#4393c3",
    "decode": "#5aae61",
    "write": "#bf812d",
    "wait": "#eeeeee",
}
ORDER = ("reference", "denoise", "decode", "MainThread", "write")


@dataclass(frozen=True)
class Bar:
    lane: str
    name: str
    start: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("traces", type=Path, nargs="+")
    asked = parser.parse_args(arguments)
    traces = {path.stem.replace("_", " "): bars(path) for path in asked.traces}
    drawn(traces).save(asked.picture, optimize=True)
    print(asked.picture)


def bars(path: Path) -> list[Bar]:
    """The spans, from the first beginning on, outer ones first."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"]))
    begin = spans[0]["ts"]
    return [Bar(lanes[e["tid"]], e["name"], (e["ts"] - begin) / 1e6, e["dur"] / 1e6) for e in spans]


def drawn(traces: dict[str, list[Bar]]) -> Image.Image:
    longest = max(bar.start + bar.seconds for found in traces.values() for bar in found)
    rows = {title: lanes_of(found) for title, found in traces.items()}
    picture = Image.new("RGB", (WIDTH, sum(HEAD + ROW * len(lanes) for lanes in rows.values()) + HEAD), "white")
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(size=15), 0
    for title, found in traces.items():
        end = max(bar.start + bar.seconds for bar in found)
        draw.text((4, top + 10), f"{title}: {end:.1f} s", "black", font)
        for number, lane in enumerate(rows[title]):
            y = top + HEAD + number * ROW
            draw.text((14, y + 3), "all but writing" if lane == "MainThread" else lane, "black", font)
            for bar in found:
                if bar.lane == lane:
                    draw_bar(draw, bar, y, (WIDTH - LEFT - 10) / longest)
        top += HEAD + ROW * len(rows[title])
    for number, (word, color) in enumerate(COLORS.items()):
        x = LEFT + number * 130
        draw.rectangle((x, top + 10, x + 14, top + 24), color, "#777777")
        draw.text((x + 20, top + 8), f"{word}ing" if word == "wait" else word, "black", font)
    return picture


def lanes_of(found: Sequence[Bar]) -> list[str]:
    """Lanes that do more than wait."""
    working = {bar.lane for bar in found if not bar.name.startswith("wait")}
    return sorted(working, key=lambda lane: ORDER.index(lane) if lane in ORDER else len(ORDER))


def draw_bar(draw: ImageDraw.ImageDraw, bar: Bar, y: int, scale: float) -> None:
    x = LEFT + bar.start * scale
    color = COLORS.get(bar.name.split()[0], "#cccccc")
    draw.rectangle((x, y, x + max(bar.seconds * scale, 1), y + ROW - 8), color, "#777777")


if __name__ == "__main__":
    main()
