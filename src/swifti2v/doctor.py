"""What this machine can do: versions, speeds, codecs, room, and how long a video will take on it.

Every check is a ``Finding``; nothing is changed but the calibration that ``plan`` keeps in the user's cache.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import presets
from .core import UsageError
from .machine import available_memory, cpu_name
from .media import Encoding
from .memory import DTYPES, matmul_rate

LIBRARIES = ("swifti2v", "torch", "diffusers", "transformers", "safetensors", "av", "numpy", "torchao")
CODECS = ("h264", "h265", "av1")
NEEDED_MEMORY_GB = 6
NEEDED_DISK_GB = 1


@dataclass(frozen=True)
class Finding:
    """One check. ``ok``: True good, False a problem that will stop or spoil a run, None for information."""

    name: str
    found: str
    ok: bool | None = None

    def row(self) -> list[str]:
        return [{True: "ok", False: "PROBLEM", None: ""}[self.ok], self.name, self.found]


def examine(*, quick: bool = False) -> Iterator[Finding]:
    """All checks, as they are done; ``quick`` leaves out the measurements."""
    yield from _software()
    yield from _machine()
    yield _conv3d()
    yield from _codecs()
    yield _weights()
    if not quick:
        yield from _speeds()
        yield from _calibration()
    yield from _expected()


def _software() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for library in LIBRARIES:
        try:
            yield Finding(library, version(library))
        except PackageNotFoundError:
            optional = library == "torchao"
            yield Finding(library, "not installed" + (" (needed for quantization only)" if optional else ""), optional)


def _machine() -> Iterator[Finding]:
    yield Finding("processor", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{facts.name}, {facts.total_memory / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU")
    free = available_memory()
    if free is not None:
        said = f"{free / 1e9:.1f} GB (nano at 2K needs {NEEDED_MEMORY_GB})"
        yield Finding("memory available", said, free >= NEEDED_MEMORY_GB * 1e9)
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("disk free here", f"{disk:.1f} GB", disk >= NEEDED_DISK_GB)


def _conv3d() -> Finding:
    from .models.self_check import self_check_conv3d

    try:
        self_check_conv3d("cpu")
    except (UsageError, RuntimeError) as error:
        return Finding("conv3d", str(error), False)
    return Finding("conv3d", "computed rightly by this torch", True)


def _codecs() -> Iterator[Finding]:
    for codec in CODECS:
        try:
            Encoding(codec)
        except UsageError as error:
            yield Finding(codec, str(error), codec != "h264")
        else:
            yield Finding(codec, "can be written", True)


def _weights() -> Finding:
    from .shipped import verify_shipped

    try:
        return Finding("nano's weights", f"{verify_shipped()} files, as shipped", True)
    except UsageError as error:
        return Finding("nano's weights", str(error), False)


def _speeds() -> Iterator[Finding]:
    rates = {name: matmul_rate(DTYPES[name]) for name in ("float32", "bfloat16")}
    for name, rate in rates.items():
        yield Finding(f"{name} products", f"{rate:,.0f} GFLOP/s")
    faster = max(rates, key=lambda name: rates[name])
    yield Finding("faster here", faster)


def _calibration() -> Iterator[Finding]:
    from .calibration import calibrate

    measured = calibrate()
    speeds = f"convolutions {measured.conv_flops / 1e9:,.0f} GFLOP/s, memory {measured.copy_bytes / 1e9:.1f} GB/s"
    video = f"H.264 {measured.encode_pixels / 1e6:.0f} Mpixel/s"
    yield Finding("calibration", f"{speeds}, {video}; kept in {measured.save()}", True)


def _expected() -> Iterator[Finding]:
    """What the default video costs here, by ``plan``."""
    from .plan import plan, stored_calibration

    preset = presets.get("nano")
    request, _ = presets.resolve(preset, prompt="", seed=0)
    try:
        expected = plan(request, preset, stored_calibration())
    except UsageError as error:
        yield Finding("a 2K video", str(error), False)
        return
    for line in expected.lines()[-3:]:
        yield Finding(f"{request.size}, {request.num_frames} frames", line)
