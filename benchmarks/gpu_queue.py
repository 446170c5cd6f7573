"""One command for all that is to be measured and trained when a GPU is at hand; it goes on where it stopped.

    python benchmarks/gpu_queue.py --record --minutes 9.3          # appends to benchmarks/results/
    python benchmarks/gpu_queue.py --out "$OUT" --minutes 9.3 --commit 1a2b3c4      # on a lent machine, no checkout
    python benchmarks/gpu_queue.py --tiny --out /tmp/queue         # everything at toy size, on a CPU too
    python benchmarks/gpu_queue.py --list                          # what there is, and what is held already

Every item is a child process with a time limit, in this order. What benchmarks/results/ or ``--out`` already holds for
this commit (with the tree as clean or as changed as now) is left out, unless ``--fresh``. An item is begun only if its
limit fits into what is left of ``--minutes``. Each one ends in a line of gpu_queue.jsonl: done, or failed with the last
line it said. The exit code is 1 if an item failed or ran over its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

# Options that say where and how a line is written or run, not what is measured: with their values, and without.
WHERE, SWITCHES = ("--out", "--commit", "--note", "--threads", "--device", "--minutes", "--data"), ("--record",)
PHOTOS, LATENTS = "data/photos.jsonl", "data/latents"


@dataclass(frozen=True)
class Item:
    """One child process. ``minutes``: its limit. ``needs``: data, in the repository, without which it is left out."""

    name: str
    command: str
    minutes: float
    needs: str = ""

    @property
    def trains(self) -> bool:
        return self.command.startswith("-m")

    def arguments(self, tiny: bool) -> list[str]:
        return [*shlex.split(self.command), *(["--tiny"] if tiny else [])]


def _training(name: str, recipe: str, needs: str) -> Item:
    return Item(name, f"-m swifti2v.train {recipe}", 8.5, needs)


HEADLINE, STAGE_TWO = "benchmarks/headline.py --preset wan", "benchmarks/stage_two.py --part"
QUEUE = (
    Item("headline", f"{HEADLINE} --profile 80gb", 8),
    Item("headline-24gb", f"{HEADLINE} --profile 24gb", 8),
    Item("headline-at-once", f"{HEADLINE} --profile 80gb --at-once", 8),
    _training("train-nano-vae", "nano_vae", PHOTOS),
    _training("train-nano-one", "nano_one", PHOTOS),
    _training("train-nano-two", "nano_two", PHOTOS),
    Item("vae", "benchmarks/vae.py --only channels_last_3d tiled tiled_parked", 5),
    Item("vae-compiled", "benchmarks/vae.py --only compiled", 8),
    Item("vae-channels-last-compiled", "benchmarks/vae.py --only channels_last_compiled", 8),
    Item("vae-2.1", "benchmarks/vae.py --vae wan2.1 --only channels_last_3d", 4),
    Item("stage-two-backends", f"{STAGE_TWO} backends reference modulation", 6),
    Item("stage-two-compiled", f"{STAGE_TWO} compiled quantized", 8),
    Item("stage-two-clips", f"{STAGE_TWO} windows length", 8),
    Item("mobile", "benchmarks/mobile.py --threads 1", 8),
    Item("peers", "benchmarks/peers.py", 8),
    _training("train-mobile", "mobile", LATENTS),
    _training("train-mobile-few", "mobile_few", LATENTS),
)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments)
    begin, now, folder = time.monotonic(), common.commit(asked.commit), asked.out or common.RESULTS
    states: dict[str, list[str]] = {"done": [], "held": [], "without data": [], "left": [], "failed": []}
    for item in QUEUE:
        if asked.only and item.name not in asked.only:
            continue
        left = asked.minutes - (time.monotonic() - begin) / 60
        state = due(item, asked, now, left)
        if state == "due" and not asked.list:
            line = worked_off(item, asked, now, folder)
            state = line["status"]
        states.setdefault(state, []).append(item.name)
        print(f"{item.name}: {state}", flush=True)
    print(json.dumps(states), flush=True)
    if states["failed"]:
        raise SystemExit(1)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="every item at toy size")
    parser.add_argument("--record", action="store_true", help="lines go to benchmarks/results/")
    parser.add_argument("--out", type=Path, help="lines and trained weights go to this folder instead")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all items together")
    parser.add_argument("--only", nargs="+", choices=[item.name for item in QUEUE], metavar="NAME")
    parser.add_argument("--fresh", action="store_true", help="also what is held already")
    parser.add_argument("--list", action="store_true", help="say what is due and what is held, and run nothing")
    parser.add_argument("--commit", help="the commit, where this is no checkout")
    asked = parser.parse_args(arguments)
    if not (asked.list or asked.record or asked.out):
        parser.error("say where the lines go: --record or --out FOLDER")
    if asked.record and asked.out:
        parser.error("--record and --out both say where the lines go")
    return asked


def due(item: Item, asked: argparse.Namespace, now: dict[str, Any], minutes_left: float) -> str:
    """ "due", or why the item is not run."""
    folders = [common.RESULTS, *([asked.out] if asked.out else [])]
    if not asked.fresh and held(item, asked.tiny, now, folders):
        return "held"
    if item.needs and not asked.tiny and not (common.REPOSITORY / item.needs).exists():
        return "without data"
    return "due" if item.minutes <= minutes_left else "left"


def held(item: Item, tiny: bool, now: dict[str, Any], folders: Sequence[Path]) -> bool:
    """Whether a folder has a finished line of the same measurement for the same commit."""
    wanted = key(shlex.join(["python", *item.arguments(tiny)]))
    for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            same = all(line.get(field) == now[field] for field in ("commit", "dirty"))
            if same and line.get("status", "done") == "done" and key(line["command"]) == wanted:
                return True
    return False


def key(command: str) -> tuple[str, ...]:
    """What a command measures: its words, in any order, but for those that only say where."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in WHERE:
            next(words, None)
        elif word not in SWITCHES:
            kept.append(word)
    return tuple(sorted(kept))


