"""Does one clip in two processes give the same clip, and how does its time compare?

    python benchmarks/context_parallel.py --record
    python benchmarks/context_parallel.py --tiny          # the tiny twin at toy size: does the script work?

On a CPU, the processes joined by gloo; nothing here says what GPUs and NCCL do. Three ways, in turn: one process with
one thread, one with two, two with one thread each under torchrun. Random weights of wan's shape, larger than the tiny
twin's, in float32. Differences are against one process with one thread: the largest of all latents of both stages, and
of all pixels (8 bits). ``seconds`` are from the photo to the written file, without loading; ``step_seconds`` are of one
step of Stage II, the median. Ratios above 1: faster than one process with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

PLAIN, THREADED, SHARED = "1 process, 1 thread", "1 process, 2 threads", "2 processes, 1 thread each"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WAYS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    PLAIN: (["--threads", "1"], ()),
    THREADED: (["--threads", "2"], ()),
    SHARED: (["--threads", "1", "--context-parallel", "2"], TORCHRUN),
}
LATENTS_WITHIN = 1e-4
NETWORK = {"num_attention_heads": 8, "attention_head_dim": 48, "ffn_dim": 1536, "num_layers": 8}
# Wan's classes at a size that a CPU feels, in the rest of the tiny twin; drawn in a child, see common.
_WEIGHTS = """
import json, sys, torch
from swifti2v.tiny import tiny_pipeline
pipe, sizes = tiny_pipeline("wan"), json.loads(sys.argv[2])
torch.manual_seed(0)
for name in ("transformer", "transformer_2"):
    model = getattr(pipe, name)
    config = {**model.config, **sizes}
    if config["added_kv_proj_dim"] is not None:
        config["added_kv_proj_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    pipe.register_modules(**{name: type(model).from_config(config)})
pipe.save_pretrained(sys.argv[1])
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", help="(default: 512x256; tiny: 128x64)")
    parser.add_argument("--num-frames", type=int, help="(default: 33; tiny: 17)")
    parser.add_argument("--steps", type=int, help="of either stage (default: 4; tiny: 2)")
    parser.add_argument("--rounds", type=int, help="how often each way runs; the best counts (default: 3; tiny: 1)")
    asked = common.parsed(parser, arguments)
    asked.size = asked.size or ("128x64" if asked.tiny else "512x256")
    asked.num_frames = asked.num_frames or (17 if asked.tiny else 33)
    asked.steps = asked.steps or (2 if asked.tiny else 4)
    asked.rounds = asked.rounds or (1 if asked.tiny else 3)
    record = common.Record("context parallelism on a CPU: the same clip, and its time", asked, __file__)
    model, asked.model = asked.model, asked.model or Path()
    with common.workplace(asked) as (folder, _):
        if model is None:
            model = folder / "weights"
            sizes = {} if asked.tiny else NETWORK
            command = [sys.executable, "-c", _WEIGHTS, str(model), json.dumps(sizes)]
            subprocess.run(command, check=True, capture_output=True)
        results = measure(folder, clip_arguments(asked, model), asked.rounds)
    settings = {"backend": "gloo on a CPU", "weights": "random", "dtype": "float32", "rounds": asked.rounds}
    settings |= {"size": asked.size, "num_frames": asked.num_frames, "steps": asked.steps}
    record.finish(settings | {"network": "tiny twin" if asked.tiny else NETWORK}, results)


def clip_arguments(asked: argparse.Namespace, model: Path) -> list[str]:
    steps = str(asked.steps)
    arguments = ["--image", str(common.PHOTO), "--prompt", common.PROMPT, "--preset", "tiny-wan"]
    arguments += ["--model", str(model.resolve()), "--size", asked.size, "--num-frames", str(asked.num_frames)]
    arguments += ["--num-inference-steps", steps, "--num-inference-steps-2", steps]
    return [*arguments, "--seed", "1", "--dtype", "float32", "--device", "cpu", "--keep-job"]


def measure(folder: Path, arguments: list[str], rounds: int) -> dict[str, Any]:
    """Rows by way, with what lies between its clip and that of one process with one thread."""
    runs: dict[str, list[common.CliRun]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for index, (way, (more, launcher)) in enumerate(WAYS.items()):
            name = f"way{index}_{number}.png"
            runs[way].append(common.generate(folder, [*arguments, *more], name=name, launcher=launcher))
    rows: dict[str, dict[str, Any]] = {}
    first = runs[PLAIN][0].output.with_suffix("")
    for way, done in runs.items():
        seconds, steps = min(map(clip_seconds, done)), min(map(step_seconds, done))
        rows[way] = {"seconds": round(seconds, 3), "step_seconds": round(steps, 4)}
        rows[way] |= {"ratio": round(rows[PLAIN]["seconds"] / seconds, 3)}
        rows[way] |= {"step_ratio": round(rows[PLAIN]["step_seconds"] / steps, 3)}
        rows[way] |= differences(first, done[-1].output.with_suffix(""))
    return {"ways": rows, "met": rows[SHARED]["max_latent_difference"] <= LATENTS_WITHIN}


def clip_seconds(run: common.CliRun) -> float:
    begin = next(event.at for event in run.events if event.is_a("started", "run"))
    return next(event.at for event in run.events if event.is_a("completed", "write")) - begin


def step_seconds(run: common.CliRun) -> float:
    """Seconds between two steps of one segment of Stage II: nothing but its transformer."""
    steps = [event for event in run.events if event.is_a("progress", "refine")]
    return statistics.median(
        b.at - a.at for a, b in itertools.pairwise(steps) if a.event["segment"] == b.event["segment"]
    )


def differences(one: Path, other: Path) -> dict[str, Any]:
    """The largest difference of latents and of pixels between two folders of pictures and their kept jobs."""
    jobs = [path.with_name(f"{path.name}.job") for path in (one, other)]
    names = sorted(path.relative_to(jobs[0]) for path in jobs[0].glob("*/*.safetensors"))
    latents = [np.abs(np.subtract(*(load_file(job / name)["latents"] for job in jobs))).max() for name in names]
    pictures = sorted(path.name for path in one.iterdir())
    pixels = [
        np.abs(np.subtract(*(np.asarray(Image.open(folder / name), dtype=np.int16) for folder in (one, other)))).max()
        for name in pictures
    ]
    return {"max_latent_difference": float(max(latents)), "max_pixel_difference": int(max(pixels))}


if __name__ == "__main__":
    main()
