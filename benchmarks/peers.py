"""How does diffusers' own pipeline do on the same work: TI2V-5B at 2K in one piece, and its VAE in one shot?

    python benchmarks/peers.py --record          # 81 frames 2560x1408, 4 steps, no guidance
    python benchmarks/peers.py --tiny            # seconds, on a CPU too

Denoise: ``WanImageToVideoPipeline`` up to its latents (photo encoded, all blocks in one window, a timestep a token)
beside our ``refine`` with the same weights, widened by zeros: in one window too, and segment by segment (M=3 N=1). Ours
is given random reference latents. Decode: ``vae.decode`` in one shot beside our stream, whole and in exact tiles, whose
chunks are dropped as a writer would. All in turn in one run; ``ratio`` is the peer's seconds over ours (above 1: ours
is faster). ``equal``: the decoded pixels of the first two chunks. Random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import common
import gpu
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from torch import Tensor

from swifti2v import costs, flow
from swifti2v.core import Size
from swifti2v.images import read_image
from swifti2v.models.causal_vae import StreamingVAE, WanStreamingVAE, decode_stream, encode_stream
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.reference import fit_image
from swifti2v.segments import CSG, windows
from swifti2v.stage_two import Sampling, dit_velocity, refine

SHIFT, TRAINED_BLOCKS, CHUNK_BLOCKS = 5.0, 21, 3
Call = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.gpu_parser(__doc__)
    parser.add_argument("--size", help="default: 2560x1408; tiny: 64x64")
    parser.add_argument("--num-frames", type=int, help="default: 81; tiny: 17")
    parser.add_argument("--steps", type=int, help="default: 4; tiny: 2")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is timed")
    parser.add_argument("--tiles", default="2x4", help="ROWSxCOLUMNS of the tiled decoder")
    asked = common.parsed(parser, arguments)
    machine = gpu.Machine.of(asked)
    record = common.Record("diffusers' own pipeline and VAE beside ours on the same work", asked, __file__)
    work = Work(
        machine,
        Size.parse(asked.size or ("64x64" if asked.tiny else "2560x1408")),
        asked.num_frames or (17 if asked.tiny else 81),
        asked.steps or (2 if asked.tiny else 4),
    )
    vae = gpu.made(machine, partial(gpu.vae_two, asked.tiny))
    results = {"denoise": denoise(work, vae, asked)}
    machine.tidy()
    results["decode"] = decode(work, vae, asked)
    settings = {"size": str(work.size), "num_frames": work.num_frames, "steps": work.steps, "rounds": asked.rounds}
    settings |= {"dtype": str(machine.dtype).removeprefix("torch."), "tiles": asked.tiles, "weights": "random"}
    record.finish(settings, results)


@dataclass(frozen=True)
class Work:
    """The clip that both sides make."""

    machine: gpu.Machine
    size: Size
    num_frames: int
    steps: int

    @property
    def blocks(self) -> int:
        return (self.num_frames + 3) // 4


def in_turn(work: Work, calls: dict[str, Call], flops: dict[str, int], rounds: int) -> dict[str, dict[str, Any]]:
    """Rows; the first call is the peer. One that the machine refuses (memory) has the reason in ``skipped``."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "flops": flops[name]} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if "skipped" in rows[name]:
                continue
            try:
                measured = gpu.timed(work.machine, call)
            except gpu.REFUSALS as error:
                rows[name] = {"skipped": gpu.reason(error)}
                continue
            rows[name]["seconds"].append(round(measured.seconds, 4))
            rows[name]["gib"] = max(rows[name].get("gib", 0.0), gpu.gib(measured.bytes))
            del measured
    peer = next(iter(rows.values())).get("seconds")
    for row in rows.values():
        if "skipped" not in row:
            row["tflop_per_second"] = round(row["flops"] / min(row["seconds"]) / 1e12, 3)
            row["ratio"] = round(min(peer) / min(row["seconds"]), 3) if peer else None
    return rows


# -- denoise --------------------------------------------------------------------------------------------------------