def worked_off(item: Item, asked: argparse.Namespace, now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an item to its end or its limit, and write down which."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    failed = finished(command(item, asked), item.minutes * 60)
    line = {
        "command": shlex.join(["python", *item.arguments(asked.tiny)]),
        **now,
        "item": item.name,
        "status": "failed" if failed else "done",
        "seconds": round(time.monotonic() - begin, 1),
    }
    if failed:
        line["reason"] = failed.replace(str(common.REPOSITORY), "").strip()
        print(line["reason"], flush=True)
    with open(folder / "gpu_queue.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def command(item: Item, asked: argparse.Namespace) -> list[str]:
    made = [sys.executable, *item.arguments(asked.tiny)]
    if item.trains:
        runs = (asked.out or common.REPOSITORY / "runs").resolve()
        made += ["--out", str(runs / item.name), "--export", str(runs / f"{item.name}-weights")]
        return made if asked.tiny else [*made, "--minutes", str(item.minutes - 1), "--data", item.needs]
    made += ["--record"] if asked.record else ["--out", str(asked.out.resolve())]
    return [*made, *(["--commit", asked.commit] if asked.commit else [])]


def finished(command: Sequence[str], seconds: float) -> str:
    """Run a child and all it starts, for so long at most: empty, or what went wrong."""
    with tempfile.TemporaryFile("w+") as errors:
        # A group of its own, not a session: what outlives its limit goes with it, and it goes if the machine stops us.
        child = subprocess.Popen(
            command, cwd=common.REPOSITORY, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=os.setpgrp
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ran over its limit of {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["it said nothing"]
    return f"ended with {code}: {said[-1][-500:]}" if code else ""


if __name__ == "__main__":
    main()
