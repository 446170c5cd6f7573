"""The tables of docs/ablations.md out of the lines that benchmarks/ablations.py recorded; it measures nothing itself.

In the document a table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is around it is written by
hand and stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch

from swifti2v import metrics

DOCUMENT = common.REPOSITORY / "docs" / "ablations.md"
DRAWS, FEWEST = 5000, 4  # of the bootstrap: samples, and clips below which it says nothing
COLUMNS = {
    "latent_db": ("latents, dB", 3),
    "psnr": ("PSNR, dB", 3),
    "ssim": ("SSIM", 4),
    "st_lpips": ("ST-LPIPS", 4),
    "sharpness_db": ("sharpness, dB", 2),
}
SEGMENT_FRAMES = {"M=1": 4, "M=2": 8, "M=5": 20}
LENGTHS = (81, 161, 321)
Row = dict[str, Any]
# name of a table: use, what differences are taken against, variants
COMPARED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "detail": ("plain", "default", ("stage II off", "carried off", "both off", "frame 0 not replaced")),
    "segments": ("plain", "default", ("un-segmented", "N=0", "N=2", "M=1", "M=2", "M=5")),
    "anchor": ("plain", "default", ("anchor off", "anchor and neighbors off")),
    "read-only": ("plain", "control", ("read-only", "default")),
    "steps": ("plain", "default", ("2 steps", "4 steps", "8 steps")),
    "conventions": (
        "plain",
        "default",
        ("positions: window", "neighbor timestep: current", "neighbor reference: generated"),
    ),
    "cascade": (
        "cascade",
        "default",
        (
            "stage II off",
            "un-segmented",
            "N=0",
            "N=2",
            "M=1",
            "M=5",
            "anchor off",
            "anchor and neighbors off",
            "4 steps",
        ),
    ),
    "cascade read-only": ("cascade", "control", ("read-only",)),
    "transition": (
        "cascade",
        "transition off",
        ("transition 0.25", "transition 0.4", "transition 0.625", "transition 0.8333", "default", "stage II off"),
    ),
}


def report(rows: Sequence[Row], document: Path = DOCUMENT) -> None:
    """Rewrite the tables of ``document``; SystemExit names a table that does not exist."""
    if not rows:
        raise SystemExit("nothing is recorded for this checkpoint: python benchmarks/ablations.py --record")
    text = document.read_text(encoding="utf-8")

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(found[2], rows)}\n<!-- end -->"

    text = re.sub(r"(<!-- table: ([^>]*?) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)
    part = document.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(document)
    print(f"{document.name}: {len(rows)} lines used")


def table(name: str, rows: Sequence[Row]) -> str:
    special = {"absolute": absolute, "seams": seams, "long": long, "noise": noise, "likeness": likeness}
    if name in COMPARED:
        return compared(rows, *COMPARED[name])
    if name not in special:
        raise SystemExit(f"there is no table {name!r}; there are {', '.join([*COMPARED, *special])}")
    return special[name](rows)


# --- differences ------------------------------------------------------------------------------------------------


def values(rows: Sequence[Row], use: str, variant: str, measure: str, kind: str = "") -> dict[str, float]:
    """A measure by clip, the mean over seeds; latents' error from lines of latents, the rest from lines of frames."""
    found: dict[str, list[float]] = {}
    for row in rows:
        own = row["settings"]
        asked = (own["use"], own["variant"]) == (use, variant) and kind in ("", own["kind"])
        if asked and measure in row["results"] and (own["measures"] == "latents" or own["seed"] == 0):
            found.setdefault(own["clip"], []).append(row["results"][measure])
    return {clip: sum(series) / len(series) for clip, series in found.items()}


