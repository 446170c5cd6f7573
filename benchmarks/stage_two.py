"""What does Stage II's transformer cost, which of its fast paths pay, and is its memory flat in the clip's length?

    python benchmarks/stage_two.py --part backends --record
    python benchmarks/stage_two.py --tiny                     # all parts in seconds, on a CPU too

Parts, by the library's own functions and names. ``backends``: every attention kernel (``attention``). ``compiled``: the
repeated layers (``compiling``). ``quantized``: every kind of 8 bits, compiled as it has to be (``quantize``).
``reference``: its tokens once a segment of four steps against in each. ``modulation``: a noise level a block against
one a token. Each of these calls one window of M=3 N=1, the variant beside plain in one run (ratio above 1: faster),
with its difference from plain's velocity. ``windows``: seconds of a clip over M and N. ``length``: peak bytes over
frames, wanted within 2 % of one another. The last two run ``refine`` with one step a segment, and on a CPU count the
bytes of live tensors. Random weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import gpu
import torch
from torch import Tensor

from swifti2v.attention import NAMES, NATIVE, AttentionChoice, probe, use_attention
from swifti2v.compiling import compile_blocks
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.quantize import KINDS, check_quantization, quantize
from swifti2v.segments import CSG, Window, windows
from swifti2v.stage_two import Sampling, Velocity, dit_velocity, refine

SWEEP = ((3, 1), (1, 1), (2, 1), (4, 1), (5, 1), (3, 0), (3, 2), (5, 2), (20, 0))
TINY_SWEEP = ((3, 1), (1, 1), (3, 0))
FLAT_WITHIN = 0.02
TRAINED_BLOCKS = 21
STEPS = (1.0, 0.75, 0.5, 0.25)
ELSEWHERE = "its kernel comes from a hub: nothing is downloaded here"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.gpu_parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--latent", type=int, nargs=2, help="height and width of a block (default: 88 160; tiny: 8 16)")
    parser.add_argument("--frames", type=int, nargs="+", help="of part length (default: 81 161 321; tiny: 33 65 129)")
    parser.add_argument("--rounds", type=int, help="how often each is timed (default: 3; tiny: 1)")
    asked = common.parsed(parser, arguments)
    asked.latent = tuple(asked.latent or ((8, 16) if asked.tiny else (88, 160)))
    asked.frames = asked.frames or ([33, 65, 129] if asked.tiny else [81, 161, 321])
    asked.rounds = asked.rounds or (1 if asked.tiny else 3)
    machine = gpu.Machine.of(asked)
    record = common.Record("cost of Stage II's transformer and of its variants", asked, __file__)
    bench = Bench(machine, gpu.made(machine, partial(gpu.stage_two_dit, asked.tiny)), asked)
    with gpu.many_graphs():
        results = {part: PARTS[part](bench) for part in asked.part}
    settings = {"latent": asked.latent, "rounds": asked.rounds, "compiler": machine.compiler, "weights": "random"}
    settings |= {"dtype": str(machine.dtype).removeprefix("torch."), "product_tflop_per_second": bench.tflops}
    record.finish(settings, results)


class Bench:
    """The network, and one window of M=3 N=1 to call it with."""

    def __init__(self, machine: gpu.Machine, network: SwiftI2VTransformer3DModel, asked: argparse.Namespace) -> None:
        self.machine, self.network, self.asked = machine, network, asked
        config: Any = network.config
        self.channels, self.reference_channels = config.out_channels, config.in_channels - config.out_channels
        self.text = gpu.text_states(machine, network)
        self.rate = gpu.product_rate(machine)
        self.tflops = round(self.rate / 1e12, 3)
        self.window = list(windows(TRAINED_BLOCKS))[1]
        blocks = len(self.window.blocks)
        self.x = machine.random(1, self.channels, blocks, *asked.latent)
        self.reference = machine.random(1, self.reference_channels, blocks, *asked.latent, seed=1)

    def call(self, network: SwiftI2VTransformer3DModel) -> Callable[[], Tensor]:
        """One velocity of the window, as the pipeline asks for it."""
        velocity = dit_velocity(network, self.text, CSG(), trained_blocks=TRAINED_BLOCKS)
        return lambda: velocity(self.x, 0.5, self.window, self.reference)

    def twin(self) -> SwiftI2VTransformer3DModel:
        """The same weights, not copied, in modules of their own."""
        return SwiftI2VTransformer3DModel.from_wan(self.network, reference_channels=0)

    def beside(self, calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        plain: dict[str, Callable[[], Any]] = {"plain": self.call(self.network)}
        return gpu.beside_plain(self.machine, plain | calls, self.asked.rounds, self.rate)


def backends(bench: Bench) -> dict[str, Any]:
    """Plain is torch's own choice of kernel. What the library refuses is not tried, with its reason."""
    machine, width = bench.machine, bench.network.config.attention_head_dim
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, Any] = {}
    for name in sorted({*NAMES} - {NATIVE}):
        reason = ELSEWHERE if "_hub" in name else probe(name, machine.device, machine.dtype, width)
        if reason is not None:
            refused[name] = {"skipped": reason}
            continue
        network = bench.twin()
        use_attention([network], AttentionChoice(name, "to be timed"))
        calls[name] = bench.call(network)
    return bench.beside(calls) | refused


