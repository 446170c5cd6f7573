"""Still pictures in and out: any photo to plain sRGB bytes, and clips as folders of PNG files.

Knows EXIF, ICC profiles, alpha and bit depths so that nothing after it has to. With ``media`` the only user of PIL.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from .core import RunError, Size, UsageError
from .outputs import check_writable, part_path, sync_folder

MAX_PIXELS = 178_956_970  # Pillow's own bomb limit, checked on the header before anything is decoded
MAX_BYTES = 2**30
MIN_SIDE = 16
MAX_ASPECT = 8
# Named, so that no other decoder is reached: EPS alone would start Ghostscript. JPEG opens MPO by itself.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "JPEG2000", "PPM", "TGA", "ICO")
_HINT = "give a JPEG, PNG, WebP, TIFF or AVIF photo"
# What Pillow's decoders raise on damaged files; found by fuzzing, hence the odd ones.
_DAMAGE = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error, EOFError,
    ArithmeticError, RuntimeError, AttributeError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo as the model sees it: upright, opaque, sRGB.

    ``pixels``: uint8 (3, h, w). ``sha256``: of the file's bytes, or of the pixels if there was no file.
    ``notes``: what was converted on the way, for the user's eyes.
    """

    pixels: Tensor
    sha256: str
    size: Size
    notes: tuple[str, ...] = ()


def check_file(path: str | Path, kind: str) -> Path:
    """The absolute path of a readable, non-empty, regular file, or a ``UsageError`` of one line."""
    text = str(path)
    shown = ascii(text) if not text.isprintable() else text
    shown = shown if len(shown) <= 160 else f"{shown[:60]}...{shown[-60:]}"
    try:
        checked = Path(path).expanduser().absolute()
        status = checked.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{shown}: is a folder; give one {kind} file")
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{shown}: is a device or pipe; give one {kind} file")
        with open(checked, "rb"):
            pass
    except FileNotFoundError:
        raise UsageError(f"{shown}: no such {kind} file") from None
    except PermissionError:
        raise UsageError(f"{shown}: no permission to read it") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{shown}: cannot be read ({reason})") from None
    if status.st_size == 0:
        raise UsageError(f"{shown}: is empty")
    return checked


