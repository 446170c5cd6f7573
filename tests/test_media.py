"""Video files: right colors, playable while made, whole or absent, never overwriting."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.color import rgb_to_yuv420, yuv420_to_rgb
from swifti2v.core import RunError, Size, UsageError
from swifti2v.media import (
    Encoding,
    check_writable,
    part_path,
    probe,
    read_metadata,
    read_video,
    release,
    unique_path,
    write_png_sequence,
    write_video,
)

FORMATS = [(codec, depth) for codec in ("h264", "h265", "av1") for depth in (8, 10)]
WHOLE = Size(128, 96)
THREE_COLORS = torch.tensor([[0.8, -0.6, 0.1], [-0.7, 0.5, -0.2], [-0.3, -0.8, 0.9]])


def clip(frames: int, height: int = 96, width: int = 128) -> torch.Tensor:
    """Colored waves that drift: (1, 3, t, h, w)."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = (torch.sin((x + 3 * t) / 17), torch.cos((y - 2 * t) / 11), torch.sin((x + y + t) / 23))
    return torch.stack(waves)[None] * 0.95


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) / 2).square().mean().clamp_min(1e-12)))


def frames_of(path: Path) -> torch.Tensor:
    return torch.cat(list(read_video(path)), dim=2)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([8, 10]), st.floats(-1, 1))
def test_yuv_round_trip_of_flat_colors(rows: int, columns: int, depth: int, level: float) -> None:
    color = torch.tensor([level, -level, level / 2])[:, None, None].expand(3, 2 * rows, 2 * columns)
    back = yuv420_to_rgb(rgb_to_yuv420(color, bit_depth=depth), bit_depth=depth)
    assert (back - color).abs().max() < (0.02 if depth == 8 else 0.005)


def test_yuv_code_values_are_those_of_bt709() -> None:
    def codes(rgb: tuple[float, ...], depth: int = 8) -> list[float]:
        planes = rgb_to_yuv420(torch.tensor(rgb)[:, None, None].expand(3, 2, 2), bit_depth=depth)
        return [planes.y[0, 0].item(), planes.cb[0, 0].item(), planes.cr[0, 0].item()]

    assert codes((-1, -1, -1)) == [16, 128, 128] and codes((1, 1, 1)) == [235, 128, 128]
    assert codes((1, -1, -1)) == [63, 102, 240] and codes((-1, 1, -1)) == [173, 42, 26]
    assert codes((-1, -1, 1)) == [32, 240, 118] and codes((1, 1, 1), 10) == [940, 512, 512]
    assert codes((7, 7, 7)) == [235, 128, 128]  # clamped


@pytest.mark.parametrize(("codec", "depth"), FORMATS)
def test_round_trip_tags_and_layout(codec: str, depth: int, tmp_path: Path) -> None:
    target, frames = tmp_path / "clip.mp4", clip(9)
    encoding = Encoding(codec, depth, threads=1)
    assert write_video(target, frames.split([1, 4, 4], dim=2), fps=15, codec=encoding, expected_frames=9) == 9
    assert os.listdir(tmp_path) == ["clip.mp4"]
    back = frames_of(target)
    assert back.shape == frames.shape and min(psnr(frames[:, :, i], back[:, :, i]) for i in range(9)) > 40
    info = probe(target)
    assert (info.frames, info.fps, info.size) == (9, 15, Size(128, 96))
    assert info.pix_fmt == ("yuv420p" if depth == 8 else "yuv420p10le") and info.codec == {"h265": "hevc"}.get(
        codec, codec
    )
    assert (info.color_primaries, info.color_transfer, info.color_matrix, info.full_range) == (1, 1, 1, False)
    with av.open(str(target)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert context.codec_tag == {"h264": "avc1", "h265": "hvc1", "av1": "av01"}[codec]
        times = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    assert times == pytest.approx([i / 15 for i in range(9)], abs=1e-4)
    assert [name for name, _ in boxes(target) if name in ("moov", "mdat", "moof")] == ["moov", "mdat"]
    assert b"colr" in target.read_bytes()


@pytest.mark.parametrize(("codec", "depth"), FORMATS)
def test_foreign_decoder_sees_the_same_colors(codec: str, depth: int, tmp_path: Path) -> None:
    """libswscale, told nothing but what the file says, agrees: the tags and the matrix are true."""
    target = tmp_path / "colors.mp4"
    still = THREE_COLORS.repeat_interleave(32, 0).T[:, :, None].expand(3, 96, 128).clone()[None, :, None]
    write_video(target, [still], fps=15, codec=Encoding(codec, depth, threads=1))
    with av.open(str(target)) as container:
        frame = next(container.decode(video=0))
        rgb = frame.reformat(format="rgb24", src_colorspace=int(frame.colorspace), interpolation="AREA").to_ndarray()
    for row, color in zip((16, 48, 80), THREE_COLORS, strict=True):
        assert np.abs(rgb[row, 64] / 127.5 - 1 - color.numpy()).max() < 0.035


def boxes(path: Path) -> list[tuple[str, int]]:
    data, offset, found = path.read_bytes(), 0, []
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 4], "big")
        found.append((data[offset + 4 : offset + 8].decode(), length))
        offset += length
    return found


