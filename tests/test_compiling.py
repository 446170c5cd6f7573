"""Regional compilation: one graph for windows of every length, equal to the layers as they are written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from swifti2v import compiling, flow
from swifti2v.compiling import check_compiling, compile_blocks, is_compiled, uncompiled
from swifti2v.core import UsageError
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.segments import CSG, windows
from swifti2v.stage_two import Sampling, dit_velocity, refine
from swifti2v.tiny import tiny_pipeline

BLOCKS = 9  # windows of 4, 5 and 4 blocks; of 3 below


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def clip(model: SwiftI2VTransformer3DModel, blocks: int) -> list[Tensor]:
    velocity = dit_velocity(model, drawn(1, 512, 16), CSG(), trained_blocks=5)
    return list(refine(velocity, [drawn(1, 4, blocks, 4, 8)], windows(blocks), Sampling(flow.sigmas(2, 5.0), 7, CSG())))


def test_one_graph_for_windows_of_every_length() -> None:
    """4, 5, 5 and 3 blocks, two layers: one graph, no breaks, the same bits."""
    model = tiny_pipeline("wan").transformer_2
    assert {len(window.blocks) for window in windows(11)} | {len(window.blocks) for window in windows(8)} == {3, 4, 5}
    plain = clip(model, 11), clip(model, 8)
    compile_blocks(model, backend="eager")
    assert is_compiled(model) and counters["stats"]["unique_graphs"] == 0
    fast = clip(model, 11), clip(model, 8)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for a, b in zip((*plain[0], *plain[1]), (*fast[0], *fast[1]), strict=True):
        assert torch.equal(a, b)


def test_the_witness_runs_uncompiled() -> None:
    model, called = tiny_pipeline("wan").transformer_2, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.append(len(inputs))
        return graph

    compile_blocks(model, backend=backend)  # type: ignore[arg-type]
    x, text = drawn(1, 8, 3, 4, 8), drawn(1, 512, 16)
    with torch.no_grad(), uncompiled(model):
        assert not is_compiled(model)
        model(x, torch.full((1, 3), 500.0), text)
    assert not called and is_compiled(model)
    with torch.no_grad():
        model(x, torch.full((1, 3), 500.0), text)
    assert len(called) == 1


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloaded_layers_are_refused(kind: str) -> None:
    model = tiny_pipeline("wan").transformer_2
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    with pytest.raises(UsageError, match="compile and offloading exclude each other"):
        compile_blocks(model, backend="eager")


def test_accelerates_offloading_is_refused_too() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_pipeline("wan").transformer_2
    add_hook_to_module(model.blocks[1], AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(UsageError, match=r"blocks.1 is offloaded"):
        compile_blocks(model, backend="eager")


def test_models_without_repeated_layers() -> None:
    class Other(nn.Module):
        def compile_repeated_blocks(self, **_: object) -> None:
            raise ValueError("`_repeated_blocks` attribute is empty")

    with pytest.raises(ValueError, match="is empty"):
        compile_blocks(Other())


def test_devices_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiling(torch.device("cpu"))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    for device, says in (("cpu", r"C\+\+ compiler"), ("cuda", "needs triton"), ("mps", "not possible on mps")):
        with pytest.raises(UsageError, match=says):
            check_compiling(torch.device(device))
