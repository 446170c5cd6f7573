"""Turn a video into the small animated picture of the README.

python scripts/make_picture.py demo.mp4 docs/assets/nano.webp --width 720 --frames 27
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--frames", type=int, default=27)
    parser.add_argument("--quality", type=int, default=70)
    asked = parser.parse_args()
    with av.open(str(asked.video)) as container:
        stream = container.streams.video[0]
        total, rate = stream.frames, float(stream.average_rate or 15)
        kept = {round(index * (total - 1) / (asked.frames - 1)) for index in range(asked.frames)}
        frames = enumerate(container.decode(stream))
        pictures = [small(frame.to_image(), asked.width) for k, frame in frames if k in kept]
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    milliseconds = round(1000 * total / rate / len(pictures))
    pictures[0].save(
        asked.picture,
        save_all=True,
        append_images=pictures[1:],
        duration=milliseconds,
        loop=0,
        quality=asked.quality,
        method=6,
    )
    print(f"{asked.picture}: {len(pictures)} frames, {asked.picture.stat().st_size / 1000:.0f} kB")


def small(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