@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_part_plays_everything_given_so_far(codec: str, tmp_path: Path) -> None:
    target, frames, cuts = tmp_path / "clip.mp4", clip(18), [1, 12, 4, 1]

    def chunks() -> Iterator[torch.Tensor]:
        given = 0
        for number, chunk in enumerate(frames.split(cuts, dim=2)):
            if number:
                part = part_path(target)
                assert not target.exists() and [n for n, _ in boxes(part)].count("moof") == number
                assert psnr(frames_of(part), frames[:, :, :given]) > 40
                assert probe(part).frames == given and read_metadata(part)["comment"] == "moof"
            given += chunk.shape[2]
            yield chunk

    encoding = Encoding(codec, threads=1)
    assert write_video(target, chunks(), fps=15, codec=encoding, metadata={"comment": "moof"}) == 18
    assert psnr(frames_of(target), frames) > 40 and os.listdir(tmp_path) == ["clip.mp4"]


def test_remux_does_not_change_a_frame(tmp_path: Path) -> None:
    target, kept = tmp_path / "clip.mp4", tmp_path / "kept.mp4"

    def chunks() -> Iterator[torch.Tensor]:
        yield clip(5)
        kept.write_bytes(part_path(target).read_bytes())

    write_video(target, chunks(), fps=15)
    assert torch.equal(frames_of(target), frames_of(kept))


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (59.94, Fraction(60000, 1001)), (15, 15),
     (16.0, 16), (12.5, Fraction(25, 2)), (24, 24), (240, 240), (0.5, Fraction(1, 2))],
)  # fmt: skip
def test_frame_rates_are_exact(fps: float, rate: Fraction, tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    write_video(target, clip(6, 32, 32).split(2, dim=2), fps=fps)
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate and stream.frames == 6
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert times == [i / Fraction(rate) for i in range(6)]


def test_one_frame_and_empty_chunks_and_half_precision(tmp_path: Path) -> None:
    target = tmp_path / "one.mp4"
    empty = torch.zeros(1, 3, 0, 96, 128)
    assert write_video(target, [empty, clip(1).to(torch.bfloat16), empty], fps=23.976) == 1
    assert frames_of(target).shape == (1, 3, 1, 96, 128) and probe(target).frames == 1


@pytest.mark.parametrize("keys", [("comment",), ("comment", "title", "swifti2v_manifest")])
def test_long_metadata_in_any_script(keys: tuple[str, ...], tmp_path: Path) -> None:
    request = json.dumps({"prompt": "slow pan ← 雪 🎥 naïve\n" * 5000}, ensure_ascii=False)
    assert len(request.encode()) > 2**16
    tags = {key: request if key == "comment" else f"{key} é" for key in keys}
    write_video(tmp_path / "clip.mp4", [clip(1, 32, 32)], fps=15, metadata=tags)
    found = read_metadata(tmp_path / "clip.mp4")
    assert {key: found[key] for key in keys} == tags
    write_video(tmp_path / "bare.mp4", [clip(1, 32, 32)], fps=15)
    assert "comment" not in read_metadata(tmp_path / "bare.mp4")


class Abandoned(Exception):
    pass


def failing(chunks: int, error: BaseException, closed: list[bool]) -> Iterator[torch.Tensor]:
    try:
        for _ in range(chunks):
            yield clip(2, 32, 48)
        raise error
    finally:
        closed.append(True)


@pytest.mark.parametrize("error", [RunError("out of memory"), KeyboardInterrupt(), Abandoned()])
def test_error_leaves_a_playable_part_or_nothing(error: BaseException, tmp_path: Path) -> None:
    target, closed = tmp_path / "clip.mp4", list[bool]()
    with pytest.raises(type(error)):
        write_video(target, failing(0, error, closed), fps=15)
    assert not os.listdir(tmp_path)
    with pytest.raises(type(error)):
        write_video(target, failing(3, error, closed), fps=15)
    assert os.listdir(tmp_path) == ["clip.part.mp4"] and frames_of(part_path(target)).shape[2] == 6
    assert write_video(target, [clip(1, 32, 48)], fps=15) == 1  # what `resume` does: the remainder is replaced
    assert os.listdir(tmp_path) == ["clip.mp4"] and closed == [True, True]


def test_wrong_count_and_bad_chunks(tmp_path: Path) -> None:
    target, good = tmp_path / "clip.mp4", clip(2, 32, 48)
    with pytest.raises(RunError, match="2 of 3"):
        write_video(target, [good], fps=15, expected_frames=3)
    nan = good.clone()
    nan[0, 1, 1, 5, 5] = float("nan")
    for bad, why in (
        (nan, "frame 3 holds NaN"),
        (clip(1, 32, 64), "64x32 after 48x32"),
        (clip(1, 33, 48), "even"),
        (clip(1, 8, 8), "sides"),
        (good[0], "float"),
        (good.to(torch.uint8), "float"),
        (good[:, :1], "float"),
    ):
        with pytest.raises(RunError, match=why) as caught:
            write_video(target, [good, bad], fps=15)
        assert "\n" not in str(caught.value) and probe(part_path(target)).frames == 2
    with pytest.raises(RunError, match="no frames"):
        write_video(tmp_path / "other.mp4", [], fps=15)
    assert os.listdir(tmp_path) == ["clip.part.mp4"]


def test_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    target.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        write_video(target, [clip(1, 32, 32)], fps=15)
    late = tmp_path / "late.mp4"

    def chunks() -> Iterator[torch.Tensor]:
        yield clip(1, 32, 32)
        late.write_text("precious")

    with pytest.raises(RunError, match="not overwritten"):
        write_video(late, chunks(), fps=15)
    assert late.read_text() == target.read_text() == "precious"
    assert probe(part_path(late)).frames == 1
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "late.mp4", "late.part.mp4"]


