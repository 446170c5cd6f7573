"""What ``swifti2v generate`` and ``plan`` can be told: each field of ``Options`` is an option of the command line.

Only words and types: what is legal is decided by ``core`` and ``presets``. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

PHOTO, SIZE, CLIP, MODEL, FILE, RUN = "What to make", "Size", "How", "Model", "File", "Run"


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """A command-line option whose default its verb does not show."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **settings)


@dataclass(frozen=True)
class Options:
    """What ``generate`` and ``plan`` can be told. ``None``: the preset's or ``core.Request``'s default."""

    image: Annotated[str | None, option(PHOTO, "The photo, which becomes the first frame.", metavar="PHOTO")] = None
    prompt: Annotated[str | None, option(PHOTO, "What should happen, in words (mobile: not read).", metavar="TEXT")] = (
        None
    )
    negative_prompt: Annotated[str | None, option(PHOTO, "What should not happen.", metavar="TEXT")] = None
    num_frames: Annotated[int | None, option(PHOTO, "Frames: 4k+1, with mobile 8k+1 (default: the preset's).")] = None
    duration: Annotated[str | None, option(PHOTO, "Length in seconds instead, e.g. 5s.", metavar="SECONDS")] = None
    seed: Annotated[int | None, option(PHOTO, "Same seed, same video (default: drawn and recorded).")] = None
    fps: Annotated[float | None, option(PHOTO, "Frames a second (default: the preset's).")] = None

    size: Annotated[str | None, option(SIZE, "Exact size, e.g. 2560x1408; crops the photo.", metavar="WxH")] = None
    resolution: Annotated[
        str | None, option(SIZE, "360p, 720p, 1080p or 2k, in the photo's aspect (nano: 2k).", metavar="NAME")
    ] = None
    fit: Annotated[str | None, option(SIZE, "auto, crop or pad.", metavar="HOW")] = None
    strict: Annotated[bool, option(SIZE, "Refuse sizes and lengths off the grid instead of snapping.", "--strict")] = (
        False
    )

    num_inference_steps: Annotated[
        int | None, option(CLIP, "Steps of stage I, or of the only one.", "--num-inference-steps", "--steps")
    ] = None
    num_inference_steps_2: Annotated[int | None, option(CLIP, "Steps of stage II.", "--num-inference-steps-2")] = None
    guidance_scale: Annotated[float | None, option(CLIP, "Prompt guidance of stage I (1: off).")] = None
    guidance_scale_2: Annotated[
        float | None, option(CLIP, "Prompt guidance of stage II (1: off).", "--guidance-scale-2")
    ] = None
    shift: Annotated[float | None, option(CLIP, "Flow shift of stage I's noise levels.")] = None
    shift_2: Annotated[float | None, option(CLIP, "Flow shift of stage II's noise levels.", "--shift-2")] = None
    strength_2: Annotated[
        float | None, option(CLIP, "Noise level stage II starts from, 0-1 (wan-refine: 0.5).", "--strength-2")
    ] = None
    sampler_2: Annotated[
        str | None, option(CLIP, "euler, or renoise for few-step students.", "--sampler-2", metavar="NAME")
    ] = None
    motion_score: Annotated[
        float | None, option(CLIP, "How much is to move, 0-100 (mobile, mobile-nano: 2).", "--motion-score")
    ] = None
    segment_blocks: Annotated[int | None, option(CLIP, "Latent blocks denoised together.")] = None
    neighbor_blocks: Annotated[int | None, option(CLIP, "Finished blocks they see.")] = None
    rope_positions: Annotated[str | None, option(CLIP, "clamped, absolute or window.", metavar="RULE")] = None
    neighbor_timestep: Annotated[str | None, option(CLIP, "zero or current.", metavar="RULE")] = None
    neighbor_reference: Annotated[str | None, option(CLIP, "reference or generated.", metavar="RULE")] = None
    encode: Annotated[str | None, option(CLIP, "lazy (first frames soon) or ahead.", metavar="WHEN")] = None
    exact_first_frame: Annotated[
        bool, option(CLIP, "Frame 0 is the fitted photo itself, not its decoded latent.", "--exact-first-frame")
    ] = False
    motion: Annotated[
        str | None, option(CLIP, "Refine this low-resolution video instead of stage I.", metavar="FILE")
    ] = None
    preview: Annotated[bool, option(CLIP, "Stop after stage I; resume the job to finish.", "--preview")] = False

    preset: Annotated[str, option(MODEL, "nano (default), mobile-nano, mobile, wan, wan-refine.", metavar="NAME")] = (
        "nano"
    )
    model: Annotated[
        str | None, option(MODEL, "Folder with the preset's weights; mobile: TRANSFORMER,LTX_VAE.", metavar="PATH")
    ] = None
    lora: Annotated[list[str] | None, option(MODEL, "LoRA for stage I; repeatable.", metavar="PATH[:WEIGHT]")] = None
    lora_2: Annotated[
        list[str] | None, option(MODEL, "LoRA for stage II; repeatable.", "--lora-2", metavar="PATH[:WEIGHT]")
    ] = None

    output: Annotated[
        str | None, option(FILE, "NAME.mp4; an existing folder; or NAME.png for a folder of PNGs.", metavar="FILE")
    ] = None
    codec: Annotated[str, option(FILE, "h264 (default), h265 or av1.", metavar="NAME")] = "h264"
    bit_depth: Annotated[int, option(FILE, "8 (default) or 10.")] = 8
    crf: Annotated[int | None, option(FILE, "Quality of the codec, lower is better.")] = None
    no_metadata: Annotated[bool, option(FILE, "Do not write the request into the file.", "--no-metadata")] = False
    keep_job: Annotated[bool, option(FILE, "Keep the job folder when done.", "--keep-job")] = False

    dtype: Annotated[str, option(RUN, "auto (default), float32 or bfloat16.", metavar="NAME")] = "auto"
    device: Annotated[str | None, option(RUN, "cpu, cuda, cuda:1, mps (default: the best there is).")] = None
    vae_device: Annotated[
        str | None, option(RUN, "The VAEs on a device of their own, e.g. cuda:1.", metavar="DEVICE")
    ] = None
    threads: Annotated[int | None, option(RUN, "CPU threads.")] = None
    fast: Annotated[
        bool, option(RUN, "Faster for a little quality: changes what the preset names, and says so.", "--fast")
    ] = False
    profile: Annotated[
        str | None,
        option(
            RUN,
            "Fit into auto (what is free), 80gb, 24gb, 16gb, 12gb, 8gb or cpu (wan on a GPU: auto).",
            metavar="NAME",
        ),
    ] = None
    at_once: Annotated[
        bool | None,
        option(
            RUN, "Stages at once or one at a time: the same video (default: at once on a GPU).", "--at-once/--in-turn"
        ),
    ] = None
    trace: Annotated[
        str | None, option(RUN, "Write who worked when, for chrome://tracing or ui.perfetto.dev.", metavar="OUT.json")
    ] = None
    context_parallel: Annotated[
        int | None, option(RUN, "One clip by N processes (wan, wan-refine), started by torchrun.", metavar="N")
    ] = None
    attention: Annotated[
        str, option(RUN, "Attention kernel by diffusers' name (default: auto, tried before use).", metavar="NAME")
    ] = "auto"
    quantize: Annotated[
        str | None, option(RUN, "int8, int8-dynamic, fp8 or fp8-rows: transformers in 8 bits.", metavar="KIND")
    ] = None
    compile: Annotated[bool, option(RUN, "Compile the transformers' layers; the first steps wait.", "--compile")] = (
        False
    )
    cache: Annotated[str | None, option(RUN, "Keep embeddings of prompts and photos here.", metavar="FOLDER")] = None
    dry_run: Annotated[bool, option(RUN, "Check everything, print the plan, make nothing.", "--dry-run")] = False
    json: Annotated[bool, option(RUN, "Events as JSON lines on stdout.", "--json")] = False
    quiet: Annotated[bool, option(RUN, "Print nothing but errors.", "--quiet")] = False
    debug: Annotated[bool, option(RUN, "Show the traceback of an error.", "--debug")] = False


