"""Cut-outs over moving photos: pixels agree with the exact flow, and what is hidden is known to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.camera import Motion
from swifti2v.core import Size, UsageError
from swifti2v.train.sprites import Cutouts, Path2D, Sprite, SyntheticSource, World, prepared
from swifti2v.train.synthetic import Scene

SIZE = Size(96, 64)


def smooth(seed: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    coarse = torch.rand(1, channels, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)


def disc(side: int = 40) -> torch.Tensor:
    """A textured disc, uint8 (4, side, side)."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    inside = ((x - side / 2).square() + (y - side / 2).square() < (side / 2 - 2) ** 2).to(torch.uint8) * 255
    return torch.cat([smooth(9, side, side), inside[None]])


class Photos(list[torch.Tensor]):
    pass


PHOTOS = Photos([smooth(1, 180, 260), smooth(2, 200, 240)])


def world(motion: Motion, *paths: Path2D) -> World:
    scene = Scene(smooth(3, 140, 200).float() / 127.5 - 1, 38, 52, SIZE, motion)
    return World(scene, tuple(Sprite(prepared(disc(), 0.6), path) for path in paths), "x")


def test_flow_of_a_still_camera_is_the_cutouts_own() -> None:
    made = world(Motion(), Path2D(0.4, 0.5, 1.0, move_x=0.25, move_y=-0.125))
    truth = made.truth(0, 80)
    assert set(truth.layer.unique().tolist()) == {0, 1}
    moved, still = truth.layer == 1, truth.layer == 0
    torch.testing.assert_close(truth.flow[:, still], torch.zeros(2, int(still.sum())), atol=1e-4, rtol=0)
    torch.testing.assert_close(truth.flow[0, moved], torch.full((int(moved.sum()),), 24.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(truth.flow[1, moved], torch.full((int(moved.sum()),), -8.0), atol=1e-4, rtol=0)
    assert bool(truth.visible[moved].all()) and not bool(truth.visible[still].all())


def test_the_front_cutout_hides_the_one_behind() -> None:
    made = world(Motion(), Path2D(0.5, 0.5, 1.0), Path2D(0.1, 0.5, 1.0, move_x=0.4))
    truth = made.truth(0, 80)
    assert not bool(truth.visible[truth.layer == 1].any()) and bool(truth.visible[truth.layer == 2].all())


@settings(max_examples=12)
@given(
    st.floats(-0.15, 0.15), st.floats(0.85, 1.2), st.floats(-6, 6), st.floats(-0.3, 0.3), st.floats(-0.5, 0.5),
    st.floats(0.8, 1.2), st.integers(0, 40), st.integers(0, 40),
)  # fmt: skip
def test_frames_warped_by_the_flow_agree_where_visible(
    pan: float, zoom: float, roll: float, move: float, turn: float, grow: float, first: int, second: int
) -> None:
    made = world(Motion(pan, -pan / 2, zoom, roll), Path2D(0.5, 0.5, 1.0, 0.1, move, move / 2, grow, turn, 0.05))
    truth = made.truth(first, second)
    before, after = made.frames([first, second]).unbind(1)
    y, x = torch.meshgrid(torch.arange(SIZE.height) + 0.5, torch.arange(SIZE.width) + 0.5, indexing="ij")
    at = torch.stack([2 * (x + truth.flow[0]) / SIZE.width - 1, 2 * (y + truth.flow[1]) / SIZE.height - 1], dim=-1)
    back = F.grid_sample(after[None], at[None].float(), "bicubic", "border", align_corners=False)[0]
    error = (back - before).abs().mean(dim=0)
    edge = F.max_pool2d(_edges(truth.layer), 5, 1, 2)[0] > 0  # bilinear alpha mixes both layers there
    assert error[truth.visible & ~edge].mean() < 0.012


def _edges(layer: torch.Tensor) -> torch.Tensor:
    value = layer[None].float()
    return F.max_pool2d(value, 3, 1, 1) - -F.max_pool2d(-value, 3, 1, 1)


def test_without_cutouts_a_world_is_its_scene() -> None:
    made = world(Motion(pan=0.1))
    assert torch.equal(made.frames([0])[:, 0], made.scene.photo)
    assert bool((made.truth(0, 80).layer == 0).all())


def test_items_are_functions_of_the_index() -> None:
    sizes = ((SIZE, 1.0), (Size(64, 64), 1.0))
    one, two = (SyntheticSource(PHOTOS, Photos([disc()]), 5, sizes, seed=4, share=0.5) for _ in range(2))
    made = {index: one.at(index) for index in range(6)}
    for index in reversed(range(6)):
        again = two.at(index)
        assert torch.equal(made[index].frames, again.frames) and made[index].prompt == again.prompt
        assert made[index].motion == two.world(index).scene.motion
    assert len({item.size for item in made.values()}) == 2
    assert {bool(one.world(index).sprites) for index in range(20)} == {True, False}


def test_photos_too_small_for_any_motion_are_refused() -> None:
    tiny = Photos([torch.zeros(3, 12, 12, dtype=torch.uint8)])
    with pytest.raises(UsageError, match="larger photos"):
        SyntheticSource(tiny, None, 5, ((SIZE, 1.0),)).at(0)


def test_cutouts_of_a_split(tmp_path: Path) -> None:
    Image.fromarray(disc().permute(1, 2, 0).numpy()).save(tmp_path / "disc.png")
    (tmp_path / "cutouts.jsonl").write_text(json.dumps({"path": "disc.png", "split": "train"}))
    held = Cutouts(tmp_path / "cutouts.jsonl")
    assert len(held) == 1 and torch.equal(held[0], disc())
    with pytest.raises(UsageError, match="held_out"):
        Cutouts(tmp_path / "cutouts.jsonl", "held_out")
