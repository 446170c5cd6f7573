"""Small ncnn networks (.param and .bin) as torch modules: the layers of SPAN, SRVGGNetCompact and RRDBNet.

Only what those graphs use is read; anything else is refused by name. It knows file formats, not what the networks do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import UsageError

_MAGIC = "7767517"
_HALF = 0x01306B47  # the tag before weights that are stored as float16; 0 before float32
_LISTS = -23300  # keys at or below it hold lists: -23300 - key


@dataclass(frozen=True)
class Layer:
    """A line of the .param file: what it is, which blobs it takes and gives, its numbered settings."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: dict[int, float]
    lists: dict[int, tuple[float, ...]]

    def whole(self, key: int, default: int = 0) -> int:
        return int(self.settings.get(key, default))


class NcnnNetwork(nn.Module):
    """The network in ``path.param`` and ``path.bin``: (n, 3, h, w) in [0, 1] in, the blob ``output`` out."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.layers = read_param(Path(f"{path}.param"))
        weights = _Weights(Path(f"{path}.bin"))
        self.tensors = nn.ParameterDict()
        for index, layer in enumerate(self.layers):
            for name, tensor in weights.of(layer).items():
                self.tensors[f"{index}_{name}"] = nn.Parameter(tensor, requires_grad=False)
        weights.finish()
        # A deep network's blobs do not fit memory together: each goes after its last use.
        self._last_use = {blob: index for index, layer in enumerate(self.layers) for blob in layer.inputs}

    def forward(self, pictures: Tensor) -> Tensor:
        blobs: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if layer.kind == "Input":
                made = pictures
            else:
                given = [blobs[name] for name in layer.inputs]
                held = {name: self.tensors[key] for name in "wb" if (key := f"{index}_{name}") in self.tensors}
                made = KINDS[layer.kind](layer, given, held)
            blobs.update(dict.fromkeys(layer.outputs, made))
            for name in layer.inputs:
                if self._last_use[name] == index:
                    del blobs[name]
        return blobs["output"]


def read_param(path: Path) -> tuple[Layer, ...]:
    """The graph of a .param file; ``UsageError`` if it is none or holds a layer unknown here."""
    lines = _read(path).decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise UsageError(f"{path.name} is not an ncnn .param file (it does not begin with {_MAGIC})")
    layers = tuple(_parsed(line, path) for line in lines[2:] if line.strip())
    if not any("output" in layer.outputs for layer in layers):
        raise UsageError(f"{path.name} has no blob named output")
    return layers


def _parsed(line: str, path: Path) -> Layer:
    words = line.split()
    try:
        kind, takes, gives = words[0], int(words[2]), int(words[3])
        blobs, pairs = words[4 : 4 + takes + gives], [word.split("=") for word in words[4 + takes + gives :]]
        lists = {_LISTS - int(k): tuple(map(float, v.split(",")[1:])) for k, v in pairs if int(k) <= _LISTS}
        settings = {int(k): float(v) for k, v in pairs if int(k) > _LISTS}
    except (ValueError, IndexError):
        raise UsageError(f"{path.name} holds a line that is no layer: {line.strip()[:80]!r}") from None
    if kind not in KINDS:
        raise UsageError(f"{path.name} holds a layer {kind}, which is not one of {', '.join(KINDS)}")
    return Layer(kind, tuple(blobs[:takes]), tuple(blobs[takes:]), settings, lists)


class _Weights:
    """The .bin file, read from front to back."""

    def __init__(self, path: Path) -> None:
        self._path, self._raw, self._at = path, _read(path), 0

    def of(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's own tensors: ``w`` and, of a convolution, ``b``."""
        if layer.kind == "Convolution":
            rows, side, count = layer.whole(0), layer.whole(1), layer.whole(6)
            if rows * side == 0 or count % (rows * side * side):
                raise UsageError(f"{self._path.name}: {count} weights make no {side}x{side} convolution to {rows} maps")
            held = {"w": self._tagged(count).view(rows, -1, side, side)}
            return held | ({"b": self._take(rows, "<f4")} if layer.whole(5) else {})
        if layer.kind == "PReLU":
            return {"w": self._take(layer.whole(0), "<f4")}
        if layer.kind == "MemoryData":
            shape = [max(layer.whole(key), 1) for key in (2, 1, 0)]
            return {"w": self._take(math.prod(shape), "<f4").view(1, *shape)}
        return {}

    def finish(self) -> None:
        if self._at != len(self._raw):
            raise UsageError(f"{self._path.name} has {len(self._raw) - self._at} bytes more than its .param file says")

    def _tagged(self, count: int) -> Tensor:
        (tag,) = struct.unpack("<I", self._bytes(4))
        if tag not in (0, _HALF):
            raise UsageError(f"{self._path.name} stores weights in a form ({tag:#x}) that is neither float16 nor 32")
        values = self._take(count, "<f4" if tag == 0 else "<f2")
        if tag:
            self._bytes(-2 * count % 4)  # padded to four bytes
        return values

    def _take(self, count: int, kind: str) -> Tensor:
        data = self._bytes(count * np.dtype(kind).itemsize)
        return torch.from_numpy(np.frombuffer(data, kind).astype(np.float32))

    def _bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._raw):
            raise UsageError(f"{self._path.name} is truncated: {len(self._raw)} bytes, at least {self._at} are needed")
        return self._raw[self._at - count : self._at]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path.name}: cannot be read ({error.strerror or error})") from None


