"""Blueprints to ONNX files that ONNX Runtime has run: parity with torch is checked before a file gets its name.

torch's tracing exporter writes them (the newer one needs onnxscript besides).
Weights may be stored in 16 or 8 bits; a Cast or DequantizeLinear node makes them float32, in which all arithmetic is.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .blueprint import LIMITS, Blueprint, gap, refuse
from .budget import onnx_operators
from .contracts import GraphContract, Parity, Precision

OPSET = 17  # GridSample came with 16, LayerNormalization with 17
SMALLEST = 4096  # weights with fewer numbers stay float32


def write(blueprint: Blueprint, folder: Path, precision: Precision = "float32") -> GraphContract:
    """``folder``/NAME.onnx, whole or not at all; ParityError if it does not compute what torch does."""
    part = folder / f".{blueprint.name}.part.onnx"
    try:
        trace(blueprint, part)
        if precision != "float32":
            compress(part, precision)
        error, limit = gap(run(part, blueprint), blueprint.wanted()), LIMITS[precision]
        refuse(f"{blueprint.name}.onnx ({precision})", error, limit)
        operators = onnx_operators(part)
        target = folder / f"{blueprint.name}.onnx"
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return blueprint.graph(target, "onnx", precision, Parity(error=error, limit=limit), operators)


def trace(blueprint: Blueprint, path: Path) -> None:
    """The float32 graph at ``path``, unchecked."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecation, and of shapes that are constants here on purpose
        torch.onnx.export(
            blueprint.module.eval(),
            blueprint.examples,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(blueprint.inputs),
            output_names=list(blueprint.outputs),
        )
    _mend(path)


def _mend(path: Path) -> None:
    """The exporter writes ``movedim`` of a tensor whose rank it lost with negative axes, which ONNX does not have."""
    import onnx

    model, broken = onnx.load(str(path)), False
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Transpose" else ():
            if min(attribute.ints, default=0) < 0:
                attribute.ints[:] = [axis % len(attribute.ints) for axis in attribute.ints]
                broken = True
    if broken:
        onnx.save(model, str(path))


def run(path: Path, blueprint: Blueprint, threads: int = 1) -> list[np.ndarray]:
    """What ONNX Runtime's CPU makes of the blueprint's examples."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}  # an input that nothing reads is not in the graph
    given = zip(blueprint.inputs, blueprint.examples, strict=True)
    return session.run(None, {name: x.numpy() for name, x in given if name in taken})


def compress(path: Path, precision: Precision) -> None:
    """Store large weights in 16 or 8 bits, in place; those named ``exact_*`` stay as they are."""
    import onnx

    model = onnx.load(str(path))
    kept, added = [], []
    for tensor in model.graph.initializer:
        axis = _axis(model.graph, tensor)
        if axis is None or "exact_" in tensor.name or np.prod(tensor.dims) < SMALLEST:
            kept.append(tensor)
        elif precision == "float16":
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            kept.append(onnx.numpy_helper.from_array(values, f"{tensor.name}.f16"))
            to = onnx.TensorProto.FLOAT
            added.append(onnx.helper.make_node("Cast", [f"{tensor.name}.f16"], [tensor.name], to=to))
        else:
            parts, node = _quantized(onnx, tensor, axis)
            kept += parts
            added.append(node)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


def _quantized(onnx: Any, tensor: Any, axis: int) -> tuple[list[Any], Any]:
    """Symmetric int8 with a scale for each output channel: the initializers, and the node that undoes it."""
    values, name = onnx.numpy_helper.to_array(tensor), tensor.name
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.maximum(np.abs(values).max(axis=others), 1e-12).astype(np.float32) / 127
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    whole = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
    parts = [onnx.numpy_helper.from_array(x, f"{name}.{key}") for key, x in (("i8", whole), ("scale", scale))]
    return parts, onnx.helper.make_node("DequantizeLinear", [part.name for part in parts], [name], axis=axis)


def _axis(graph: Any, tensor: Any) -> int | None:
    """The axis of a weight's output channels; None if it is no weight of a product or a convolution."""
    if tensor.data_type != 1 or len(tensor.dims) < 2:
        return None
    for node in graph.node:
        if tensor.name in node.input[1:2]:
            if node.op_type == "Conv":
                return 0
            if node.op_type == "Gemm":
                transposed = any(a.name == "transB" and a.i for a in node.attribute)
                return 0 if transposed else 1
            if node.op_type == "MatMul":
                return len(tensor.dims) - 1
    return None
