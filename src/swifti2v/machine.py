"""What the processor is and what memory is free, read without torch, so that ``plan`` and ``memory`` decide alike."""

from __future__ import annotations

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
# Without these instructions torch emulates bfloat16 products, several times slower than float32.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "svebf16")


def cpu_name() -> str:
    """The processor's own name, or the architecture where it cannot be read."""
    return _field("model name") or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that a new process can get; None where it is not known (only Linux is)."""
    if not _MEMORY.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def bfloat16_instructions() -> str | None:
    """The instruction set that makes bfloat16 matrix products fast here; None if there is none, or none known."""
    flags = (_field("flags") or _field("Features") or "").split()
    return next((name for name in _BFLOAT16 if name in flags), None)


def _field(name: str) -> str | None:
    if not _INFO.is_file():
        return None
    for line in _INFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
