"""What every benchmark needs: the real command line run as a child and watched, and one JSON line a run.

This module imports neither torch nor the pipeline: a child's peak RSS as the system counts it is never below the
size of the process that started it, so the starter has to stay small.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from swifti2v.machine import cpu_name

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PHOTO = REPOSITORY / "examples" / "photo.jpg"
PROMPT = "slow pan left"
# tiny_pipeline's weights in a folder, so that a tiny benchmark runs the real command line too.
_TWIN = "import sys; from swifti2v.tiny import tiny_pipeline; tiny_pipeline('nano').save_pretrained(sys.argv[1])"
_KILOBYTE = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


@dataclass(frozen=True)
class TimedEvent:
    """One line of ``--json`` and when it arrived, in seconds since the process was started (imports included)."""

    at: float
    event: dict[str, Any]

    def is_a(self, type: str, phase: str) -> bool:
        return (self.event["type"], self.event["phase"]) == (type, phase)


@dataclass(frozen=True)
class CliRun:
    """One finished run of ``swifti2v generate``: wall ``seconds`` of the process, CPU seconds, peak RSS in bytes.

    ``peak_rss`` is 0 where this process's own size hides it (see the module).
    """

    arguments: tuple[str, ...]
    seconds: float
    cpu_seconds: float
    peak_rss: int
    events: tuple[TimedEvent, ...]
    output: Path


@dataclass
class _Listener:
    """Reads the child's events on a thread of its own, so that their times are right whatever the caller does."""

    stream: IO[str]
    begin: float
    events: list[TimedEvent] = field(default_factory=list)

    def read(self) -> None:
        for line in self.stream:
            self.events.append(TimedEvent(time.monotonic() - self.begin, json.loads(line)))


def generate(
    folder: Path,
    arguments: Sequence[str],
    watch: Callable[[float, Sequence[TimedEvent], Path], None] | None = None,
    name: str = "clip.mp4",
    launcher: Sequence[str] = (),
) -> CliRun:
    """Run ``python -m swifti2v generate`` with ``arguments`` in ``folder`` to its end; RuntimeError if it fails.

    ``launcher``: what stands before ``-m swifti2v`` (torchrun and its options).
    ``watch(seconds, events so far, the part file)`` is called about ten times a second while it runs.
    """
    output = folder / name
    command = [sys.executable, *launcher, "-m", "swifti2v", "generate", *arguments, "--output", name, "--json"]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        listener = _Listener(child.stdout, begin)
        reader = threading.Thread(target=listener.read)
        reader.start()
        status, usage = _wait(child.pid, watch, listener, output.with_name(f"{output.stem}.part{output.suffix}"))
        seconds = time.monotonic() - begin
        reader.join()
        child.stdout.close()
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if child.returncode:
            raise RuntimeError(f"generate ended with {child.returncode}: {errors.read().strip()[-2000:]}")
    peak = usage.ru_maxrss if usage.ru_maxrss > own else 0
    cpu = usage.ru_utime + usage.ru_stime
    return CliRun(tuple(arguments), seconds, cpu, peak * _KILOBYTE, tuple(listener.events), output)


def _wait(
    pid: int, watch: Callable[[float, Sequence[TimedEvent], Path], None] | None, listener: _Listener, part: Path
) -> tuple[int, resource.struct_rusage]:
    """The child's exit status and what it used (its own, not the sum over all children)."""
    if watch is None:
        _, status, usage = os.wait4(pid, 0)
        return status, usage
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage
        watch(time.monotonic() - listener.begin, tuple(listener.events), part)
        time.sleep(0.1)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="the tiny twin of nano at toy size: does the script work?")
    made.add_argument("--model", type=Path, help="weights in diffusers layout, if not the shipped ones")
    _common_options(made)
    return made


def gpu_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of Wan's networks on a GPU, whose weights are random."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="the tiny twins at toy size, on a CPU too: does it work?")
    made.add_argument("--device", help="where it runs (default: CUDA if there is one)")
    _common_options(made)
    return made


