"""Checkpoints in, whole and strict; diffusers folders out; hashes of both.

The only module (with ``lora``) that opens checkpoints and knows foreign key names. Nothing is ever
dropped or filled in silently: every load returns a ``LoadReport``, and a file that does not fit is
refused in one line before any weight is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, ModelMixin, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from diffusers.models.modeling_utils import no_init_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .core import RunError, UsageError

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.", "model.", "module.", "_orig_mod.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "model.", "module.", "_orig_mod.")
HEAD_DIM = 128  # of every released Wan transformer; tiny models say theirs in config
_ORIGINAL = re.compile(
    r"(^|\.)(self_attn|cross_attn|head|time_embedding|text_embedding|time_projection|img_emb|modulation)(\.|$)"
    r"|\.ffn\.[02]\.|\.norm3\.(weight|bias)$"
)
_DIFFUSERS = re.compile(
    r"(^|\.)(attn1|attn2|condition_embedder|proj_out|scale_shift_table)(\.|$)|\.ffn\.net\.|\.norm2\.(weight|bias)$"
)
# Public constants of the Wan2.2 VAE (Wan-AI/Wan2.2-TI2V-5B-Diffusers, vae/config.json); original files lack them.
# fmt: off
WAN22_LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
WAN22_LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on


@dataclass(frozen=True)
class LoadReport:
    """What became of every key.

    ``matched``: loaded from the file; ``missing``: keys of the model that the file lacks (taken from the
    base checkpoint, or layers a LoRA leaves alone); ``unexpected``: keys of the file that were ignored on
    purpose; ``files``: name -> SHA-256 of everything read.
    """

    name: str
    layout: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the model's keys that the file supplied, 0..1."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing))

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.layout}): {len(self.matched)} keys matched ({self.coverage:.1%})"]
        lines += [f"  {word}: {some(keys)}" for word, keys in self._rest() if keys]
        lines += [f"  sha256 {digest}  {name}" for name, digest in self.files.items()]
        return "\n".join(lines)

    def _rest(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (("not in this file", self.missing), ("ignored", self.unexpected))


def some(keys: Iterable[str], limit: int = 3) -> str:
    """``5 keys: a, b, c, ...`` for one-line messages."""
    names = sorted(keys)
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} key{'s' * (len(names) != 1)}: {', '.join(names[:limit])}{more}"


# ---------------------------------------------------------------------------------------------- reading


def read_tensors(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, memory-mapped on the CPU.

    ``path`` is a ``.safetensors`` file, a ``*.safetensors.index.json`` or a folder that holds one of them.
    Pickles (.pth, .pt, .bin, .ckpt) are opened with ``allow_pickle`` only, and then weights-only; a dict
    wrapped in ``state_dict`` or ``model`` is unwrapped. Anything else, or anything damaged, is a UsageError.
    """
    return _read_all(locate(path, allow_pickle=allow_pickle), allow_pickle)


