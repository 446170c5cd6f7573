"""One loop for every recipe: exact resume, clean ends, nothing lost, nothing overwritten."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import TOY, build, interrupted, losses, rows, small_dit, windows

from swifti2v.core import RunError, UsageError
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.train import state
from swifti2v.train.export import export, export_modules
from swifti2v.train.logs import rewind
from swifti2v.train.loop import Student, checkpoint_gradients, train
from swifti2v.train.optimizers import Average, is_inner_matrix, make_optimizers, rate, trainable
from swifti2v.train.recipe import Loss, Parts, described
from swifti2v.train.source import Curriculum, Echo, feed, item_index, seeded


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(TOY, out, quiet=True).reason == "finished"
    return out


def tensors(out: Path) -> dict[str, Tensor]:
    """Weights, averages and optimizer state of the last checkpoint."""
    student = Student(build(), TOY.objective, TOY.precision)
    average = Average(trainable(student), 0.9)
    optimizers = make_optimizers(trainable(student), TOY)
    state.load(state.latest(out), student, average, optimizers)
    found = state._tensors(student, average, optimizers)
    assert any(key.endswith("momentum_buffer") for key in found) and any(key.endswith("exp_avg") for key in found)
    return found


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, no checkpoint is written."""


def die() -> None:
    raise Killed


def test_a_killed_run_goes_on_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(interrupted(5, die), tmp_path, quiet=True)
    assert len(rows(tmp_path)) == 5 and state.latest(tmp_path).name == "step-0000004"
    outcome = train(TOY, tmp_path, quiet=True)
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert losses(tmp_path) == losses(undisturbed)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert same(tmp_path, undisturbed)


