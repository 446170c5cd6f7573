"""What a user asked for, checked: everything that can be found before weights load is found here.

Nothing is made on disk and nothing is printed. This module knows options and files' names, not how a
video is made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import media, presets
from .checkpoints import locate, read_metadata, sha256
from .core import Request, Size, UsageError
from .fitting import arrangement_of, at_once, check_names, fitted_again, planned
from .hastening import hastened
from .journal import Inputs, Manifest, WriteOptions
from .origin import Origin, described, find_photo, origin_of
from .presets import Preset
from .ranks import split_of
from .reference import fit_image
from .segments import CSG

if TYPE_CHECKING:
    from torch import Tensor

    from .options import Options
    from .plan import Plan

_DIRECT = (
    "negative_prompt", "fps", "num_inference_steps", "num_inference_steps_2", "guidance_scale",
    "guidance_scale_2", "shift", "shift_2", "strength_2", "sampler_2", "encode", "motion_score",
)  # fmt: skip
_RESTORED = ("dtype", "device", "vae_device", "threads", "attention", "quantize", "compile")
_CSG = ("segment_blocks", "neighbor_blocks", "rope_positions", "neighbor_timestep", "neighbor_reference")


@dataclass(frozen=True, eq=False)
class Order:
    """A checked request with all it takes to begin; nothing exists on disk yet.

    ``wanted``: the output's path, which ``start`` makes unique; ``photo``: fitted, (1, 3, 1, H, W);
    ``before``: what made the file that this order makes again.
    """

    manifest: Manifest
    photo: Tensor
    wanted: Path
    notices: tuple[str, ...] = ()
    preview: bool = False
    before: Origin | None = None


@contextmanager
def _at_the_door() -> Iterator[None]:
    """Nothing is loaded or made yet: what the system refuses here (a name too long, say) was asked for wrongly."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        shown = name if len(name) <= 160 else f"{name[:60]}...{name[-60:]}"
        raise UsageError(f"{shown}: {error.strerror or error}") from None


@_at_the_door()
def prepare(options: Options) -> Order:
    """Check everything that ``generate`` needs. Raises UsageError; makes nothing."""
    preset = presets.get(options.preset)
    options, hasty = hastened(options, preset)
    if options.image is None:
        raise UsageError("--image is missing; give the photo to start from")
    if options.prompt is None and preset.reads_text:
        raise UsageError('--prompt is missing; say what should happen, e.g. --prompt "slow pan left"')
    _refuse_second_stage(options, preset)
    source = media.read_image(options.image)
    request, notices = request_of(options, preset, source.size, source.sha256)
    trace_file(options.trace)
    settings = _settings(options, preset)
    way = arrangement_of(options, request, preset)
    if way is not None:
        request = request.model_copy(update={"encode": way.encode_when})
    write = _write_options(options)
    inputs = Inputs(
        photo_name=Path(options.image).name,
        model=location(options.model),
        loras=_loras(options.lora),
        loras_2=_loras(options.lora_2),
        motion=None if options.motion is None else str(_path(options.motion).absolute()),
        cache=_cache(options, preset),
        arrangement=None if way is None else way.to_json(),
    )
    wanted = _wanted(options.output, Path(options.image).stem, request)
    check_weights(preset, inputs.model)
    media.check_writable(wanted, planned(request, preset, inputs.model).disk_bytes)
    manifest = Manifest(
        request=request,
        model=described(preset, inputs),
        settings=settings,
        inputs=inputs,
        output=wanted.name,
        write=write,
        keep_job=options.keep_job,
    )
    photo = fit_image(source.pixels, request.size, request.fit)
    fitted = () if way is None else (f"memory, {way.source}: {'; '.join(way.ways())}",)
    return Order(manifest, photo, wanted, (*source.notes, *hasty, *notices, *fitted), options.preview)


