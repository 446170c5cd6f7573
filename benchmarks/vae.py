"""What does the VAE of 2K cost alone, and what do its exact fast paths gain?

    python benchmarks/vae.py --record                    # Wan2.2's, 17 frames of 2560x1408, encode and decode
    python benchmarks/vae.py --vae wan2.1 --record       # Stage I's, of 640x352
    python benchmarks/vae.py --tiny                      # seconds, on a CPU too

Variants, each beside the plain path in the same run: ``channels_last_3d``, compiled region by region (the blocks of
encoder and decoder), both, in exact halo tiles (``tiled``), and these with their caches on the host
(``tiled_parked``). Seconds, GiB above the weights (the frames, which stay on the device, among them), the share of the
floor (counted FLOPs at the rate of a matrix product in this run), and the largest difference from the plain path's
result, relative to its largest value. Random weights.
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

from swifti2v.core import Size
from swifti2v.models.causal_vae import StreamingVAE, WanStreamingVAE, decode_stream, encode_stream
from swifti2v.models.vae_layout import channels_last, compiled

SIZES = {"wan2.1": "640x352", "wan2.2": "2560x1408"}
CHUNK_BLOCKS = 3  # decoded together, as the pipeline does with a segment


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.gpu_parser(__doc__)
    parser.add_argument("--vae", choices=list(SIZES), default="wan2.2")
    parser.add_argument("--size", help="default: 2560x1408, of wan2.1 640x352; tiny: 64x64")
    parser.add_argument("--num-frames", type=int, help="default: 17; tiny: 5")
    parser.add_argument("--tiles", default="2x4", help="ROWSxCOLUMNS of the tiled encoder and decoder")
    parser.add_argument("--rounds", type=int, help="how often each is timed (default: 3; tiny: 1)")
    parser.add_argument("--only", nargs="+", help="these variants; to compile takes minutes")
    asked = common.parsed(parser, arguments)
    machine = gpu.Machine.of(asked)
    record = common.Record("seconds and GiB of the VAE alone, and of its exact fast paths", asked, __file__)
    size = Size.parse(asked.size or ("64x64" if asked.tiny else SIZES[asked.vae]))
    frames, rounds = asked.num_frames or (5 if asked.tiny else 17), asked.rounds or (1 if asked.tiny else 3)
    vae = gpu.made(machine, partial((gpu.vae_two if asked.vae == "wan2.2" else gpu.vae_one), asked.tiny))
    rate = gpu.product_rate(machine)
    with gpu.many_graphs():
        chosen = variants(machine, vae, asked)
        pixels = machine.random(1, 3, frames, size.height, size.width).clamp_(-1, 1)
        encoders = {name: encoding(stream, pixels) for name, stream in chosen.items()}
        results = {"encode": gpu.beside_plain(machine, encoders, rounds, rate)}
        del pixels
        latents = list(gpu.latent_blocks(machine, vae.config.z_dim, (frames + 3) // 4, latent_size(vae, size)))
        decoders = {name: decoding(stream, latents) for name, stream in chosen.items()}
        results["decode"] = gpu.beside_plain(machine, decoders, rounds, rate)
    settings = {"vae": asked.vae, "size": str(size), "num_frames": frames, "rounds": rounds, "tiles": asked.tiles}
    settings |= {"dtype": str(machine.dtype).removeprefix("torch."), "compiler": machine.compiler, "weights": "random"}
    record.finish(settings, {"product_tflop_per_second": round(rate / 1e12, 3), **results})


def variants(machine: gpu.Machine, vae: Any, asked: argparse.Namespace) -> dict[str, StreamingVAE]:
    """The VAE plain and in every other way; those with weights of another layout have a copy."""
    rows, columns = map(int, asked.tiles.split("x"))
    makers: dict[str, Callable[[], StreamingVAE]] = {
        "plain": lambda: WanStreamingVAE(vae),
        "channels_last_3d": lambda: WanStreamingVAE(channels_last(copy.deepcopy(vae))),
        "compiled": lambda: WanStreamingVAE(compiled(copy.deepcopy(vae), machine.compiler)),
        "channels_last_compiled": lambda: WanStreamingVAE(
            compiled(channels_last(copy.deepcopy(vae)), machine.compiler)
        ),
        "tiled": lambda: WanStreamingVAE(vae, tiles=(rows, columns), encoder_tiles=(rows, columns)),
        "tiled_parked": lambda: WanStreamingVAE(
            vae, (rows, columns), cache_device="cpu", encoder_tiles=(rows, columns), encoder_cache_device="cpu"
        ),
    }
    wanted = {"plain", *(asked.only or makers)}
    if wanted - makers.keys():
        raise SystemExit(f"not known: {sorted(wanted - makers.keys())}; known: {list(makers)}")
    return {name: make() for name, make in makers.items() if name in wanted}


def latent_size(vae: Any, size: Size) -> tuple[int, int]:
    stride = WanStreamingVAE(vae).spatial_stride
    return size.height // stride, size.width // stride


def encoding(stream: StreamingVAE, pixels: Tensor) -> Callable[[], Tensor]:
    def encode() -> Tensor:
        return torch.cat(list(encode_stream(stream, pixels.split(4 * CHUNK_BLOCKS, dim=2))), dim=2)

    return encode


def decoding(stream: StreamingVAE, latents: Sequence[Tensor]) -> Callable[[], Tensor]:
    chunks = [latents[0], *(torch.cat(latents[k : k + CHUNK_BLOCKS], 2) for k in range(1, len(latents), CHUNK_BLOCKS))]

    def decode() -> Tensor:
        return torch.cat(list(decode_stream(stream, iter(chunks))), dim=2)

    return decode


if __name__ == "__main__":
    main()