def test_a_kill_inside_a_line_window_and_inside_a_checkpoint(tmp_path: Path) -> None:
    """The sums of a half-full log window are part of the checkpoint; a half-written checkpoint is not one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(replace(TOY, log_every=3), whole, quiet=True)
    with pytest.raises(Killed):
        train(replace(interrupted(2, die), log_every=3), cut, quiet=True)
    part = cut / "checkpoints" / ".step-0000004.part"
    shutil.copytree(cut / "checkpoints" / "step-0000002", part)
    with (cut / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train(replace(TOY, log_every=3), cut, quiet=True)
    assert losses(cut) == losses(whole) and not part.exists()


def test_keeps_two_checkpoints_and_steps_may_be_raised(tmp_path: Path) -> None:
    train(replace(TOY, steps=4), tmp_path, quiet=True)
    assert train(replace(TOY, steps=8), tmp_path, quiet=True).step == 8
    assert [folder.name for folder in state.folders(tmp_path)] == ["step-0000006", "step-0000008"]
    assert train(replace(TOY, steps=8), tmp_path, quiet=True).step == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_with_a_checkpoint(number: int, undisturbed: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    outcome = train(interrupted(2, lambda: os.kill(os.getpid(), number)), tmp_path, quiet=True)
    assert (outcome.step, outcome.reason, outcome.checkpoint.name) == (4, "signal", "step-0000004")
    assert signal.getsignal(number) is before
    train(TOY, tmp_path, quiet=True)
    assert same(tmp_path, undisturbed)


def test_minutes_end_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    outcome = train(TOY, tmp_path, minutes=1e-9, quiet=True)
    assert (outcome.step, outcome.reason) == (1, "minutes") and state.latest(tmp_path) == outcome.checkpoint
    with pytest.raises(UsageError, match="minutes 0 is not positive"):
        train(TOY, tmp_path, minutes=0, quiet=True)


class Breaks:
    """NaN from step 4 on."""

    def __call__(self, parts: Parts, item: Any, generator: torch.Generator) -> Loss:
        loss = TOY.objective(parts, item, generator)
        bad = bool(torch.equal(item.clean, windows(parts).at(3).clean))
        return loss._replace(value=loss.value * (float("nan") if bad else 1.0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step 4 of toy: loss nan.*last checkpoint is .*step-0000002"):
        train(replace(TOY, objective=Breaks()), tmp_path, quiet=True)
    assert len(rows(tmp_path)) == 3 and [folder.name for folder in state.folders(tmp_path)] == ["step-0000002"]


def test_a_changed_recipe_is_refused_by_name(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    changed = replace(TOY, lr=2e-2, objective=replace(TOY.objective, text_dropout=0.5), steps=7)  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"lr was 0.01, is 0.02; objective.text_dropout was 0.0, is 0.5"):
        train(changed, out, quiet=True)
    with pytest.raises(UsageError, match="items_per_step was 1, is 2"):
        train(replace(TOY, accumulation=2, steps=7), out, quiet=True)
    assert train(changed, out, allow=("lr", "objective"), quiet=True).step == 7


def test_another_network_is_refused(undisturbed: Path) -> None:
    student = Student(Parts({"transformer": small_dit(hidden_size=48)}), TOY.objective, "float32")
    with pytest.raises(RunError, match="belongs to another network"):
        state.load_average(state.latest(undisturbed), student)


def test_the_log_says_what_happened(undisturbed: Path) -> None:
    row = rows(undisturbed)[-1]
    assert {"step", "time", "loss", "error", "base", "ratio", "norm", "lr", "seconds"} == set(row)
    assert row["ratio"] == row["error"] / row["base"] and row["lr"] == 1e-2


def test_samples_see_averaged_weights_and_leave_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def sample(parts: Parts, source: Any, folder: Path | None) -> None:
        assert folder is not None and folder.is_dir() and not torch.is_grad_enabled()
        model: Any = parts.modules["transformer"]
        assert not model.training
        seen.append(model.proj_out.weight.clone())
        torch.randn(3)  # draws of samples must not reach training

    train(replace(TOY, sample=sample, sample_every=3), tmp_path, quiet=True)
    assert same(tmp_path, undisturbed) and len(seen) == 2
    held = tensors(tmp_path)
    name = "trained.transformer.proj_out.weight"
    assert torch.equal(seen[1], held[f"average/{name}"]) and not torch.equal(seen[1], held[f"model/{name}"])


def test_export_writes_averaged_weights_whole(undisturbed: Path, tmp_path: Path) -> None:
    folder = export(TOY, undisturbed, tmp_path / "out")["transformer"]
    loaded = MobileTransformer3DModel.from_pretrained(folder)
    held = tensors(undisturbed)["average/trained.transformer.proj_out.weight"].bfloat16()
    assert torch.equal(loaded.proj_out.weight, held)
    assert {v.dtype for v in load_file(folder / "diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="exists"):
        export(TOY, undisturbed, tmp_path / "out")
    export(TOY, undisturbed, tmp_path / "out", replace=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformer"]
    with pytest.raises(UsageError, match="holds no checkpoint"):
        export(TOY, tmp_path, tmp_path / "other")
    with pytest.raises(UsageError, match="cannot be exported"):
        export_modules(Parts({"head": nn.Linear(2, 2)}), tmp_path / "linear")


def test_gradient_checkpointing_and_workers_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    train(replace(TOY, gradient_checkpointing=True, workers=1), tmp_path, quiet=True)
    assert losses(tmp_path) == losses(undisturbed)
    with pytest.raises(UsageError, match="Linear has no gradient checkpointing"):
        checkpoint_gradients(nn.Linear(1, 1))


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    train(replace(TOY, precision="bfloat16"), tmp_path, quiet=True)
    assert {value.dtype for value in tensors(tmp_path).values()} == {torch.float32}


def test_trackers_only_when_asked(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == ["checkpoints", "log.jsonl"]


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nosuch"):
        train(TOY, tmp_path, trackers=("nosuch",), quiet=True)
    if importlib.util.find_spec("comet_ml") is None:
        with pytest.raises(UsageError, match="comet_ml at least one is unknown or not installed"):
            train(TOY, tmp_path, trackers=("comet_ml",), quiet=True)


# --- the rules beneath ------------------------------------------------------------------------------------------


def test_two_micro_batches_are_two_processes() -> None:
    one = [item_index(step, micro, 0, 2, 1) for step in range(3) for micro in range(2)]
    two = [item_index(step, 0, rank, 1, 2) for step in range(3) for rank in range(2)]
    assert one == two == list(range(6))


def test_sources_are_functions_of_the_index() -> None:
    source = windows(build())
    assert torch.equal(source.at(7).clean, source.at(7).clean)
    echo = Echo(source, 3)
    assert echo.at(4) is echo.at(5) and torch.equal(echo.at(6).clean, source.at(2).clean)
    curriculum = Curriculum(((source, 2), (source, 1)))
    assert torch.equal(curriculum.at(3).clean, source.at(1).clean)
    with pytest.raises(UsageError, match="not positive"):
        Echo(source, 0)
    got = [batch.clean for batch in feed(source, [3, 1], workers=1)]
    assert torch.equal(got[0], source.at(3).clean) and torch.equal(got[1], source.at(1).clean)


def test_generators_depend_on_seed_index_and_use() -> None:
    draws = {float(torch.rand((), generator=seeded(*key))) for key in ((0, 0), (1, 0), (0, 1), (0, 0, "noise"))}
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=seeded(4, 5)), torch.rand(3, generator=seeded(4, 5)))


def test_the_rate_warms_up_stays_and_falls() -> None:
    course = [rate(step, 100, 10, 20) for step in range(100)]
    assert course[0] == 0.1 and course[9:80] == [1.0] * 71 and course[99] == 0.05
    assert rate(0, 10, 1, 1000) == 1.0  # a decay longer than the run is the run


def test_muon_takes_matrices_inside_blocks_alone() -> None:
    named = trainable(nn.ModuleDict({"transformer": small_dit()}))
    inner = {name for name, parameter in named.items() if is_inner_matrix(name, parameter)}
    assert "transformer.blocks.0.attn.to_qkv.weight" in inner
    assert not any("table" in name or name.endswith("bias") or "blocks" not in name for name in inner)
    muon, adamw = make_optimizers(named, TOY)
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(named)
    with pytest.raises(UsageError, match="trains nothing"):
        make_optimizers({}, TOY)


def test_recipes_refuse_nonsense() -> None:
    for change, message in (
        ({"steps": 0}, "steps 0"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"precision": "float16"}, "precision 'float16'"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(TOY, **change)  # type: ignore[arg-type]


def test_a_record_is_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(described(TOY)))["objective"]["csg"]["segment_blocks"] == 3
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    rewind(path, 1)
    assert path.read_text() == '{"step": 1}\n'
