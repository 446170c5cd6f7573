"""Where modules live, in which dtype and by which fast paths they run: the only caller of ``.to`` for devices.

The settings chosen here are recorded in the job's manifest: with them, equal requests give equal latents.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from .core import UsageError
from .machine import bfloat16_instructions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_THREADS = 1024


@dataclass(frozen=True)
class FastPaths:
    """The transformers' fast paths, by name. The default is the slow witness of each, but for ``attention``.

    ``attention``: a kernel by diffusers' name; "auto" until one has been chosen. ``quantize``: a kind of
    ``quantize.KINDS``, or None. ``compile``: whether the repeated layers are compiled. ``reason``: why this kernel.
    """

    attention: str = "auto"
    quantize: str | None = None
    compile: bool = False
    reason: str = field(default="", compare=False)

    def settings(self) -> dict[str, str]:
        """As a manifest holds it; what is off is left out."""
        found = {"attention": self.attention, **({"attention_reason": self.reason} if self.reason else {})}
        if self.quantize is not None:
            found["quantize"] = self.quantize
        return found | ({"compile": "regional"} if self.compile else {})

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> FastPaths:
        """What ``settings`` wrote, and what was written before there were fast paths."""
        return cls(settings.get("attention", "auto"), settings.get("quantize"), "compile" in settings)


@dataclass(frozen=True)
class Placement:
    """Device, dtype of the transformers and VAEs, and CPU threads of one run, with the reason for the dtype.

    ``fast``: what the transformers were set to; None for those that know no fast paths. ``ranks``: processes that split
    the transformers between them (``parallel``). ``vae_device``: where the VAEs are, if apart from the transformers.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    reason: str
    fast: FastPaths | None = None
    ranks: int = 1
    vae_device: torch.device | None = None

    def settings(self) -> dict[str, str]:
        shared = {"context_parallel": str(self.ranks)} if self.ranks > 1 else {}
        shared |= {"vae_device": str(self.vae_device)} if self.vae_device is not None else {}
        fast = {} if self.fast is None else self.fast.settings()
        return fast | {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": str(self.threads),
            "dtype_reason": self.reason,
            **shared,
        }


def choose_placement(
    device: str | None = None, dtype: str = "auto", threads: int | None = None, vae_device: str | None = None
) -> Placement:
    """Check and complete the user's choice. Sets the process's thread count if ``threads`` is given.

    Raises ``UsageError`` for a device that is not there, an unknown dtype, or a bad thread count.
    """
    chosen = _placement(device, dtype, threads)
    return chosen if vae_device is None else replace(chosen, vae_device=_device(vae_device))


def _placement(device: str | None, dtype: str, threads: int | None) -> Placement:
    place = _device(device)
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise UsageError(f"threads {threads} is not between 1 and {MAX_THREADS}")
        torch.set_num_threads(threads)
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
        return Placement(place, DTYPES[dtype], torch.get_num_threads(), "asked for")
    if place.type != "cpu":
        return Placement(place, torch.bfloat16, torch.get_num_threads(), "accelerator default")
    # By instruction set and not by timing: a busy machine must not change the dtype, and with it the video.
    found = bfloat16_instructions()
    if found is None:
        return Placement(place, torch.float32, torch.get_num_threads(), "this CPU has no fast bfloat16")
    return Placement(place, torch.bfloat16, torch.get_num_threads(), f"this CPU has {found}")


def matmul_rate(dtype: torch.dtype, rounds: int = 3) -> float:
    """GFLOP/s of a matrix product of nano's shape on the CPU; the best of a few short rounds."""
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    a @ b
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 256 * 1024 / best / 1e9


def place(module: nn.Module | None, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move a module; with ``dtype``, cast it but for the parts its class keeps in float32."""
    if module is None:
        return
    module.to(device)
    if dtype is None:
        return
    kept = () if dtype == torch.float32 else tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


def align(module: nn.Module, device: torch.device) -> None:
    """Let a module on ``device`` take tensors from any other one, and give back where the first of them came from."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(module, AlignDevicesHook(execution_device=device, io_same_device=True))


def release_cached(device: torch.device | None) -> None:
    """Give memory that an accelerator's allocator holds for nobody back to it."""
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()


def stream_weights(module: nn.Module, device: torch.device, folder: Path | None = None) -> None:
    """Keep a module's weights in host memory, or in ``folder`` on a disk, and take them to ``device`` layer by layer.

    diffusers' group offloading by leaves; on CUDA the next layer travels while one works.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
        low_cpu_mem_usage=folder is not None,
        offload_to_disk_path=None if folder is None else str(folder),
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes of an accelerator; None for a CPU, or where they cannot be asked for."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _device(name: str | None) -> torch.device:
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known; use cpu, cuda, cuda:0 or mps") from None
    if device.type == "meta":
        raise UsageError("device 'meta' holds no numbers; use cpu, cuda, cuda:0 or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices found; use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name!r} is not there; use cpu")
    return device
