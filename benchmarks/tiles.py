"""Does the exactly tiled VAE give the same pixels for less memory?

    python benchmarks/tiles.py --record                  # Wan2.2's VAE with an eighth of its channels, 640x640, float32
    python benchmarks/tiles.py --size 1024x1024 --tiles 2x3
    python benchmarks/tiles.py --tiny                    # seconds

Encode and decode of 9 frames, whole and in tiles, each in a fresh process with the same random weights, on the CPU.
``equal`` and ``max_difference``: of what both give. ``live_mb``: tensors alive at once; ``rss_mb``: what the system
charged the process above what it held before; ``planned_mb``: the closed form of ``costs_tiles``, without the clip
itself. ``ratio``: tiled over whole; ``planned_flops``: what halos should add. 1 MB is 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from swifti2v.core import Size
from swifti2v.costs_tiles import Cut, Job, TilePlan, decode_plan, encode_plan, whole_decode, whole_encode
from swifti2v.costs_wan_vae import WanVAEShape

FRAMES, STRIDE, CHANNELS = 9, 16, 48
SPLIT = 2  # the decoder's last two levels in tiles, the encoder's first two


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", help="default: 640x640; tiny: 96x64")
    parser.add_argument("--base", type=int, help="channels of the encoder's first level, 160 in Wan2.2 (default: 20)")
    parser.add_argument("--tiles", default="2x2", help="ROWSxCOLUMNS")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = common.parsed(parser, arguments)
    asked.base = asked.base or (8 if asked.tiny else 20)
    size = Size.parse(asked.size or ("96x64" if asked.tiny else "640x640"))
    if asked.child:
        for told in json.loads(asked.child):
            measured(asked, size, **told)
        return
    record = common.Record("pixels and memory of the exactly tiled VAE against the whole one", asked, __file__)
    rows, columns = map(int, asked.tiles.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        results = compared(asked, size, (rows, columns), Path(folder))
    settings = {"size": str(size), "num_frames": FRAMES, "base": asked.base, "tiles": asked.tiles, "split": SPLIT}
    record.finish({**settings, "dtype": "float32", "weights": "random"}, results)


def compared(asked: argparse.Namespace, size: Size, tiles: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Encode and decode: whole, in tiles, and what lies between."""
    names = {"whole": None, "tiled": tiles}
    cases = [
        {"verb": verb, "tiles": cut, "out": str(folder / f"{verb}-{name}.pt")}
        for verb in ("encode", "decode")
        for name, cut in names.items()
    ]
    # At toy size one process does it all: to start one takes longer, and its size says nothing.
    groups = [cases] if asked.tiny else [[case] for case in cases]
    measurements = iter([row for group in groups for row in child(asked, size, group)])
    results: dict[str, Any] = {}
    for verb in ("encode", "decode"):
        plans = {name: planned(asked.base, size, verb, cut) for name, cut in names.items()}
        runs = {
            name: next(measurements) | {"planned_mb": common.megabytes(plan.device_bytes)}
            for name, plan in plans.items()
        }
        ratio = {key: round(value / (runs["whole"][key] or 1), 3) for key, value in runs["tiled"].items()}
        results[verb] = {**runs, "ratio": ratio, "planned_flops": round(plans["tiled"].flops_factor, 3)}
        # Torch is imported only here, after the last child: see benchmarks/README.md, "Adding one".
        results[verb] |= difference(*(folder / f"{verb}-{name}.pt" for name in names))
    return results


def planned(base: int, size: Size, verb: str, tiles: tuple[int, int] | None) -> TilePlan:
    """The closed form of one call of the stream, which passes one block."""
    shape = WanVAEShape(base, base * 8 // 5, CHANNELS, 12, 2, residual=True)
    job = Job(shape, size.height // STRIDE, size.width // STRIDE, blocks=1, itemsize=4)
    if tiles is None:
        return whole_decode(job) if verb == "decode" else whole_encode(job)
    cut = Cut(*tiles, SPLIT)
    return decode_plan(job, cut) if verb == "decode" else encode_plan(job, cut)


def child(asked: argparse.Namespace, size: Size, told: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Measurements in a process of their own."""
    command = [sys.executable, __file__, "--size", str(size), "--base", str(asked.base), "--child", json.dumps(told)]
    if asked.threads is not None:
        command += ["--threads", str(asked.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the child ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for case, row in zip(told, rows, strict=True):
        print(case["verb"], case["tiles"], row, flush=True)
    return rows


def measured(asked: argparse.Namespace, size: Size, verb: str, tiles: list[int] | None, out: str) -> None:
    """In the child: run, save what came out, print what it took as a JSON line."""
    import torch
    from diffusers import AutoencoderKLWan

    from swifti2v import meters
    from swifti2v.models.causal_vae import WanStreamingVAE

    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"base_dim": asked.base, "decoder_base_dim": asked.base * 8 // 5, "z_dim": CHANNELS}
    shape |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(**shape, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS).eval()
    cut = None if tiles is None else (tiles[0], tiles[1])
    stream = WanStreamingVAE(vae, tiles=cut, split=SPLIT, encoder_tiles=cut, encoder_split=SPLIT)
    if verb == "encode":
        step: Any = stream.encode_chunk
        frames = torch.rand(1, 3, FRAMES, size.height, size.width) * 2 - 1
        chunks = frames.split([1] + [4] * (FRAMES // 4), dim=2)
    else:  # not clamped: random weights overshoot, and clamping would hide a difference
        step, latent = stream.decode_chunk, (size.height // STRIDE, size.width // STRIDE)
        chunks = torch.randn(1, CHANNELS, (FRAMES + 3) // 4, *latent).split(1, dim=2)
    parts, state = [], None
    meters.reset_peak_rss()
    before, begin, begin_cpu = meters.current_rss(), time.perf_counter(), time.process_time()
    with meters.LiveBytes() as live:
        for chunk in chunks:
            part, state = step(chunk, state)
            parts.append(part)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    row = {"live_mb": common.megabytes(live.peak), "rss_mb": common.megabytes(meters.peak_rss() - before)}
    torch.save(torch.cat(parts, dim=2), out)
    print(json.dumps({**row, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}))


def difference(whole: Path, tiled: Path) -> dict[str, Any]:
    """Whether both files hold the same bits, and how far they lie apart."""
    import torch

    expected, found = (torch.load(path, weights_only=True) for path in (whole, tiled))
    return {
        "equal": bool(torch.equal(expected, found)),
        "max_difference": float((expected - found).abs().max()),
        "largest": float(expected.abs().max()),
    }


if __name__ == "__main__":
    main()
