"""Photos of every kind come in as upright opaque sRGB; whatever cannot is refused in one line."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from swifti2v.core import RunError, Size, UsageError
from swifti2v.images import MAX_PIXELS, read_image, write_png_sequence

RNG = np.random.default_rng(0)


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    x = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0)
    y = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    return Image.fromarray(np.stack((x, y, 255 - x), -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(data: object) -> np.ndarray:
    return read_image(data).pixels.permute(1, 2, 0).numpy()  # type: ignore[arg-type]


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    def block(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(rows)) + block(b"IEND", b"")


def wide_gamut() -> bytes:
    """A minimal matrix profile: sRGB's curve approximated by gamma 2.2, red and green primaries of DCI-P3 (D50)."""

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"Wide\0" + bytes(78)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"desc": text + bytes(-len(text) % 4),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + s15(0.9642) + s15(1.0) + s15(0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def test_plain_png_is_exact_and_hashed(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "photo ü.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes()):
        photo = read_image(source)
        assert photo.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert photo.size == Size(48, 32) and photo.notes == () and photo.pixels.dtype == torch.uint8
        assert np.array_equal(photo.pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_pil_image_is_taken_and_not_changed() -> None:
    image = picture("RGBA")
    before = image.tobytes()
    one, two = read_image(image), read_image(picture("RGB"))
    assert one.sha256 == two.sha256 != read_image(picture(size=(32, 48))).sha256
    assert image.tobytes() == before and image.mode == "RGBA"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = np.asarray(picture())
    # What a camera held that way stores, by the definition of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    photo = read_image(data)
    assert photo.size == Size(48, 32)
    assert np.abs(photo.pixels.permute(1, 2, 0).numpy().astype(int) - upright).max() <= 6
    assert any("EXIF" in note for note in photo.notes) == (orientation != 1)


def test_orientation_survives_palette_profile_and_alpha() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture("RGBA"), exif=exif, icc_profile=wide_gamut())
    photo = read_image(data)
    assert photo.size == Size(32, 48) and len(photo.notes) == 2


def test_broken_exif_is_ignored() -> None:
    assert read_image(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).size == Size(48, 32)
    assert read_image(encoded(picture(), "JPEG", exif=b"Exif\0\0garbage")).size == Size(48, 32)


def test_wide_gamut_profile_is_converted() -> None:
    data = encoded(Image.new("RGB", (32, 32), (200, 120, 60)), icc_profile=wide_gamut())
    photo = read_image(data)
    # The profile's own matrix to XYZ, sRGB's (D50) back, and the sRGB curve.
    wide = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
    linear = np.linalg.solve(srgb, wide @ (np.array([200, 120, 60]) / 255) ** 2.2)
    expected = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    assert np.abs(photo.pixels[:, 16, 16].numpy() - expected).max() <= 2 and expected[0] > 210
    assert photo.notes == ("colors converted to sRGB from Wide",)


def test_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = read_image(encoded(picture(), icc_profile=profile))
    assert np.array_equal(photo.pixels.permute(1, 2, 0).numpy(), np.asarray(picture())) and photo.notes == ()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_unusable_profile_is_noted(mode: str) -> None:
    profile = wide_gamut() if mode != "RGB" else b"not a profile at all"
    kind = "TIFF" if mode == "CMYK" else "PNG"
    photo = read_image(encoded(picture(mode), kind, icc_profile=profile))
    assert photo.notes[0].startswith("color profile unusable")


def test_cmyk_without_profile() -> None:
    for kind in ("JPEG", "TIFF"):
        photo = read_image(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), kind))
        red, green, blue = photo.pixels[:, 8, 8].tolist()
        assert red > 245 and green < 12 and blue < 12 and "CMYK" in photo.notes[0]


def test_alpha_is_laid_on_white() -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    image.paste((0, 0, 0, 128), (0, 0, 8, 8))
    pixels = array(encoded(image))
    assert pixels[20, 4].tolist() == [255, 255, 255] and pixels[20, 20].tolist() == [255, 0, 0]
    assert abs(int(pixels[2, 2, 0]) - 127) <= 1
    assert "white" in read_image(encoded(image)).notes[0]
    assert read_image(encoded(Image.new("RGBA", (32, 32), "red"))).notes == ()