# --- what the layers do: (layer, inputs, its tensors) -> output ---------------------------------------------------


def _convolution(layer: Layer, given: list[Tensor], held: dict[str, Tensor]) -> Tensor:
    made = F.conv2d(given[0], held["w"], held.get("b"), stride=layer.whole(3, 1), padding=layer.whole(4))
    activation = layer.whole(9)
    if activation == 0:
        return made
    if activation == 1:
        return F.relu(made)
    if activation == 2:
        return F.leaky_relu(made, layer.lists[10][0])
    raise UsageError(f"a convolution with activation {activation} cannot be run; 0, 1 and 2 can")


def _interp(layer: Layer, given: list[Tensor], held: dict[str, Tensor]) -> Tensor:
    mode = {1: "nearest", 2: "bilinear", 3: "bicubic"}[layer.whole(0, 1)]
    scale = (layer.settings.get(1, 1.0), layer.settings.get(2, 1.0))
    return F.interpolate(given[0], scale_factor=scale, mode=mode, align_corners=None if mode == "nearest" else False)


def _binary(layer: Layer, given: list[Tensor], held: dict[str, Tensor]) -> Tensor:
    right: Tensor | float = given[1] if len(given) > 1 else layer.settings.get(2, 0.0)
    operation = (torch.add, torch.sub, torch.mul, torch.div)[layer.whole(0)]
    return operation(given[0], right)


def _elementwise(layer: Layer, given: list[Tensor], held: dict[str, Tensor]) -> Tensor:
    if layer.whole(0) == 0:
        return given[0] * given[1]
    factors = layer.lists.get(1, (1.0,) * len(given))
    return torch.stack([x * factor for x, factor in zip(given, factors, strict=True)]).sum(dim=0)


KINDS: dict[str, Callable[[Layer, list[Tensor], dict[str, Tensor]], Tensor]] = {
    "Input": lambda layer, given, held: given[0],
    "Split": lambda layer, given, held: given[0],
    "MemoryData": lambda layer, given, held: held["w"],
    "Convolution": _convolution,
    "PReLU": lambda layer, given, held: F.prelu(given[0], held["w"]),
    "Sigmoid": lambda layer, given, held: given[0].sigmoid(),
    "Swish": lambda layer, given, held: F.silu(given[0]),
    "Concat": lambda layer, given, held: torch.cat(given, dim=1),
    "PixelShuffle": lambda layer, given, held: F.pixel_shuffle(given[0], layer.whole(0)),
    "Interp": _interp,
    "BinaryOp": _binary,
    "Eltwise": _elementwise,
}
