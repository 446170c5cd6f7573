"""Two processes see what one sees: DDP and FSDP2 (gloo, CPU) against one process with twice the micro-batches.

Real processes, started once; each run leaves a log and checkpoints that the tests compare.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from toys import TOY, losses, rows

from swifti2v import memory, tiny
from swifti2v.train import state
from swifti2v.train.export import export
from swifti2v.train.loop import Student, train
from swifti2v.train.optimizers import trainable
from swifti2v.train.recipe import Parts, Recipe
from swifti2v.train.recipes import make, with_lora

WORLD, TIMEOUT = 2, 400
ROUNDED = {
    "fsdp_lora_half": "sharded weights are rounded as they are gathered, norms too",
    "fsdp_muon": "Muon's matrix products are in bfloat16, and summed in another order over shards",
}


def toy() -> Recipe:
    return replace(TOY, steps=3, ema_decay=0.5, gradient_checkpointing=True)


def wan(name: str) -> Recipe:
    return replace(make(name, tiny=True), steps=2, optimizer="adamw", gradient_checkpointing=True)


def half() -> Recipe:
    """A float32 LoRA on a bfloat16 base with float32 norms, computed in bfloat16: as at full size."""
    return replace(wan("stage_one_lora"), build=halved, precision="bfloat16")


def halved() -> Parts:
    model = tiny.wan_stage_one_dit()
    memory.place(model, torch.device("cpu"), torch.bfloat16)
    return Parts({"transformer": with_lora(model, 4)})


QUICK: dict[str, tuple[Recipe, bool]] = {
    "ddp": (toy(), False),
    "fsdp": (replace(toy(), optimizer="adamw"), True),
    "fsdp_lora_half": (half(), True),
}
"""Name -> recipe and whether it is sharded."""
SLOW: dict[str, tuple[Recipe, bool]] = {
    "fsdp_muon": (toy(), True),
    "fsdp_stage_two": (wan("stage_two"), True),
    "fsdp_lora": (wan("stage_one_lora"), True),
    "fsdp_distill": (wan("nano_one_few"), True),
    "ddp_dmd": (wan("nano_one_dmd"), False),
    "fsdp_dmd": (wan("nano_one_dmd"), True),
}


def work(rank: int, port: int, out: Path, runs: dict[str, tuple[Recipe, bool]]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
    for name, (recipe, shard) in runs.items():
        train(recipe, out / name, quiet=True, sharded=shard)
    if "fsdp" in runs:  # and an interrupted sharded run: two steps, then the rest from its checkpoint
        recipe = runs["fsdp"][0]
        train(replace(recipe, steps=2), out / "resumed", quiet=True, sharded=True)
        train(recipe, out / "resumed", quiet=True, sharded=True)
    torch.distributed.destroy_process_group()


def start(out: Path, runs: dict[str, tuple[Recipe, bool]]) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["swifti2v.train.distill"])  # seconds of imports, once for all
    context = mp.start_processes(work, (port, out, runs), nprocs=WORLD, join=False, start_method="forkserver")
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:  # processes that wait for one another would wait for ever
            for process in context.processes:
                process.kill()
            pytest.fail(f"{WORLD} processes were not done after {TIMEOUT} s: {sorted(p.name for p in out.iterdir())}")
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("two"), QUICK)


@pytest.fixture(scope="module")
def two_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("two_more"), SLOW)


def averages(recipe: Recipe, out: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(recipe.seed)
    student = Student(recipe.build(), recipe.objective, recipe.precision)
    state.load_average(state.latest(out), student)
    return {name: parameter.detach() for name, parameter in trainable(student).items()}


def compare(name: str, recipe: Recipe, two: Path, one: Path) -> None:
    twice = replace(recipe, accumulation=WORLD)
    train(twice, one, quiet=True)
    if name in ROUNDED:
        assert losses(two / name) == pytest.approx(losses(one), rel=2e-2)
        return
    assert losses(two / name) == pytest.approx(losses(one), rel=1e-5, abs=1e-5)
    assert [r["norm"] for r in rows(two / name)] == pytest.approx([r["norm"] for r in rows(one)], rel=1e-4)
    apart, together = averages(recipe, two / name), averages(recipe, one)
    assert apart.keys() == together.keys()
    assert max(float((apart[key] - together[key]).abs().max()) for key in apart) < 1e-5


@pytest.mark.parametrize("name", list(QUICK))
def test_two_processes_are_two_micro_batches(name: str, two: Path, tmp_path: Path) -> None:
    compare(name, QUICK[name][0], two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW))
def test_every_kind_of_network_and_objective(name: str, two_more: Path, tmp_path: Path) -> None:
    compare(name, SLOW[name][0], two_more, tmp_path)


def test_a_sharded_run_resumes_exactly(two: Path) -> None:
    recipe = QUICK["fsdp"][0]
    assert losses(two / "resumed") == losses(two / "fsdp")
    one, both = averages(recipe, two / "resumed"), averages(recipe, two / "fsdp")
    assert all(torch.equal(one[key], both[key]) for key in one)


def test_a_sharded_run_goes_on_in_one_process_and_is_exported_there(two: Path, tmp_path: Path) -> None:
    """Checkpoints belong to the run, not to the number of processes."""
    recipe = QUICK["fsdp"][0]
    longer = replace(recipe, steps=4, accumulation=WORLD)
    assert train(longer, two / "fsdp", quiet=True).step == 4
    assert train(longer, tmp_path / "one", quiet=True).step == 4
    assert losses(two / "fsdp") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=1e-5)
    assert export(recipe, two / "fsdp", tmp_path / "out")["transformer"].is_dir()
