"""Traces of ``generate --trace`` as one picture: a row for every lane, all traces on the same scale of seconds.

python scripts/trace_picture.py docs/pictures/overlap.svg in_turn.json at_once.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, LEFT, ROW, GAP = 1000, 110, 26, 40
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
    asked.picture.write_text(drawn(traces))
    print(asked.picture)


def bars(path: Path) -> list[Bar]:
    """The spans, from the first beginning on, outer ones first."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"]))
    begin = spans[0]["ts"]
    return [Bar(lanes[e["tid"]], e["name"], (e["ts"] - begin) / 1e6, e["dur"] / 1e6) for e in spans]


def drawn(traces: dict[str, list[Bar]]) -> str:
    longest = max(bar.start + bar.seconds for found in traces.values() for bar in found)
    scale, top, parts = (WIDTH - LEFT - 10) / longest, 8, []
    for title, found in traces.items():
        lanes = sorted({bar.lane for bar in found}, key=lambda lane: ORDER.index(lane) if lane in ORDER else len(ORDER))
        end = max(bar.start + bar.seconds for bar in found)
        parts.append(f'<text x="4" y="{top + 12}" font-weight="bold">{escape(title)}: {end:.1f} s</text>')
        for number, lane in enumerate(lanes):
            y = top + 20 + number * ROW
            parts.append(f'<text x="4" y="{y + 16}">{escape("main" if lane == "MainThread" else lane)}</text>')
            parts += [drawn_bar(bar, y, scale) for bar in found if bar.lane == lane]
        top += 20 + len(lanes) * ROW + GAP // 2
    top += 6
    for number, (word, color) in enumerate(COLORS.items()):
        x = LEFT + number * 120
        label = f"{word}ing" if word == "wait" else word
        parts.append(f'<rect x="{x}" y="{top}" width="14" height="14" fill="{color}" stroke="#999"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 12}">{label}</text>')
    frame = f'viewBox="0 0 {WIDTH} {top + 24}" font-family="sans-serif" font-size="13"'
    ground = f'<rect width="{WIDTH}" height="{top + 24}" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', ground, *parts, "</svg>"]) + "\n"


def drawn_bar(bar: Bar, y: int, scale: float) -> str:
    color = COLORS.get(bar.name.split()[0], "#cccccc")
    x, width = LEFT + bar.start * scale, max(bar.seconds * scale, 0.5)
    shape = (
        f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{color}" stroke="#777" stroke-width="0.4"'
    )
    return f"<rect {shape}><title>{escape(bar.name)}, {bar.seconds:.2f} s</title></rect>"


if __name__ == "__main__":
    main()
