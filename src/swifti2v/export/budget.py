"""How many operators of each kind a graph has, once its backend's converter or optimizer is done with it.

Transposes and reshapes are what the channels-first layout is there to avoid: tests hold their numbers.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

MOVERS = ("Transpose", "Reshape", "transpose", "reshape")


def onnx_operators(path: str | Path, *, optimized: bool = True) -> dict[str, int]:
    """Operators of an ONNX file, by default after ONNX Runtime's general optimizations; constants not counted."""
    import onnx

    if not optimized:
        model = onnx.load(str(path), load_external_data=False)
        return _counted(node.op_type for node in model.graph.node)
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx_operators(options.optimized_model_filepath, optimized=False)


def mil_operators(model: Any) -> dict[str, int]:
    """Operators of the MIL program of a coremltools model that was just converted; constants not counted."""
    return _counted(operation.op_type for operation in model._mil_program.functions["main"].operations)


def edge_operators(program: Any) -> dict[str, int]:
    """Operators of a program lowered for ExecuTorch: its delegates (each a piece that the backend runs whole), and by
    name what is left to the portable kernels."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "__name__", str(node.target)) for node in nodes]
    return _counted(name for name in names if name != "getitem")


def _counted(kinds: Any) -> dict[str, int]:
    counts = Counter(kind for kind in kinds if kind not in ("Constant", "const"))
    return dict(sorted(counts.items()))