@dataclass(frozen=True)
class BatchOptions:
    """What ``batch`` can be told."""

    jobs: Annotated[str, typer.Argument(metavar="JOBS.jsonl", help="One JSON object a line: options of generate.")]
    engine: Annotated[str, option(RUN, "local (default) or ray.", metavar="NAME")] = "local"
    workers: Annotated[int | None, option(RUN, "How many (default: one for each GPU, else one).")] = None
    devices: Annotated[str | None, option(RUN, "One worker for each, e.g. cuda:0,cuda:1.", metavar="NAMES")] = None
    stage_workers: Annotated[
        str | None, option(RUN, "A workers make stage I, B the rest.", "--stage-workers", metavar="A,B")
    ] = None
    address: Annotated[str | None, option(RUN, "Of a Ray cluster (default: one of its own).", metavar="HOST:PORT")] = (
        None
    )
    attempts: Annotated[int, option(RUN, "Give a clip up after so many in a row that added nothing (4).")] = 4
    model: Annotated[str | None, option(MODEL, "Where the weights are, for lines that do not say.", metavar="PATH")] = (
        None
    )
    json: Annotated[bool, option(RUN, "Events as JSON lines on stdout.", "--json")] = False
    quiet: Annotated[bool, option(RUN, "Print nothing but errors.", "--quiet")] = False
    debug: Annotated[bool, option(RUN, "Show the traceback of an error.", "--debug")] = False


def takes_options(verb: Callable[[Any], None], kind: Any = Options) -> Callable[..., None]:
    """Give a verb every field of ``Options`` as a command-line option, so that no list is written twice."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]

    def command(**values: Any) -> None:
        verb(kind(**values))

    command.__doc__, command.__name__ = verb.__doc__, verb.__name__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    return command
