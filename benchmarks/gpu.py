"""What the benchmarks of a GPU share: Wan's networks with random weights made where they run, clocks, comparisons.

Each network exists as its tiny twin (``swifti2v.tiny``, float32) and at its true size (bfloat16, the parts that the
class keeps in float32 in float32). Nothing is read from a file. This module knows no question.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from costs import WAN22_VAE, dit_config
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from swifti2v import costs, meters, tiny
from swifti2v.costs import WanDiTCost
from swifti2v.models.text import nano_tokenizer
from swifti2v.models.wan import SwiftI2VTransformer3DModel

GIB = 2**30
# How a library says that something is not there or does not run here; anything else is a fault of the benchmark.
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError)
UMT5 = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
CLIP = CLIPVisionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
)


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs. Peaks are of the allocator on CUDA, of the process (RSS) on a CPU."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, asked: argparse.Namespace) -> Machine:
        """What ``--device``, ``--tiny`` and ``--threads`` say."""
        if asked.threads is not None:
            torch.set_num_threads(asked.threads)
        device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cpu" and not asked.tiny:
            raise SystemExit("the true size needs a CUDA device; on a CPU use --tiny")
        return cls(device, torch.float32 if asked.tiny else torch.bfloat16)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until everything asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            meters.reset_peak_rss()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else meters.peak_rss()

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.cuda else meters.current_rss()

    def tidy(self) -> None:
        """Give the device's unused memory back (on a CPU it would only take time)."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def compiler(self) -> str:
        """torch.compile's backend: on a CPU only the graphs are tried."""
        return "inductor" if self.cuda else "eager"

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        draw = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=draw, device=self.device, dtype=dtype)


# -- networks -------------------------------------------------------------------------------------------------------


def made(machine: Machine, network: Callable[[], Any]) -> Any:
    """``network()`` with its own random weights, drawn on the device in the benchmark's dtype."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    try:
        with torch.device(machine.device):
            module = network()
    finally:
        torch.set_default_dtype(before)
    kept = getattr(module, "_keep_in_fp32_modules", None) or () if hasattr(module, "register_to_config") else ()
    for name, parameter in module.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    return module.to(machine.device).eval().requires_grad_(False)


def dit_cost(transformer: Any, text_tokens: int) -> WanDiTCost:
    """The closed form of a transformer without image states, by its configuration."""
    config = transformer.config
    stock = not isinstance(transformer, SwiftI2VTransformer3DModel)
    return replace(
        costs.WAN22_TI2V_5B if stock else costs.SWIFTI2V_5B,
        heads=config.num_attention_heads,
        layers=config.num_layers,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        ffn=config.ffn_dim,
        head_dim=config.attention_head_dim,
        text_tokens=text_tokens,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
    )


def stage_one_dit(small: bool) -> Any:
    return tiny.wan_stage_one_dit() if small else WanTransformer3DModel(**dit_config(costs.WAN21_I2V_14B))


def base_dit(small: bool) -> Any:
    """TI2V-5B, diffusers' own class."""
    return tiny.wan_base_dit() if small else WanTransformer3DModel(**dit_config(costs.WAN22_TI2V_5B))


def stage_two_dit(small: bool) -> Any:
    """Stage II, its reference channels as if they were trained."""
    if not small:
        return SwiftI2VTransformer3DModel(**dit_config(costs.SWIFTI2V_5B))
    network = SwiftI2VTransformer3DModel.from_wan(tiny.wan_base_dit(), reference_channels=4)
    nn.init.normal_(network.patch_embedding.weight, std=0.1)
    network.register_to_config(reference_is_untrained=False)
    return network


def vae_one(small: bool) -> Any:
    return tiny.wan_vae_one() if small else AutoencoderKLWan()


def vae_two(small: bool) -> Any:
    return tiny.wan_vae_two() if small else AutoencoderKLWan(**WAN22_VAE)


def components(machine: Machine, widened: bool) -> Iterator[tuple[str, Any]]:
    """The parts of a true-size ``SwiftI2VPipeline``, each made when it is asked for. Bytes are the tokens."""
    makers: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: UMT5EncoderModel(UMT5),
        "image_encoder": lambda: CLIPVisionModel(CLIP),
        "transformer": lambda: stage_one_dit(False),
        "transformer_2": lambda: stage_two_dit(False) if widened else base_dit(False),
        "vae": lambda: vae_one(False),
        "vae_2": lambda: vae_two(False),
    }
    for name, network in makers.items():
        yield name, made(machine, network)
    yield "tokenizer", nano_tokenizer()
    yield "image_processor", CLIPImageProcessorPil()
    yield "scheduler", FlowMatchEulerDiscreteScheduler(shift=5.0)


