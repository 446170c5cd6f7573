"""Make a clip of a photo with an exported bundle. Needs onnxruntime, numpy and pillow; not torch, not swifti2v.

    python run.py photo.jpg clip.webp            # or clip.gif, or clip (a folder of PNG)
    python run.py photo.jpg clip.gif --seed 7 --motion-score 4

This file is copied beside the graphs as run.py; all it knows of them is manifest.json. One graph is in memory at a
time. The video is the one that swifti2v makes with torch, to rounding: noise is drawn as there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

LOG = logging.getLogger("swifti2v.runner")


class Bundle:
    """A folder of graphs: its ``manifest``, ``layout`` of the denoiser, ``threads`` of ONNX Runtime (0: its own)."""

    kind = "onnx"

    def __init__(self, folder: Path, layout: str | None = None, threads: int = 0) -> None:
        self.folder, self.threads = folder, threads
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        if self.manifest["schema_version"] != 1:
            raise SystemExit(f"{folder}: schema {self.manifest['schema_version']} is not 1; use its own run.py")
        self.layout = layout or self.manifest["layout_for"]["onnxruntime-cpu"]

    def session(self, role: str, **wanted: Any) -> Callable[..., list[np.ndarray]]:
        """The graph of ``role`` as a function of tensors by position."""
        graphs = [
            graph
            for graph in self.manifest["graphs"]
            if graph["format"] == self.kind and graph["role"] == role and all(graph[k] == v for k, v in wanted.items())
        ]
        if len(graphs) != 1:
            raise SystemExit(f"{self.folder}: {len(graphs)} {self.kind} graphs for {role} {wanted}, not one")
        return self.opened(graphs[0])

    def opened(self, graph: dict[str, Any]) -> Callable[..., list[np.ndarray]]:
        """``graph`` as a function of tensors by position."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        path = str(self.folder / graph["file"])
        made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names, taken = [tensor["name"] for tensor in graph["inputs"]], {value.name for value in made.get_inputs()}

        def call(*tensors: np.ndarray) -> list[np.ndarray]:
            given = zip(names, tensors, strict=True)
            return made.run(None, {name: np.ascontiguousarray(x) for name, x in given if name in taken})

        return call


def read_photo(path: Path, width: int, height: int) -> np.ndarray:
    """(1, 3, height, width) float32 in [-1, 1]: upright, on white, cut to the aspect at the center, bicubic.

    Color profiles are not converted (swifti2v does): give an sRGB photo.
    """
    image: Image.Image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    h, w = pixels.shape[:2]
    kept_w, kept_h = _side(h * width / height, w), _side(w * height / width, h)
    top, left = (h - kept_h) // 2, (w - kept_w) // 2
    pixels = pixels[top : top + kept_h, left : left + kept_w]
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    return np.clip(np.stack(resized)[None] / 127.5 - 1, -1, 1).astype(np.float32)


def _side(ideal: float, limit: int) -> int:
    return min(limit, max(1, round(ideal)))


