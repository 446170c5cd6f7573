"""A model and a kind of clip to a folder of graphs, their manifest and a script that runs them: whole or not at all."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .. import memory
from ..core import RunError, UsageError
from ..mobile import MobileI2VPipeline
from ..presets import resolve
from . import onnx, runner
from .blueprint import ParityError
from .blueprints import Clip, Plan, example_photo
from .contracts import Format, GraphContract, Layout, Manifest, Precision, write_manifest

LOG = logging.getLogger(__name__)
RUNNER = "run.py"
NEEDED: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "coreml": ("coremltools",),
    "executorch": ("executorch",),
}
EXTRA = {"executorch": "executorch"}  # all else comes with swifti2v[export]
LAYOUTS: tuple[Layout, ...] = ("reference", "channels-first")
CLIP_PSNR: dict[Precision, float] = {"float32": 40.0, "float16": 35.0, "int8": 20.0}  # of a whole clip, dB
COMPARED_PARAMETERS = 50_000_000  # larger networks are not run a second time for clip_psnr
# Softmax over axis 1 aside, ONNX Runtime's CPU kernels are made for tokens-first matrix products.
FORMAT_OF: dict[str, Format] = {"onnxruntime-cpu": "onnx", "coreml": "coreml", "executorch": "executorch"}
LAYOUT_FOR: dict[str, Layout] = {
    "onnxruntime-cpu": "reference",
    "coreml": "channels-first",
    "phone": "channels-first",
    "executorch": "reference",
}
NOISE = (
    "block k of seed s: standard normal (c, h, w) of torch's CPU generator seeded with the first 8 bytes, little-endian"
    " and shifted right by 1, of blake2b(b'swifti2v/stage_two/{s}/0/{k}/0', digest_size=8); run.py has it in numpy"
)


def export(
    model: str | Path | MobileI2VPipeline,
    out: str | Path,
    clip: Clip | None = None,
    *,
    formats: Iterable[Format] = ("onnx",),
    layouts: Sequence[Layout] = LAYOUTS,
    precision: Precision = "float32",
) -> Manifest:
    """Write ``out``, a new folder: graphs of encoder, denoiser (in each of ``layouts``) and decoder, ``manifest.json``,
    and, for ONNX, ``run.py``, which makes clips with onnxruntime, numpy and pillow. Core ML's denoiser is always
    channels-first, ExecuTorch's in the reference layout.

    ``model``: a pipeline, or what ``MobileI2VPipeline.from_pretrained`` takes. ``clip``: size, frames and steps, which
    are built in. ``precision``: of ONNX's stored weights; Core ML is float16, ExecuTorch float32. Every graph that
    can run here is compared with torch, and so is a whole clip of a small model; on ParityError nothing is written.
    Raises UsageError for what cannot be exported or if ``out`` exists.
    """
    out, wanted = Path(out), tuple(formats)
    _check(out, wanted, layouts, precision)
    pipeline = model if isinstance(model, MobileI2VPipeline) else MobileI2VPipeline.from_pretrained(model)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            memory.place(part.eval().requires_grad_(False), torch.device("cpu"), torch.float32)
    plan = Plan(pipeline, clip or Clip())
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    folder.mkdir(parents=True)
    try:
        graphs = [graph for kind in wanted for graph in _write(plan, folder, kind, layouts, precision)]
        manifest = _manifest(plan, graphs)
        write_manifest(manifest, folder)
        if "onnx" in wanted:
            shutil.copyfile(runner.__file__, folder / RUNNER)
        manifest = _compared(plan, folder, manifest, precision)
        if out.exists():
            raise RunError(f"{out} appeared while it was being made and is not overwritten")
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _check(out: Path, formats: tuple[Format, ...], layouts: Sequence[Layout], precision: Precision) -> None:
    if out.exists():
        raise UsageError(f"{out} exists and is not overwritten; choose another name")
    for name, given, known in (
        ("format", formats, get_args(Format)),
        ("layout", layouts, LAYOUTS),
        ("precision", (precision,), get_args(Precision)),
    ):
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            raise UsageError(f"{name} {unknown or 'nothing'} is not among {', '.join(known)}")
    for module in (name for kind in formats for name in NEEDED[kind]):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module} is not installed: pip install 'swifti2v[{EXTRA.get(module, 'export')}]'")


def _write(
    plan: Plan, folder: Path, kind: Format, layouts: Sequence[Layout], precision: Precision
) -> Iterable[GraphContract]:
    if kind == "onnx":
        for blueprint in plan.blueprints(layouts):
            LOG.info("onnx: %s", blueprint.name)
            yield onnx.write(blueprint, folder, precision)
        return
    module: Any = importlib.import_module({"coreml": ".coreml", "executorch": ".xnnpack"}[kind], __package__)
    yield from module.write_all(plan, folder)


def _manifest(plan: Plan, graphs: Sequence[GraphContract]) -> Manifest:
    pipeline = plan.pipeline
    anchor = next(g for g in graphs if g.role == "encoder").outputs[0].shape
    names = ("torch", "onnx", "onnxruntime", "coremltools", "executorch", "swifti2v")
    return Manifest(
        family="nano" if plan.nano else "ltx",
        width=plan.size.width,
        height=plan.size.height,
        num_frames=plan.num_frames,
        fps=plan.preset.fps,
        latent_shape=(anchor[1], plan.grid.blocks(plan.num_frames), anchor[3], anchor[4]),
        levels=plan.levels,
        motion_score=plan.preset.defaults["motion_score"],
        windows=plan.windows,
        reach=plan.reach,
        layout_for=_layouts_for(graphs),
        noise=NOISE,
        weights_sha256={name: _hash(part) for name, part in pipeline.components.items() if hasattr(part, "parameters")},
        versions={name: found for name in names if (found := _version(name))},
        graphs=tuple(graphs),
        notes=_notes({g.format for g in graphs}),
    )


def _layouts_for(graphs: Sequence[GraphContract]) -> dict[str, Layout]:
    """The recommended layout where it was exported in the use's format, else the one there is."""
    found: dict[str, Layout] = {}
    every = [(g.format, g.layout) for g in graphs if g.layout]
    for use, layout in LAYOUT_FOR.items():
        made = [kind for format, kind in every if format == FORMAT_OF.get(use, format)] or [kind for _, kind in every]
        found[use] = layout if layout in made else made[0]
    return found


