"""mobile-nano's training windows: cameras that move as much as asked, film whose motion is found or refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("cv2")

from swifti2v import motion_field
from swifti2v.camera import Motion
from swifti2v.core import Size
from swifti2v.motion_score import motion_score
from swifti2v.tiny import tiny_pipeline
from swifti2v.train import moving
from swifti2v.train.film import Shot
from swifti2v.train.moving import Moving, camera, filmed, latents_of, push_of, view_fields, view_score
from swifti2v.train.nano import Photos
from swifti2v.train.synthetic import make_scene, render
from swifti2v.train.windows import Material

SIZE = Size(160, 96)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8, detail at two scales."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 255, (height // n, width // n, 3), np.uint8)) for n in (6, 24)]
    layers = [np.asarray(image.resize((width, height))) for image in coarse]
    return (sum(layer.astype(np.float32) for layer in layers) / 2).astype(np.uint8)


def drifting(step: int, frames: int = 40) -> Shot:
    wide = texture(200, 320 + abs(step) * frames)
    return Shot("drift", np.stack([wide[:, k * step : k * step + 320] for k in range(frames)]))


@given(score=st.floats(0.3, 3.0), seed=st.integers(0, 1000))
def test_a_camera_moves_as_much_as_it_was_asked_to(score: float, seed: int) -> None:
    motion = camera(score, random.Random(seed))
    assert view_score(motion, moving.SQUARE) == pytest.approx(score, rel=0.1)
    assert motion.shake == 0


@pytest.mark.parametrize("score", [0.6, 2.0])
def test_the_score_of_a_rendered_push_is_measured_as_that(score: float) -> None:
    photo = torch.from_numpy(texture(500, 800)).permute(2, 0, 1)
    scene = make_scene(photo, Size(576, 320), push_of(score), 16, random.Random(0))
    assert motion_score(render(scene, range(16))) == pytest.approx(score, rel=0.12)


def test_a_pan_to_the_right_shows_what_lies_right() -> None:
    fields = view_fields(Motion(pan=0.8), [8], (4, 6), SIZE)
    torch.testing.assert_close(fields[0], torch.full((1, 4, 6), 0.08 * SIZE.width))
    assert not fields[1].any()


def test_films_motion_is_found() -> None:
    """A shot that drifts a pixel a frame, at half its size or a little more: every field is that drift."""
    found = filmed([drifting(1)], SIZE, (1, 2, 3, 4), random.Random(3))
    assert found is not None
    inner = found.fields[:, :, 1:-1, 2:-4]
    first, last = inner[0, 0].mean(), inner[0, 3].mean()
    assert 1.9 < float(first.abs()) < 3.5 and float(last / first) == pytest.approx(4, rel=0.1)  # mirrored or not
    assert inner[1].abs().mean() < 0.3
    assert 1 < found.score < moving.LIVELIEST


def test_still_film_noise_and_cuts_are_refused() -> None:
    still = Shot("still", np.repeat(texture(200, 320)[None], 40, axis=0))
    noise = Shot("noise", np.random.default_rng(0).integers(0, 255, (40, 200, 320, 3), np.uint8))
    cut = Shot("cut", np.stack([texture(200, 320, seed=k // 3) for k in range(40)]))
    for shot in (still, noise, cut):
        assert all(filmed([shot], SIZE, (1, 2, 3, 4), random.Random(k)) is None for k in range(4)), shot.name
    assert filmed([drifting(1, frames=16)], SIZE, (1, 2, 3, 4), random.Random(0)) is None  # too short


def test_latents_do_not_depend_on_how_much_moves() -> None:
    """A slow and a fast push: the same latents, different scores; the anchor does not move."""
    found = []
    for score in (0.1, 0.4):
        fields = view_fields(push_of(score), [4, 8, 12, 16], (12, 20), SIZE)
        found.append(latents_of(Moving(torch.zeros(3, 1, 96, 160), fields, score), (0, 1, 2, 3, 4)))
    a, b = found
    assert a.shape == (motion_field.CHANNELS, 5, 6, 10) and not a[:, 0].any()
    torch.testing.assert_close(a, b, atol=0.03, rtol=0.05)


def test_latents_are_held_within_bounds() -> None:
    wild = Moving(torch.zeros(3, 1, 96, 160), 500 * torch.ones(2, 1, 12, 20), 0.3)
    assert float(latents_of(wild, (0, 1)).abs().max()) == moving.LIMIT


def test_windows_are_functions_of_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "COUNT", 2)
    Image.fromarray(texture(400, 600)).save(tmp_path / "a.png")
    (tmp_path / "photos.jsonl").write_text('{"sha256": "a", "path": "a.png", "split": "train"}\n')
    vae = tiny_pipeline("nano").vae
    material = Material(vae, Photos(tmp_path / "photos.jsonl", "train"), [drifting(1)])
    source = moving.MobileWindows(material, 0, ((SIZE, 1.0),))
    seen = set()
    for index in range(6):
        batch, again = source.at(index), source.at(index)
        assert torch.equal(batch.clean, again.clean) and torch.equal(batch.reference, again.reference)
        blocks = batch.frame_indices.tolist()
        assert batch.clean.shape == (2, 8, len(blocks), 6, 10) and batch.reference.shape == (2, 104, len(blocks), 6, 10)
        assert blocks[0] == 0 and len(blocks) - batch.context == 4 and not batch.clean[:, :, 0].any()
        assert torch.equal(batch.reference[:, :, 0], batch.reference[:, :, -1]) and not batch.reference[:, :8].any()
        assert batch.motion_score is not None and batch.motion_score.shape == (2,)
        seen.add(tuple(blocks))
    assert len(seen) > 1
