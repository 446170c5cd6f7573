"""LoRA files of every dialect onto a model, each layer accounted for.

diffusers' own loader ignores some dialects with no more than a warning and drops full-weight patches;
here every tensor is either attached and checked, or named in a refusal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .checkpoints import first_line, hash_list, locate, read_json, read_metadata, read_tensors, refuse, some
from .core import RunError, UsageError
from .weights import LoadReport

Stage = Literal["one", "two"]
COMPONENTS: dict[str, str] = {"one": "transformer", "two": "transformer_2"}
_PREFIXES = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|transformer\.|transformer_2\.|"
    r"lora_unet_|dit\.|model\.|module\.)+"
)
_PART = re.compile(
    r"^(?P<module>.+)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight|"
    r"(?P<up>lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight|"
    r"(?P<bias>lora_B(?:\.[^.]+)?\.bias|diff_b)|"
    r"(?P<alpha>alpha))$"
)
_PARTS = ("down", "up", "bias", "alpha")
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank and alpha in a safetensors header


@dataclass
class _Layer:
    """One target's tensors: down (rank, in), up (out, rank), bias (out,), alpha a scalar; and their keys."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    name: str
    tensors: dict[str, Tensor]
    scaling: dict[str, Any]
    files: dict[str, str]


def load_lora(
    target: Any,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str,
    weight: float = 1.0,
    stage: Stage = "one",
    allow_pickle: bool = False,
    ignore_extra: bool = False,
) -> LoadReport:
    """Attach a LoRA to a pipeline's transformer (Stage I or II) or to a bare model, beside those already active.

    source: file, folder or tensors. Dialects: diffusers/PEFT (``transformer.``, ``transformer_2.``),
    ``diffusion_model.`` with lora_A/B or lora_down/up, alpha and diff_b, musubi ``lora_unet_``, DiffSynth
    ``.lora_A.default``, bare original names. A file with both ``transformer.`` and ``transformer_2.`` fills both
    stages of a pipeline.
    weight: finite strength, 1 as trained. stage: which model when the file does not say.
    ignore_extra: report tensors that cannot be attached instead of refusing (full-weight ``.diff``, foreign layers).
    A text-to-video LoRA leaves an image-to-video model's image projections as they are; the report names them.
    """
    if not adapter_name or "." in adapter_name:
        raise UsageError(f"adapter name {adapter_name!r} is empty or has a dot; use a plain word")
    if not math.isfinite(weight):
        raise UsageError(f"LoRA weight {weight} is not finite; 1.0 is as trained")
    if stage not in COMPONENTS:
        raise UsageError(f"stage {stage!r} is not 'one' or 'two'")
    read = _read(source, allow_pickle)
    jobs = _assign(target, read, stage)
    plans = [(model, *_plan(model, read, tensors, ignore_extra)) for model, tensors in jobs]
    for model, *_ in plans:
        if adapter_name in getattr(model, "peft_config", {}):
            raise UsageError(f"adapter {adapter_name!r} is loaded already; choose another name or unload it")
    matched, missing, extra = [], [], []
    for model, layers, ignored in plans:
        _attach(model, layers, adapter_name, weight, None if model is target else target)
        matched += [key for layer in layers.values() for key in layer.keys]
        missing += _image_layers_left_alone(model, layers)
        extra += ignored
    dialect = f"LoRA, {_dialect(read.tensors)}"
    return LoadReport(read.name, dialect, tuple(sorted(matched)), tuple(missing), tuple(sorted(extra)), read.files)


def _read(source: str | Path | Mapping[str, Tensor], allow_pickle: bool) -> _Source:
    if isinstance(source, Mapping):
        read = _Source("LoRA", dict(source), {}, {})
    else:
        files = locate(source, allow_pickle=allow_pickle)
        tensors = read_tensors(source, allow_pickle=allow_pickle)
        read = _Source(files[0].name, tensors, _scaling(files[0], tensors), hash_list(files))
    if not read.tensors:
        raise UsageError(f"{read.name} holds no tensors")
    return read