def _notes(formats: set[Format]) -> tuple[str, ...]:
    notes = ["color profiles of photos are not converted by run.py"] if "onnx" in formats else []
    if "coreml" in formats:
        notes.append("Core ML graphs were converted, not run: parity is unmeasured")
    return tuple(notes)


def _compared(plan: Plan, folder: Path, manifest: Manifest, precision: Precision) -> Manifest:
    """The manifest with ``clip_psnr``, rewritten; ParityError if the clip of a format that runs here is not torch's."""
    parameters = sum(p.numel() for p in plan.pipeline.transformer.parameters())
    bundles = _runnable(folder, manifest)
    if parameters > COMPARED_PARAMETERS or not bundles:
        return manifest
    photo, found = example_photo(plan.size), []
    wanted = torch_clip(plan, photo, seed=0)[0].permute(1, 2, 3, 0)
    wanted = ((wanted + 1) * 127.5).round() / 127.5 - 1
    for bundle in bundles:
        made = torch.from_numpy(np.stack(list(runner.generate(bundle, photo.numpy(), seed=0)))).float() / 127.5 - 1
        error = float((made - wanted).square().mean())
        psnr, limit = min(120.0, 10 * float(np.log10(4 / max(error, 1e-12)))), CLIP_PSNR["float32"]
        limit = CLIP_PSNR[precision] if bundle.kind == "onnx" else limit
        if not psnr >= limit:
            raise ParityError(f"the {bundle.kind} bundle's clip is {psnr:.1f} dB from torch's, less than {limit:g}")
        found.append(psnr)
    manifest = manifest.model_copy(update={"clip_psnr": round(min(found), 2)})
    write_manifest(manifest, folder)
    return manifest


def _runnable(folder: Path, manifest: Manifest) -> list[runner.Bundle]:
    formats, bundles = {graph.format for graph in manifest.graphs}, list[runner.Bundle]()
    if "onnx" in formats:
        bundles.append(runner.Bundle(folder, manifest.layout_for["onnxruntime-cpu"], torch.get_num_threads()))
    if "executorch" in formats:
        from . import xnnpack

        bundles.append(xnnpack.Bundle(folder, manifest.layout_for["executorch"]))
    return bundles


def torch_clip(plan: Plan, photo: Tensor, seed: int) -> Tensor:
    """The clip (1, 3, t, h, w) in [-1, 1] that the pipeline itself makes."""
    request, _ = resolve(
        plan.preset,
        prompt="",
        photo_size=plan.size,
        size=str(plan.size),
        num_frames=plan.num_frames,
        seed=seed,
        num_inference_steps=len(plan.levels) - 1,
    )
    chunks = plan.pipeline.stream(photo[:, :, None], request)
    return torch.cat([chunk.frames for chunk in chunks], dim=2)


def _hash(module: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