def test_gray_palette_bilevel_and_transparent_palette() -> None:
    assert np.array_equal(array(encoded(picture("L")))[..., 1], np.asarray(picture("L")))
    assert array(encoded(picture("P"))).shape == (32, 48, 3)
    assert set(np.unique(array(encoded(picture("1"))))) == {0, 255}
    gray_alpha = Image.merge("LA", (picture("L"), Image.new("L", (48, 32), 0)))
    gray_alpha.putpixel((0, 0), (0, 255))
    assert array(encoded(gray_alpha))[0, 0].tolist() == [0, 0, 0] and array(encoded(gray_alpha))[9, 9].min() == 255
    indexed = Image.new("P", (32, 32), 1)
    indexed.putpalette([0, 0, 0, 0, 0, 255])
    indexed.paste(0, (0, 0, 16, 16))
    pixels = array(encoded(indexed, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[20, 20].tolist() == [0, 0, 255]


def test_sixteen_bits_are_rounded() -> None:
    values = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    expected = np.round(values / 257)
    photo = read_image(encoded(Image.fromarray(values)))
    assert np.abs(photo.pixels[0].numpy() - expected).max() == 0 and "16-bit" in photo.notes[0]
    assert np.abs(array(encoded(Image.fromarray(values), "TIFF"))[..., 0] - expected).max() == 0
    rgb = np.stack((values, values[::-1], values), -1).astype(">u2")
    data = png(48, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in rgb))
    assert np.abs(array(data)[..., 0] - expected).max() <= 1 and "16 bits" in read_image(data).notes[0]


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_tiff(white: float) -> None:
    values = np.linspace(0, white, 48 * 32, dtype=np.float32).reshape(32, 48)
    assert np.abs(array(encoded(Image.fromarray(values), "TIFF"))[..., 0] - values * (255 / white)).max() <= 0.51


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    photo = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert photo.pixels[:, 5, 5].tolist() == [255, 0, 0] and "first frame" in photo.notes[0]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF"])
def test_formats(kind: str) -> None:
    assert np.abs(array(encoded(picture(), kind)).astype(int) - np.asarray(picture())).mean() < 12


BAD_BYTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello, this is not an image\n" * 9,
    "zeros": lambda: bytes(4096),
    "random": lambda: RNG.bytes(4096),
    "html": lambda: b"<!doctype html><html><body>404</body></html>",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>",
    "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
    "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64),
    "zip": lambda: b"PK\x03\x04" + bytes(64),
    "png signature": lambda: b"\x89PNG\r\n\x1a\n",
    "png header": lambda: encoded(picture())[:33],
    "png half": lambda: encoded(picture())[: len(encoded(picture())) // 2],
    "png bad checksum": lambda: encoded(picture()).replace(b"IDAT", b"IDAX", 1),
    "png corrupt data": lambda: encoded(picture())[:60] + b"\xff" * 40 + encoded(picture())[100:],
    "png zero size": lambda: png(0, 32, 8, 2, b""),
    "png short rows": lambda: png(64, 64, 8, 2, b"\0" * 64),
    "png bomb": lambda: png(60_000, 60_000, 8, 2, b"\0" * 100),
    "png just a bomb": lambda: png(16_000, MAX_PIXELS // 16_000 + 1, 8, 0, b"\0"),
    "png huge side": lambda: png(2**31 - 1, 1, 8, 0, b"\0"),
    "jpeg start": lambda: encoded(picture(), "JPEG")[:20],
    "jpeg half": lambda: encoded(picture(), "JPEG")[: len(encoded(picture(), "JPEG")) // 2],
    "webp half": lambda: encoded(picture(), "WEBP", lossless=True)[:60],
    "gif header": lambda: encoded(picture(), "GIF")[:12],
    "tiff half": lambda: encoded(picture(), "TIFF")[:1000],
    "tiff loop": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "bmp half": lambda: encoded(picture(), "BMP")[:1000],
    "avif half": lambda: encoded(picture(), "AVIF")[:200],
    "ppm lies": lambda: b"P6 500 500 255\n" + bytes(100),
    "too narrow": lambda: encoded(Image.new("RGB", (15, 64))),
    "too low": lambda: encoded(Image.new("RGB", (64, 15))),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1))),
    "too long": lambda: encoded(Image.new("RGB", (257, 32))),
    "too tall": lambda: encoded(Image.new("RGB", (32, 257))),
    "nan": lambda: encoded(Image.fromarray(np.full((32, 32), np.nan, np.float32)), "TIFF"),
    "infinite": lambda: encoded(Image.fromarray(np.full((32, 32), np.inf, np.float32)), "TIFF"),
    "negative": lambda: encoded(Image.fromarray(np.full((32, 32), -1, np.float32)), "TIFF"),
    "beyond 16 bits": lambda: encoded(Image.fromarray(np.full((32, 32), 70000, np.int32)), "TIFF"),
    "all transparent": lambda: encoded(Image.new("RGBA", (32, 32), (1, 2, 3, 0))),
}


