"""The authors' MobileI2V checkpoint (hybrid_371.pth) as a ``MobileTransformer3DModel``: each key by table, each shape.

The published file is the network in float32 with a text path that it never reads and position tables that it never
adds; both are checked and left out. Facts: specs of the public code, shared/specs/mobilei2v.md section 1.4.
With ``weights`` and ``checkpoints`` the only module that knows foreign key names. A file that does not fit is refused
in one line that names the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor

from .checkpoints import PICKLES, hash_list, locate, read_files, refuse, some, tensor_names
from .core import RunError, UsageError
from .models.mobile_dit import MobileTransformer3DModel
from .weights import LoadReport, strip_prefixes

PUBLISHED_PARAMETERS = 267_218_048
"""Trainable parameters of the published network, its dead text path included."""
PARAMETERS = 264_855_296
"""Those that it uses: all of ``MobileTransformer3DModel()``."""
TRAINABLE_TENSORS = 196
TEXT_CHANNELS, TEXT_TOKENS = 896, 300  # Qwen2-0.5B's states, and how many of them
POSITIONS = {"pos_embed": 920, "pos_embed_temporal": 17}  # 23 x 40 places, 17 frames
PREFIXES = ("module.", "model.", "_orig_mod.")

_ENDS = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "flow_embedder.mlp.0": "motion_embed.linear_1",
    "flow_embedder.mlp.2": "motion_embed.linear_2",
    "t_block.1": "time_modulation",
    "flow_block.1": "motion_modulation",
    "final_layer.linear": "proj_out",
}
_LAYER = {
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.inverted_conv.conv": "ffn.expand",
    "mlp.depth_conv.conv": "ffn.depthwise",
    "mlp.point_conv.conv": "ffn.project",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the published file: its shape there, and its name here (None: checked and left out)."""

    shape: tuple[int, ...]
    ours: str | None
    trained: bool = True


def key_table(model: MobileTransformer3DModel) -> dict[str, Entry]:
    """Every key of a published file of ``model``'s sizes, in the authors' words.

    Products are 1x1 convolutions there where ours are linear: the same numbers with singleton axes behind.
    """
    state, table = model.state_dict(), dict[str, Entry]()

    def add(theirs: str, ours: str, axes: int = 0) -> None:
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in state:
                behind = (1,) * axes if part == "weight" else ()
                table[f"{theirs}.{part}"] = Entry((*state[f"{ours}.{part}"].shape, *behind), f"{ours}.{part}")

    for theirs, ours in _ENDS.items():
        add(theirs, ours, axes=2 if ours == "patch_embed" else 0)
    table["final_layer.scale_shift_table"] = Entry(tuple(state["final_table"].shape), "final_table")
    for index in range(len(model.blocks)):
        block = f"blocks.{index}"
        for theirs, ours in _LAYER.items():
            add(f"{block}.{theirs}", f"{block}.{ours}", axes=2 if ours in ("ffn.expand", "ffn.project") else 0)
        tables = f"{block}.scale_shift_table"
        table[tables] = Entry(tuple(state[tables].shape), tables)
    return table | _dead(model.config["hidden_size"])


def _dead(width: int) -> dict[str, Entry]:
    """The text path that no block reads, and the buffers."""
    table = {
        "y_embedder.y_proj.fc1.weight": Entry((width, TEXT_CHANNELS), None),
        "y_embedder.y_proj.fc1.bias": Entry((width,), None),
        "y_embedder.y_proj.fc2.weight": Entry((width, width), None),
        "y_embedder.y_proj.fc2.bias": Entry((width,), None),
        "attention_y_norm.weight": Entry((width,), None),
        "y_embedder.y_embedding": Entry((TEXT_TOKENS, TEXT_CHANNELS), None, trained=False),
    }
    return table | {name: Entry((length, width), None, trained=False) for name, length in POSITIONS.items()}


def is_published(path: str | Path, *, allow_pickle: bool = False) -> bool:
    """Whether a file speaks in MobileI2V's words. Raises UsageError if it is no checkpoint, or a pickle not allowed."""
    files = locate(path, allow_pickle=allow_pickle)
    names = set(read_files(files, allow_pickle)) if files[0].suffix in PICKLES else tensor_names(files[0])
    return all(
        any(name.endswith(word) for name in names) for word in ("flow_embedder.mlp.0.weight", "t_block.1.weight")
    )


def load_mobile(path: str | Path, *, allow_pickle: bool = False) -> tuple[MobileTransformer3DModel, LoadReport]:
    """The published base network, in eval mode on the CPU, and what became of every key.

    ``path``: the authors' file, a pickle (with ``allow_pickle`` only, and then weights-only), or the same keys as
    safetensors. The null caption and the position tables may be missing. Raises UsageError naming missing,
    surplus, misshapen and non-floating tensors, and if the counts are not the published ones.
    """
    files, name = locate(path, allow_pickle=allow_pickle), Path(path).name
    given, prefix = strip_prefixes(read_files(files, allow_pickle), PREFIXES)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = MobileTransformer3DModel()
    table = key_table(model)
    _check(name, given, table)
    _check_counts(name, given, table)
    ours = {e.ours: given[key].reshape(model.state_dict()[e.ours].shape) for key, e in table.items() if e.ours}
    model.load_state_dict(ours, strict=True, assign=True)
    if left := [key for key, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise RunError(f"{name}: not filled, {some(left)}")
    dead = tuple(sorted(key for key in given if table[key].ours is None))
    layout = f"MobileI2V, prefix {prefix}" if prefix else "MobileI2V"
    return model.eval(), LoadReport(name, layout, tuple(sorted(ours)), (), dead, hash_list(files))


def _check(name: str, given: Mapping[str, Tensor], table: Mapping[str, Entry]) -> None:
    refuse(name, "keys that MobileI2V does not have", given.keys() - table.keys())
    optional = {key for key, entry in table.items() if not entry.trained}
    if missing := table.keys() - given.keys() - optional:
        raise UsageError(f"{name} lacks {some(missing)} (of {len(table)}); it is not the whole MobileI2V checkpoint")
    for key, tensor in given.items():
        entry, shape = table[key], tuple(tensor.shape)
        if shape != entry.shape and (entry.trained or shape != (1, *entry.shape)):  # buffers may have a batch axis
            raise UsageError(f"{name}: {key} is {list(shape)}, MobileI2V has {list(entry.shape)}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UsageError(f"{name}: {key} is {tensor.dtype}, weights are floating point of 16 bits or more")


def _check_counts(name: str, given: Mapping[str, Tensor], table: Mapping[str, Entry]) -> None:
    """The ledger of the spec, held against the file itself."""
    trained = [key for key, entry in table.items() if entry.trained]
    counts = (len(trained), _sizes(given[k] for k in trained), _sizes(given[k] for k in trained if table[k].ours))
    if counts != (TRAINABLE_TENSORS, PUBLISHED_PARAMETERS, PARAMETERS):
        raise UsageError(f"{name} has tensors, parameters and used parameters {counts}, which are not MobileI2V's")


def _sizes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def fake_checkpoint(fill: float = 0.0) -> dict[str, Tensor]:
    """A state dict of exactly the published keys and shapes, each one number in memory: for tests and examples."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = MobileTransformer3DModel()
    return {key: torch.full((), fill).expand(entry.shape) for key, entry in key_table(model).items()}
