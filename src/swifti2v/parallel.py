"""Context parallelism: one clip by several processes, the tokens of both Wan transformers split between them (Ulysses).

    torchrun --nproc-per-node 2 -m swifti2v generate ... --preset wan-refine --context-parallel 2

and from Python, in a script that ``torchrun`` starts:

    with parallel.joined() as ranks:
        pipe = SwiftI2VPipeline.from_pretrained(folder)  # in every process, the same weights
        with parallel.enable_context_parallel(pipe, ranks) as leads:
            if leads:  # the other processes stay in the line above until this one is through
                frames = pipe("photo.jpg", "slow pan left").frames

The first process alone runs the pipeline: text, photo, noise, VAEs, job directory, files, what is printed. Whenever it
calls a transformer it sends the arguments, and the others call theirs. So all see the same bits, whatever their kernels
would have made of the photo; resuming is the first one's business alone; and nothing is decoded twice. The split is
diffusers' own (``ContextParallelConfig``). This module knows no stage, no journal and no file; CUDA has never been run.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from . import presets
from .core import RunError, UsageError
from .journal import Manifest
from .ranks import TRANSFORMERS, legal_ranks, nearest, split_of

if TYPE_CHECKING:
    from .pipeline import SwiftI2VPipeline

TIMEOUT = timedelta(minutes=30)
FAILED = "failed"
_HOOK = "swifti2v_lead"
_GRACE = timedelta(seconds=2)  # how long word of a failure may take that has already closed its connections


class Ended(RunError):
    """Not this process failed but another one; the message is its own word, if it left one."""


# -- the processes ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ranks:
    """This process among those that make the clip together; made by ``joined``. Process 0 leads."""

    rank: int
    size: int
    store: Any
    config: ParallelConfig
    stack: ExitStack = field(default_factory=ExitStack)
    over: bool = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def lead(self, manifest: Manifest, load: Callable[[], Any]) -> Any:
        """``load`` the pipeline of a job while the others do (``follow``), and share it with them until the end.

        UsageError, and nothing is loaded, if so many processes cannot share it.
        """
        split = split_of(self.size, presets.get(manifest.request.preset), manifest.request, manifest.inputs.model)
        self.say("load", (manifest.model_dump_json(), split.parts))
        pipeline = load()
        self.stack.enter_context(enable_context_parallel(pipeline, self, split.parts))
        return pipeline

    def follow(self, load: Callable[[Manifest], Any]) -> None:
        """Load what the first process loads and serve its calls. Raises Ended if that one fails."""
        _, (manifest, parts) = self.hear()
        with enable_context_parallel(load(Manifest.model_validate_json(manifest)), self, parts):
            return

    def say(self, kind: str, value: Any = None) -> None:
        """Tell the other processes; plain values only, tensors go through ``send``."""
        with self.connected():
            dist.broadcast_object_list([kind, value], src=0, device=torch.device("cpu"))

    def hear(self) -> tuple[str, Any]:
        """What the first process says next."""
        said: list[Any] = [None, None]
        with self.connected():
            dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0], said[1]

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            dist.broadcast(tensor.contiguous(), src=0)

    def receive(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]) -> dict[str, Any]:
        """What ``send`` sends; on this process's own device of the same kind."""
        tensors = {name: torch.empty(shape, dtype=dtype, device=kind) for name, (shape, dtype, kind) in shapes.items()}
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)
        return tensors

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Work that the others share. Ended, with the word they left, in place of what a lost connection looks like."""
        try:
            yield
        except RuntimeError as error:
            ended = self._explained(error)
            if ended is None:
                raise
            raise ended from error

    def leave_word(self, error: BaseException) -> None:
        """Say why this process ends, for the others to find; the first word counts."""
        if isinstance(error, Ended):
            return
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        with self.connected():
            self.store.compare_set(FAILED, "", f"process {self.rank}: {' '.join(reason.split())[:300]}")

    def word(self, patience: timedelta = timedelta(milliseconds=10)) -> str | None:
        """Why another process ended, if it has said so."""
        try:
            self.store.wait([FAILED], patience)
            return str(self.store.get(FAILED).decode())
        except RuntimeError:  # nothing was said, or the place to say it has gone too
            return None

    def _explained(self, error: RuntimeError) -> Ended | None:
        if isinstance(error, Ended):
            return None
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
        word = self.word(_GRACE) if lost else self.word()
        if word is None and not lost:
            return None
        self.over = True
        return Ended(word or f"another of {self.size} processes does not answer (killed? stopped?)")


@contextmanager
def joined(count: int | None = None, *, device: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Meet the other processes that ``torchrun`` started; when one of them fails, all end with its word.

    ``count``: how many there should be. ``device``: "cpu" if GPUs are not to be used; else every process takes the GPU
    of its number on its machine. ``timeout``: how long one may wait for another. Raises UsageError without
    ``torchrun`` or with another number of processes.
    """
    store, rank, size = _met(count, timeout)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        _take_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )
    try:
        # All groups are made here, while everybody is here: to make one waits for everybody.
        ranks = Ranks(rank, size, dist.PrefixStore("swifti2v", store), _config(rank, size, "cuda" if cuda else "cpu"))
        with _terminable(ranks):
            try:
                with ranks.stack:
                    yield ranks
            except BaseException as error:
                ranks.leave_word(error)
                raise
    finally:
        dist.destroy_process_group()