def test_full_disk_is_one_line_and_no_final(tmp_path: Path) -> None:
    script = f"""
import resource, signal, torch
from swifti2v.media import write_video
from swifti2v.core import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (160_000, 160_000))
try:
    write_video({str(tmp_path / "clip.mp4")!r}, (torch.rand(1, 3, 2, 96, 128) * 2 - 1 for _ in range(20)), fps=15)
except RunError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: cannot write") and done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["clip.part.mp4"]
    assert frames_of(tmp_path / "clip.part.mp4").shape[2] >= 2


def test_first_chunk_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import resource, signal, torch
from swifti2v.media import write_video
from swifti2v.core import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
try:
    write_video({str(tmp_path / "clip.mp4")!r}, [torch.rand(1, 3, 2, 96, 128) * 2 - 1], fps=15)
except RunError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: cannot write") and not os.listdir(tmp_path)


def test_part_plays_between_any_two_writes(tmp_path: Path) -> None:
    """A writer stopped anywhere inside a fragment leaves the fragments before it playable."""
    target, states = tmp_path / "clip.mp4", tmp_path / "state.mp4"
    seen: list[bytes] = []

    def chunks() -> Iterator[torch.Tensor]:
        for chunk in clip(12).split(4, dim=2):
            yield chunk
            seen.append(part_path(target).read_bytes())

    write_video(target, chunks(), fps=15)
    before, after = len(seen[1]), seen[2]
    hidden = after[:before] + (len(after) - before).to_bytes(4, "big") + b"free" + after[before + 8 :]
    for share in (0.02, 0.1, 0.3, 0.7, 0.99, 1.0):
        states.write_bytes(hidden[: before + int((len(after) - before) * share)])
        assert probe(states).frames == frames_of(states).shape[2] == 8, share


KILLED = """
import sys, time, torch
from swifti2v.media import write_video
def chunks():
    for i in range(100):
        yield torch.rand(1, 3, 4, 32, 48)
        print(i, flush=True)
        time.sleep(0.02)