@contextmanager
def many_graphs() -> Iterator[None]:
    """More graphs of one function than dynamo allows: a VAE's layers see the start of a stream, its second call, the
    rest; and a transformer's layer comes in several quantizations."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


# -- clocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One call: seconds, bytes at its peak above what was held before it, and what it gave."""

    seconds: float
    bytes: int
    result: Any


def timed(machine: Machine, call: Callable[[], Any]) -> Timed:
    """Run ``call`` without gradients, the device idle before and after."""
    machine.tidy()
    machine.wait()
    machine.forget_peak()
    before, begin = machine.held(), time.perf_counter()
    with torch.no_grad():
        result = call()
    machine.wait()
    return Timed(time.perf_counter() - begin, max(machine.peak() - before, 0), result)


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call, and what it gave."""
    with torch.no_grad(), meters.FlopMeter() as meter:
        result = call()
    return meter.count.total, result


def live_bytes(call: Callable[[], Any]) -> int:
    """The peak of tensors that a call makes on a CPU, where what the process holds would drown it."""
    with torch.no_grad(), meters.LiveBytes() as live:
        call()
    return live.peak


def product_rate(machine: Machine, rounds: int = 5) -> float:
    """FLOP/s of a large matrix product in the benchmark's dtype, the best of ``rounds``: what a floor is."""
    n = 8192 if machine.cuda else 512
    a, b = machine.random(n, n, dtype=machine.dtype), machine.random(n, n, seed=1, dtype=machine.dtype)
    best = min(timed(machine, lambda: a @ b).seconds for _ in range(rounds))
    return 2 * n**3 / best


def beside_plain(
    machine: Machine, calls: dict[str, Callable[[], Any]], rounds: int, rate: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Each call beside the one called "plain": all in turn, round after round, so that a disturbance falls on all.

    ``first_seconds`` warms up, and compiles. ``ratio`` is plain's best round over the variant's (above 1: faster),
    ``gib`` the peak above what was held before. ``max_difference`` between the results, relative to plain's largest
    value; ``equal``: the same bits. ``floor_share``: plain's counted FLOPs at ``rate`` over the best seconds. A variant
    that this machine refuses has ``skipped``, the reason, instead.
    """
    flops, expected = counted(calls["plain"])
    rows: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for name, call in calls.items():
        try:
            first = timed(machine, call)
            rows[name] |= {"first_seconds": round(first.seconds, 3), **difference(expected, first.result)}
            del first
        except REFUSALS as error:
            if name == "plain":
                raise
            rows[name]["skipped"] = reason(error)
    del expected
    seconds: dict[str, list[Timed]] = {name: [] for name, row in rows.items() if "skipped" not in row}
    for _ in range(rounds):
        for name, runs in seconds.items():
            runs.append(replace(timed(machine, calls[name]), result=None))
    plain = min(run.seconds for run in seconds["plain"])
    for name, runs in seconds.items():
        best = min(run.seconds for run in runs)
        rows[name] |= {"seconds": [round(run.seconds, 5) for run in runs], "ratio": round(plain / best, 3)}
        rows[name] |= {"gib": gib(max(run.bytes for run in runs)), "tflop_per_second": round(flops / best / 1e12, 3)}
        if rate:
            rows[name]["floor_share"] = round(flops / rate / best, 4)
    rows["plain"]["flops"] = flops
    return rows


def difference(expected: Tensor, found: Tensor) -> dict[str, Any]:
    """How far two results lie apart, relative to the largest value expected."""
    largest = float(expected.abs().max()) or 1.0
    return {
        "equal": bool(torch.equal(expected, found)),
        "max_difference": float((expected.float() - found.float()).abs().max()) / largest,
    }


def reason(error: BaseException) -> str:
    """The first line of what a library said."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def gib(count: float) -> float:
    return round(count / GIB, 3)


def text_states(machine: Machine, transformer: Any, tokens: int = 512) -> Tensor:
    return machine.random(1, tokens, transformer.config.text_dim, seed=7, dtype=machine.dtype)


def latent_blocks(machine: Machine, channels: int, count: int, size: Sequence[int]) -> Iterator[Tensor]:
    """``count`` random latent blocks (1, c, 1, h, w), one by one."""
    for number in range(count):
        yield machine.random(1, channels, 1, *size, seed=100 + number)