def _met(count: int | None, timeout: timedelta) -> tuple[Any, int, int]:
    """The store that all processes see, the number of this one, and how many there are."""
    shown = "N" if count is None else count
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError:  # the variables that torchrun sets are not there
        raise UsageError(
            f"context_parallel {shown} needs {shown} processes; use torchrun --nproc-per-node {shown} -m swifti2v ..."
        ) from None
    if count is not None and count != size:
        said = f"context_parallel {count}: {size} processes were started; use --nproc-per-node {count}"
        raise UsageError(said) if rank == 0 else Ended(said)
    return store, rank, size


def _take_device(rank: int) -> None:
    local, there = dist.get_node_local_rank(fallback_rank=rank), torch.cuda.device_count()
    if local >= there:
        raise UsageError(f"process {local} has no GPU of its own: {there} found here; start fewer, or use --device cpu")
    torch.cuda.set_device(local)


def _config(rank: int, size: int, kind: str) -> ParallelConfig:
    """diffusers' configuration of a split over all processes.

    Set up here, since ``enable_parallelism`` divides by the number of accelerators: 0 on a CPU.
    """
    split = ContextParallelConfig(ulysses_degree=size)
    mesh = dist.device_mesh.init_device_mesh(kind, split.mesh_shape, mesh_dim_names=split.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=split)
    config.setup(rank, size, torch.device(kind), mesh=mesh)
    return config


@contextmanager
def _terminable(ranks: Ranks) -> Iterator[None]:
    """SIGTERM raises Ended and SIGINT KeyboardInterrupt, once: torchrun sends the one when another process has failed,
    and the other a second time after Ctrl-C, and there is something to say and to tidy up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        if ranks.over:
            return
        ranks.over = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(ranks.word() or "told to end (SIGTERM), as torchrun does when another process is gone")

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- the transformers ------------------------------------------------------------------------------------------------


@contextmanager
def enable_context_parallel(
    pipeline: SwiftI2VPipeline, ranks: Ranks, parts: Sequence[str] = TRANSFORMERS
) -> Iterator[bool]:
    """Split the transformers of ``pipeline`` for as long as the context lasts; True in the first process.

    Every process enters with the same weights and the same ``parts``, the transformers to split. In the first the
    pipeline is then used as ever; the others come out of entering, with False, when it has left. Raises UsageError if
    the processes do not divide the heads, or for networks other than Wan's; a call whose tokens they do not divide
    raises it too.
    """
    models = {name: getattr(pipeline, name, None) for name in parts}
    for model in models.values():
        _check_model(model, ranks.size)
    if pipeline.placement is not None:
        pipeline.placement = replace(pipeline.placement, ranks=ranks.size)
    _compare(models, ranks)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_split(model, ranks.config))
        if not ranks.leads:
            _serve(models, ranks)
            yield False
            return
        for name, model in models.items():
            stack.enter_context(_led(model, name, ranks))
        yield True
        ranks.say("done")  # not after an error: the others may be in the middle of a call


def _check_model(model: Any, size: int) -> None:
    if not isinstance(model, WanTransformer3DModel):
        raise UsageError(f"context parallelism splits Wan's transformers; {type(model).__name__} is none")
    heads = model.config.num_attention_heads
    if heads % size:
        legal = nearest(size, legal_ranks([heads]) or [1])
        raise UsageError(f"context_parallel {size} does not divide {heads} heads; nearest legal value: {legal}")


def _compare(models: Mapping[str, Any], ranks: Ranks) -> None:
    """RunError in a process whose weights are not those of the first."""
    looks = {f"{name}.{key}": _look(value) for name, model in models.items() for key, value in model.named_parameters()}
    if ranks.leads:
        ranks.say("weights", looks)
        return
    _, wanted = ranks.hear()
    for name in sorted(wanted.keys() | looks.keys()):
        if wanted.get(name) != looks.get(name):
            raise RunError(f"{name} is not as in process 0; give every process the same weights, LoRAs and dtype")


def _look(parameter: Tensor) -> tuple[Any, ...]:
    """What tells weights apart at little cost: shape, dtype, and two values where they are plain numbers."""
    plain = type(parameter) is torch.nn.Parameter and parameter.device.type != "meta"
    ends = parameter.detach().flatten()[[0, -1]].tolist() if plain else ()
    return tuple(parameter.shape), parameter.dtype, tuple(ends)


@contextmanager
def _split(model: Any, config: ParallelConfig) -> Iterator[None]:
    """What diffusers' ``enable_parallelism`` does to a model, undone at the end."""
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    for module in attentions:
        chosen = module.processor._attention_backend
        backend = AttentionBackendName(chosen) if chosen else _AttentionBackendRegistry.get_active_backend()[0]
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            raise UsageError(f"attention backend {backend.value} cannot be split; use native")
    try:
        _configure(model, attentions, config)
        apply_context_parallel(model, config.context_parallel_config, model._cp_plan)
        yield
    finally:
        remove_context_parallel(model, model._cp_plan)
        _configure(model, attentions, None)