def _scaling(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Rank and alpha that are kept beside the tensors, in PEFT's words; empty if the file has none."""
    if file.suffix == ".safetensors" and (text := read_metadata(file).get(_METADATA_KEY)):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{file.name}: its {_METADATA_KEY} is not JSON: {first_line(error)}") from None
        return content if isinstance(content, dict) else {}
    if any(key.startswith("base_model.model.") for key in tensors):
        if not (file.parent / "adapter_config.json").is_file():
            raise UsageError(f"{file.name} is a PEFT adapter; its adapter_config.json (rank, alpha) must lie beside it")
        return read_json(file.parent / "adapter_config.json")
    return {}


def _assign(target: Any, read: _Source, stage: Stage) -> list[tuple[Any, dict[str, Tensor]]]:
    """Which model gets which tensors: a file that speaks of both stages fills both of a pipeline."""
    second = {key: value for key, value in read.tensors.items() if key.startswith("transformer_2.")}
    first = {key: value for key, value in read.tensors.items() if key not in second}
    if isinstance(target, nn.Module):
        if second and first:
            return [(target, second if stage == "two" else first)]
        return [(target, read.tensors)]
    if second and not first and stage == "one":
        raise UsageError(f"{read.name} is made for transformer_2 (Stage II); pass stage='two'")
    if second and first:
        return [(_component(target, COMPONENTS["one"]), first), (_component(target, COMPONENTS["two"]), second)]
    return [(_component(target, COMPONENTS[stage]), read.tensors)]


def _component(pipeline: Any, name: str) -> Any:
    model = getattr(pipeline, name, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"the pipeline has no {name} to put a LoRA on")
    return model


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers that can carry an adapter, under their own names even where one sits there already."""
    found = {}
    for name, module in model.named_modules():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(inner, nn.Linear) and not re.search(r"\.(base_layer|lora_[AB]\.[^.]+)$", name):
            found[name] = inner
    return found


def _foreign_names(model: Any, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Original Wan and musubi (underscored) layer names -> this model's names; empty for other models."""
    if not issubclass(type(model), WanTransformer3DModel):
        return {}
    inner = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "o")]
    inner += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    names = [f"blocks.{i}.{name}" for i in range(model.config["num_layers"]) for name in inner]
    names += ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    names += ["head.head", "img_emb.proj.1", "img_emb.proj.3"]
    table = {}
    for name in names:
        own = next(iter(convert_wan_transformer_to_diffusers({f"{name}.weight": torch.empty(0)})))
        if own.removesuffix(".weight") in layers:
            table[name] = table[name.replace(".", "_")] = own.removesuffix(".weight")
    return table | {own.replace(".", "_"): own for own in layers}


def _plan(
    model: nn.Module, read: _Source, tensors: Mapping[str, Tensor], ignore_extra: bool
) -> tuple[dict[str, _Layer], list[str]]:
    """Sort every tensor to its layer, check that it fits, fold the scales in. Returns layers and ignored keys."""
    linear = _linear_layers(model)
    foreign = _foreign_names(model, linear)
    layers: dict[str, _Layer] = {}
    extra = []
    for key, tensor in tensors.items():
        match = _PART.match(_PREFIXES.sub("", key))
        module = match["module"] if match else ""
        module = module if module in linear else foreign.get(module, "")
        if match is None or not module:
            extra.append(key)
            continue
        part = next(name for name in _PARTS if match[name])
        layer = layers.setdefault(module, _Layer())
        if part in layer.tensors:
            raise UsageError(f"{read.name}: {key} and another key both mean the {part} of {module}")
        layer.tensors[part] = tensor
        layer.keys.append(key)
    whole = {name: layer for name, layer in layers.items() if {"down", "up"} <= layer.tensors.keys()}
    extra += [key for name in layers.keys() - whole.keys() for key in layers[name].keys]
    # Converters write zero patches for norms and the like; adding zero changes nothing, so they may go.
    harmful = [key for key in extra if not (key.endswith((".diff", ".diff_b")) and not tensors[key].any())]
    if not ignore_extra:
        refuse(read.name, f"tensors that no layer of this {type(model).__name__} can take", harmful)
    if not whole:
        raise UsageError(f"{read.name} has no LoRA tensors for this {type(model).__name__}, only {some(tensors)}")
    for name, layer in whole.items():
        _fit(layer, name, linear[name], read)
    return whole, extra


