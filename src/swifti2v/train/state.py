"""Checkpoints of a run: weights, optimizer, average and step, written whole or not at all, the last two kept.

Tensors go through torch's distributed checkpoints: every process writes its own shards, and a run saved by one number
of processes is read by another. What a run is is a line of JSON beside them. It knows no recipes and no data.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..core import RunError
from .optimizers import Average, trainable

KEPT = 2


def folders(out: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(folder for folder in (out / "checkpoints").glob("step-*") if (folder / "state.json").is_file())


def latest(out: Path) -> Path | None:
    found = folders(out)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is damaged: {error}; delete it to go on from the one before") from None


def save(
    out: Path,
    student: nn.Module,
    average: Average,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/step-NNNNNNN``; every process calls it. ``state`` is JSON and has "step"."""
    folder = out / "checkpoints" / f"step-{state['step']:07d}"
    if (folder / "state.json").is_file():
        return folder
    part = folder.with_name(f".{folder.name}.part")
    if _first():
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
    _wait()
    with _quiet():
        dcp.save(_tensors(student, average, optimizers), checkpoint_id=part, no_dist=not dist.is_initialized())
    if _first():
        (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        part.rename(folder)
        for old in folders(out)[:-KEPT]:
            shutil.rmtree(old)
    _wait()
    return folder


@torch.no_grad()
def load(folder: Path, student: nn.Module, average: Average, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a checkpoint back, in place; every process calls it. Refuses one whose tensors are not this network's."""
    saved = _saved(folder)
    target = _tensors(student, average, ())
    named = trainable(student)
    slots: dict[str, tuple[nn.Parameter, str]] = {}
    for key, size in saved.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, slot = rest.rpartition("/")
            if name in named:
                slots[key] = (named[name], slot)
                whole = size == named[name].shape
                target[key] = torch.zeros_like(named[name]).detach() if whole else torch.empty(size)
    _refuse_other(folder, target, saved)
    with _quiet():
        dcp.load(target, checkpoint_id=folder, no_dist=not dist.is_initialized())
    for key, (parameter, slot) in slots.items():
        _holder(optimizers, parameter).state[parameter][slot] = target[key]


@torch.no_grad()
def load_average(folder: Path, student: nn.Module) -> None:
    """Put the averaged weights of a checkpoint into ``student``, in one process; for export."""
    target: dict[str, Any] = {f"average/{name}": torch.empty(p.shape) for name, p in trainable(student).items()}
    buffers = {key: value for key, value in _tensors(student, None, ()).items() if key.startswith("buffer/")}
    saved = {key: size for key, size in _saved(folder).items() if key.startswith(("average/", "buffer/"))}
    _refuse_other(folder, target | buffers, saved)
    with _quiet():
        dcp.load(target | buffers, checkpoint_id=folder, no_dist=True)
    for name, parameter in trainable(student).items():
        parameter.copy_(target[f"average/{name}"])


def _saved(folder: Path) -> dict[str, torch.Size]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: entry.size for key, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _refuse_other(folder: Path, target: Mapping[str, Tensor], saved: Mapping[str, torch.Size]) -> None:
    wrong = sorted(target.keys() ^ saved.keys())
    wrong += [key for key in target.keys() & saved.keys() if target[key].shape != saved[key]]
    if wrong:
        raise RunError(f"{folder} belongs to another network: {len(wrong)} tensors differ, e.g. {wrong[0]}")


def _tensors(
    student: nn.Module, average: Average | None, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """All tensors of a run by flat names: model/NAME, average/NAME, buffer/NAME, optimizer/NAME/SLOT."""
    named = trainable(student)
    parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    out: dict[str, Any] = {f"model/{name}": parameter.detach() for name, parameter in named.items()}
    buffers = {name: value for name, value in student.state_dict().items() if name not in parameters}
    out |= {f"buffer/{name}": value for name, value in buffers.items()}
    if average is not None:
        out |= {f"average/{name}": value for name, value in average.values.items()}
    for name, parameter in named.items():
        for optimizer in optimizers:
            for slot, value in optimizer.state.get(parameter, {}).items():
                out[f"optimizer/{name}/{slot}"] = value
    return out


def _holder(optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter) -> torch.optim.Optimizer:
    return next(o for o in optimizers if any(parameter is p for group in o.param_groups for p in group["params"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