def read_image(source: str | Path | bytes | Image.Image) -> Photo:
    """Read a photo: a path, the bytes of a file, or a PIL image. Whatever cannot be used is a ``UsageError``.

    EXIF orientation is applied, ICC profiles are converted to sRGB (relative colorimetric), transparency is
    laid on white, deeper than 8 bits is rounded, of an animation the first frame is taken.
    """
    if isinstance(source, Image.Image):
        pixels, notes = _decode(source.copy(), "the image", b"")
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return _photo(pixels, digest, notes)
    if isinstance(source, bytes):
        data, name = source, "the image"
    elif isinstance(source, str | Path):
        path = check_file(source, "image")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{source}: is larger than {MAX_BYTES >> 30} GiB; {_HINT}")
        data, name = path.read_bytes(), str(source)
    else:
        raise UsageError(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")
    if not data:
        raise UsageError(f"{name}: is empty")
    pixels, notes = _decode(_open(data, name), name, data)
    return _photo(pixels, hashlib.sha256(data).hexdigest(), notes)


def write_png_sequence(folder: str | Path, chunks: Iterable[Tensor]) -> int:
    """Write chunks, (1, 3, t, h, w) in [-1, 1], as ``folder/000000.png`` and on; returns the number of frames.

    The folder is whole or absent: it is made as ``NAME.part`` and renamed; on an error the part is removed.
    """
    folder = Path(folder)
    check_writable(folder)
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists and is not overwritten; choose another name")
    part = part_path(folder)
    part.mkdir(exist_ok=True)
    if any(part.iterdir()):
        raise UsageError(f"{part} is in use or left over; remove it or choose another name")
    try:
        count = _write_pngs(part, chunks)
        if count == 0:
            raise RunError(f"{folder}: there were no frames to write")
        if os.path.lexists(folder):
            raise RunError(f"{folder} appeared while it was being made and is not overwritten")
        part.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    return count


def _write_pngs(part: Path, chunks: Iterable[Tensor]) -> int:
    count = 0
    for chunk in chunks:
        for frame in chunk[0].detach().to("cpu", torch.float32).unbind(1):
            if not bool(torch.isfinite(frame).all()):
                raise RunError(f"frame {count} holds NaN; the model or its dtype is broken (doctor checks both)")
            pixels = frame.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            picture.save(part / f"{count:06d}.png", compress_level=3)
            count += 1
    return count


def _photo(pixels: np.ndarray, digest: str, notes: list[str]) -> Photo:
    height, width = pixels.shape[:2]
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    return Photo(tensor, digest, Size(width, height), tuple(notes))


def _open(data: bytes, name: str) -> Image.Image:
    """Only the header is read here."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"heis", b"hevc"):
        raise UsageError(f"{name}: HEIC is not supported; export the photo as JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise UsageError(f"{name}: is not an image that can be read; {_HINT}") from None
    except Image.DecompressionBombError:
        raise UsageError(f"{name}: is over {MAX_PIXELS // 10**6} megapixels; shrink it first") from None
    except _DAMAGE as error:
        raise UsageError(f"{name}: is a damaged image ({_line(error)}); {_HINT}") from None


def _decode(image: Image.Image, name: str, data: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels uint8 (h, w, 3) and notes."""
    _check_shape(image, name)
    notes: list[str] = []
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("animated or multi-page: only the first frame is used")
    if image.format == "PNG" and data[24:25] == b"\x10" and image.mode not in ("I;16", "I"):
        notes.append("16 bits a channel reduced to 8")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            image = _upright(image, notes)
            image = _eight_bits(image, name, notes)
            image = _opaque(_srgb(image, notes), name, notes)
            return np.asarray(image), notes
    except UsageError:
        raise
    except _DAMAGE as error:
        raise UsageError(f"{name}: is truncated or damaged ({_line(error)}); {_HINT}") from None


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UsageError(f"{name}: {width}x{height} is over {MAX_PIXELS // 10**6} megapixels; shrink it first")
    if min(width, height) < MIN_SIDE:
        raise UsageError(f"{name}: {width}x{height} is too small; at least {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(f"{name}: {width}x{height} is too long; crop it to at most {MAX_ASPECT}:1")


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation not in range(2, 9):
            return image
        turned = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        notes.append(f"EXIF unreadable ({_line(error)}), orientation ignored")
        return image
    notes.append(f"turned upright (EXIF orientation {orientation})")
    turned.info = {**image.info, **turned.info}
    return turned


def _eight_bits(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Deep gray modes to L; the other modes are 8 bits already."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UsageError(f"{name}: holds NaN or infinite values; export it as an ordinary picture")
    top = float(values.max())
    if values.min() < 0 or top > 65535:
        raise UsageError(f"{name}: has values outside 0 to 65535; export it as an ordinary picture")
    # Integers are 16-bit by their mode; floats say their scale only by their values.
    white = 65535.0 if image.mode != "F" or top > 255 else 255.0 if top > 1 else 1.0
    gray = Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))
    if "icc_profile" in image.info:
        gray.info["icc_profile"] = image.info["icc_profile"]
    notes.append(f"{'floating-point' if image.mode == 'F' else '16-bit'} gray reduced to 8 bits")
    return gray


def _srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """RGB or RGBA in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode in ("P", "PA", "1", "La", "RGBa") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    converted = _convert_profile(image, profile, notes) if profile else None
    if converted is None:
        if image.mode not in ("RGB", "L"):
            notes.append(f"{image.mode} converted to RGB without a profile; colors are approximate")
        converted = image.convert("RGB")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _convert_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    """``image`` in sRGB, or None if the profile cannot be applied to it."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(source).strip()
        if image.mode == "RGB" and description.lower().startswith("srgb"):
            return image
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notes.append(f"color profile unusable ({_line(error)}), taken for sRGB")
        return None
    notes.append(f"colors converted to sRGB from {description or 'an unnamed profile'}")
    return converted


def _opaque(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    if image.mode != "RGBA":
        return image
    lowest, highest = image.getchannel("A").getextrema()
    if highest == 0:
        raise UsageError(f"{name}: is entirely transparent; give a photo that shows something")
    if lowest == 255:
        return image.convert("RGB")
    notes.append("transparency laid on white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _line(error: BaseException) -> str:
    """One line, of bounded length, of whatever a library had to say."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
