"""Meters: what a run costs in memory and arithmetic, measured rather than estimated.

``peak_rss`` reads what the operating system charged this process; ``LiveBytes`` the bytes of tensors
alive at once; ``count_flops`` the multiply-adds (as 2 FLOPs) of a call. The last two also work on the
meta device, so that a 14 B model can be priced on a laptop without its weights.
Not seen: kernel workspaces (oneDNN, cuDNN), allocator slack, and tensors made on other threads.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_rss() -> int:
    """Highest resident bytes of this process so far (since ``reset_peak_rss``); 0 where it is not known.

    Linux's own high-water mark is preferred to ``ru_maxrss``: the latter survives ``exec`` and so shows
    the parent's size in a child that was started from a large process.
    """
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """Resident bytes of this process now; 0 where it is not known (only Linux is)."""
    return _status_bytes("VmRSS") if _STATUS.exists() else 0


def reset_peak_rss() -> bool:
    """Start ``peak_rss`` anew from the present size; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


class _FusedMetaAttention(TorchFunctionMode):
    """Sends ``scaled_dot_product_attention`` on meta tensors to the fused CPU kernel's meta implementation.

    Left alone, the meta device takes the unfused path and would be charged for materialized scores: the right
    FLOPs, an absurd peak. Masks are dropped: shapes and costs do not depend on them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = _query_key_value(*args, **(kwargs or {}))
            if query.is_meta:
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were created under this mode and are alive; and their peak.

    A storage counts once, however many views it has, from the operation that made it until its last
    owner is gone (Python variable, view, or a graph that saved it). Storages that existed before
    (weights, inputs) never count. ``at`` is the operation that set the peak. Works on meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.at = ""
        self._live: dict[int, int] = {}
        self._foreign: set[int] = set()
        self._attention = _FusedMetaAttention()

    def __enter__(self) -> LiveBytes:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._attention.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage._cdata not in self._foreign:
                self._foreign.add(storage._cdata)
                weakref.finalize(storage, self._foreign.discard, storage._cdata)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._count(tensor.untyped_storage())
        if self.current > self.peak:
            self.peak, self.at = self.current, str(func)
        return out

    def reset_peak(self) -> None:
        """Measure the peak from here on: what is alive now still counts."""
        self.peak, self.at = self.current, ""

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._foreign:
            return
        if key not in self._live:
            weakref.finalize(storage, self._free, key)
        # A storage that grew (resize_, out=) is charged the difference.
        self.current += size - self._live.get(key, 0)
        self._live[key] = size

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a call: 2 a multiply-add, in matrix products, convolutions and attention only.

    ``attention``: the part of ``total`` spent in scaled dot product attention (both products).
    """

    total: int
    attention: int


class FlopMeter:
    """Counts FLOPs inside a ``with`` block, of real and of meta tensors."""

    def __init__(self) -> None:
        # Without this entry torch prices every attention kernel but the CPU's.
        cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        self._counter = FlopCounterMode(display=False, custom_mapping=cpu_attention)
        self._attention = _FusedMetaAttention()

    def __enter__(self) -> FlopMeter:
        self._attention.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counter.__exit__(kind, error, trace)
        self._attention.__exit__(kind, error, trace)

    @property
    def count(self) -> FlopCount:
        by_operation = self._counter.get_flop_counts().get("Global", {})
        attention = sum(flops for operation, flops in by_operation.items() if "attention" in str(operation))
        return FlopCount(self._counter.get_total_flops(), attention)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    *batch, length, width = query
    return 2 * math.prod(batch) * length * key[-2] * (width + value[-1])


def _query_key_value(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query, key, value


@dataclass(frozen=True)
class Cost:
    """What one call costs: FLOPs and the peak of tensors it made (its result included, inputs not)."""

    flops: FlopCount
    peak_bytes: int


def measure(call: Callable[[], object]) -> Cost:
    """Run ``call`` without gradients and meter it; meant for the meta device, works on any."""
    with torch.no_grad(), FlopMeter() as meter, LiveBytes() as live:
        result = call()
    del result
    return Cost(meter.count, live.peak)


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
