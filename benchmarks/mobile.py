"""What does MobileI2V's network cost through ONNX Runtime on this CPU, and how does attention grow with tokens?

    python benchmarks/mobile.py --threads 1 --record
    python benchmarks/mobile.py --threads 1 --skip-network       # the layers alone
    python benchmarks/mobile.py --tiny                           # half a minute

Layers: one attention layer of MobileI2V's width (projections, rotation, norms and all), reference layout, float32,
linear and softmax at four token counts; operators: the attention alone, from queries, keys and values. All are measured
in turn, round after round, and the best round counts, so that other work on the machine falls on all of them alike; the
exponents are slopes in log-log. Network: the published shape with random weights at 3x23x40 tokens, in each layout: one
step of the graph in a process that holds ONNX Runtime and no torch, and what the system charged that process. This is a
computer's CPU: it says nothing about a phone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import common

KINDS, LAYOUTS = ("linear", "softmax"), ("reference", "channels-first")
GRIDS, TINY_GRIDS = ((3, 11, 20), (3, 17, 30), (3, 23, 40), (3, 34, 60)), ((2, 2, 4), (2, 4, 8))
TINY = {"in_channels": 8, "out_channels": 8, "hidden_size": 48, "num_attention_heads": 4}
EXPORT_SECONDS = 900


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="how often each layer is measured (default: 7; tiny: 2)")
    parser.add_argument("--steps", type=int, help="steps of the network that are timed (default: 3; tiny: 1)")
    parser.add_argument("--skip-network", action="store_true")
    asked = common.parsed(parser, arguments)
    grids, rounds, steps = (TINY_GRIDS, 2, 1) if asked.tiny else (GRIDS, 7, 3)
    rounds, steps = asked.rounds or rounds, asked.steps or steps
    threads = asked.threads or len(os.sched_getaffinity(0))
    record = common.Record("seconds of MobileI2V's network and attention layers through ONNX Runtime", asked, __file__)
    results: dict[str, Any] = {}
    for part in ("layers", "operators"):
        results[part] = child("layers", asked.tiny, threads, rounds, grids, part == "operators")
        results[f"exponents of {part}"] = {kind: exponents(results[part][kind]) for kind in KINDS}
    print(results, flush=True)
    if not asked.skip_network:
        grid = grids[0] if asked.tiny else (3, 23, 40)
        results["network"] = {layout: network(asked.tiny, threads, steps, grid, layout) for layout in LAYOUTS}
    settings = {"threads": threads, "rounds": rounds, "steps": steps, "grids": grids, "weights": "random, float32"}
    record.finish(settings, results)


def child(part: str, *told: Any) -> Any:
    """What ``part``, a function below, gives in a fresh process."""
    command = [sys.executable, __file__, part, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EXPORT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{part} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def network(tiny: bool, threads: int, steps: int, grid: Sequence[int], layout: str) -> dict[str, Any]:
    """Export in one process, run in another."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "denoiser.onnx")
        return child("export", path, tiny, grid, layout) | child("step", path, threads, steps)


