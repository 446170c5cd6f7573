"""Bad inputs through the real command line: one line that starts with ``error:``, the right exit code, nothing left.

Every case is data. ``made`` cases start from a finished clip with its job and from a job that was stopped half-way.
Exit code 2: found before weights load. 1: after.
"""

# ruff: noqa: E501  (one case, one line)
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from swifti2v import cli, media
from swifti2v.journal import Job
from swifti2v.tiny import tiny_pipeline

GOOD = {
    "image": "photo.png", "prompt": "slow pan left", "preset": "tiny-nano", "model": "weights", "size": "128x64",
    "num-frames": "17", "seed": "7", "dtype": "float32",
}  # fmt: skip
ONE = "weights/transformer/diffusion_pytorch_model.safetensors"
TWO = "weights/transformer_2/diffusion_pytorch_model.safetensors"
Prepare = Callable[[Path], Any]


@dataclass(frozen=True)
class Bad:
    """A line typed, what it must say, the exit code, and how the folder is made bad first.

    ``line`` in the shell's words; one that begins with an option is ``generate`` with the good options and these
    (``--no-NAME`` leaves a good option out). ``made``: the folder holds a finished clip and jobs. ``more``:
    arguments that no shell could pass.
    """

    line: str
    says: str
    code: int = 2
    prepare: Prepare | None = None
    made: bool = False
    more: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        words = [*shlex.split(self.line), *self.more]
        if words and not words[0].startswith("-"):
            return words
        given = {words[i].removeprefix("--") for i in range(len(words)) if words[i].startswith("--")}
        good = {name: value for name, value in GOOD.items() if name not in given and f"no-{name}" not in given}
        extra = [word for word in words if word.removeprefix("--no-") not in GOOD]
        return ["generate", "--quiet", *(w for name, value in good.items() for w in (f"--{name}", value)), *extra]


def file(name: str, data: bytes | str) -> Prepare:
    return lambda here: (here / name).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(name: str, share: float = 0.5) -> Prepare:
    """The file, cut off."""
    return lambda here: os.truncate(here / name, int((here / name).stat().st_size * share))


def flipped(name: str, where: float = 0.5) -> Prepare:
    """The file with one byte changed."""

    def prepare(here: Path) -> None:
        data = bytearray((here / name).read_bytes())
        data[int(len(data) * where)] ^= 0xFF
        (here / name).write_bytes(data)

    return prepare


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Prepare:
    """The weights file after ``change`` of its tensors."""

    def prepare(here: Path) -> None:
        held = {key: value.clone() for key, value in load_file(here / name).items()}
        change(held)
        save_file(held, here / name, {"format": "pt"})

    return prepare


def record(name: str, **changes: Any) -> Prepare:
    """The JSON file with some values changed."""

    def prepare(here: Path) -> None:
        content = json.loads((here / name).read_text())
        for key, value in changes.items():
            inner = content
            *path, last = key.split("__")
            for part in path:
                inner = inner[part]
            inner[last] = value
        (here / name).write_text(json.dumps(content))

    return prepare