def block_noise(shape: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    """swifti2v.noise.block_noise in numpy: torch's CPU generator, a Mersenne twister whose 24-bit uniforms become
    normal by Box and Muller, sixteen at a time. Equal to rounding of float32."""
    key = f"swifti2v/stage_two/{seed}/0/{block}/0".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    count = int(np.prod(shape))
    if count < 16:
        raise SystemExit(f"noise of {count} numbers is drawn by another rule; give a larger size")
    rest = count % 16
    twister = np.random.RandomState(number & 0xFFFFFFFF)
    words = twister.randint(0, 2**32, size=count + (16 if rest else 0), dtype=np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    values = _box_muller(uniform[: count - rest])
    if rest:  # torch draws the last sixteen anew, over the end of what it has
        values = np.concatenate([values, np.empty(rest, np.float32)])
        values[-16:] = _box_muller(uniform[count:])
    return values.reshape(shape)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(-2 * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def generate(bundle: Bundle, photo: np.ndarray, seed: int, motion_score: float | None = None) -> Iterator[np.ndarray]:
    """Frames (height, width, 3) uint8 of the clip whose first frame is ``photo`` (1, 3, height, width) in [-1, 1]."""
    encoded = bundle.session("encoder")(photo)
    score = bundle.manifest["motion_score"] if motion_score is None else motion_score
    blocks = denoise(bundle, encoded, seed, score)
    for chunk in decode(bundle, blocks, photo, score):
        yield from np.rint((chunk[0] + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)


def denoise(bundle: Bundle, encoded: list[np.ndarray], seed: int, score: float) -> list[np.ndarray]:
    """All latent blocks (1, c, 1, h, w), window by window, by Euler steps down the manifest's levels.

    ``encoded``: the anchor, which is block 0, and the reference if the network has one, for every block the same.
    """
    anchor, *reference = encoded
    levels, blocks = bundle.manifest["levels"], {0: anchor}
    for number, window in enumerate(bundle.manifest["windows"]):
        velocity = bundle.session("denoiser", window=number, layout=bundle.layout)
        context = [blocks[k] for k in window["context"]]
        shape = anchor.shape[1:2] + anchor.shape[3:]
        x = np.stack([block_noise(shape, seed, k) for k in window["segment"]], axis=1)[None]
        extra = [np.repeat(y, len(context) + x.shape[2], axis=2) for y in reference]
        for step, (sigma, following) in enumerate(pairwise(levels), start=1):
            latents = np.concatenate([*context, x], axis=2)
            told = [np.array([value], np.float32) for value in (sigma, score)]
            x = x + np.float32(following - sigma) * velocity(latents, *told, *extra)[0]
            LOG.info("window %d of %d, step %d", number + 1, len(bundle.manifest["windows"]), step)
        blocks |= {k: x[:, :, i : i + 1] for i, k in enumerate(window["segment"])}
    return [blocks[k] for k in sorted(blocks)]


def decode(bundle: Bundle, blocks: list[np.ndarray], photo: np.ndarray, score: float) -> Iterator[np.ndarray]:
    """Pixels (1, 3, t, height, width) in [-1, 1]: the whole clip, or the photo and, block by block, the photo moved."""
    decoder, reach = bundle.session("decoder"), bundle.manifest["reach"]
    if reach is None:
        yield decoder(np.concatenate(blocks, axis=2))[0]
        return
    yield photo[:, :, None]
    _, _, _, h, w = blocks[0].shape
    field = np.zeros((1, 2, 2 * h, 2 * w), np.float32)
    for number, block in enumerate(blocks[1:], start=1):
        frames, field = decoder(photo, block, field, np.array([reach * score * number], np.float32))
        yield frames
        LOG.info("block %d of %d", number, len(blocks) - 1)


def save(frames: list[np.ndarray], target: Path, fps: float) -> None:
    """A .webp or .gif animation, or, for a name without extension, a folder of PNG; whole or absent."""
    pictures = [Image.fromarray(frame) for frame in frames]
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    if target.exists():
        raise SystemExit(f"{target} exists and is not overwritten")
    if target.suffix.lower() not in ("", ".gif", ".webp"):
        raise SystemExit(f"{target}: give .webp, .gif, or no extension for a folder of PNG")
    try:
        if not target.suffix:
            part.mkdir()
            for number, picture in enumerate(pictures):
                picture.save(part / f"{number:06d}.png", compress_level=3)
        else:
            options: dict[str, Any] = {"lossless": True} if target.suffix.lower() == ".webp" else {}
            more, milliseconds = pictures[1:], round(1000 / fps)
            pictures[0].save(part, save_all=True, append_images=more, duration=milliseconds, loop=0, **options)
        os.replace(part, target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("output", type=Path, help="a .webp or .gif file, or a folder for PNG")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: where this is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--motion-score", type=float, help="mean optical flow to ask for (default: the manifest's)")
    parser.add_argument("--layout", choices=("reference", "channels-first"), help="default: the manifest's for a CPU")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: as many as it likes")
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.motion_score is not None and not 0 <= asked.motion_score <= 100:
        parser.error(f"--motion-score {asked.motion_score:g} is not between 0 and 100")
    logging.basicConfig(level=logging.WARNING if asked.quiet else logging.INFO, format="%(message)s")
    bundle = Bundle(asked.bundle, asked.layout, asked.threads)
    photo = read_photo(asked.photo, bundle.manifest["width"], bundle.manifest["height"])
    save(list(generate(bundle, photo, asked.seed, asked.motion_score)), asked.output, bundle.manifest["fps"])
    LOG.info("%s", asked.output)


if __name__ == "__main__":
    main()