def denoise(work: Work, vae: Any, asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    base = gpu.made(work.machine, partial(gpu.base_dit, asked.tiny))
    widened = SwiftI2VTransformer3DModel.from_wan(base, base.config.out_channels)
    text = gpu.text_states(work.machine, base)
    side = WanStreamingVAE(vae).spatial_stride * base.config.patch_size[2]
    for call in denoisers(Work(work.machine, Size(4 * side, 2 * side), 17, 1), base, widened, vae, text).values():
        call()  # libraries load
    tokens = work.size.area // side**2
    stock, ours = gpu.dit_cost(base, text.shape[1]), gpu.dit_cost(widened, text.shape[1])
    passes = (
        stock.flops(work.blocks, tokens),
        ours.flops(work.blocks, tokens),
        sum(ours.flops(len(window.blocks), tokens) for window in windows(work.blocks)),
    )
    calls = denoisers(work, base, widened, vae, text)
    flops = {name: work.steps * count for name, count in zip(calls, passes, strict=True)}
    return in_turn(work, calls, flops, asked.rounds)


def denoisers(work: Work, base: Any, widened: Any, vae: Any, text: Tensor) -> dict[str, Call]:
    """Latents of the clip from a photo and text states, by either side."""
    photo = fit_image(read_image(common.PHOTO).pixels, work.size).to(work.machine.device)
    latent = [size // WanStreamingVAE(vae).spatial_stride for size in (work.size.height, work.size.width)]

    def segment_by_segment(csg: CSG) -> None:
        anchor = encode_stream(WanStreamingVAE(vae), [photo])
        later = gpu.latent_blocks(work.machine, vae.config.z_dim, work.blocks - 1, latent)
        velocity = dit_velocity(widened, text, csg, trained_blocks=TRAINED_BLOCKS)
        sampling = Sampling(flow.sigmas(work.steps, SHIFT), 1, csg)
        cut = windows(work.blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks)
        for segment in refine(velocity, chain(anchor, later), cut, sampling):
            del segment

    return {
        "diffusers, one window": partial(theirs, work, base, vae, text, photo),
        "ours, one window": partial(segment_by_segment, CSG(segment_blocks=work.blocks - 1, neighbor_blocks=0)),
        "ours, M=3 N=1": partial(segment_by_segment, CSG()),
    }


def theirs(work: Work, base: Any, vae: Any, text: Tensor, photo: Tensor) -> Tensor:
    """diffusers' pipeline as it comes, for TI2V-5B; without guidance, as ours."""
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=base,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=(photo[:, :, 0] + 1) / 2,
        prompt_embeds=text,
        height=work.size.height,
        width=work.size.width,
        num_frames=work.num_frames,
        num_inference_steps=work.steps,
        guidance_scale=1.0,
        output_type="latent",
        return_dict=False,
    )[0]


# -- decode ---------------------------------------------------------------------------------------------------------


def decode(work: Work, vae: Any, asked: argparse.Namespace) -> dict[str, Any]:
    rows, columns = map(int, asked.tiles.split("x"))
    whole, tiled = WanStreamingVAE(vae), WanStreamingVAE(vae, tiles=(rows, columns))
    size = [side // whole.spatial_stride for side in (work.size.height, work.size.width)]
    latents = torch.cat(list(gpu.latent_blocks(work.machine, whole.latent_channels, work.blocks, size)), dim=2)
    start = latents[:, :, : 1 + CHUNK_BLOCKS]
    with torch.no_grad():
        expected = one_shot(vae, whole, start)
        equal = {
            "ours, streamed": gpu.difference(expected, torch.cat(list(streamed(whole, start)), dim=2)),
            "ours, tiled": gpu.difference(expected, torch.cat(list(streamed(tiled, start)), dim=2)),
        }
        del expected
    calls: dict[str, Call] = {
        "vae.decode, one shot": partial(one_shot, vae, whole, latents),
        "ours, streamed": lambda: consumed(streamed(whole, latents)),
        "ours, tiled": lambda: consumed(streamed(tiled, latents)),
    }
    if asked.tiny:
        flops = gpu.counted(calls["vae.decode, one shot"])[0]
    else:
        flops = costs.WAN22_VAE.decode_flops(size[0] * size[1], work.blocks)
    found = in_turn(work, calls, dict.fromkeys(calls, flops), asked.rounds)
    return {name: row | equal.get(name, {}) for name, row in found.items()}


def one_shot(vae: Any, stream: StreamingVAE, latents: Tensor) -> Tensor:
    """diffusers' own call on normalized latents."""
    mean, std = (x.to(latents).view(1, -1, 1, 1, 1) for x in (stream.latents_mean, stream.latents_std))
    return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0].float()


def streamed(stream: StreamingVAE, latents: Tensor) -> Iterator[Tensor]:
    first, later = latents[:, :, :1], latents[:, :, 1:]
    return decode_stream(stream, iter([first, *later.split(CHUNK_BLOCKS, dim=2)]))


def consumed(chunks: Iterator[Tensor]) -> None:
    for chunk in chunks:
        del chunk


if __name__ == "__main__":
    main()