def _common_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--threads", type=int, help="CPU threads of the run (default: torch's)")
    made.add_argument("--note", default="", help="what else a reader of the record should know")
    made.add_argument("--record", action="store_true", help="append the line to benchmarks/results/NAME.jsonl")
    made.add_argument("--out", type=Path, help="append the line to NAME.jsonl in this folder")
    made.add_argument("--commit", help="the commit to name where this is no checkout (a lent machine)")


def parsed(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, and as ``arguments`` what was typed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return made.parse_args(arguments, argparse.Namespace(arguments=list(arguments)))


def add_clip_options(made: argparse.ArgumentParser) -> None:
    """What to generate, for the benchmarks that generate."""
    made.add_argument("--image", type=Path, default=PHOTO)
    made.add_argument("--prompt", default=PROMPT)
    made.add_argument("--steps", type=int, help="of Stage I (default: the preset's)")
    made.add_argument("--steps-2", type=int, help="of Stage II (default: the preset's)")


def clip_arguments(asked: argparse.Namespace, model: Path | None, size: str, num_frames: int) -> list[str]:
    """The command line of a clip; seed 1, so that runs can be compared."""
    arguments = ["--prompt", getattr(asked, "prompt", PROMPT), "--size", size, "--num-frames", str(num_frames)]
    arguments += ["--seed", "1"]
    if asked.tiny:
        arguments += ["--preset", "tiny-nano"]
    if model is not None:
        arguments += ["--model", str(model.resolve())]
    for option, value in (
        ("--num-inference-steps", asked.steps),
        ("--num-inference-steps-2", asked.steps_2),
        ("--threads", asked.threads),
    ):
        if value is not None:
            arguments += [option, str(value)]
    return arguments


@contextmanager
def workplace(asked: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """A folder to write in, which goes afterwards, and the folder of weights (None: the shipped ones)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model
        if asked.tiny and model is None:
            model = folder / "twin"
            subprocess.run([sys.executable, "-c", _TWIN, str(model)], check=True, capture_output=True)
        yield folder, model


class Record:
    """One line about one run. Made before the run, so that commit and load are those it began with."""

    def __init__(self, question: str, asked: argparse.Namespace, script: str) -> None:
        self._asked, self._script = asked, Path(script)
        self.line: dict[str, Any] = {
            "question": question,
            "command": shlex.join(["python", f"benchmarks/{self._script.name}", *map(_portable, asked.arguments)]),
            **commit(asked.commit),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(asked.threads),
        }
        if hasattr(asked, "device"):
            self.line["hardware"] |= accelerator(asked.device)

    def finish(self, settings: dict[str, Any], results: dict[str, Any]) -> None:
        """Print the line; append it if ``--record`` or ``--out``."""
        if self._asked.note:
            settings["note"] = self._asked.note
        self.line |= {"settings": settings, "results": results}
        text = json.dumps(self.line, ensure_ascii=False)
        print(text, flush=True)
        for folder in ([RESULTS] if self._asked.record else []) + ([self._asked.out] if self._asked.out else []):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{self._script.stem}.jsonl", "a") as file:
                file.write(text + "\n")


def commit(said: str | None = None) -> dict[str, Any]:
    """The commit checked out, and whether tracked files differ from it (results apart); ``said`` if none is."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {"commit": head or said or "unknown", "dirty": bool(changed)}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def hardware(threads: int | None) -> dict[str, Any]:
    """The machine; ``load`` is its one-minute load average as the run begins (0: nobody else is there)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": threads or cores,
        "torch": importlib.metadata.version("torch"),
        "load": round(os.getloadavg()[0], 2),
        "nice": os.nice(0),
    }


def accelerator(name: str | None) -> dict[str, Any]:
    """The CUDA device that a benchmark runs on: nothing if it runs on the CPU. Imports torch."""
    import torch

    if name == "cpu" or not torch.cuda.is_available():
        return {}
    device = torch.device(name or "cuda")
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name,
        "device_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
    }


def shown(arguments: Sequence[str]) -> str:
    """A generate command as a reader can repeat it from the repository."""
    return shlex.join(["swifti2v", "generate", *map(_portable, arguments)])


def _portable(argument: str) -> str:
    """No path of this machine leaves it: relative to the repository, or the name alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def megabytes(count: float) -> float:
    return round(count / 1e6, 1)
