"""Where a pipeline's weights come from: the package, a folder, the hub, or two public Wan checkpoints.

``load`` is the door the CLI uses: everything is checked and placed, LoRAs are attached.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    WanTransformer3DModel,
)
from huggingface_hub import snapshot_download
from torch import nn

from . import presets
from .checkpoints import hash_files, some, tensor_names
from .core import RunError, UsageError
from .fast_paths import check_fast_paths, chosen, settle
from .lora import Stage, load_lora
from .memory import FastPaths, Placement, align, choose_placement, place
from .models.camera_head import CameraHead
from .models.mobile_dit import MobileTransformer3DModel
from .models.nano_vae import NanoVAE
from .models.self_check import self_check_conv3d
from .models.turbo_decoder import TurboDecoder
from .models.wan import SwiftI2VTransformer3DModel
from .presets import Preset

if TYPE_CHECKING:
    from .mobile import MobileI2VPipeline
    from .pipeline import SwiftI2VPipeline

# from_pretrained finds a component's class only if its module has been imported.
COMPONENTS = (CameraHead, MobileTransformer3DModel, NanoVAE, SwiftI2VTransformer3DModel, TurboDecoder)
WEIGHTS = tuple(
    f"{stem}.safetensors{index}" for stem in ("diffusion_pytorch_model", "model") for index in (".index.json", "")
)
WAN_COMPONENTS = ("transformer", "vae", "tokenizer", "text_encoder", "image_processor", "image_encoder")
LIBRARIES = ("swifti2v", "torch", "diffusers", "transformers", "safetensors", "av", "numpy")


def local_folder(name: str, local_files_only: bool = False) -> Path:
    """The folder of a preset's name, a path, or a hub repository (downloaded by ``huggingface_hub``)."""
    if name in presets.PRESETS and not Path(name).is_dir():
        folder = presets.PRESETS[name].folder
        if folder is None:
            raise UsageError(f"preset {name!r} ships no weights; {_help_for(presets.PRESETS[name])}")
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1:
        raise UsageError(f"{name!r} is neither a preset, a folder in diffusers layout, nor a hub repository")
    return Path(snapshot_download(name, local_files_only=local_files_only, ignore_patterns=["*.pth", "*.bin", "*.pt"]))


def load(
    preset: Preset,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    vae_device: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    loras_2: Sequence[tuple[str, float]] = (),
    fast: FastPaths | None = None,
) -> SwiftI2VPipeline | MobileI2VPipeline:
    """A pipeline ready to run, placed on ``device`` in ``dtype``, with LoRA files attached to either stage.

    ``model``: a folder (or hub repository) in diffusers layout written by the pipeline's ``save_pretrained``; for
    wan-refine also two Wan repositories joined by a comma, for mobile the folders of a converted checkpoint, an LTX VAE
    and maybe a Turbo decoder. ``vae_device``: the VAEs apart from the transformers, on a second GPU (never run on one).
    ``fast``: the transformers' fast paths. Raises UsageError if there are no weights to load
    or a fast path is not possible here.
    """
    placement = choose_placement(device, dtype, threads, vae_device)
    check_fast_paths(fast or FastPaths(), preset.family, placement)
    self_check_conv3d(str(placement.device))
    if model is None and preset.folder is not None:
        model = preset.name
    pipeline = _mobile(preset, model) if preset.family == "mobile" else _two_stages(preset, model, placement)
    if pipeline.preset.name != preset.name:
        raise RunError(f"{model} holds weights of {pipeline.preset.name}, not of {preset.name}")
    try:
        attach_loras(pipeline, "one", loras)
        attach_loras(pipeline, "two", loras_2)
        place_pipeline(pipeline, placement, fast)
    except UsageError as error:  # whether a file or a kernel fits is known only here, after the weights
        raise RunError(str(error)) from None
    return pipeline


def attach_loras(pipeline: Any, stage: Stage, files: Sequence[tuple[str, float]]) -> None:
    """LoRA files with their weights, onto a stage's transformer. UsageError for one that does not fit."""
    for index, (path, weight) in enumerate(files):
        load_lora(pipeline, path, adapter_name=f"{stage}_{index}", weight=weight, stage=stage)


def _mobile(preset: Preset, model: str | None) -> MobileI2VPipeline:
    from .mobile import MobileI2VPipeline

    if model is None:
        raise UsageError(f"preset {preset.name!r} has no weights here; {_help_for(preset)}")
    if "," in model:
        return MobileI2VPipeline.from_parts(*model.split(",")[:3], preset=preset.name)
    return MobileI2VPipeline.from_pretrained(model)


def _two_stages(preset: Preset, model: str | None, placement: Placement) -> SwiftI2VPipeline:
    from .pipeline import SwiftI2VPipeline

    if model is not None and "," not in model:
        return SwiftI2VPipeline.from_pretrained(model)
    if preset.family == "wan-refine":
        return SwiftI2VPipeline.from_wan(*wan_folders(preset, model), preset=preset.name, torch_dtype=placement.dtype)
    raise UsageError(f"preset {preset.name!r} has no public weights; {_help_for(preset)}")