def picture(name: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> Prepare:
    return lambda here: Image.new(mode, size).save(here / name, **options)


def noise(name: str) -> Prepare:
    """A photo that fills many kilobytes, to be cut off by another step."""
    pixels = np.random.default_rng(1).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    return lambda here: Image.fromarray(pixels).save(here / name)


def bomb(here: Path) -> None:
    """A PNG of 40000 x 40000 pixels by its header."""
    Image.new("RGB", (64, 64)).save(here / "bad.png")
    data = bytearray((here / "bad.png").read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
    (here / "bad.png").write_bytes(data)


def both(*steps: Prepare) -> Prepare:
    return lambda here: [step(here) for step in steps]


def clip_saying(comment: str) -> Prepare:
    """A video that says this of itself."""
    frames = torch.zeros(1, 3, 5, 16, 16)
    return lambda here: media.write_video(here / "said.mp4", [frames], fps=15, metadata={"comment": comment})


def clip_of_request(**changes: Any) -> Prepare:
    """A copy of the finished clip whose recorded request was changed by hand."""

    def prepare(here: Path) -> None:
        content = json.loads(media.read_metadata(here / "clip.mp4")["comment"])
        for key, value in changes.items():
            part = content["swifti2v"] if key in content["swifti2v"] else content["swifti2v"]["request"]
            part[key] = value
        clip_saying(json.dumps(content))(here)

    return prepare


def lora(name: str, layer: str, width: int = 48) -> Prepare:
    held = {f"transformer.{layer}.lora_A.weight": torch.ones(2, width)}
    held[f"transformer.{layer}.lora_B.weight"] = torch.ones(48, 2)
    return lambda here: save_file(held, here / name)


def no_latents(here: Path) -> None:
    for path in (here / "stopped.job/motion").iterdir():
        path.unlink()


def sound(here: Path) -> None:
    """A file with sound and no picture."""
    with av.open(str(here / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 48_000
        container.mux([*stream.encode(frame), *stream.encode(None)])


BAD_IMAGE = "--image bad.png"
PHOTOS = {
    "photo: none given": Bad("--no-image", "--image is missing"),
    "photo: missing": Bad("--image gone.jpg", "no such image file"),
    "photo: empty": Bad(BAD_IMAGE, "is empty", prepare=file("bad.png", "")),
    "photo: a text": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", "not a picture\n" * 9)),
    "photo: a web page": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", "<!doctype html><svg></svg>")),
    "photo: a PDF": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", "%PDF-1.7\n" + "x" * 500)),
    "photo: an EPS": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", "%!PS-Adobe-3.0 EPSF-3.0\n")),
    "photo: a zip": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", b"PK\x03\x04" + b"\0" * 500)),
    "photo: random bytes": Bad(BAD_IMAGE, "not an image", prepare=file("bad.png", bytes(range(1, 256)) * 9)),
    "photo: HEIC": Bad(BAD_IMAGE, "HEIC", prepare=file("bad.png", b"\0\0\0\x18ftypheic" + b"\0" * 200)),
    "photo: JPEG cut off": Bad("--image bad.jpg", "truncated", prepare=both(noise("bad.jpg"), cut("bad.jpg"))),
    "photo: JPEG's first bytes": Bad("--image bad.jpg", "bad.jpg", prepare=file("bad.jpg", b"\xff\xd8\xff\xe0\0\x10JF")),
    "photo: PNG cut off": Bad(BAD_IMAGE, "truncated", prepare=both(noise("bad.png"), cut("bad.png"))),
    "photo: PNG damaged": Bad(BAD_IMAGE, "damaged", prepare=both(noise("bad.png"), flipped("bad.png"))),
    "photo: WebP cut off": Bad("--image bad.webp", "bad.webp", prepare=both(noise("bad.webp"), cut("bad.webp"))),
    "photo: TIFF cut off": Bad("--image bad.tif", "bad.tif", prepare=both(noise("bad.tif"), cut("bad.tif"))),
    "photo: a bomb": Bad(BAD_IMAGE, "megapixels", prepare=bomb),
    "photo: a folder": Bad("--image .", "is a folder"),
    "photo: a device": Bad("--image /dev/zero", "device or pipe"),
    "photo: a pipe": Bad("--image pipe", "device or pipe", prepare=lambda here: os.mkfifo(here / "pipe")),
    "photo: under a file": Bad("--image photo.png/photo.png", "cannot be read"),
    "photo: a dangling link": Bad(BAD_IMAGE, "no such", prepare=lambda here: (here / "bad.png").symlink_to("gone")),
    "photo: a link to itself": Bad(BAD_IMAGE, "cannot be read", prepare=lambda here: (here / "bad.png").symlink_to("bad.png")),
    "photo: a video": Bad("--image clip.mp4", "not an image", made=True),
    "photo: too small": Bad(BAD_IMAGE, "8x8 is too small", prepare=picture("bad.png", (8, 8))),
    "photo: too long": Bad(BAD_IMAGE, "too long", prepare=picture("bad.png", (1000, 20))),
    "photo: all transparent": Bad(BAD_IMAGE, "transparent", prepare=picture("bad.png", mode="RGBA")),
    "photo: numbers beyond white": Bad("--image bad.tif", "outside", prepare=lambda here: Image.fromarray(np.full((64, 64), -5.0, np.float32)).save(here / "bad.tif")),
    "photo: not numbers": Bad("--image bad.tif", "NaN", prepare=lambda here: Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(here / "bad.tif")),
    "photo: name with a NUL": Bad("", "cannot be read", more=("--image", "a\0b.png")),
    "photo: name with a new line": Bad("", "no such", more=("--image", "a\nb.png")),
    "photo: name of stray bytes": Bad("", "no such", more=("--image", "a\udce9.png")),
    "photo: name too long": Bad("--image " + "x" * 5000, "cannot be read"),
}  # fmt: skip

NUMBERS = {
    "size: zero": Bad("--size 0x64", "width 0 is not positive"),
    "size: negative": Bad("--size 128x-64", "not positive"),
    "size: not whole": Bad("--size 128.5x64", "whole pixels"),
    "size: one number": Bad("--size 128", "WIDTHxHEIGHT"),
    "size: a word": Bad("--size large", "WIDTHxHEIGHT"),
    "size: nothing": Bad("--size ''", "WIDTHxHEIGHT"),
    "size: over the limit": Bad("--size 100000x64", "over the limit of 8192"),
    "size: thousands of digits": Bad(f"--size {'9' * 5000}x64", "size"),
    "size: off the grid": Bad("--size 130x64 --strict", "nearest legal value: 128x64"),
    "size: and resolution": Bad("--resolution 720p", "give one of them"),
    "size: unknown resolution": Bad("--no-size --resolution 8k", "known: 360p"),
    "size: fit auto with a size": Bad("--fit auto", "--fit auto chooses a size"),
    "size: unknown fit": Bad("--fit stretch", "use auto, crop or pad"),
    "frames: zero": Bad("--num-frames 0", "not positive"),
    "frames: negative": Bad("--num-frames -17", "not positive"),
    "frames: not whole": Bad("--num-frames 17.5", "--num-frames"),
    "frames: too many": Bad("--num-frames 100000", "over the limit of 4001"),
    "frames: off the grid": Bad("--num-frames 18 --strict", "nearest legal value: 17"),
    "duration: and frames": Bad("--duration 5s", "give one of them"),
    "duration: zero": Bad("--no-num-frames --duration 0s", "not positive"),
    "duration: negative": Bad("--no-num-frames --duration=-2", "not positive"),
    "duration: a word": Bad("--no-num-frames --duration long", "not a number of seconds"),
    "duration: not a number": Bad("--no-num-frames --duration nan", "not positive"),
    "duration: endless": Bad("--no-num-frames --duration inf", "not positive"),
    "duration: too long": Bad("--no-num-frames --duration 3600", "over the limit"),
    "duration: with no frame rate": Bad("--no-num-frames --duration 5s --fps nan", "fps"),
    "duration: with an endless rate": Bad("--no-num-frames --duration 5s --fps inf", "fps"),
    "fps: zero": Bad("--fps 0", "fps 0"),
    "fps: negative": Bad("--fps=-15", "fps -15"),
    "fps: too many": Bad("--fps 1000", "240"),
    "prompt: missing": Bad("--no-prompt", "--prompt is missing"),
    "prompt: NUL": Bad("", "NUL", more=("--prompt", "a\0b")),
    "prompt: lone surrogate": Bad("", "lone surrogate", more=("--prompt", "a\ud800b")),
    "prompt: stray bytes": Bad("", "lone surrogate", more=("--prompt", "caf\udce9")),
    "prompt: too long": Bad("--prompt " + "x" * 10_001, "at most 10000"),
    "negative prompt: NUL": Bad("", "NUL", more=("--negative-prompt", "a\0b")),
    "seed: negative": Bad("--seed -5", "seed -5"),
    "seed: too large": Bad(f"--seed {2**63}", "seed"),
    "seed: a word": Bad("--seed lucky", "--seed"),
    "seed: a fraction": Bad("--seed 1.5", "--seed"),
    "steps: zero": Bad("--num-inference-steps 0", "num_inference_steps 0"),
    "steps: too many": Bad("--num-inference-steps-2 1001", "num_inference_steps_2 1001"),
    "guidance: below one": Bad("--guidance-scale 0.5", "guidance_scale 0.5"),
    "guidance: not a number": Bad("--guidance-scale-2 nan", "guidance_scale_2 nan"),
    "guidance: endless": Bad("--guidance-scale inf", "guidance_scale inf"),
    "segments: none": Bad("--segment-blocks 0", "segment_blocks 0"),
    "neighbors: negative": Bad("--neighbor-blocks -1", "neighbor_blocks -1"),
    "positions: unknown": Bad("--rope-positions spiral", "rope_positions 'spiral'"),
    "neighbors: unknown timestep": Bad("--neighbor-timestep late", "neighbor_timestep 'late'"),
    "neighbors: unknown reference": Bad("--neighbor-reference none", "neighbor_reference 'none'"),
    "shift: zero": Bad("--shift 0", "shift 0"),
    "shift: not a number": Bad("--shift-2 nan", "shift_2 nan"),
    "strength: zero": Bad("--strength-2 0", "strength_2 0"),
    "strength: above one": Bad("--strength-2 1.5", "strength_2 1.5"),
    "sampler: unknown": Bad("--sampler-2 heun", "sampler_2 'heun'"),
    "encode: unknown": Bad("--encode never", "encode 'never'"),
    "codec: unknown": Bad("--codec mpeg1", "mpeg1"),
    "bit depth: nine": Bad("--bit-depth 9", "bit_depth 9"),
    "crf: too high": Bad("--crf 99", "crf 99"),
    "device: unknown": Bad("--device toaster", "toaster"),
    "device: not here": Bad("--device cuda:97", "cuda:97"),
    "device: without storage": Bad("--device meta", "meta"),
    "dtype: unknown": Bad("--dtype int3", "int3"),
    "attention: unknown": Bad("--attention fast", "attention 'fast' is not known; use auto, native, flash"),
    "attention: empty": Bad("--attention ''", "attention '' is not known"),
    "attention: not nano's": Bad("--attention _native_math", "nano has one kernel"),
    "attention: not here": Bad("--no-model --preset wan --attention sage", "'native' works here"),
    "quantize: unknown": Bad("--quantize int3", "use int8, int8-dynamic, fp8, fp8-rows"),
    "quantize: no GPU for it": Bad("--quantize fp8-rows", "compute capability 8.9 or later"),
    "cache: a file": Bad("--cache photo.png", "photo.png is not a folder"),
    "cache: under a file": Bad("--cache photo.png/in", "photo.png is not a folder"),
    "cache: name too long": Bad("--cache " + "x" * 5000, "too long"),
    "cache: name with a NUL": Bad("", "cache", more=("--cache", "a\0b")),
    "cache: somebody's home": Bad("--cache ~nobody-of-this-name/kept", "unknown user"),
    "cache: where nobody can write": Bad("--cache /proc/kept", "cannot be written to"),
    "profile: unknown": Bad("--profile 25gb", "profile '25gb' is not known; use auto, 80gb, 24gb"),
    "profile: too small": Bad("--no-model --preset wan --size 3840x2176 --num-frames 81 --profile 8gb", "do not fit"),
    "vae-device: unknown": Bad("--vae-device gpu7", "device 'gpu7' is not known"),
    "vae-device: with a profile": Bad("--vae-device cpu --profile 24gb", "a profile fits a single device"),
    "trace: exists": Bad("--trace photo.png", "exists and is not overwritten"),
    "trace: no such folder": Bad("--trace gone/who.json", "does not exist; create it"),
    "trace: somebody's home": Bad("--trace ~nobody-of-this-name/who.json", "unknown user"),
    "threads: none": Bad("--threads 0", "threads 0"),
    "threads: too many": Bad("--threads 99999999999", "threads"),
    "option: unknown": Bad("--colour red", "--colour"),
    "option: without its value": Bad("--output", "--output"),
    "verb: unknown": Bad("dance", "dance"),
    "verb: one word too many": Bad("plan now", "now"),
    "plan: a text for a photo": Bad("plan --image bad.png", "not an image", prepare=file("bad.png", "text")),
    "plan: bad size": Bad("plan --size 0x0", "not positive"),
    "plan: unknown preset": Bad("plan --preset huge", "known presets"),
}  # fmt: skip

WEIGHTS = {
    "preset: unknown": Bad("--preset huge", "known presets: nano"),
    "preset: wan has no public weights": Bad("--no-model --preset wan", "give --model"),
    "model: missing folder": Bad("--model gone", "no weights"),
    "model: a file": Bad("--model photo.png", "no weights"),
    "model: name too long": Bad("--model " + "x" * 5000, "too long"),
    "model: no model_index": Bad("--model .", "model_index.json"),
    "model: index cut off": Bad("", "cannot load the model", 1, cut("weights/model_index.json")),
    "model: index is not JSON": Bad("", "cannot load the model", 1, file("weights/model_index.json", "{]")),
    "model: of another preset": Bad("--preset tiny-wan", "tiny-nano"),
    "model: config cut off": Bad("", "unusable config.json", 2, cut("weights/vae/config.json")),
    "model: config of another width": Bad("", "cannot load", 1, record("weights/transformer/config.json", hidden_size=96)),
    "model: no stage II folder": Bad("", "error", 2, lambda here: shutil.rmtree(here / "weights/transformer_2")),
    "model: weights missing": Bad("", "cannot load", 1, lambda here: (here / TWO).unlink()),
    "model: weights empty": Bad("", "cannot load", 1, file(TWO, "")),
    "model: weights cut off": Bad("", "cannot load", 1, cut(TWO)),
    "model: weights of zeros": Bad("", "cannot load", 1, file(TWO, b"\0" * 4096)),
    "model: weights are text": Bad("", "cannot load", 1, file(ONE, "version https://git-lfs.github.com/spec/v1\n")),
    "model: text encoder cut off": Bad("", "cannot load", 1, cut("weights/text_encoder/model.safetensors")),
    "model: a tensor missing": Bad("", "lacks 1 key: proj_out.weight", 1, tensors(TWO, lambda held: held.pop("proj_out.weight"))),
    "model: a tensor too many": Bad("", "does not have: 1 key: surplus", 1, tensors(ONE, lambda held: held.update(surplus=torch.ones(2)))),
    "model: a tensor of the wrong shape": Bad("", "cannot load", 1, tensors(TWO, lambda held: held.update({"proj_out.weight": torch.ones(3, 5)}))),
    "model: a text tensor missing": Bad("", "lacks 1 key", 1, tensors("weights/text_encoder/model.safetensors", lambda held: held.pop("encoder.final_layer_norm.weight"))),
    "model: NaN in the weights": Bad("", "not finite", 1, tensors(ONE, lambda held: held["proj_out.weight"].fill_(float("nan")))),
    "convert: missing": Bad("models convert gone.safetensors out", "no such checkpoint"),
    "convert: a text": Bad("models convert bad.safetensors out", "not whole", prepare=file("bad.safetensors", "words " * 99)),
    "convert: a pickle": Bad("models convert bad.pt out", "pickle", prepare=lambda here: torch.save({}, here / "bad.pt")),
    "convert: another model": Bad("models convert bad.safetensors out", "bad.safetensors", prepare=lora("bad.safetensors", "x")),
    "convert: a photo for a VAE": Bad("models convert photo.png out --vae", "not a checkpoint"),
    "lora: missing": Bad("--lora gone.safetensors", "gone.safetensors"),
    "lora: a folder": Bad("--lora weights", "weights"),
    "lora: name too long": Bad("--lora " + "x" * 5000, "too long"),
    "lora: empty": Bad("--lora bad.safetensors", "is empty", prepare=file("bad.safetensors", "")),
    "lora: a text": Bad("--lora bad.safetensors", "not whole", prepare=file("bad.safetensors", "words " * 99)),
    "lora: a pickle": Bad("--lora bad.pt", "pickle", prepare=lambda here: torch.save({}, here / "bad.pt")),
    "lora: cut off": Bad("--lora-2 bad.safetensors", "damaged", prepare=both(lora("bad.safetensors", "x"), cut("bad.safetensors", 0.9))),
    "lora: weight is a word": Bad("--lora photo.png:much", "'much' is not a number"),
    "lora: weight is not finite": Bad("--lora bad.safetensors:nan", "finite", prepare=lora("bad.safetensors", "x")),
    "lora: no layer of this model": Bad("--lora bad.safetensors", "no layer", 1, lora("bad.safetensors", "elsewhere.to_q")),
    "lora: of another width": Bad("--lora bad.safetensors:0.5", "another model", 1, lora("bad.safetensors", "proj_out", 40)),
}  # fmt: skip

FILES = {
    "output: no such folder": Bad("--output gone/clip.mp4", "does not exist"),
    "output: under a file": Bad("--output photo.png/clip.mp4", "is a file"),
    "output: where nobody can write": Bad("--output /proc/clip.mp4", "cannot write"),
    "output: unknown ending": Bad("--output clip.doc", "ends in .doc"),
    "output: another container": Bad("--output clip.webm", "ends in .webm"),
    "output: name too long": Bad(f"--output {'x' * 250}.mp4", "bytes long"),
    "output: path too long": Bad(f"--output {'x' * 5000}.mp4", "too long"),
    "output: name with a NUL": Bad("", "NUL", more=("--output", "a\0b.mp4")),
    "output: name of a lone surrogate": Bad("", "not a valid file name", more=("--output", "a\ud800.mp4")),
    "output: somebody's home": Bad("--output ~nobody-of-this-name/clip.mp4", "error"),
    "output: its job exists": Bad("--output stopped.mp4", "resume it", made=True, prepare=lambda here: (here / "stopped.part.mp4").unlink(missing_ok=True)),
    "motion: missing": Bad("--motion gone.mp4", "no such video"),
    "motion: a text": Bad("--motion bad.mp4", "not a readable video", prepare=file("bad.mp4", "text")),
    "motion: sound alone": Bad("--motion sound.mp4", "holds no video", prepare=sound),
    "motion: a photo": Bad("--motion photo.png", "photo.png"),
    "motion: a playlist": Bad("--motion bad.mp4", "not a readable video", prepare=file("bad.mp4", "#EXTM3U\nphoto.png\n")),
    "motion: cut off": Bad("--no-num-frames --motion said.mp4", "error", made=True, prepare=both(clip_saying(""), cut("said.mp4", 0.6))),
    "motion: too short for the clip": Bad("--motion clip.mp4 --num-frames 33", "17 frames, 33 are asked for", made=True),
    "motion: and preview": Bad("--motion clip.mp4 --preview", "give one of them", made=True),
    "resume: missing": Bad("resume gone.job", "does not exist"),
    "resume: no argument": Bad("resume", "JOB"),
    "resume: a file": Bad("resume photo.png", "does not exist"),
    "resume: not a job": Bad("resume weights", "is not a job"),
    "resume: manifest cut off": Bad("resume stopped.job", "is damaged", prepare=cut("stopped.job/manifest.json"), made=True),
    "resume: manifest is a list": Bad("resume stopped.job", "not a JSON object", prepare=file("stopped.job/manifest.json", "[]"), made=True),
    "resume: manifest is bytes": Bad("resume stopped.job", "is damaged", prepare=file("stopped.job/manifest.json", b"\xff\0"), made=True),
    "resume: unknown field": Bad("resume stopped.job", "colour", prepare=record("stopped.job/manifest.json", colour="red"), made=True),
    "resume: newer version": Bad("resume stopped.job", "update it", prepare=record("stopped.job/manifest.json", schema_version=99), made=True),
    "resume: impossible request": Bad("resume stopped.job", "num_frames", prepare=record("stopped.job/manifest.json", request__num_frames=-1), made=True),
    "resume: off the grid": Bad("resume stopped.job", "num_frames 18", prepare=both(record("stopped.job/manifest.json", request__num_frames=18), no_latents), made=True),
    "resume: unknown preset": Bad("resume stopped.job", "known presets", prepare=both(record("stopped.job/manifest.json", request__preset="huge"), no_latents), made=True),
    "resume: changed photo": Bad("resume stopped.job", "not the photo", prepare=flipped("stopped.job/photo.safetensors"), made=True),
    "resume: no photo": Bad("resume stopped.job", "lost its photo", prepare=lambda here: (here / "stopped.job/photo.safetensors").unlink(), made=True),
    "resume: segments of another job": Bad("resume stopped.job", "another request", prepare=record("stopped.job/manifest.json", request__seed=8), made=True),
    "resume: weights gone": Bad("resume stopped.job", "no weights", prepare=lambda here: shutil.rmtree(here / "weights"), made=True),
    "resume: other weights": Bad("resume stopped.job --quiet", "use --force", prepare=tensors(TWO, lambda held: held["proj_out.weight"].mul_(2)), made=True),
    "resume: another kernel": Bad("resume stopped.job --quiet", "has one kernel", prepare=record("stopped.job/manifest.json", settings__attention="sage"), made=True),
    "resume: an arrangement of another version": Bad("resume stopped.job --quiet", "cannot be read", prepare=record("stopped.job/manifest.json", inputs__arrangement="{}"), made=True),
    "resume: another quantization": Bad("resume stopped.job --quiet", "use int8", prepare=record("stopped.job/manifest.json", settings__quantize="int1"), made=True),
    "resume: model not there": Bad("resume stopped.job --model gone", "no weights", made=True),
    "info: missing": Bad("info gone.mp4", "no such video"),
    "info: a photo": Bad("info photo.png", "photo.png"),
    "info: a text": Bad("info bad.mp4", "not a readable video", prepare=file("bad.mp4", "text")),
    "info: cut off": Bad("info clip.mp4", "clip.mp4", made=True, prepare=cut("clip.mp4", 0.02)),
    "info: says nothing": Bad("info said.mp4", "no swifti2v metadata", prepare=clip_saying("holiday")),
    "info: says other JSON": Bad("info said.mp4", "no swifti2v metadata", prepare=clip_saying("[1, 2]")),
    "rerun: missing": Bad("rerun gone.mp4", "no such video"),
    "rerun: says nothing": Bad("rerun said.mp4", "no swifti2v metadata", prepare=clip_saying("holiday")),
    "rerun: incomplete record": Bad("rerun said.mp4", "cannot be used", prepare=clip_saying('{"swifti2v": {"request": {}}}')),
    "rerun: unknown preset": Bad("rerun said.mp4", "known presets", made=True, prepare=clip_of_request(preset="huge")),
    "rerun: off the grid": Bad("rerun said.mp4 --model weights", "size 130x64", made=True, prepare=clip_of_request(width=130)),
    "rerun: unknown codec": Bad("rerun said.mp4 --model weights", "mpeg1", made=True, prepare=clip_of_request(write={"codec": "mpeg1"})),
    "rerun: made with a LoRA": Bad("rerun said.mp4", "LoRA", made=True, prepare=clip_of_request(loras=["x"])),
    "rerun: no photo": Bad("rerun clip.mp4 --model weights", "give it with --image", made=True, prepare=lambda here: (here / "photo.png").unlink()),
    "rerun: another photo": Bad("rerun clip.mp4 --image other.png --model weights", "is not the photo", made=True, prepare=picture("other.png")),
    "rerun: no weights": Bad("rerun clip.mp4 --model gone", "no weights", made=True),
}  # fmt: skip
CORPUS = {**PHOTOS, **NUMBERS, **WEIGHTS, **FILES}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo, weights, a finished clip, and a job that a preview left to be resumed."""
    here = tmp_path_factory.mktemp("originals")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(here / "photo.png")
    tiny_pipeline("nano").save_pretrained(here / "weights")
    before = Path.cwd()
    os.chdir(here)
    try:
        for more in ("--output clip.mp4", "--output stopped.mp4 --preview"):
            assert CliRunner().invoke(cli.app, Bad(more, "").arguments()).exit_code == 0
    finally:
        os.chdir(before)
    return here


def furnish(here: Path, originals: Path, bad: Bad) -> None:
    """A folder of its own for one case: files that a case changes are copies, the others links to save time."""
    shutil.copy(originals / "photo.png", here)
    shutil.copytree(originals / "weights", here / "weights")
    if bad.made:
        shutil.copy(originals / "clip.mp4", here)
        shutil.copytree(originals / "stopped.job", here / "stopped.job")
        for manifest in (here / "stopped.job/manifest.json",):
            moved = manifest.read_text().replace(str(originals), str(here))
            manifest.write_text(moved)
    if bad.prepare is not None:
        bad.prepare(here)


def contents(folder: Path) -> dict[str, str]:
    """Every name below the folder, and what the regular files hold."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(code: int, errors: str, bad: Bad) -> None:
    assert "Traceback" not in errors, errors
    assert code == bad.code, (code, errors)
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    assert bad.says.removeprefix("error") in lines[0], lines[0]
    assert len(lines[0]) < 1000, lines[0]


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 150 and len({bad.code for bad in CORPUS.values()}) == 2


@pytest.mark.parametrize("name", CORPUS)
def test_one_line_and_nothing_left(
    name: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = CORPUS[name]
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, originals, bad)
    before = contents(tmp_path)
    capfd.readouterr()
    result = CliRunner().invoke(cli.app, bad.arguments(), catch_exceptions=False)
    assert capfd.readouterr() == ("", "")  # libraries in C write past Python's own streams
    assert_one_line(result.exit_code, result.stderr, bad)
    assert result.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["photo: PNG cut off", "size: zero", "motion: cut off", "resume: changed photo", "model: weights cut off"],
)
def test_as_real_processes(name: str, originals: Path, tmp_path: Path) -> None:
    bad = CORPUS[name]
    furnish(tmp_path, originals, bad)
    before = contents(tmp_path)
    command = [sys.executable, "-m", "swifti2v", *bad.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert_one_line(done.returncode, done.stderr, bad)
    assert done.stdout == "" and contents(tmp_path) == before


def test_a_locked_job_is_refused(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Bad("resume stopped.job", "in use", made=True)
    furnish(tmp_path, originals, bad)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with Job.open("stopped.job"):
        result = CliRunner().invoke(cli.app, bad.arguments())
    assert_one_line(result.exit_code, result.stderr, bad)
    assert contents(tmp_path) == before


def test_a_refused_model_does_not_stick(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``resume --model WRONG`` fails and the job is as before: ``resume`` alone still works."""
    furnish(tmp_path, originals, Bad("", "", made=True))
    monkeypatch.chdir(tmp_path)
    shutil.copytree("weights", "other")
    tensors("other/transformer/diffusion_pytorch_model.safetensors", lambda held: held["proj_out.weight"].mul_(2))(
        tmp_path
    )
    for wrong in ("gone", "photo.png", "other"):
        refused = CliRunner().invoke(cli.app, ["resume", "stopped.job", "--quiet", "--model", wrong])
        assert refused.exit_code == 2, refused.stderr
    done = CliRunner().invoke(cli.app, ["resume", "stopped.job", "--quiet"])
    assert done.exit_code == 0, done.stderr


def test_shipped_weights_with_a_changed_byte(tmp_path: Path) -> None:
    """In a copy of the package, so that the real weights are left alone."""
    package = Path(cli.__file__).parent
    skip = shutil.ignore_patterns("__pycache__", "train", "diffusion_pytorch_model.safetensors")
    shutil.copytree(package, tmp_path / "swifti2v", ignore=skip)
    script = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from swifti2v import cli\n"
        "from typer.testing import CliRunner\n"
        "def verify(*more): r = CliRunner().invoke(cli.app, ['models', 'verify', *more]); print(r.exit_code, r.stderr)\n"
        "verify('--write'); verify()\n"
        "file = 'swifti2v/nano/text_encoder/model.safetensors'\n"
        "data = bytearray(open(file, 'rb').read()); data[-1] ^= 1; open(file, 'wb').write(data); verify()\n"
        "open('swifti2v/nano/manifest.json', 'w').write('{'); verify()\n"
        "os.remove('swifti2v/nano/model_index.json'); verify()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[:2] == ["0 ", "0 "], done
    for line, says in zip(lines[2:], ("model.safetensors: SHA-256", "missing or damaged", "no weights"), strict=True):
        assert line.startswith("2 error: ") and says in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 600 KB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_read_only_and_full_disks(small_disk: Path, originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(originals)
    line = f"--output {small_disk}/clip.mp4"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = Bad(line, "cannot write")
    result = CliRunner().invoke(cli.app, refused.arguments())
    assert_one_line(result.exit_code, result.stderr, refused)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)

    (small_disk / "ballast").write_bytes(b"\0" * 590_000)
    refused = Bad(line, "MiB free")
    result = CliRunner().invoke(cli.app, refused.arguments())
    assert_one_line(result.exit_code, result.stderr, refused)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_disk_that_fills_while_running(small_disk: Path, originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment: one line, and either nothing is left or a job that gives the same video once there is room."""
    from swifti2v import order, produce
    from swifti2v.core import Event, RunError

    monkeypatch.chdir(originals)
    options = cli.Options(
        **{**{k.replace("-", "_"): v for k, v in GOOD.items()}, "num_frames": 17, "seed": 7},
        output=f"{small_disk}/c.mp4",
    )
    expected = torch.cat(list(media.read_video("clip.mp4")), dim=2)
    ballast, resumed = small_disk / "ballast", 0
    for moment in range(1, 16, 2):
        seen = 0

        def fill(event: Event, moment: int = moment) -> None:
            nonlocal seen
            seen += 1
            if seen == moment:
                with open(ballast, "wb", buffering=0) as stream:
                    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                    stream.write(b"\0" * room)

        try:
            produce.start(order.prepare(options), fill)
        except RunError as error:
            assert "\n" not in str(error)
        ballast.unlink(missing_ok=True)
        if (small_disk / "c.job").exists():
            result = CliRunner().invoke(cli.app, ["resume", str(small_disk / "c.job"), "--quiet"])
            assert result.exit_code == 0, result.stderr
            resumed += 1
        else:
            assert list(small_disk.iterdir()) in ([], [small_disk / "c.mp4"])
        if (small_disk / "c.mp4").exists():
            assert torch.equal(torch.cat(list(media.read_video(small_disk / "c.mp4")), dim=2), expected)
            (small_disk / "c.mp4").unlink()
        assert list(small_disk.iterdir()) == []
    assert resumed >= 2
