"""Checkpoints in, whole and strict; diffusers folders out; hashes of both.

With ``checkpoints`` (files) and ``lora`` the only module that opens weights and knows foreign key names.
Nothing is ever dropped or filled in silently: every load returns a ``LoadReport``, and a file that does not fit is
refused in one line before any weight is used.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from diffusers.models.modeling_utils import no_init_weights
from safetensors import SafetensorError
from torch import Tensor

from .checkpoints import (
    first_line,
    hash_files,
    hash_list,
    locate,
    read_files,
    read_json,
    read_tensors,
    refuse,
    sha256,
    some,
    verify,
)
from .core import RunError, UsageError

__all__ = [
    "LoadReport",
    "hash_files",
    "load_transformer",
    "load_vae",
    "read_tensors",
    "sha256",
    "verify",
    "write_diffusers",
]

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "transformer.",
    "model.",
    "module.",
    "_orig_mod.",
)
VAE_PREFIXES = ("first_stage_model.", "vae.", "model.", "module.")
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


# ------------------------------------------------------------------------------------------ transformer


def load_transformer(
    path: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    cls: type[Any] | None = None,
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
    widened = bool(overlay and "patch_embedding.weight" in overlay)
    settings = {**_settings(cls, tensors, found, widened), **_overrides(config)}
    if issubclass(cls, WanTransformer3DModel) and "num_attention_heads" not in settings:
        _refuse_unknown_heads(name, tensors)
    model, ignored = _fill(cls, settings, tensors, name, dtype)
    matched = (overlay or set(tensors)) - ignored
    missing = set(tensors) - ignored - matched
    keys = [tuple(sorted(group)) for group in (matched, missing, ignored)]
    return model, LoadReport(name, layout, keys[0], keys[1], keys[2], hash_list(files))


def _settings(cls: type[Any], tensors: Mapping[str, Tensor], found: dict[str, Any], widened: bool) -> dict[str, Any]:
    """The config in a folder, completed from shapes; trained tensors may widen, and have trained, the base's input."""
    inferred = _infer_dit(tensors) if issubclass(cls, WanTransformer3DModel) else {}
    if widened:
        trained = {"reference_is_untrained": False} if "reference_is_untrained" in found else {}
        found = {**found, "in_channels": inferred.get("in_channels"), **trained}
    return {**inferred, **found}


def _refuse_unknown_heads(name: str, tensors: Mapping[str, Tensor]) -> None:
    if "patch_embedding.weight" in tensors:
        raise UsageError(
            f"{name}: cannot tell the heads of width {tensors['patch_embedding.weight'].shape[0]}, not a multiple of "
            f"{HEAD_DIM}; pass config with num_attention_heads and attention_head_dim"
        )


def _default_class() -> type[Any]:
    from .models.wan import SwiftI2VTransformer3DModel

    return SwiftI2VTransformer3DModel


def _read_dit(
    path: str | Path, cls: type[Any], allow_pickle: bool
) -> tuple[dict[str, Tensor], str, list[Path], dict[str, Any]]:
    files = locate(path, allow_pickle=allow_pickle)
    config = _folder_config(Path(path), cls)
    raw, prefix = strip_prefixes(read_files(files, allow_pickle), PREFIXES)
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


def _folder_config(folder: Path, cls: type[Any]) -> dict[str, Any]:
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
        raise UsageError(f"{name}: its config does not build a {cls.__name__}: {first_line(error)}") from None
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


def write_diffusers(model: Any, folder: str | Path) -> Path:
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
        raise RunError(f"cannot write {folder}: {first_line(error)}") from None
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
    raw, prefix = strip_prefixes(read_files(files, allow_pickle), VAE_PREFIXES)
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
    return model, LoadReport(name, layout, tuple(sorted(tensors)), (), tuple(ignored), hash_list(files))


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
