"""Stage II's training windows: pure in their index, the anchor exact, references better than enlarging; kept whole."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.segments import Window
from swifti2v.tiny import tiny_pipeline
from swifti2v.train import film, windows
from swifti2v.train.film import Shot
from swifti2v.train.nano import Photos
from swifti2v.train.zonal import Yardstick, choose


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> windows.Material:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).resize((800, 600)).save(folder / "a.png")
    (folder / "photos.jsonl").write_text('{"sha256": "a", "path": "a.png", "split": "train"}\n')
    frames = rng.integers(0, 255, (90, 11, 16, 3), np.uint8).repeat(32, axis=1).repeat(40, axis=2)
    shots = [Shot("film", frames)]
    vae = tiny_pipeline("nano").vae
    return windows.Material(vae, Photos(folder / "photos.jsonl", "train"), shots)


def test_a_window_is_a_function_of_its_index_and_kept(
    material: windows.Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "COUNT", 1)
    source = windows.StageTwoWindows(material, seed=0)
    made = source.at(3)
    kept = windows.Kept(source, tmp_path / "kept")
    first, again = kept.at(3), windows.Kept(None, tmp_path / "kept").at(3)
    assert torch.equal(first.clean, again.clean) and torch.equal(first.frame_indices, made.frame_indices)
    torch.testing.assert_close(first.reference, made.reference, atol=0.02, rtol=2e-3)
    channels = material.vae.latent_channels
    assert made.reference.shape[1] == 2 * channels and made.clean.shape[1] == channels
    assert torch.equal(made.reference[:, :channels, :1], made.clean[:, :, :1])  # the anchor
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npz"]


@pytest.mark.parametrize(("soften", "through_vae"), [(None, False), (0.6, False), (None, True)])
def test_reference_is_nearer_to_the_truth_than_nothing(
    material: windows.Material, soften: float | None, through_vae: bool
) -> None:
    rng = random.Random(1)
    frames = windows.photo_frames(material.photos, windows.SIZES[0][0], 20, rng)
    clean, reference = windows.window_pair(material.vae, frames, Window(0, (2,), (3, 4)), soften, through_vae)
    assert clean.shape[2] == 4 and reference.shape[2] == 4
    error = (reference[:, : clean.shape[1]] - clean)[:, :, 1:].square().mean()
    assert error < 0.5 * clean[:, :, 1:].square().mean()


def test_film_windows_stay_inside_their_shot(material: windows.Material) -> None:
    size = windows.SIZES[1][0]
    chosen = windows.film_frames(material.shots, size, 80, random.Random(0))
    assert chosen is not None and chosen([0, 80]).shape == (3, 2, size.height, size.width)
    assert windows.film_frames(material.shots, size, 90, random.Random(0)) is None


def test_trained_windows_are_within_the_trained_length() -> None:
    rng = random.Random(0)
    for _ in range(200):
        window = windows.trained_window(rng)
        assert window.anchor == 0 and window.segment[0] >= 1 and window.segment[-1] <= 20


def test_crops_are_consecutive_frames(material: windows.Material) -> None:
    taken = film.crop(material.shots, random.Random(0), 9, 64)
    assert taken.shape == (3, 9, 64, 64) and taken.abs().max() <= 1


def test_choosing_keeps_the_largest_and_the_yardstick_is_a_projection() -> None:
    def draw(index: int, frames: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        waves = torch.randn(3, 1, 2, 2, generator=generator).expand(-1, frames, -1, -1)
        return torch.nn.functional.interpolate(waves, (32, 32), mode="bicubic").clamp(-1, 1)

    lists = choose(draw, 12, 6)
    assert {0, 256, 512} <= set(lists["kept_image"]) and len(set(lists["kept_video"])) == 12
    yardstick, x = Yardstick(draw, 12, 6), draw(0, 5)
    once = yardstick(x)
    torch.testing.assert_close(yardstick(once), once, atol=1e-4, rtol=0)
    assert once.shape == x.shape