write_video(sys.argv[1], chunks(), fps=15)
"""


def test_killed_writer_leaves_a_playable_part(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 2:
                break
        with pytest.raises(UsageError, match="another process"):
            write_video(target, [clip(1, 32, 32)], fps=15)
        writer.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == ["clip.part.mp4"]
    assert frames_of(part_path(target)).shape[2] >= 12
    assert unique_path(target) == tmp_path / "clip_0001.mp4"  # a remainder is not taken from its owner
    assert write_video(target, [clip(3, 32, 32)], fps=15) == 3


def take(folder: str, suffix: str, queue: Any) -> None:
    queue.put([unique_path(Path(folder) / f"clip{suffix}").name for _ in range(8)])


@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_concurrent_names_are_all_different(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"clip{suffix}").touch()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    takers = [context.Process(target=take, args=(str(tmp_path), suffix, queue)) for _ in range(4)]
    for taker in takers:
        taker.start()
    names = [name for _ in takers for name in queue.get(timeout=60)]
    for taker in takers:
        taker.join()
    assert sorted(names) == [f"clip_{i:04d}{suffix}" for i in range(1, 33)]
    for name in names:
        release(tmp_path / name)
    assert os.listdir(tmp_path) == [f"clip{suffix}"]


def test_reservation_is_consumed(tmp_path: Path) -> None:
    first, second = unique_path(tmp_path / "clip.mp4"), unique_path(tmp_path / "clip.mp4")
    folder = unique_path(tmp_path / "clip")
    assert (first.name, second.name, folder.name) == ("clip.mp4", "clip_0001.mp4", "clip")
    write_video(first, [clip(1, 32, 32)], fps=15)
    write_png_sequence(folder, [clip(1, 32, 32)])
    release(first)
    release(second)
    release(second)
    assert sorted(os.listdir(tmp_path)) == ["clip", "clip.mp4"]


@pytest.mark.parametrize(
    "name",
    ["clip.avi", "clip.jpg", "clip.mp4.exe", "folder.mp4", "missing/clip.mp4", "file/clip.mp4", "x" * 300 + ".mp4",
     "x" * 248 + ".mp4", "a\0b.mp4", "", "..", "\udcff\ud800.mp4", "/proc/clip.mp4", "/dev/null/clip.mp4",
     "雪" * 90 + ".mp4"],
)  # fmt: skip
def test_bad_outputs(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    target = tmp_path / name if name else Path("")
    for attempt in (
        lambda: check_writable(target),
        lambda: unique_path(target),
        lambda: write_video(target, [], fps=15),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "clip.mp4", 1000)
    check_writable(tmp_path / "clip")
    with pytest.raises(UsageError, match="MiB are needed"):
        check_writable(tmp_path / "clip.mp4", 2**60)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [{"codec": "vp9"}, {"codec": ""}, {"bit_depth": 9}, {"bit_depth": 12}, {"crf": -1}, {"crf": 52},
     {"crf": float("nan")}, {"threads": -1}, {"threads": 1000}, {"threads": 1.5}],
)  # fmt: skip
def test_bad_encodings(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Encoding(**bad)


@pytest.mark.parametrize("fps", [0, -1, 241, float("nan"), float("inf")])
def test_bad_rates(fps: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fps"):
        write_video(tmp_path / "clip.mp4", [], fps=fps)


@pytest.mark.parametrize("tags", [{"": "x"}, {"a": "x\0y"}, {"a": "\ud800"}])
def test_bad_metadata(tags: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata"):
        write_video(tmp_path / "clip.mp4", [], fps=15, metadata=tags)


def foreign(path: Path, codec: str, pix_fmt: str, size: Size = WHOLE, **context: Any) -> torch.Tensor:
    """A clip of three flat color bands written by libav alone; returns the frame it shows."""
    rgb = ((THREE_COLORS.repeat_interleave(size.height // 3, 0) + 1) * 127.5).round().to(torch.uint8)
    pixels = rgb[:, None, :].expand(size.height, size.width, 3).contiguous().numpy()
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, pix_fmt
        for key, value in context.items():
            setattr(stream.codec_context, key, value)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            space = context.get("colorspace", 5)
            frame = frame.reformat(format=pix_fmt, dst_colorspace=space, dst_color_range=context.get("color_range", 1))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "context"),
    [
        ("601.mp4", "libx264", "yuv420p", {"colorspace": 5, "color_range": 1}),
        ("untagged.mp4", "libx264", "yuv420p", {}),
        ("444.mp4", "libx264", "yuv444p", {"colorspace": 1, "color_range": 1}),
        ("full.mp4", "libx264", "yuv420p", {"colorspace": 1, "color_range": 2}),
        ("422.mkv", "libx264", "yuv422p10le", {"colorspace": 1, "color_range": 1}),
        ("ffv1.mkv", "ffv1", "yuv444p16le", {"colorspace": 1, "color_range": 1}),
        ("jpeg.avi", "mjpeg", "yuvj420p", {"color_range": 2}),
    ],
)
def test_foreign_videos_keep_their_colors(
    name: str, codec: str, pix_fmt: str, context: dict[str, int], tmp_path: Path
) -> None:
    frame = foreign(tmp_path / name, codec, pix_fmt, **context)
    back = frames_of(tmp_path / name)
    assert back.shape == (1, 3, 3, 96, 128)
    for row in (16, 48, 80):
        assert (back[0, :, 1, row, 64] - frame[:, row, 64]).abs().max() < 0.05


def test_odd_sizes_rgb_and_gif(tmp_path: Path) -> None:
    foreign(tmp_path / "odd.mkv", "ffv1", "yuv420p", Size(127, 93))
    assert frames_of(tmp_path / "odd.mkv").shape == (1, 3, 3, 93, 127)
    pictures = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=100)
    back = frames_of(tmp_path / "clip.gif")
    assert back.shape == (1, 3, 2, 48, 64)
    assert (back[0, :, 0, 20, 20] - torch.tensor([1.0, -1, -1])).abs().max() < 0.05


def test_read_video_resizes_and_crops(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [clip(5)], fps=15)
    frames = list(read_video(tmp_path / "clip.mp4", Size(64, 64)))
    assert len(frames) == 5 and all(f.shape == (1, 3, 1, 64, 64) for f in frames)
    assert all(f.min() >= -1 and f.max() <= 1 for f in frames)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_respected(degrees: int, tmp_path: Path) -> None:
    """The display matrix is patched into an upright file, as a telephone writes it."""
    write_video(tmp_path / "clip.mp4", [clip(3)], fps=15)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    # The track header's matrix: the second identity in the file (the movie header has the first).
    identity = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    place = data.index(identity, data.index(b"tkhd"))
    a, b = {0: (1, 0), 90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]  # counter-clockwise
    values = (a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected = torch.rot90(frames_of(tmp_path / "clip.mp4"), degrees // 90, dims=(3, 4))
    info = probe(tmp_path / "turned.mp4")
    assert info.rotation == degrees and (info.size.width, info.size.height) == (expected.shape[4], expected.shape[3])
    assert torch.equal(frames_of(tmp_path / "turned.mp4"), expected)


def bad_video(name: str, folder: Path) -> Path:
    path = folder / f"{name}.mp4"
    good = folder / "good.mp4"
    write_video(good, clip(8).split(4, dim=2), fps=15)
    data = good.read_bytes()
    if name == "hdr":
        foreign(path, "libx265", "yuv420p10le", colorspace=9, color_trc=16, color_primaries=9, color_range=1)
    elif name == "audio only":
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("aac", rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        content = {
            "empty": b"",
            "text": b"not a video\n" * 50,
            "zeros": bytes(5000),
            "header": data[:32],
            "half": data[: len(data) * 2 // 3],
            "no moov": data[data.index(b"mdat") - 4 :],
            "playlist": b"#EXTM3U\n#EXTINF:1,\n" + str(good).encode() + b"\n#EXT-X-ENDLIST\n",
            "concat": b"ffconcat version 1.0\nfile '" + str(good).encode() + b"'\n",
            "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        }[name]
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    ["empty", "text", "zeros", "header", "half", "no moov", "playlist", "concat", "png", "hdr", "audio only"],
)
def test_bad_videos(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_video(bad_video(name, tmp_path))
    assert "\n" not in str(caught.value) and f"{name}.mp4" in str(caught.value)


def test_bad_video_paths(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing.mp4", "http://127.0.0.1:9/x.mp4", "concat:a.mp4|b.mp4", "a\0.mp4", ""):
        for reader in (read_video, probe, read_metadata):
            with pytest.raises(UsageError):
                reader(bad)


def test_reading_is_lazy(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", clip(60, 32, 32).split(10, dim=2), fps=15)
    frames = read_video(tmp_path / "clip.mp4")
    started = time.perf_counter()
    assert next(frames).shape == (1, 3, 1, 32, 32)
    frames.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 5