def _refuse_second_stage(options: Options, preset: Preset) -> None:
    """UsageError for what a preset with one stage cannot do; what a request holds is checked with it."""
    if preset.stages == 2:
        return
    for name, given in (("motion", options.motion), ("preview", options.preview)):
        if given:
            raise UsageError(f"--{name}: {preset.name} has one stage; leave it out")
    if options.lora or options.lora_2:
        raise UsageError(f"--lora: {preset.name} takes no LoRA files; leave it out")


def request_of(options: Options, preset: Preset, photo: Size | None, sha256: str = "") -> tuple[Request, list[str]]:
    """The legal request for these options, and what was snapped. Raises UsageError."""
    fields = {name: getattr(options, name) for name in _DIRECT}
    fields["fps"], motion_frames, motion_sha256 = _motion_facts(options)
    cuts = {name: getattr(options, name) for name in _CSG}
    base = preset.defaults.get("csg", CSG()).model_dump()
    num_frames = _num_frames(options, fields["fps"] or preset.fps, preset)
    request, notices = presets.resolve(
        preset,
        prompt=options.prompt or "",
        photo_size=photo,
        size=options.size,
        resolution=options.resolution,
        fit=options.fit,  # type: ignore[arg-type]
        num_frames=motion_frames if num_frames is None else num_frames,
        seed=options.seed,
        strict=options.strict,
        csg={**base, **{name: value for name, value in cuts.items() if value is not None}},
        exact_first_frame=options.exact_first_frame,
        image_sha256=sha256,
        motion_sha256=motion_sha256,
        **fields,
    )
    if motion_frames is not None and motion_frames < request.num_frames:
        raise UsageError(f"--motion has {motion_frames} frames, {request.num_frames} are asked for; lower --num-frames")
    return request, [*notices, *_shared(options, preset, request)]


def _shared(options: Options, preset: Preset, request: Request) -> tuple[str, ...]:
    """What is to be said about the work of several processes; UsageError if they cannot share it."""
    if options.context_parallel is None:
        return ()
    split = split_of(options.context_parallel, preset, request, options.model)
    if options.device not in (None, "cpu", "cuda"):
        raise UsageError(f"device {options.device!r} is not for several processes; use cuda (one GPU each) or cpu")
    return split.notices


@_at_the_door()
def plan_of(options: Options) -> Plan:
    """The ``Plan`` of these options; the photo is optional (its aspect decides the size)."""
    preset = presets.get(options.preset)
    options, _ = hastened(options, preset)
    size = media.read_image(options.image).size if options.image is not None else None
    request, _ = request_of(options, preset, size)
    check_names(options)
    way, overlap = arrangement_of(options, request, preset), at_once(options.at_once, options.device)
    if way is not None:
        request, overlap = request.model_copy(update={"encode": way.encode_when}), way.overlap
    return replace(planned(request, preset, options.model, overlap=overlap), arrangement=way)


@_at_the_door()
def prepare_again(file: Path, *, image: str | None, output: str | None, model: str | None) -> Order:
    """The order that made ``file``, from the file's own metadata. Raises UsageError."""
    origin = origin_of(file)
    request = origin.request
    if origin.loras or request.motion_sha256:
        what = "LoRA files" if origin.loras else "a motion video"
        raise UsageError(
            f"{file.name} was made with {what}, which rerun cannot find; use generate with the same options"
        )
    photo = Path(image) if image is not None else find_photo(origin, (file.parent, Path.cwd()))
    source = media.read_image(photo)
    if source.sha256 != request.image_sha256:
        raise UsageError(f"{photo.name} is not the photo {file.name} was made from (its checksum differs)")
    inputs = Inputs(photo_name=photo.name, model=location(model))
    preset = check_recorded(request, origin.write, inputs)
    wanted = _wanted(output, photo.stem, request)
    media.check_writable(wanted, planned(request, preset, inputs.model).disk_bytes)
    manifest = Manifest(
        request=request,
        model=described(preset, inputs),
        settings={name: value for name, value in origin.settings.items() if name in _RESTORED},
        inputs=inputs,
        output=wanted.name,
        write=origin.write,
    )
    manifest = fitted_again(manifest)
    notices = (f"photo: {photo}", *source.notes)
    return Order(manifest, fit_image(source.pixels, request.size, request.fit), wanted, notices, before=origin)