def _configure(model: Any, attentions: list[Any], config: ParallelConfig | None) -> None:
    model._parallel_config = config
    for module in attentions:
        module.processor._parallel_config = config


@contextmanager
def _led(model: Any, name: str, ranks: Ranks) -> Iterator[None]:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(_Lead(name, ranks, model), _HOOK)
    try:
        yield
    finally:
        registry.remove_hook(_HOOK)


class _Lead(ModelHook):
    """Sends every call of the first process's transformer to the others, then makes it together with them."""

    def __init__(self, name: str, ranks: Ranks, model: Any) -> None:
        super().__init__()
        self.name, self.ranks, self.stock = name, ranks, _tables(model)

    def new_forward(self, model: Any, **given: Any) -> Any:
        call = _divisible(model, given, self.ranks.size)
        tensors = {key: value for key, value in call.items() if isinstance(value, Tensor)}
        tables = _tables(model)
        moved = any(table is not self.stock[key] for key, table in tables.items())  # rope_frames is at work
        sent = tensors | (tables if moved else {})
        shapes = {key: (tuple(value.shape), value.dtype, value.device.type) for key, value in sent.items()}
        self.ranks.say("call", (self.name, shapes, {key: call[key] for key in call.keys() - tensors.keys()}))
        with self.ranks.connected():
            self.ranks.send(sent)
            return self.fn_ref.original_forward(**call)


@torch.no_grad()
def _serve(models: Mapping[str, Any], ranks: Ranks) -> None:
    """Make every call that the first process makes, until it is done."""
    stock = {name: _tables(model) for name, model in models.items()}
    while True:
        kind, said = ranks.hear()
        if kind == "done":
            return
        name, shapes, plain = said
        model = models[name]
        with ranks.connected():
            tensors = ranks.receive(shapes)
            for key, table in stock[name].items():
                setattr(model.rope, key, tensors.pop(key, table))
            model(**tensors, **plain)


def _tables(model: Any) -> dict[str, Tensor]:
    """The rotary tables, which ``rope_frames`` swaps: state of a call that is not among its arguments."""
    return {key: getattr(model.rope, key) for key in ("freqs_cos", "freqs_sin")}


def _divisible(model: Any, call: dict[str, Any], size: int) -> dict[str, Any]:
    """The arguments with noise levels (b, n) that the processes divide: instead of a block's, one for each piece of it.

    Since they divide the tokens of the window, the pieces are whole; UsageError if they do not.
    """
    sides = zip(call["hidden_states"].shape[2:], model.config.patch_size, strict=True)
    tokens = math.prod(side // patch for side, patch in sides)
    if tokens % size:
        raise UsageError(f"context_parallel {size} does not divide the {tokens} tokens of a window")
    timestep = call["timestep"]
    if timestep.ndim == 1:
        return call
    pieces = size // math.gcd(timestep.shape[1], size)
    return {**call, "timestep": timestep.repeat_interleave(pieces, dim=1)}