def compiled(bench: Bench) -> dict[str, Any]:
    """The repeated layer compiled once, for every layer and for windows of every length."""
    network = bench.twin()
    compile_blocks(network, bench.machine.compiler)
    return bench.beside({"compiled": bench.call(network)})


def quantized(bench: Bench) -> dict[str, Any]:
    """The blocks in 8 bits and compiled, as it has to be; each kind holds weights of its own."""
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, Any] = {}
    for kind in KINDS:
        try:
            check_quantization(kind, bench.machine.device, bench.machine.dtype)
            network = copy.deepcopy(bench.network)
            quantize(network, kind)
        except gpu.REFUSALS as error:
            refused[kind] = {"skipped": gpu.reason(error)}
            continue
        compile_blocks(network, bench.machine.compiler)
        calls[kind] = bench.call(network)
    return bench.beside(calls) | refused


def reference(bench: Bench) -> dict[str, Any]:
    """A segment of ``STEPS``: plain embeds latents and reference together in each, the other the reference once."""
    velocity = dit_velocity(bench.network, bench.text, CSG(), trained_blocks=TRAINED_BLOCKS)

    def last(once: Callable[[], Velocity]) -> Tensor:
        called = once()
        return [called(bench.x, sigma, bench.window, bench.reference) for sigma in STEPS][-1]

    calls = {"plain": lambda: last(lambda: velocity), "once a segment": lambda: last(velocity.for_segment)}
    return gpu.beside_plain(bench.machine, calls, bench.asked.rounds, bench.rate)


def modulation(bench: Bench) -> dict[str, Any]:
    """Plain says a noise level once a block, "per token" once a token, as diffusers' own layer wants it."""
    _, p, q = bench.network.config.patch_size
    height, width = bench.asked.latent
    sigmas = torch.tensor([bench.window.sigmas(0.5, CSG())], device=bench.machine.device) * 1000
    positions = torch.tensor(bench.window.positions("clamped", TRAINED_BLOCKS), device=bench.machine.device)

    def per_token() -> Tensor:
        return bench.network(
            hidden_states=bench.x.to(bench.machine.dtype),
            timestep=sigmas.repeat_interleave((height // p) * (width // q), dim=1),
            encoder_hidden_states=bench.text,
            reference_hidden_states=bench.reference.to(bench.machine.dtype),
            frame_indices=positions,
            return_dict=False,
        )[0].float()

    return bench.beside({"per token": per_token})


def sweep(bench: Bench) -> dict[str, Any]:
    """Rows by M and N, with the closed-form FLOPs of one step over the clip; ``ratio`` beside M=3 N=1."""
    num_blocks = 5 if bench.asked.tiny else TRAINED_BLOCKS
    rows = {}
    for m, n in TINY_SWEEP if bench.asked.tiny else SWEEP:
        rows[f"M={m} N={n}"] = clip(bench, num_blocks, CSG(segment_blocks=m, neighbor_blocks=n))
    first = rows["M=3 N=1"]["seconds"]
    return {name: row | {"ratio": round(first / row["seconds"], 3)} for name, row in rows.items()}


def length(bench: Bench) -> dict[str, Any]:
    """Rows by frames, and whether the peaks lie together."""
    rows = [{"num_frames": n} | clip(bench, (n + 3) // 4, CSG()) for n in bench.asked.frames]
    peaks = [row["peak_bytes"] for row in rows]
    return {"clips": rows, "met": max(peaks) <= (1 + FLAT_WITHIN) * min(peaks)}


def clip(bench: Bench, num_blocks: int, csg: CSG) -> dict[str, Any]:
    """Seconds of ``refine`` over a clip whose reference is drawn as it is pulled; segments are dropped."""
    plan = list(windows(num_blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks))
    velocity = dit_velocity(bench.network, bench.text, csg, trained_blocks=TRAINED_BLOCKS)

    def run(cut: Sequence[Window]) -> None:
        reference = gpu.latent_blocks(bench.machine, bench.reference_channels, num_blocks, bench.asked.latent)
        for segment in refine(velocity, reference, cut, Sampling((1.0, 0.0), 1, csg)):
            del segment

    run(plan[:1])  # warms up
    measured = gpu.timed(bench.machine, partial(run, plan))
    tokens = bench.x[0, 0, 0].numel() // (bench.network.config.patch_size[1] * bench.network.config.patch_size[2])
    cost = gpu.dit_cost(bench.network, bench.text.shape[1])
    flops = sum(cost.flops(len(window.blocks), tokens) for window in plan)
    return {
        "segments": len(plan),
        "longest_window_tokens": max(len(window.blocks) for window in plan) * tokens,
        "seconds": round(measured.seconds, 5),
        "peak_bytes": measured.bytes if bench.machine.cuda else gpu.live_bytes(partial(run, plan)),
        "flops": flops,
        "tflop_per_second": round(flops / measured.seconds / 1e12, 3),
        "floor_share": round(flops / bench.rate / measured.seconds, 4),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "backends": backends,
    "compiled": compiled,
    "quantized": quantized,
    "reference": reference,
    "modulation": modulation,
    "windows": sweep,
    "length": length,
}

if __name__ == "__main__":
    main()