def exponents(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Slope of log seconds over log tokens: of all rows by least squares, and between neighbors."""
    points = [(log(row["tokens"]), log(row["best"])) for row in rows]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    between = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    return {"fitted": round(slope, 3), "between": [round(value, 3) for value in between]}


# -- in children ----------------------------------------------------------------------------------------------------


def layers(tiny: bool, threads: int, rounds: int, grids: Sequence[Sequence[int]], alone: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    share_memory()
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            (kind, tuple(grid)): layer(Path(folder), kind, grid, (tiny, alone), threads)
            for kind in KINDS
            for grid in grids
        }
        seconds: dict[Any, list[float]] = {key: [] for key in calls}
        for number in range(rounds + 1):
            for key, call in calls.items():
                begin = time.perf_counter()
                call()
                if number:  # the first round warms up
                    seconds[key].append(time.perf_counter() - begin)
    return {kind: [row_of(grid, seconds[kind, tuple(grid)]) for grid in grids] for kind in KINDS}


def row_of(grid: Sequence[int], seconds: list[float]) -> dict[str, float]:
    middle = sorted(seconds)[len(seconds) // 2]
    return {"tokens": grid[0] * grid[1] * grid[2], "best": round(min(seconds), 6), "median": round(middle, 6)}


def layer(folder: Path, kind: str, grid: Sequence[int], size: tuple[bool, bool], threads: int) -> Callable[[], Any]:
    """A call of one attention layer's graph, or of its attention ``alone``; ``size``: (tiny, alone)."""
    import torch

    from swifti2v.models.channels_first import ReferenceLayout

    (tiny, alone), (t, h, w) = size, grid
    whole = ReferenceLayout(model_of(tiny, (kind,)), (t, h, w), range(t), 1)
    attention = whole.model.blocks[0].attn

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return whole._attended(attention, x)

    class Operator(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.attend(q, k, v, h * w)

    path, width = str(folder / f"{kind}-{h}.onnx"), whole.model.config.hidden_size
    if alone:
        heads = torch.randn(3, 1, t * h * w, attention.heads, width // attention.heads)
        written(Operator(), tuple(heads), path)
    else:
        written(Layer(), (torch.randn(1, t, h * w, width),), path)
    return opened(path, threads, shared=True)


def export(path: str, tiny: bool, grid: Sequence[int], layout: Any) -> dict[str, Any]:
    import torch

    from swifti2v.models.channels_first import exportable

    begin, (t, h, w) = time.monotonic(), grid
    model = model_of(tiny)
    module = exportable(model, (t, h, w), layout=layout, equations="onnx")
    given = (torch.randn(1, model.config.in_channels, t, h, w), torch.ones(1), torch.ones(1))
    written(module, given, path)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "export_seconds": round(time.monotonic() - begin, 1)}


def model_of(tiny: bool, pattern: tuple[str, ...] = ()) -> Any:
    """The published shape, or a toy, with random weights; ``pattern``: kinds of attention if not the published ones."""
    from swifti2v.models.mobile_dit import MobileTransformer3DModel

    given: dict[str, Any] = dict(TINY, attention_pattern=("linear", "softmax")) if tiny else {}
    if pattern:
        given["attention_pattern"] = pattern
    return MobileTransformer3DModel(**given).eval().requires_grad_(False)


def written(module: Any, examples: tuple[Any, ...], path: str) -> None:
    """As ``swifti2v.export.onnx.trace`` writes it, without its second copy in memory."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), examples, path, dynamo=False, opset_version=17)


def step(path: str, threads: int, steps: int) -> dict[str, Any]:
    """Seconds of one call, the best and the middle of ``steps``, and peak RSS; no torch in this process."""
    begin = time.monotonic()
    call, seconds = opened(path, threads), []
    call()
    ready = time.monotonic() - begin
    for _ in range(steps):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    assert "torch" not in sys.modules
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * common._KILOBYTE
    row = {"best": round(min(seconds), 4), "median": round(sorted(seconds)[len(seconds) // 2], 4)}
    size = common.megabytes(Path(path).stat().st_size)
    return row | {"first_with_loading": round(ready, 1), "peak_mb": common.megabytes(peak), "file_mb": size}


def opened(path: str, threads: int, shared: bool = False) -> Callable[[], Any]:
    """A call of the graph at ``path`` with random inputs (0.5 for those that are one number)."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if shared:
        options.add_session_config_entry("session.use_env_allocators", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    given = {
        value.name: draw.standard_normal(value.shape, np.float32) if len(value.shape) > 1 else np.full(1, 0.5, "f4")
        for value in session.get_inputs()
    }
    return lambda: session.run(None, given)


def share_memory() -> None:
    """One arena for all layers, which grows by what is asked for: softmax over 6,120 tokens takes gigabytes."""
    import onnxruntime

    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(0, 1, -1, -1))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("layers", "export", "step"):
        print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))), flush=True)
    else:
        main()