def locate(path: str | Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files that make up a checkpoint: one file, or an index and its shards. Refuses missing ones."""
    file = Path(path)
    if file.is_dir():
        file = _in_folder(file, allow_pickle)
    if not file.is_file():
        raise UsageError(f"{file.name}: no such checkpoint file ({file})")
    if file.suffix in PICKLES and not allow_pickle:
        raise UsageError(
            f"{file.name} is a pickle, which can run code when it is opened; "
            "convert it to .safetensors, or pass --allow-pickle if you trust its author"
        )
    if file.name.endswith(".index.json"):
        return [file, *(file.parent / name for name in sorted(set(_weight_map(file).values())))]
    if file.suffix != ".safetensors" and file.suffix not in PICKLES:
        raise UsageError(f"{file.name} is not a checkpoint: expected .safetensors, .safetensors.index.json or a folder")
    return [file]


def _in_folder(folder: Path, allow_pickle: bool) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{p}" for p in PICKLES if allow_pickle)):
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{folder.name} holds {len(found)} checkpoints ({some(p.name for p in found)}); name one")
    if (folder / "model_index.json").is_file():
        raise UsageError(f"{folder.name} is a whole pipeline; give one of its folders, e.g. {folder.name}/transformer")
    pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
    hint = f", only pickles ({pickles[0]}): convert them or pass --allow-pickle" if pickles else ""
    raise UsageError(f"{folder.name} holds no .safetensors file{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(v, str) for v in content.values()):
        raise UsageError(f"{index.name} is not a shard index: it has no weight_map of key to file name")
    for name in sorted(set(content.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{index.name} names the shard {name!r}, which is not a .safetensors file beside it")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index.name} needs the shard {name}, which is missing")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file, or a UsageError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.name} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path.name} is not a JSON object")
    return content


def _read_all(files: list[Path], allow_pickle: bool) -> dict[str, Tensor]:
    if not files[0].name.endswith(".index.json"):
        return _read_pickle(files[0]) if files[0].suffix in PICKLES and allow_pickle else _read_safetensors(files[0])
    listed = _weight_map(files[0])
    tensors: dict[str, Tensor] = {}
    for shard in files[1:]:
        held = _read_safetensors(shard)
        wanted = {key for key, name in listed.items() if name == shard.name}
        if held.keys() != wanted:
            raise UsageError(f"{shard.name} and {files[0].name} disagree about {some(held.keys() ^ wanted)}")
        tensors.update(held)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in a safetensors header; also checks the header against the file's length."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            body = stream.read(length) if length <= min(size - 8, 100_000_000) else b""
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror}") from None
    if size < 8:
        raise UsageError(f"{path.name} is {'empty' if size == 0 else f'cut off after {size} bytes'}; fetch it again")
    if start == b"version ":
        raise UsageError(f"{path.name} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if not body:
        raise UsageError(f"{path.name} is not whole safetensors: header of {length} bytes in a file of {size} bytes")
    try:
        header = json.loads(body)
        metadata = header.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UsageError(f"{path.name} is not safetensors: its header of {length} bytes is not a tensor table") from None
    if end != size:
        raise UsageError(f"{path.name} is damaged: its header describes {end} bytes, the file has {size}")
    return metadata


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_metadata(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"{path.name} is damaged safetensors: {_first_line(error)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size == 0:
        raise UsageError(f"{path.name} is empty; fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        raise UsageError(f"{path.name} is not a plain dict of tensors in PyTorch format: {_first_line(error)}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path.name} holds {type(content).__name__}, not a dict of named tensors")
    wrong = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise UsageError(f"{path.name} holds things that are not tensors, {some(wrong)}")
    return dict(content)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ------------------------------------------------------------------------------------------ transformer


def load_transformer(
    path: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    cls: type[ModelMixin] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> tuple[Any, LoadReport]:
    """Build a transformer from any layout it is published in, in eval mode on the CPU.

    path: diffusers folder or file, original Wan, DiffSynth or ComfyUI single file, any usual prefix.
    config: values (or a config.json, or its folder) that override the file's own or the inferred ones.
    cls: model class, default ``SwiftI2VTransformer3DModel``; other than Wan's, diffusers layout only.
    base: a whole checkpoint under a trainable-only ``path``, whose tensors replace the base's.
    dtype: cast to this, but for the modules the class keeps in float32; None keeps the file's.
    Refuses (UsageError) unknown, missing, misshapen and non-floating tensors.
    """
    cls = cls or _default_class()
    name = Path(path).name
    tensors, layout, files, found = _read_dit(path, cls, allow_pickle)
    overlay = set(tensors) if base else None
    if base:
        beneath, base_layout, base_files, base_found = _read_dit(base, cls, allow_pickle)
        refuse(name, "keys that the base does not have", tensors.keys() - beneath.keys())
        tensors = {**beneath, **tensors}
        layout, files, found = f"{layout} over {base_layout}", [*files, *base_files], found or base_found
    wan = issubclass(cls, WanTransformer3DModel)
    settings = {**(_infer_dit(tensors) if wan else {}), **found, **_overrides(config)}
    if wan and "num_attention_heads" not in settings and "patch_embedding.weight" in tensors:
        raise UsageError(
            f"{name}: cannot tell the heads of width {tensors['patch_embedding.weight'].shape[0]}, not a multiple of "
            f"{HEAD_DIM}; pass config with num_attention_heads and attention_head_dim"
        )
    model, ignored = _fill(cls, settings, tensors, name, dtype)
    matched = (overlay or set(tensors)) - ignored
    missing = set(tensors) - ignored - matched
    return model, LoadReport(name, layout, *(tuple(sorted(k)) for k in (matched, missing, ignored)), _hash_list(files))


def _default_class() -> type[ModelMixin]:
    from .models.wan import SwiftI2VTransformer3DModel

    return SwiftI2VTransformer3DModel


def refuse(name: str, what: str, keys: Iterable[str]) -> None:
    """UsageError if there are any such keys."""
    keys = list(keys)
    if keys:
        raise UsageError(f"{name} has {what}: {some(keys)}")


def _read_dit(
    path: str | Path, cls: type[ModelMixin], allow_pickle: bool
) -> tuple[dict[str, Tensor], str, list[Path], dict[str, Any]]:
    files = locate(path, allow_pickle=allow_pickle)
    config = _folder_config(Path(path), cls)
    raw, prefix = strip_prefixes(_read_all(files, allow_pickle), PREFIXES)
    name = Path(path).name
    if any("lora_" in key or key.endswith((".lora.up.weight", ".diff", ".diff_b")) for key in raw):
        raise UsageError(f"{name} is a LoRA, not a checkpoint; load it with --lora")
    scaled = [k for k, v in raw.items() if "scale_weight" in k or "scaled_fp8" in k or v.dtype.itemsize < 2]
    refuse(name, "fp8-scaled or integer weights, which are not read (use the fp16 or bf16 file)", scaled)
    original = [k for k in raw if _ORIGINAL.search(k)] if issubclass(cls, WanTransformer3DModel) else []
    if original and any(_DIFFUSERS.search(k) for k in raw):
        raise UsageError(f"{name} mixes original and diffusers keys, e.g. {original[0]}")
    tensors = convert_wan_transformer_to_diffusers(dict(raw)) if original else raw
    if len(tensors) != len(raw):
        raise UsageError(f"{name} has {len(raw) - len(tensors)} keys that collide once renamed")
    kind = "original" if original else ("diffusers folder" if config else "diffusers")
    if config:
        files = [Path(path) / "config.json", *files]
    return tensors, f"{kind}, prefix {prefix}" if prefix else kind, files, config


def strip_prefixes(tensors: dict[str, Tensor], prefixes: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """Take off, repeatedly, the first prefix that every key has. Returns the rest and what was taken off."""
    taken = ""
    while tensors:
        prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        taken += prefix
    return tensors, taken


def _folder_config(folder: Path, cls: type[ModelMixin]) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        return {}
    config = read_json(folder / "config.json")
    known = {c.__name__ for c in cls.__mro__}
    if issubclass(cls, WanTransformer3DModel):
        known.add("SwiftI2VTransformer3DModel")
    if config.get("_class_name", cls.__name__) not in known:
        raise UsageError(f"{folder.name} holds a {config['_class_name']}, not a {cls.__name__}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _overrides(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if isinstance(config, (str, Path)):
        path = Path(config)
        config = read_json(path / "config.json" if path.is_dir() else path)
    return {key: value for key, value in (config or {}).items() if not key.startswith("_")}


def _infer_dit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a (diffusers-named) Wan transformer say about its config."""

    def axis(key: str, dim: int) -> int | None:
        return tensors[key].shape[dim] if key in tensors and tensors[key].ndim > dim else None

    blocks = [int(key.split(".")[1]) for key in tensors if re.match(r"blocks\.\d+\.", key)]
    config: dict[str, Any] = {
        "num_layers": max(blocks, default=0) + 1,
        "in_channels": axis("patch_embedding.weight", 1),
        "ffn_dim": axis("blocks.0.ffn.net.0.proj.weight", 0),
        "text_dim": axis("condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": axis("condition_embedder.time_embedder.linear_1.weight", 1),
        "image_dim": axis("condition_embedder.image_embedder.norm1.weight", 0),
        "added_kv_proj_dim": axis("blocks.0.attn2.add_k_proj.weight", 1),
    }
    width, patch = axis("patch_embedding.weight", 0), tuple(getattr(tensors.get("patch_embedding.weight"), "shape", ()))
    if width and len(patch) == 5:
        config["patch_size"] = patch[2:]
        if (rows := axis("proj_out.weight", 0)) is not None:
            config["out_channels"] = rows // math.prod(patch[2:])
        if width % HEAD_DIM == 0:
            config |= {"num_attention_heads": width // HEAD_DIM, "attention_head_dim": HEAD_DIM}
    if "blocks.0.attn1.to_q.weight" in tensors:
        config["cross_attn_norm"] = "blocks.0.norm2.weight" in tensors
        config["qk_norm"] = "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in tensors else None
    return {key: value for key, value in config.items() if value is not None or key == "qk_norm"}


def _fill(
    cls: type[Any], config: dict[str, Any], tensors: dict[str, Tensor], name: str, dtype: torch.dtype | None
) -> tuple[Any, set[str]]:
    """Build ``cls`` without memory, check every tensor against it, put them in. Returns model, ignored keys."""
    try:
        # Parameters on meta, buffers real: rotary tables are not in checkpoints and must be computed.
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = cls.from_config(config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{name}: its config does not build a {cls.__name__}: {_first_line(error)}") from None
    wanted = model.state_dict()
    patterns = getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or []
    ignored = {k for k in tensors.keys() - wanted.keys() if any(re.search(p, k) for p in patterns)}
    refuse(name, f"keys that a {cls.__name__} does not have", tensors.keys() - wanted.keys() - ignored)
    if missing := wanted.keys() - tensors.keys():
        raise UsageError(
            f"{name} lacks {some(missing)} (of {len(wanted)}); a file of trained tensors only needs base=CHECKPOINT"
        )
    for key, target in wanted.items():
        if tensors[key].shape != target.shape:
            raise UsageError(f"{name}: {key} is {list(tensors[key].shape)}, the model has {list(target.shape)}")
        if not tensors[key].is_floating_point():
            raise UsageError(f"{name}: {key} is {tensors[key].dtype}, weights are floating point")
    state = {key: _cast(tensors[key], key, dtype, getattr(cls, "_keep_in_fp32_modules", None) or []) for key in wanted}
    model.load_state_dict(state, strict=True, assign=True)
    left = [key for key, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RunError(f"{name}: not filled, {some(left)}")
    return model.eval(), ignored


def _cast(tensor: Tensor, key: str, dtype: torch.dtype | None, keep: Iterable[str]) -> Tensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.float32 if any(part in keep for part in key.split(".")) else dtype)


def write_diffusers(model: ModelMixin, folder: str | Path) -> Path:
    """Save in diffusers layout, whole or not at all; never onto something that exists."""
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder.name} exists; name a new folder")
    if getattr(model, "peft_config", None):
        raise UsageError("the model carries LoRA adapters; fuse or unload them before saving")
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        for file in part.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {_first_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


# -------------------------------------------------------------------------------------------------- VAE


def load_vae(
    path: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> tuple[AutoencoderKLWan, LoadReport]:
    """A Wan2.1 or Wan2.2 VAE from a diffusers folder or file or from the original (or ComfyUI) file."""
    name = Path(path).name
    files = locate(path, allow_pickle=allow_pickle)
    found = _folder_config(Path(path), AutoencoderKLWan)
    raw, prefix = strip_prefixes(_read_all(files, allow_pickle), VAE_PREFIXES)
    if any(key.startswith("encoder.downsamples.0.downsamples.") for key in raw):
        layout, tensors = "original Wan2.2 VAE", {_wan22_vae_key(key): value for key, value in raw.items()}
    elif any(key.startswith("encoder.downsamples.") for key in raw):
        layout, tensors = "original Wan2.1 VAE", convert_wan_vae_to_diffusers(raw)
    else:
        layout, tensors = "diffusers folder" if found else "diffusers", raw
    if len(tensors) != len(raw):
        raise UsageError(f"{name} has {len(raw) - len(tensors)} keys that collide once renamed")
    settings = {**_infer_vae(tensors, name), **found, **_overrides(config)}
    model, ignored = _fill(AutoencoderKLWan, settings, tensors, name, dtype)
    files = [Path(path) / "config.json", *files] if found else files
    layout = f"{layout}, prefix {prefix}" if prefix else layout
    return model, LoadReport(name, layout, tuple(sorted(tensors)), (), tuple(ignored), _hash_list(files))


_VAE_PARTS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_VAE_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def _wan22_vae_key(key: str) -> str:
    """One original Wan2.2 VAE name in diffusers' words; unknown names come back as they are (and are refused)."""
    inner = {"shortcut": "conv_shortcut", **_VAE_PARTS}
    if match := re.fullmatch(r"(conv[12])\.(weight|bias)", key):
        return f"{'quant_conv' if match[1] == 'conv1' else 'post_quant_conv'}.{match[2]}"
    if match := re.fullmatch(r"(encoder|decoder)\.(conv1|head\.[02])\.(\w+)", key):
        return f"{match[1]}.{_VAE_ENDS[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.([012])\.(.+)\.(\w+)", key):
        return f"{match[1]}.mid_block.{_VAE_MIDDLE[match[2]]}.{inner.get(match[3], match[3])}.{match[4]}"
    if match := re.fullmatch(r"(en|de)coder\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)\.(\w+)", key):
        block = f"{match[1]}coder.{match[2]}_blocks.{match[3]}"
        if match[5] in inner:
            return f"{block}.resnets.{match[4]}.{inner[match[5]]}.{match[6]}"
        return f"{block}.{match[2]}sampler.{match[5]}.{match[6]}"
    return key


def _infer_vae(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    if lacking := [key for key in needed if key not in tensors]:
        raise UsageError(f"{name} is not a Wan VAE: it lacks {some(lacking)}")
    base, channels = tensors[needed[0]].shape[:2]
    top, z_dim = tensors[needed[1]].shape[:2]
    config: dict[str, Any] = {"base_dim": base, "z_dim": z_dim}
    if not any(".upsamplers." in key for key in tensors):
        config |= {"is_residual": True, "decoder_base_dim": top // 4, "patch_size": 2, "scale_factor_spatial": 16}
        config |= {"in_channels": channels, "out_channels": channels}
        if z_dim == len(WAN22_LATENTS_MEAN):
            config |= {"latents_mean": WAN22_LATENTS_MEAN, "latents_std": WAN22_LATENTS_STD}
    return config


# ----------------------------------------------------------------------------------------------- hashes


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in 4 MiB pieces."""
    digest, path = hashlib.sha256(), Path(path)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror}") from None
    return digest.hexdigest()


def hash_files(source: str | Path | Iterable[str | Path]) -> dict[str, str]:
    """Relative posix name -> SHA-256 of a folder's files (hidden ones left out), of one file, or of several."""
    if isinstance(source, (str, Path)):
        root = Path(source)
        if not root.is_dir():
            return {root.name: sha256(root)}
        names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return {n.as_posix(): sha256(root / n) for n in names if not any(part.startswith(".") for part in n.parts)}
    return _hash_list([Path(path) for path in source])


def _hash_list(files: list[Path]) -> dict[str, str]:
    unique = len({file.name for file in files}) == len(files)
    return {file.name if unique else f"{file.parent.name}/{file.name}": sha256(file) for file in files}


def verify(folder: str | Path, manifest: Mapping[str, str]) -> list[str]:
    """One line for each file of ``manifest`` (name -> SHA-256) that is missing or differs, and each extra file."""
    root, problems = Path(folder), []
    for name, wanted in sorted(manifest.items()):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{name}: leaves the folder")
        elif not (root / name).is_file():
            problems.append(f"{name}: missing")
        elif (got := sha256(root / name)) != wanted.lower():
            problems.append(f"{name}: SHA-256 is {got[:12]}..., the manifest says {wanted[:12]}...")
    present = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    extra = {n.as_posix() for n in present if not any(part.startswith(".") for part in n.parts)} - manifest.keys()
    return problems + [f"{name}: not in the manifest" for name in sorted(extra)]