def check_recorded(request: Request, write: WriteOptions, inputs: Inputs) -> Preset:
    """Check what a file or a job says as if a user had just asked for it. Raises UsageError."""
    preset = presets.check(request)
    media.Encoding(write.codec, write.bit_depth, write.crf)
    check_weights(preset, inputs.model)
    for text in (*inputs.loras, *inputs.loras_2):
        _check_lora(split_lora(text)[0])
    if inputs.motion is not None and sha256(inputs.motion) != request.motion_sha256:
        name = Path(inputs.motion).name
        raise UsageError(f"{name} is not the motion video this job began with; put that one back")
    return preset


def check_weights(preset: Preset, model: str | None) -> None:
    """UsageError if the weights are certainly not there. What is on a hub is not looked up here."""
    if preset.family == "mobile" and (model is None or "," in model):
        _check_parts(preset, model)
    folder = Path(model) if model is not None else preset.folder
    if folder is None or (model is not None and ("," in model or (model.count("/") == 1 and not folder.exists()))):
        return
    if not (folder / "model_index.json").is_file():
        where = "this installation" if model is None else f"--model {model!r}"
        raise UsageError(f"{where} has no weights of {preset.name}: no model_index.json in {folder.name}")
    held = _preset_in(folder)
    if held is not None and held != preset.name:
        raise UsageError(f"{folder.name} holds weights of {held}, not of {preset.name}; say --preset {held}")


def _check_parts(preset: Preset, model: str | None) -> None:
    """The folders that make up a MobileI2V (``sources.load``): all of them here, two or three."""
    if model is None:
        if preset.folder is None:
            raise UsageError(
                f"{preset.name} has no public weights in diffusers layout; give --model FOLDER, or "
                "--model TRANSFORMER,LTX_VAE: swifti2v models convert makes the first of the authors' checkpoint"
            )
        return
    parts = model.split(",")
    if len(parts) not in (2, 3):
        raise UsageError(f"--model {model!r} names {len(parts)} folders; give TRANSFORMER,LTX_VAE or also a decoder")
    for name, part in zip(("transformer", "vae", "decoder"), parts, strict=False):
        if not any((at / "config.json").is_file() for at in (Path(part), Path(part) / name)):
            raise UsageError(f"--model: {part!r} is not a folder with a {name} in diffusers layout (no config.json)")


def _preset_in(folder: Path) -> str | None:
    """What a saved pipeline says it is; a damaged file says nothing and fails when it is loaded."""
    try:
        held = json.loads((folder / "model_index.json").read_bytes()).get("preset")
    except (ValueError, AttributeError):
        return None
    return held if isinstance(held, str) else None


def _num_frames(options: Options, fps: float, preset: Preset) -> int | None:
    if options.duration is None:
        return options.num_frames
    if options.num_frames is not None:
        raise UsageError("--duration and --num-frames both set the length; give one of them")
    try:
        seconds = float(options.duration.strip().removesuffix("s"))
    except ValueError:
        raise UsageError(f"duration {options.duration!r} is not a number of seconds, e.g. 5s") from None
    if not 0 < seconds < 1e6:
        raise UsageError(f"duration {options.duration!r} is not positive; give seconds, e.g. 5s")
    if not 0 < fps <= 240:
        raise UsageError(f"fps {fps} is not above 0 and at most 240; 15 is usual here")
    # One more than seconds times fps: the last frame is shown at that time.
    return preset.grid.snap_frames(round(seconds * fps) + 1)


def _motion_facts(options: Options) -> tuple[float | None, int | None, str]:
    """fps, usable frames and SHA-256 of ``--motion``; fps is the user's if given."""
    if options.motion is None:
        return options.fps, None, ""
    if options.preview:
        raise UsageError("--preview shows stage I, which --motion replaces; give one of them")
    facts = media.probe(options.motion)
    if facts.frames < 5:
        raise UsageError(f"--motion {options.motion} has {facts.frames} frames; at least 5 are needed")
    usable = (facts.frames - 1) // 4 * 4 + 1
    return options.fps or facts.fps or None, usable, sha256(options.motion)


