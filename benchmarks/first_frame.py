"""How close is frame 0 of the written file to the photo?

    python scripts/fetch_photos.py                       # once: the held-out photos
    python benchmarks/first_frame.py --record            # 10 photos at 2560x1408
    python benchmarks/first_frame.py --tiny              # one made-up photo at toy size

Every photo goes through the real command line (5 frames, the fewest; default H.264). Frame 0 is read back from the
file as RGB and compared with the fitted photo: PSNR over all pixels and channels. Wanted: 34 dB in the mean. The
photos are the held-out ones, those with the most pixels first: enlarged small photos would flatter the result.
Frame 0 does not depend on the denoising steps; one a stage is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

WANTED_DB = 34.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", default="2560x1408")
    parser.add_argument("--photos", type=int, default=10, help="how many")
    parser.add_argument("--data", type=Path, default=common.REPOSITORY / "data", help="where fetch_photos.py put them")
    asked = common.parsed(parser, arguments)
    asked.steps = asked.steps_2 = 1
    if asked.tiny:
        asked.size, asked.photos = "128x64", 1
    record = common.Record("PSNR of frame 0 in the file against the fitted photo", asked, __file__)
    rows, command = [], ""
    with common.workplace(asked) as (folder, model), tempfile.TemporaryDirectory() as made:
        for photo in [made_up(Path(made))] if asked.tiny else held_out(asked.data, asked.photos):
            told = ["--image", str(photo.resolve()), *common.clip_arguments(asked, model, asked.size, 5)]
            command = command or common.shown(told)
            rows.append({"photo": photo.name, **compared(folder, told, photo, asked)})
            print(rows[-1], flush=True)
    values = [row["psnr_db"] for row in rows]
    settings = {"size": asked.size, "photos": len(rows), "first_command": command}
    results = {"mean_db": round(sum(values) / len(values), 2), "worst_db": min(values), "photos": rows}
    record.finish(settings, {**results, "met": results["mean_db"] >= WANTED_DB})


def held_out(data: Path, count: int) -> list[Path]:
    """The held-out photos with the most pixels."""
    listed = data / "photos.jsonl"
    if not listed.is_file():
        raise SystemExit("there are no photos yet: python scripts/fetch_photos.py")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "held_out"]
    rows.sort(key=lambda row: (-row["width"] * row["height"], row["path"]))
    return [data / row["path"] for row in rows[:count]]


def made_up(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 15, 3), dtype=np.uint8)
    path = folder / "noise.png"
    Image.fromarray(pixels).resize((300, 180), Image.Resampling.BICUBIC).save(path)
    return path


def compared(folder: Path, told: Sequence[str], photo: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Make the clip, then the PSNR of its first frame in dB."""
    run = common.generate(folder, told)
    # Imported after the first run, so that this process is small while a child starts; see common.
    import torch

    from swifti2v.core import Size
    from swifti2v.media import read_image, read_video
    from swifti2v.reference import fit_image

    frame = next(read_video(run.output))
    fitted = fit_image(read_image(photo).pixels, Size.parse(asked.size))
    run.output.unlink()
    error = float(torch.mean((frame.double() - fitted.double()) ** 2))
    return {"psnr_db": round(10 * math.log10(4 / error), 2), "seconds": round(run.seconds, 1)}


if __name__ == "__main__":
    main()