def refuse_gaps(components: Mapping[str, Any], folder: Path) -> None:
    """RunError if a model's file lacks tensors or holds others: the libraries would draw or drop them silently."""
    for name, module in components.items():
        file = next((folder / name / weights for weights in WEIGHTS if (folder / name / weights).is_file()), None)
        if file is None or not isinstance(module, nn.Module) or getattr(module, "hf_quantizer", None) is not None:
            continue
        held, state = tensor_names(file), module.state_dict()
        there = {tensor.data_ptr() for key, tensor in state.items() if key in held}
        # Tied tensors are written once, under one of their names.
        missing = {key for key, tensor in state.items() if key not in held and tensor.data_ptr() not in there}
        if missing:
            raise RunError(f"{name}/{file.name} lacks {some(missing)} of {len(state)}")
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        surplus = {key for key in held - state.keys() if not any(re.search(pattern, key) for pattern in ignored)}
        if surplus and isinstance(module, ModelMixin):
            raise RunError(f"{name}/{file.name} has what a {type(module).__name__} does not have: {some(surplus)}")


def place_pipeline(
    pipeline: SwiftI2VPipeline | MobileI2VPipeline, placement: Placement, fast: FastPaths | None = None
) -> None:
    """Transformers and VAEs in the placement's dtype (their own float32 parts kept), encoders as loaded.

    ``fast``: the transformers' fast paths, set here; what was chosen is in the pipeline's placement.
    """
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    transformers = [part for part in parts if part is not None]
    placement = dataclasses.replace(placement, fast=chosen(fast or FastPaths(), transformers, placement))
    for transformer in transformers:
        settle(transformer, placement)
        if placement.vae_device is not None:
            align(transformer, placement.device)
    for name in ("vae", "vae_2", "decoder"):
        place(getattr(pipeline, name, None), placement.vae_device or placement.device, placement.dtype)
    for name in ("text_encoder", "image_encoder", "camera"):
        place(getattr(pipeline, name, None), placement.device)
    pipeline.placement = placement


def assemble_wan(
    stage_one: Any, stage_two: Any, *, widen: bool, **kwargs: Any
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Components of a ``SwiftI2VPipeline`` from two Wan image-to-video pipelines, and the folders they came from."""
    sources = tuple(local_folder(str(s)) for s in (stage_one, stage_two) if not isinstance(s, DiffusionPipeline))
    one, two = (_wan_components(s, kwargs) for s in (stage_one, stage_two))
    base = two["transformer"]
    names = ("tokenizer", "text_encoder", "image_encoder", "image_processor", "transformer", "vae")
    components = {name: one.get(name) for name in names}
    components["transformer_2"] = SwiftI2VTransformer3DModel.from_wan(base, base.config.out_channels) if widen else base
    components["vae_2"] = two["vae"]
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return components, sources


def fingerprint(sources: Sequence[Path], placement: Placement | None) -> dict[str, dict[str, str]]:
    """What has to be equal, beside the request, for latents to be equal."""
    hashes: dict[str, str] = {}
    for number, folder in enumerate(sources):
        prefix = "" if len(sources) == 1 else f"stage_{number + 1}/"
        hashes |= {prefix + name: digest for name, digest in hash_files(folder).items()}
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    settings = placement.settings() if placement is not None else {}
    settings.setdefault("attention", _attention_backend())
    return {"model_hashes": hashes, "versions": versions, "settings": settings}


def _attention_backend() -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0].value)


def wan_folders(preset: Preset, model: str | None) -> tuple[Path, Path]:
    """The folders of two public Wan checkpoints: ``model``'s two, joined by a comma, or the preset's own."""
    one, two = model.split(",", 1) if model is not None else (preset.stage_one, preset.stage_two)
    return local_folder(one), local_folder(two)


def wan_component(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One component of a Wan image-to-video pipeline; None if the folder does not have it. RunError if it has gaps."""
    if not (folder / name).is_dir():
        return None
    part = _read_wan(folder, name, dtype)
    refuse_gaps({name: part}, folder)
    return part


def _read_wan(folder: Path, name: str, dtype: torch.dtype) -> Any:
    if name == "transformer":
        return WanTransformer3DModel.from_pretrained(folder, subfolder=name, torch_dtype=dtype)
    if name == "vae":
        return AutoencoderKLWan.from_pretrained(folder, subfolder=name, torch_dtype=torch.float32)
    from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if name == "text_encoder":
        return UMT5EncoderModel.from_pretrained(folder / name, dtype=dtype)
    if name == "image_encoder":
        return CLIPVisionModel.from_pretrained(folder / name, dtype=torch.float32)
    return {"tokenizer": AutoTokenizer, "image_processor": CLIPImageProcessorPil}[name].from_pretrained(folder / name)


def _wan_components(source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, DiffusionPipeline):
        return dict(source.components)
    folder, dtype = local_folder(str(source)), kwargs.get("torch_dtype", torch.bfloat16)
    found = {name: wan_component(folder, name, dtype) for name in WAN_COMPONENTS}
    return {name: part for name, part in found.items() if part is not None}


def _help_for(preset: Preset) -> str:
    if preset.family == "mobile":
        return "give --model FOLDER, or --model TRANSFORMER,LTX_VAE (folders; models convert makes the first)"
    if preset.family == "wan-refine":
        return f"give --model {presets.WAN_STAGE_ONE},{presets.WAN_STAGE_TWO} or two local folders"
    return "give --model FOLDER with a trained pipeline, use --preset wan-refine (public Wan weights), or --preset nano"