def _write_options(options: Options) -> WriteOptions:
    media.Encoding(options.codec, options.bit_depth, options.crf)
    return WriteOptions(
        codec=options.codec, bit_depth=options.bit_depth, crf=options.crf, metadata=not options.no_metadata
    )


def _settings(options: Options, preset: Preset) -> dict[str, str]:
    """What the user asked for; ``fingerprint`` replaces it by what was used."""
    from .fast_paths import check_fast_paths
    from .memory import FastPaths, choose_placement

    fast = FastPaths(options.attention.lower(), options.quantize, options.compile)
    placement = choose_placement(options.device, options.dtype, options.threads, options.vae_device)
    check_fast_paths(fast, preset.family, placement)
    if options.vae_device is not None and (preset.stages == 1 or options.profile is not None):
        reason = f"{preset.name} has one stage" if preset.stages == 1 else "a profile fits a single device"
        raise UsageError(f"--vae-device {options.vae_device}: {reason}; leave it out")
    asked = {"device": options.device, "vae_device": options.vae_device, "threads": options.threads}
    given = {name: str(value) for name, value in asked.items() if value is not None}
    return {"dtype": options.dtype, **fast.settings(), **given}


def _cache(options: Options, preset: Preset) -> str | None:
    """The folder for embeddings, absolutely. It is made when there is something to keep."""
    if options.cache is None:
        return None
    from .embeddings import check_folder

    if not preset.reads_text:
        raise UsageError(f"--cache: {preset.name} reads no text; leave it out")
    check_folder(_path(options.cache))
    return str(_path(options.cache).absolute())


def _wanted(output: str | None, stem: str, request: Request) -> Path:
    """Where the result goes: a video, or a folder of pictures (no suffix)."""
    name = f"{stem}_{request.seed}_{request.size}_{request.num_frames}f.mp4"
    if output is None:
        return Path(name)
    path = _path(output)
    if path.is_dir():
        return path / name
    return path.with_suffix("") if path.suffix.lower() == ".png" else path


def location(model: str | None) -> str | None:
    """A folder absolutely, since ``resume`` may run elsewhere; several too; a hub name as it is."""
    if model is not None and "," in model:
        return ",".join(str(location(part)) for part in model.split(","))
    return str(Path(model).absolute()) if model is not None and Path(model).exists() else model


def _loras(given: list[str] | None) -> tuple[str, ...]:
    found = []
    for text in given or ():
        path, weight = split_lora(text)
        if not _path(path).is_file():
            raise UsageError(f"LoRA {path!r} does not exist; give PATH or PATH:WEIGHT")
        _check_lora(str(_path(path)))
        found.append(f"{_path(path).absolute()}:{weight:g}")
    return tuple(found)


def _check_lora(path: str) -> None:
    """UsageError for a file that cannot be one, from its header; whether it fits is seen when the model is there."""
    for file in locate(path):
        if file.suffix == ".safetensors":
            read_metadata(file)


def trace_file(given: str | None) -> Path | None:
    """Where a trace is to go; UsageError if something is there or it cannot be written."""
    if given is None:
        return None
    path = _path(given)
    if os.path.lexists(path):
        raise UsageError(f"--trace {given} exists and is not overwritten; choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"--trace: the folder {path.parent} does not exist; create it or choose another")
    return path


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{text!r} names the home of an unknown user; give a path") from None


def split_lora(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, 1.0
    try:
        strength = float(weight)
    except ValueError:
        raise UsageError(f"LoRA weight {weight!r} is not a number; give PATH or PATH:WEIGHT") from None
    if not math.isfinite(strength):
        raise UsageError(f"LoRA weight {weight!r} is not finite; 1 is as trained")
    return path, strength