def _fit(layer: _Layer, name: str, linear: nn.Linear, read: _Source) -> None:
    """Check shapes and values of one layer, and fold alpha / rank into ``down``."""
    down, up = layer.tensors["down"], layer.tensors["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise UsageError(f"{read.name}: {name} has down {list(down.shape)} and up {list(up.shape)}, not one rank")
    if (down.shape[1], up.shape[0]) != (linear.in_features, linear.out_features):
        raise UsageError(
            f"{read.name}: {name} maps {down.shape[1]} to {up.shape[0]}, the model's layer {linear.in_features} to "
            f"{linear.out_features}; it was made for another model"
        )
    bias = layer.tensors.get("bias")
    if bias is not None and bias.shape != (linear.out_features,):
        raise UsageError(f"{read.name}: {name} has a bias of shape {list(bias.shape)}, not [{linear.out_features}]")
    for part, tensor in layer.tensors.items():
        if (not tensor.is_floating_point() and part != "alpha") or not torch.isfinite(tensor).all():
            raise UsageError(f"{read.name}: the {part} of {name} has values that are not finite floating point")
    _fold_scale(layer, name, read.scaling, read.name)


def _fold_scale(layer: _Layer, name: str, scaling: Mapping[str, Any], source: str) -> None:
    """Multiply alpha / rank into ``down``; PEFT's alpha (beside the tensors) scales the bias too, kohya's does not."""
    component = "transformer_2." if layer.keys[0].startswith("transformer_2.") else "transformer."
    own = {key.removeprefix(component): value for key, value in scaling.items()}
    rank, parts = layer.tensors["down"].shape[0], ["down"]
    if "alpha" in layer.tensors and layer.tensors["alpha"].numel() != 1:
        raise UsageError(f"{source}: the alpha of {name} is not one number")
    if "alpha" in layer.tensors:
        scale = float(layer.tensors.pop("alpha")) / rank
    elif own.get("lora_alpha") is not None:
        patterns: dict[str, float] = own.get("alpha_pattern") or {}
        try:
            alpha = float(patterns.get(get_pattern_key(list(patterns), name), own["lora_alpha"]))
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise UsageError(f"{source}: its LoRA settings give no alpha for {name}: {first_line(error)}") from None
        scale = alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)
        parts.append("bias")
    else:
        scale = 1.0
    for part in parts if scale != 1.0 else ():
        if (tensor := layer.tensors.get(part)) is not None:
            layer.tensors[part] = (tensor.float() * scale).to(tensor.dtype)


def _attach(model: Any, layers: dict[str, _Layer], adapter: str, weight: float, pipeline: Any) -> None:
    """Hand the layers to PEFT, then prove that each of them arrived."""
    before = _active(model)
    state: dict[str, Tensor] = {}
    biased = any("bias" in layer.tensors for layer in layers.values())
    for name, layer in layers.items():
        state[f"transformer.{name}.lora_A.weight"] = layer.tensors["down"]
        state[f"transformer.{name}.lora_B.weight"] = up = layer.tensors["up"]
        if biased:  # PEFT knows biases for all layers of an adapter or for none
            state[f"transformer.{name}.lora_B.bias"] = layer.tensors.get("bias", up.new_zeros(up.shape[0]))
    model.load_lora_adapter(
        state, prefix="transformer", adapter_name=adapter, _pipeline=pipeline, low_cpu_mem_usage=True
    )
    attached = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", {})
    }
    wrong = set(attached) ^ set(layers)
    for name in attached.keys() & layers.keys():
        for half, part in (("lora_A", "down"), ("lora_B", "up")):
            held = getattr(attached[name], half)[adapter].weight
            given = layers[name].tensors[part].to(held)
            if not torch.equal(held, given):
                wrong.add(name)
    if wrong:
        model.delete_adapters(adapter)
        raise RunError(f"LoRA {adapter!r} was not attached as given to {some(wrong)}")
    model.set_adapters([*before, adapter], [*before.values(), weight])


def _active(model: nn.Module) -> dict[str, float]:
    """Adapters in use and their weights."""
    active: dict[str, float] = {}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        for name in layer.active_adapters:
            if name in getattr(layer, "scaling", {}):
                active.setdefault(name, layer.scaling[name] * layer.r[name] / layer.lora_alpha[name])
    return active


def _image_layers_left_alone(model: nn.Module, layers: Mapping[str, _Layer]) -> list[str]:
    names = [name for name in _linear_layers(model) if name.endswith((".attn2.add_k_proj", ".attn2.add_v_proj"))]
    touched = any(name in layers for name in names)
    return [] if touched or not any(".attn2." in name for name in layers) else names


def _dialect(tensors: Mapping[str, Tensor]) -> str:
    key = next(key for key in sorted(tensors, key=lambda k: "lora" not in k) if key)
    prefix = match[0] if (match := _PREFIXES.match(key)) else "no prefix"
    halves = "lora_A/B" if any("lora_A" in key for key in tensors) else "lora_down/up"
    kinds = [kind for kind in ("alpha", "diff_b", "diff") if any(key.endswith(f".{kind}") for key in tensors)]
    return ", ".join([prefix, halves, *kinds])