def refused(source: object) -> str:
    with pytest.raises(UsageError) as caught:
        read_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and 10 < len(message) < 400 and "Traceback" not in message
    return message


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_content(name: str, tmp_path: Path) -> None:
    data = BAD_BYTES[name]()
    refused(data)
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    assert "bad.jpg" in refused(path)


def test_bad_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "no such" in refused(tmp_path / "missing.jpg") and "no such" in refused(tmp_path / "dangling")
    assert "folder" in refused(tmp_path) and "pipe" in refused(tmp_path / "pipe")
    refused("/dev/zero")
    refused(tmp_path / "loop")
    refused("a\0b.jpg")
    refused("x" * 5000)
    refused("")
    refused("two\nlines.jpg")
    refused("https://example.org/cat.jpg")
    refused("~nobody-of-this-name/cat.jpg")
    refused(b"")
    refused(3)
    refused(None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(picture()))
    path.chmod(0)
    assert "permission" in refused(path)


def test_flipped_bytes_never_escape_as_another_error() -> None:
    """Damage at random: a picture or a UsageError, nothing else."""
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000"):
        whole = encoded(picture("P") if kind == "GIF" else picture(), kind)
        for _ in range(40):
            data = bytearray(whole)
            for place in RNG.integers(0, len(data), 4):
                data[place] = RNG.integers(0, 256)
            try:
                read_image(bytes(data[: RNG.integers(1, len(data) + 1)]))
            except UsageError as error:
                assert "\n" not in str(error)


def test_png_sequence_is_exact(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (1, 3, 7, 18, 22), dtype=torch.uint8)
    assert write_png_sequence(tmp_path / "clip", (frames / 127.5 - 1).split(3, dim=2)) == 7
    assert [p.name for p in sorted((tmp_path / "clip").iterdir())] == [f"{i:06d}.png" for i in range(7)]
    for i in range(7):
        with Image.open(tmp_path / "clip" / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), frames[0, :, i].permute(1, 2, 0).numpy())
    assert os.listdir(tmp_path) == ["clip"]
    with pytest.raises(UsageError, match="exists"):
        write_png_sequence(tmp_path / "clip", [])


def test_png_sequence_is_whole_or_absent(tmp_path: Path) -> None:
    closed = []

    def broken() -> object:
        try:
            yield torch.zeros(1, 3, 2, 16, 16)
            raise RunError("out of memory")
        finally:
            closed.append(True)

    with pytest.raises(RunError, match="memory"):
        write_png_sequence(tmp_path / "clip", broken())  # type: ignore[arg-type]
    with pytest.raises(RunError, match="NaN"):
        write_png_sequence(tmp_path / "clip", [torch.full((1, 3, 1, 16, 16), float("nan"))])
    with pytest.raises(RunError, match="no frames"):
        write_png_sequence(tmp_path / "clip", [])
    assert not os.listdir(tmp_path) and closed
