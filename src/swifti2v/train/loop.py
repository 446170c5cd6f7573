"""One loop for every recipe: a single process, DDP, FSDP2 or many machines, as ``accelerate launch`` starts it.

``train(recipe, out)`` runs or continues a run in folder ``out``; started again with the same recipe it goes on from its
last checkpoint and ends with the weights it would have had undisturbed: bit for bit with as many processes on the same
machine, as far as its kernels are deterministic (a CPU's are).
Everything random is a function of (seed, item index). It knows no networks, data or objectives.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .. import memory
from ..core import RunError, UsageError
from . import logs, state
from .optimizers import Average, clip, fill_missing_gradients, make_optimizers, rate, set_rate, trainable
from .recipe import Objective, Parts, Recipe, record, refuse_changes
from .source import feed, item_index, seeded

Reason = Literal["finished", "minutes", "signal"]


@dataclass(frozen=True)
class Outcome:
    """Why and where a run stopped: ``step`` is the number of optimizer steps done, ``checkpoint`` holds them.

    ``main``: this is the first of the processes, the one to speak and to write what is made of the run.
    """

    step: int
    reason: Reason
    checkpoint: Path
    main: bool = True


class Student(nn.Module):
    """The trained modules under one roof, whose forward pass is the objective: DDP and FSDP see one module."""

    def __init__(self, parts: Parts, objective: Objective, precision: str) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(parts.modules)
        self._parts, self._objective, self._half = (parts,), objective, precision == "bfloat16"

    def forward(self, item: Any, index: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = seeded(seed, index)
        torch.manual_seed(generator.initial_seed())  # for dropout inside networks
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            loss = self._objective(self._parts[0], item, generator)
        return loss.value, loss.error.detach(), loss.base.detach()


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    minutes: float | None = None,
    allow: Sequence[str] = (),
    trackers: Sequence[str] = (),
    quiet: bool = False,
    sharded: bool | None = None,
) -> Outcome:
    """Train ``recipe`` in folder ``out`` until its last step, for ``minutes``, or until SIGINT or SIGTERM.

    Whatever ends it, a checkpoint is there. ``allow``: fields of the recipe (dotted names or their beginnings) that
    may differ from those of the checkpoint found. ``trackers``: accelerate's, e.g. "tensorboard", "trackio".
    ``sharded``: FSDP2 over all processes; None as ``accelerate launch`` was told (which knows no FSDP on CPUs).
    Raises UsageError if the folder holds a run of another recipe, RunError if the loss is no longer finite.
    """
    if minutes is not None and not minutes > 0:
        raise UsageError(f"minutes {minutes} is not positive")
    out = Path(out)
    accelerator = Accelerator(mixed_precision="no", log_with=list(trackers) or None, project_dir=out)
    run = _Run(recipe, out, accelerator, tuple(allow), sharded)
    if trackers:
        if len(accelerator.log_with) < len(trackers):  # accelerate itself leaves them out without a word
            raise UsageError(f"of the trackers {', '.join(trackers)} at least one is unknown or not installed")
        accelerator.init_trackers(recipe.name)
    with _stopping() as stop, logs.Reporter(run.log, recipe.name, recipe.steps, quiet=quiet or not run.main) as report:
        outcome = run.go(report, stop, None if minutes is None else time.monotonic() + 60 * minutes)
    if trackers:
        accelerator.end_training()
    return outcome


class _Run:
    """A run in this process: what is learned, its average, and where it stands."""

    def __init__(
        self, recipe: Recipe, out: Path, accelerator: Accelerator, allow: tuple[str, ...], sharded: bool | None
    ) -> None:
        self.recipe, self.out, self.accelerator = recipe, out, accelerator
        self.main, self.world = accelerator.is_main_process, accelerator.num_processes
        self.device = accelerator.device
        self.record = record(recipe, recipe.accumulation * self.world)
        self.step, self.window, found = 0, logs.Window(), state.latest(out)
        if found is not None:
            refuse_changes(state.read_state(found)["record"], self.record, allow, str(found))
        torch.manual_seed(recipe.seed)
        self.parts = recipe.build()
        self.source = recipe.source(self.parts)
        self.student = Student(self.parts, recipe.objective, recipe.precision)
        asked = getattr(accelerator.state, "fsdp_plugin", None) is not None if sharded is None else sharded
        self.sharded = asked and self.world > 1
        self.wrapped = self._place()
        self.named = trainable(self.student)
        self.optimizers = make_optimizers(self.named, recipe)
        self.average = Average(self.named, recipe.ema_decay)
        out.mkdir(parents=True, exist_ok=True)
        if found is not None:
            self._resume(found)
        if self.main:
            logs.rewind(self.log, self.step)

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    def _place(self) -> nn.Module:
        """Modules to the device; the student wrapped for the processes that share it."""
        for module in self.parts.frozen.values():
            module.eval().requires_grad_(False)
            memory.place(module, self.device)
        constants = {name: value.to(self.device) for name, value in self.parts.constants.items()}
        self.parts.constants.update(constants)
        if self.recipe.gradient_checkpointing:
            for module in self.parts.modules.values():
                checkpoint_gradients(module)
        self.student.train()
        if not self.sharded:
            return self.accelerator.prepare_model(self.student)
        shard(self.student, self.accelerator, self.recipe.precision)
        return self.student

    def _resume(self, folder: Path) -> None:
        state.load(folder, self.student, self.average, self.optimizers)
        saved = state.read_state(folder)
        self.step, self.window = saved["step"], logs.Window(**saved["window"])

    def save(self) -> Path:
        row = {"step": self.step, "record": self.record, "window": self.window.state()}
        return state.save(self.out, self.student, self.average, self.optimizers, row)

    def go(self, report: logs.Reporter, stop: list[str], deadline: float | None) -> Outcome:
        """Step until the end; a checkpoint is written whatever the reason."""
        recipe, reason = self.recipe, "finished"
        report.say(f"{recipe.name}: {sum(p.numel() for p in self.named.values()):,} parameters, step {self.step}")
        items = feed(self.source, self._indices(), recipe.workers)
        while self.step < recipe.steps:
            begun = time.perf_counter()
            values, ends = self._update(items, [bool(stop), deadline is not None and time.monotonic() > deadline])
            self.window.add(**values, seconds=time.perf_counter() - begun)
            report.at(self.step)
            if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                self._log(report)
            if self.step % recipe.save_every == 0:
                self.save()
            if recipe.sample is not None and recipe.sample_every and self.step % recipe.sample_every == 0:
                self.sample()
            if any(ends) and self.step < recipe.steps:
                reason = "signal" if ends[0] else "minutes"
                break
        folder = self.save()
        report.say(f"{recipe.name}: {reason} at step {self.step}; {folder}")
        return Outcome(self.step, reason, folder, self.main)  # type: ignore[arg-type]

    def _indices(self) -> Iterator[int]:
        accumulation, rank = self.recipe.accumulation, self.accelerator.process_index
        for step in range(self.step, self.recipe.steps):
            for micro in range(accumulation):
                yield item_index(step, micro, rank, accumulation, self.world)

    def _update(self, items: Iterator[Any], ends: list[bool]) -> tuple[dict[str, float], list[bool]]:
        """One optimizer step; returns its numbers and which of ``ends`` any process has seen."""
        recipe, parameters = self.recipe, list(self.named.values())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(3 + len(ends), dtype=torch.float64)
        for micro in range(recipe.accumulation):
            index = item_index(self.step, micro, self.accelerator.process_index, recipe.accumulation, self.world)
            item = send_to_device(next(items), self.device)
            last = micro == recipe.accumulation - 1
            with nullcontext() if last else self._unsynchronized():
                loss, error, base = self.wrapped(item, index, recipe.seed, self.device)
                (loss / recipe.accumulation).backward()
            totals[:3] += torch.stack([loss.detach(), error, base]).double().cpu() / recipe.accumulation
        totals[3:] = torch.tensor(ends, dtype=torch.float64)
        totals = self._mean_over_processes(totals)
        fill_missing_gradients(parameters)
        norm = clip(parameters, recipe.clip_norm)
        self._refuse_broken(float(totals[0]), norm)
        lr = recipe.lr * rate(self.step, recipe.steps, recipe.warmup, recipe.decay)
        set_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.average.update(self.named, self.step)
        loss_value, error_value, base_value = totals[:3].tolist()
        values = {"loss": loss_value, "error": error_value, "base": base_value, "norm": norm, "lr": lr}
        return values, [value > 0 for value in totals[3:].tolist()]

    @contextmanager
    def _unsynchronized(self) -> Iterator[None]:
        """Gradients stay in this process until the last micro-batch."""
        wrapped: Any = self.wrapped
        if not self.sharded:
            with self.accelerator.no_sync(wrapped):
                yield
            return
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        if self.world == 1:
            return values
        return self.accelerator.reduce(values.to(self.device), reduction="mean").cpu()

    def _refuse_broken(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        found = state.latest(self.out)
        kept = f"the last checkpoint is {found}" if found is not None else "there is no checkpoint yet"
        raise RunError(
            f"step {self.step + 1} of {self.recipe.name}: loss {loss}, gradient norm {norm}: not finite. The step was "
            f"not made and nothing was overwritten; {kept}. Try a smaller lr or precision float32."
        )

    def _log(self, report: logs.Reporter) -> None:
        means = self.window.means()
        if self.main:
            report.row({"step": self.step, "time": round(time.time(), 1), **means})
        if self.accelerator.trackers:
            self.accelerator.log(means, step=self.step)

    def sample(self) -> None:
        """The recipe's samples, with averaged weights, into ``samples/step-N``; all processes of a sharded run help."""
        if self.recipe.sample is None or not (self.main or self.sharded):
            return
        folder = self.out / "samples" / f"step-{self.step:07d}"
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
        self.student.eval()
        with self.average.in_place_of(self.named), torch.no_grad():
            self.recipe.sample(self.parts, self.source, folder if self.main else None)
        self.student.train()


def checkpoint_gradients(module: nn.Module) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations."""
    enable = getattr(module, "enable_gradient_checkpointing", None) or getattr(
        module, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise UsageError(f"a {type(module).__name__} has no gradient checkpointing; set gradient_checkpointing=False")
    enable()


def shard(student: nn.Module, accelerator: Accelerator, precision: str) -> None:
    """FSDP2: every layer of a class that a module names as not to be split, then the rest.

    Parameters stay float32 (masters); with "bfloat16" they are gathered in it and gradients are summed in float32.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError(f"FSDP version {plugin.fsdp_version} is not used here; launch with --fsdp_version 2")
    half = precision == "bfloat16"
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy(),
        "offload_policy": OffloadPolicy() if plugin is None else plugin.cpu_offload,
    }
    whole = {name for module in student.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in list(student.modules()):
        if type(module).__name__ in whole:
            fully_shard(module, **settings)
    fully_shard(student, **settings)


@contextmanager
def _stopping() -> Iterator[list[str]]:
    """A list that is no longer empty once SIGINT or SIGTERM has come; a second SIGINT interrupts at once."""
    seen: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
