"""Presets: a model with its grid, defaults and the place its weights come from, as frozen values.

No tensors here: ``plan`` and ``--help`` read presets without importing torch.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from .core import MAX_SIDE, RESOLUTIONS, Fit, Grid, Lattice, Request, Size, UsageError
from .segments import CSG

Family = Literal["wan", "wan-refine", "nano", "mobile"]


@dataclass(frozen=True)
class Preset:
    """``stage_one`` and ``stage_two``: a folder in this package (nano, mobile-nano), or hub repositories, both in
    diffusers layout.

    ``overlap_blocks``: finished blocks that a Stage I continuation keeps at least (docs/decisions/0003).
    ``num_frames``: of a clip whose length is not said.
    ``carries_detail``: the reference takes the photo's detail along the motion (``reference.carried_reference``).
    ``vae``: a folder in this package that holds the VAE, if the weights' own folder does not (it is shared).
    ``defaults``: fields of ``Request`` that differ from its own defaults.
    ``fast``: what ``--fast`` makes of them (``hastening``): ``pipeline(photo, prompt, **preset.fast)`` is the same in
    Python. ``fast_quantize``: in how many bits it keeps the transformers, where the device can. ``not_fast``: why there
    is nothing that it could change.
    """

    name: str
    family: Family
    title: str
    grid: Grid
    stage_one: str
    stage_two: str
    prompt_tokens: int = 512
    overlap_blocks: int = 5
    fps: float = 15.0
    num_frames: int = 81
    vae: str = ""
    carries_detail: bool = False
    hidden: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    fast: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fast_quantize: str | None = None
    not_fast: str = ""

    @property
    def folder(self) -> Path | None:
        """Where the weights lie if they ship with the package."""
        return package_folder() / self.stage_one if self.family in ("nano", "mobile") and self.stage_one else None

    @property
    def vae_folder(self) -> Path | None:
        """Where the VAE ships, if it is shared with another preset."""
        return package_folder() / self.vae if self.vae else None

    @property
    def stages(self) -> int:
        """MobileI2V has one stage; its settings are those of ``Request`` without ``_2``."""
        return 1 if self.family == "mobile" else 2

    @property
    def reads_text(self) -> bool:
        """Whether the prompt matters."""
        return self.family != "mobile"


def _one_stage(lattice: Lattice, size: Size, **settings: int) -> Grid:
    return Grid(stage_one=lattice, stage_two=lattice, scale=1, default_size=size, **settings)


def package_folder() -> Path:
    spec = importlib.util.find_spec("swifti2v")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


WAN_STAGE_ONE = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
WAN_STAGE_TWO = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
_WAN_ONE = Lattice(stride=8, patch=2, channels=16)
_WAN_TWO = Lattice(stride=16, patch=2, channels=48)
_NANO = Lattice(stride=16, patch=2, channels=96, pads=True)
_TINY_WAN_ONE = Lattice(stride=8, patch=2, channels=16)
_TINY_WAN_TWO = Lattice(stride=16, patch=2, channels=4)
_LTX = Lattice(stride=32, patch=1, channels=128, unit=4)
_MOBILE_NANO = Lattice(stride=64, patch=1, channels=8)
_TINY_LTX = Lattice(stride=32, patch=1, channels=8, unit=4)
_MOBILE = {"num_inference_steps": 30, "shift": 3.0, "motion_score": 2.0, "csg": CSG(segment_blocks=2)}
_MOBILE_NANO_DEFAULTS = {**_MOBILE, "num_inference_steps": 2, "csg": CSG(segment_blocks=4)}
_REFINE: dict[str, Any] = {
    "strength_2": 0.5,
    "num_inference_steps_2": 4,
    "csg": CSG(renoised="neighbors", neighbor_timestep="current"),
}
# Of all M with one neighbor, 4 takes the fewest FLOPs at 81 frames (6.72 PFLOP in four steps; 3: 7.01, 5: 6.73).
_FAST_SEGMENT = 4
_WAN_FAST = MappingProxyType({"num_inference_steps_2": 2, "csg": CSG(segment_blocks=_FAST_SEGMENT)})
_REFINE_FAST = MappingProxyType(
    {"num_inference_steps_2": 2, "csg": _REFINE["csg"].model_copy(update={"segment_blocks": _FAST_SEGMENT})}
)
_FP8 = "fp8-rows"
_NANO_IS_FAST = "its transformers take a fourteenth of a clip's time (docs/fast.md)"
_FEWER_STEPS = "no student of fewer steps is there, and an untaught network moves too little (docs/experiments.md)"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="nano",
            family="nano",
            title="small models trained by this project, shipped in the package; run on a CPU",
            grid=Grid(stage_one=_NANO, stage_two=_NANO),
            carries_detail=True,  # docs/decisions/0008
            stage_one="nano",
            stage_two="nano",
            prompt_tokens=128,
            defaults={"num_inference_steps": 4, "num_inference_steps_2": 1},
            not_fast=_NANO_IS_FAST,
        ),
        Preset(
            name="wan",
            family="wan",
            title="SwiftI2V at its true size: Wan2.1-I2V-14B + trained Stage II (no such weights are public yet)",
            grid=Grid(stage_one=_WAN_ONE, stage_two=_WAN_TWO),
            stage_one=WAN_STAGE_ONE,
            stage_two=WAN_STAGE_TWO,
            fast=_WAN_FAST,
            fast_quantize=_FP8,
        ),
        Preset(
            name="wan-refine",
            family="wan-refine",
            title="public Wan weights only: an image-anchored sharpening upscaler, quality not yet measured",
            grid=Grid(stage_one=_WAN_ONE, stage_two=_WAN_TWO, stage_one_area=832 * 480),
            stage_one=WAN_STAGE_ONE,
            stage_two=WAN_STAGE_TWO,
            defaults=_REFINE,
            fast=_REFINE_FAST,
            fast_quantize=_FP8,
        ),
        Preset(
            name="mobile",
            family="mobile",
            title="MobileI2V at its true size: the authors' checkpoint (models convert) and an LTX VAE",
            grid=_one_stage(_LTX, Size(1280, 720), temporal_stride=8, trained_blocks=3, max_frames=121),
            stage_one="",
            stage_two="",
            overlap_blocks=1,
            num_frames=17,
            defaults=_MOBILE,
            not_fast=_FEWER_STEPS,
        ),
        Preset(
            name="mobile-nano",
            family="mobile",
            title="a small MobileI2V that moves the photo's own pixels; shipped in the package, runs on a CPU",
            grid=_one_stage(_MOBILE_NANO, Size(1280, 704)),
            stage_one="nano_mobile",
            stage_two="nano_mobile",
            num_frames=17,
            vae="nano/vae",
            defaults=_MOBILE_NANO_DEFAULTS,
            not_fast=_FEWER_STEPS,
        ),
        Preset(
            name="tiny-nano",
            family="nano",
            title="nano's twin for tests: tiny, random weights",
            grid=Grid(stage_one=_NANO, stage_two=_NANO, trained_blocks=5, default_size=Size(128, 64)),
            stage_one="",
            stage_two="",
            prompt_tokens=16,
            overlap_blocks=2,
            carries_detail=True,
            hidden=True,
            defaults={"num_inference_steps": 2, "num_inference_steps_2": 2},
            not_fast=_NANO_IS_FAST,
        ),
        Preset(
            name="tiny-wan",
            family="wan",
            title="wan's twin for tests: tiny, random weights",
            grid=Grid(stage_one=_TINY_WAN_ONE, stage_two=_TINY_WAN_TWO, trained_blocks=5, default_size=Size(128, 64)),
            stage_one="",
            stage_two="",
            overlap_blocks=2,
            hidden=True,
            defaults={"num_inference_steps": 2, "num_inference_steps_2": 2},
            fast=MappingProxyType({**_WAN_FAST, "num_inference_steps_2": 1}),
            fast_quantize=_FP8,
        ),
        Preset(
            name="tiny-wan-refine",
            family="wan-refine",
            title="wan-refine's twin for tests: tiny, random weights",
            grid=Grid(
                stage_one=_TINY_WAN_ONE,
                stage_two=_TINY_WAN_TWO,
                trained_blocks=5,
                default_size=Size(128, 64),
                stage_one_area=64 * 32,
            ),
            stage_one="",
            stage_two="",
            overlap_blocks=2,
            hidden=True,
            defaults={**_REFINE, "num_inference_steps": 2, "num_inference_steps_2": 2},
            fast=MappingProxyType({**_REFINE_FAST, "num_inference_steps_2": 1}),
            fast_quantize=_FP8,
        ),
        Preset(
            name="tiny-mobile",
            family="mobile",
            title="mobile's twin for tests: tiny, random weights",
            grid=_one_stage(_TINY_LTX, Size(128, 64), temporal_stride=8, trained_blocks=3, max_frames=121),
            stage_one="",
            stage_two="",
            overlap_blocks=1,
            num_frames=17,
            hidden=True,
            defaults={**_MOBILE, "num_inference_steps": 2},
            not_fast=_FEWER_STEPS,
        ),
        Preset(
            name="tiny-mobile-nano",
            family="mobile",
            title="mobile-nano's twin for tests: tiny, random weights",
            grid=_one_stage(_MOBILE_NANO, Size(128, 64)),
            stage_one="",
            stage_two="",
            num_frames=17,
            hidden=True,
            defaults=_MOBILE_NANO_DEFAULTS,
            not_fast=_FEWER_STEPS,
        ),
    )
}


def get(name: str) -> Preset:
    """The preset of that name; ``UsageError`` naming the known ones."""
    if name not in PRESETS:
        known = ", ".join(p.name for p in PRESETS.values() if not p.hidden)
        raise UsageError(f"preset {name!r} is not known; known presets: {known}")
    return PRESETS[name]


def check(request: Request) -> Preset:
    """The preset of a request that a file held; ``UsageError`` unless it is known and the request on its grid."""
    preset = get(request.preset)
    size, frames = preset.grid.snap(request.size), preset.grid.snap_frames(request.num_frames)
    if size != request.size:
        raise UsageError(f"size {request.size} is off the grid of {preset.name}; nearest legal value: {size}")
    if frames != request.num_frames:
        rule = preset.grid.frame_rule
        raise UsageError(f"num_frames {request.num_frames} is off the grid: {rule}; nearest legal value: {frames}")
    _listened_to(preset, request)
    return preset


def resolve(
    preset: Preset,
    *,
    prompt: str,
    photo_size: Size | None = None,
    size: str | None = None,
    resolution: str | None = None,
    fit: Fit | None = None,
    num_frames: int | None = None,
    seed: int | None = None,
    strict: bool = False,
    **fields: Any,
) -> tuple[Request, list[str]]:
    """A legal request, and a notice for every value that was snapped or drawn.

    ``size`` is exact and implies ``fit`` crop (or pad); ``resolution`` sets an area, and with ``fit`` auto
    (the default) takes the legal size nearest to the photo's aspect. ``strict`` refuses what would snap.
    Raises ``UsageError`` with the value, the rule and the nearest legal value.
    """
    notices: list[str] = []
    chosen, fit_used = _choose_size(preset.grid, photo_size, size, resolution, fit)
    legal = preset.grid.snap(chosen)
    if legal != chosen:
        notices.append(_snap(f"size {chosen} is off the grid: multiples of {preset.grid.multiple}", legal, strict))
    asked = preset.num_frames if num_frames is None else num_frames
    frames = preset.grid.snap_frames(asked)
    if frames != asked:
        notices.append(_snap(f"num_frames {asked} is off the grid: {preset.grid.frame_rule}", frames, strict))
    if seed is None or seed == -1:
        seed = secrets.randbelow(2**31)
        notices.append(f"seed drawn: {seed}")
    values = {"fps": preset.fps, **preset.defaults, **{k: v for k, v in fields.items() if v is not None}}
    try:
        request = Request(
            preset=preset.name,
            prompt=prompt,
            width=legal.width,
            height=legal.height,
            num_frames=frames,
            seed=seed,
            fit=fit_used,
            **values,
        )
    except ValidationError as error:
        raise UsageError(_one_line(error)) from None
    return request, [*notices, *_listened_to(preset, request)]


def _listened_to(preset: Preset, request: Request) -> list[str]:
    """UsageError for a setting that the preset would have to ignore, a notice for a prompt."""
    if preset.family != "mobile":
        if request.motion_score is not None:
            raise UsageError(
                f"motion_score {request.motion_score:g}: {preset.name} does not listen to it; mobile and mobile-nano do"
            )
        return []
    if request.negative_prompt:
        raise UsageError(f"negative_prompt: {preset.name} has no text; leave it out")
    if request.guidance_scale > 1:
        raise UsageError(
            f"guidance_scale {request.guidance_scale:g}: {preset.name} has no text that could guide it; leave it at 1"
        )
    for name in ("num_inference_steps_2", "guidance_scale_2", "shift_2", "strength_2", "encode", "motion_sha256"):
        if getattr(request, name) != Request.model_fields[name].default:
            said = "motion" if name == "motion_sha256" else name
            raise UsageError(f"{said}: {preset.name} has one stage and does not listen to it; leave it out")
    if not request.prompt:
        return []
    return [unread(preset)]


def unread(preset: Preset) -> str:
    """What to tell somebody who gave a prompt to a preset that does not read it."""
    return f"{preset.name} does not read text: the prompt changes nothing (the motion score does)"


def _choose_size(
    grid: Grid, photo: Size | None, size: str | None, resolution: str | None, fit: Fit | None
) -> tuple[Size, Literal["crop", "pad"]]:
    if size is not None and resolution is not None:
        raise UsageError(f"--size {size} and --resolution {resolution} both set the size; give one of them")
    if fit not in (None, "auto", "crop", "pad"):
        raise UsageError(f"fit {fit!r} is not known; use auto, crop or pad")
    if size is not None:
        if fit == "auto":
            raise UsageError(
                f"--size {size} is exact, --fit auto chooses a size; use --fit crop or pad, or --resolution"
            )
        return Size.parse(size), fit or "crop"
    if resolution is not None and resolution.lower() not in RESOLUTIONS:
        raise UsageError(f"resolution {resolution!r} is not known; known: {', '.join(RESOLUTIONS)}")
    area = grid.default_size.area if resolution is None else grid.area_of(resolution.lower())
    aspect = photo.aspect if photo is not None and fit in (None, "auto") else grid.default_size.aspect
    if max(area * aspect, area / aspect) > MAX_SIDE**2:
        raise UsageError(f"photo aspect {aspect:.2f} is too extreme for {resolution or 'the default size'}; use --size")
    return grid.size_for(area, aspect), "pad" if fit == "pad" else "crop"


def _snap(rule: str, legal: object, strict: bool) -> str:
    if strict:
        raise UsageError(f"{rule}; nearest legal value: {legal}")
    return f"{rule}; using {legal}"


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "request"
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else value[:57] + "..."
    return f"{where} {shown}: {first['msg'].removeprefix('Value error, ')}"