def interval(gaps: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over clips."""
    series = torch.tensor(gaps, dtype=torch.float64)
    drawn = series[torch.randint(len(series), (DRAWS, len(series)), generator=torch.Generator().manual_seed(0))]
    low, high = drawn.mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(series.mean()), low, high


def compared(rows: Sequence[Row], use: str, base: str, variants: Sequence[str]) -> str:
    """Variant minus ``base``, clip by clip; a star where the interval leaves out zero."""
    header = " | ".join(title for title, _ in COLUMNS.values())
    lines = [f"| against `{base}` | clips | {header} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for variant in variants:
        cells, count = [], [0, 0]
        for measure, (_, digits) in COLUMNS.items():
            ours, theirs = (values(rows, use, name, measure) for name in (variant, base))
            gaps = [ours[clip] - theirs[clip] for clip in ours if clip in theirs]
            place = 0 if measure == "latent_db" else 1
            count[place] = max(count[place], len(gaps))
            cells.append(cell(gaps, digits))
        clips = str(count[0]) if count[0] == count[1] else f"{count[0]}, decoded {count[1]}"
        lines.append(f"| {variant} | {clips} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(gaps: Sequence[float], digits: int) -> str:
    if not gaps:
        return "-"
    mean, low, high = interval(gaps)
    if len(gaps) < FEWEST:
        return f"{mean:+.{digits}f}"
    star = "*" if low > 0 or high < 0 else ""
    return f"{mean:+.{digits}f}{star} [{low:+.{digits}f}, {high:+.{digits}f}]"


# --- the other tables -------------------------------------------------------------------------------------------


def absolute(rows: Sequence[Row]) -> str:
    """Means and standard deviations of what stands at the two ends, over the clips decoded with all of them."""
    lines = [f"| clips | variant | {' | '.join(title for title, _ in COLUMNS.values())} |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    parts = [("plain", kind) for kind in ("film", "real", "synthetic", "")] + [("cascade", "")]
    for use, kind in parts:
        variants = ("default", "stage II off", "both off")[: 3 if use == "plain" else 2]
        held = {v: {m: values(rows, use, v, m, kind) for m in COLUMNS} for v in variants}
        shared = [clip for clip in held["default"]["psnr"] if all(clip in held[v]["psnr"] for v in variants)]
        label = f"{kind or ('all' if use == 'plain' else use)} ({len(shared)})"
        for variant in variants if shared else ():
            cells = []
            for measure, (_, digits) in COLUMNS.items():
                series = torch.tensor([held[variant][measure].get(clip, math.nan) for clip in shared])
                spread = f" ± {series.std():.{digits}f}" if len(series) > 1 else ""
                cells.append(f"{series.mean():.{digits}f}{spread}")
            lines.append(f"| {label} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def noise(rows: Sequence[Row]) -> str:
    """Seed 1 against seed 0 of the default."""
    lines = ["| measure | clips | mean absolute difference | largest |", "|---|---|---|---|"]
    for measure, (title, digits) in COLUMNS.items():
        by_seed: dict[int, dict[str, float]] = {0: {}, 1: {}}
        for row in rows:
            own = row["settings"]
            if (own["use"], own["variant"]) == ("plain", "default") and measure in row["results"]:
                by_seed[own["seed"]][own["clip"]] = row["results"][measure]
        gaps = [abs(value - by_seed[0][clip]) for clip, value in by_seed[1].items() if clip in by_seed[0]]
        if gaps:
            mean = sum(gaps) / len(gaps)
            lines.append(f"| {title} | {len(gaps)} | {mean:.{digits + 1}f} | {max(gaps):.{digits + 1}f} |")
    return "\n".join(lines)


def seams(rows: Sequence[Row]) -> str:
    """The seam score, clips pooled."""
    lines = [
        "| frames | variant | clips | against other block boundaries | p | against steps inside blocks | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for use, length in (("plain", 49), *(("long", length) for length in LENGTHS)):
        names = dict.fromkeys(row["settings"]["variant"] for row in rows if row["settings"]["use"] == use)
        for variant in names:
            if variant != "un-segmented":
                lines += _seam_line(rows, use, variant, length)
    return "\n".join(lines)


def _seam_line(rows: Sequence[Row], use: str, variant: str, length: int) -> list[str]:
    pooled, count = None, 0
    for row in rows:
        own = row["settings"]
        if (own["use"], own["variant"], own["seed"], own["measures"]) == (use, variant, 0, "frames"):
            changes = torch.tensor(row["results"]["changes"][: length - 1])
            steps = metrics.steps_by_kind(changes, segment_frames=SEGMENT_FRAMES.get(variant, 12))
            pooled, count = steps if pooled is None else pooled + steps, count + 1
    if pooled is None:
        return []
    cells = []
    for against in ("block", "inside"):
        seam = metrics.seam_score(pooled, against=against)
        cells += (
            ["-", "-"] if seam is None else [f"{seam.ratio:.3f} [{seam.low:.3f}, {seam.high:.3f}]", f"{seam.p:.3f}"]
        )
    return [f"| {length} | {variant} | {count} | {' | '.join(cells)} |"]


def long(rows: Sequence[Row]) -> str:
    """Means over clips of the last 16 frames of each length; color against the true frames, all frames up to there."""
    lines = [
        "| variant | clips | frames | PSNR, dB | against default | sharpness, dB | ST-LPIPS of the last frame "
        "| color, dE00, mean (largest) |",
        "|---" * 8 + "|",
    ]
    held: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["settings"]["use"] == "long":
            held.setdefault(row["settings"]["variant"], {})[row["settings"]["clip"]] = row["results"]
    for variant, clips in held.items():
        for place, length in enumerate(LENGTHS):

            def mean(name: str, clips: dict[str, Row] = clips, place: int = place) -> float:
                return sum(found[name][place] for found in clips.values()) / len(clips)

            color = [value for found in clips.values() for value in found["delta_e"][: length // 8 + 1]]
            theirs = held.get("default", {})
            gaps = [f["psnr"][place] - theirs[c]["psnr"][place] for c, f in clips.items() if c in theirs]
            gap = "" if variant == "default" else cell(gaps, 3)
            lines.append(
                f"| {variant} | {len(clips)} | {length} | {mean('psnr'):.2f} | {gap} | {mean('sharpness_db'):.2f} "
                f"| {mean('st_lpips'):.4f} | {sum(color) / len(color):.2f} ({max(color):.2f}) |"
            )
    return "\n".join(lines)


def likeness(rows: Sequence[Row]) -> str:
    """What stage transition makes of the low-resolution truth, against the truth and against Stage I's own output."""
    lines = ["| low-resolution motion | clips | PSNR against the truth | PSNR against Stage I's output |"]
    lines.append("|---|---|---|---|")
    own = [row for row in rows if row["settings"]["use"] == "stage one"]
    for name in dict.fromkeys(row["settings"]["variant"] for row in own):
        found = [row["results"] for row in own if row["settings"]["variant"] == name]
        cells = []
        for measure in ("psnr_truth", "psnr_stage_one"):
            series = torch.tensor([row[measure] for row in found if row[measure] is not None])
            cells.append(f"{series.mean():.2f} ± {series.std():.2f}" if len(series) > 1 else "-")
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)
