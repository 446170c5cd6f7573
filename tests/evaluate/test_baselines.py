"""The ncnn reader on a network written here and on the shipped ones, and what the baselines do to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swifti2v import media, metrics
from swifti2v.core import Size, UsageError
from swifti2v.evaluate import baselines
from swifti2v.evaluate.ncnn import NcnnNetwork
from swifti2v.reference import fit_image, resize

PHOTO = Path(__file__).parents[2] / "examples" / "photo.jpg"
PARAM = """7767517
7 8
Input data 0 1 data
Split split 1 2 data a b
Convolution conv 1 1 a c 0=4 1=3 4=1 5=1 6=108 9=2 -23310=1,2.000000e-01
PixelShuffle shuffle 1 1 c d 0=2
Interp resize 1 1 b e 0=1 1=2.0 2=2.0
BinaryOp half 1 1 e f 0=2 1=1 2=5.000000e-01
BinaryOp add 2 1 f d output 0=0
"""


def written(folder: Path, *, param: str = PARAM, half: bool = False, cut: int = 0) -> tuple[Path, torch.Tensor]:
    weights = np.random.default_rng(0).normal(0, 0.1, 108).astype(np.float16 if half else np.float32)
    tag = (0x01306B47 if half else 0).to_bytes(4, "little")
    data = tag + weights.tobytes() + np.arange(4, dtype=np.float32).tobytes()
    (folder / "net.param").write_text(param)
    (folder / "net.bin").write_bytes(data[: len(data) - cut])
    return folder / "net", torch.from_numpy(weights.astype(np.float32)).view(4, 3, 3, 3)


@pytest.mark.parametrize("half", [False, True])
def test_a_network_does_what_its_graph_says(tmp_path: Path, half: bool) -> None:
    path, weights = written(tmp_path, half=half)
    pictures = torch.rand(2, 3, 5, 6)
    convolved = F.leaky_relu(F.conv2d(pictures, weights, torch.arange(4.0), padding=1), 0.2)
    expected = 0.5 * pictures.repeat_interleave(2, -1).repeat_interleave(2, -2) + F.pixel_shuffle(convolved, 2)
    assert torch.allclose(NcnnNetwork(path)(pictures), expected, atol=1e-6)


def test_damaged_networks_are_refused(tmp_path: Path) -> None:
    for change, says in (
        ({"cut": 4}, "truncated"),
        ({"param": PARAM.replace("6=108", "6=72")}, "bytes more"),
        ({"param": PARAM.replace("6=108", "6=54")}, "54 weights make no 3x3"),
        ({"param": PARAM.replace("PixelShuffle", "Reorg")}, "layer Reorg"),
        ({"param": PARAM.replace("7767517", "7767516")}, "not an ncnn"),
        ({"param": PARAM.replace("1 2 data", "one 2 data")}, "no layer"),
        ({"param": PARAM.replace("output", "out")}, "no blob named output"),
    ):
        path, _ = written(tmp_path, **change)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=says):
            NcnnNetwork(path)
    with pytest.raises(UsageError, match=r"gone\.param: cannot be read"):
        NcnnNetwork(tmp_path / "gone")


def test_unknown_upscaler() -> None:
    with pytest.raises(UsageError, match="'lanczos' is not one of bicubic, span"):
        baselines.upscale("lanczos", torch.zeros(3, 1, 8, 8))


# PSNR on the example photo at 256x128 from 64x32. The loader this one was made from equals ncnn's own output to 1e-5.
GOLDEN = {"bicubic": 24.344, "span": 26.065, "realesrgan-video": 24.085}


@pytest.mark.parametrize("name", GOLDEN)
def test_four_times_as_large_and_like_the_photo(name: str) -> None:
    source = baselines.SOURCES.get(name)
    if source is not None and baselines.find_spec(source.module) is None:
        pytest.skip(f"{source.package} is not installed")
    photo = fit_image(media.read_image(PHOTO).pixels, Size(256, 128))[0]
    low = resize(photo[:, 0], Size(64, 32))[:, None]
    made = baselines.upscale(name, low)
    assert made.shape == photo.shape and made.abs().max() <= 1
    assert metrics.psnr(made, photo).item() == pytest.approx(GOLDEN[name], abs=0.02)
