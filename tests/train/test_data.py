"""Sources of pixels and clips: pure functions of an index; windows inside shots; mixtures with exact shares."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from films import film
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.camera import Motion
from swifti2v.core import Size, UsageError
from swifti2v.models.causal_vae import encode_stream, streaming
from swifti2v.reference import hybrid_reference
from swifti2v.tiny import tiny_pipeline, wan_vae_one, wan_vae_two
from swifti2v.train.data import (
    CYCLE,
    Clip,
    Encoded,
    FilmSource,
    MixedSource,
    Pixels,
    StageOneEncoder,
    StageTwoEncoder,
    film_shots,
    from_bytes,
    joined,
    random_crop,
    to_bytes,
    upscale,
)

SIZE = Size(64, 32)


@dataclass(frozen=True)
class Named:
    name: str

    def at(self, index: int) -> tuple[str, int]:
        return self.name, index


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    film(folder / "film.mp4", (12, 7, 20))
    shots = [(0, 12, "train"), (12, 19, "train"), (19, 39, "held_out")]
    rows = [
        {"path": "film.mp4", "start": a, "end": b, "width": 96, "height": 64, "kind": "film", "split": split}
        for a, b, split in shots
    ]
    (folder / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "clips.jsonl"


def pixels(frames: int = 5, motion: Motion | None = None) -> Pixels:
    values = torch.randint(0, 256, (3, frames, SIZE.height, SIZE.width), generator=torch.Generator().manual_seed(5))
    return Pixels(values.to(torch.uint8), "slow pan left", "noise", "film", motion)


def test_windows_stay_inside_training_shots_and_are_the_same_every_time(listing: Path) -> None:
    source = FilmSource(film_shots(listing), 5, ((SIZE, 1.0), (Size(32, 48), 1.0)), seed=3)
    again = FilmSource(film_shots(listing), 5, ((SIZE, 1.0), (Size(32, 48), 1.0)), seed=3, times=listing.parent / "t")
    seen = set()
    for index in range(12):
        item = source.at(index)
        start = int(item.name.rsplit("@", 1)[1])
        assert start + 5 <= 12 or (start >= 12 and start + 5 <= 19)
        assert torch.equal(item.frames, again.at(index).frames) and item.name == again.at(index).name
        seen.add(start)
    assert len(seen) > 3


def test_a_film_source_refuses_what_no_shot_can_give(listing: Path) -> None:
    shots = film_shots(listing)
    for frames, size, upscaled in ((13, SIZE, 1.0), (5, Size(128, 64), 1.0), (6, SIZE, 1.0)):
        with pytest.raises(UsageError):
            FilmSource(shots, frames, ((size, 1.0),), max_upscale=upscaled)
    assert FilmSource(shots, 5, ((Size(128, 64), 1.0),), max_upscale=1.5).at(0).size == Size(128, 64)
    with pytest.raises(UsageError, match="no shot of split"):
        film_shots(listing, "train", min_frames=13)


@given(st.integers(16, 400), st.integers(16, 400), st.integers(8, 200), st.integers(8, 200), st.integers(0, 9))
def test_crops_lie_inside_and_have_the_aspect(w: int, h: int, width: int, height: int, seed: int) -> None:
    given_size, wanted = Size(w, h), Size(width, height)
    top, left, rows, columns = random_crop(given_size, wanted, random.Random(seed))
    assert 0 <= top <= top + rows <= h and 0 <= left <= left + columns <= w
    if upscale(given_size, wanted) <= 1:
        assert rows >= height and columns >= width
    assert abs(columns * height - rows * width) <= max(width, height)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 3 * CYCLE))
def test_mixtures_read_every_source_without_gaps(shares: list[float], index: int) -> None:
    if not sum(shares) > 1e-3:
        shares[0] = 1.0
    sources = tuple(Named(str(i)) for i in range(len(shares)))
    mixed = MixedSource(sources, tuple(shares), seed=7)
    assert sum(mixed.counts) == CYCLE
    source, own = mixed.which(index)
    before = [mixed.which(i)[0] for i in range(index - index % CYCLE, index)].count(source)
    assert own == index // CYCLE * mixed.counts[source] + before
    assert mixed.at(index) == (str(source), own)
    ideal = [share / sum(shares) for share in shares]
    assert all(abs(count / CYCLE - share) <= 1 / CYCLE for count, share in zip(mixed.counts, ideal, strict=True))


def test_bad_mixtures_are_refused() -> None:
    for sources, shares in (
        ((Named("a"),), ()),
        ((), ()),
        ((Named("a"),), (0.0,)),
        ((Named("a"), Named("b")), (2, -1)),
    ):
        with pytest.raises(UsageError):
            MixedSource(sources, shares)


def test_pixels_are_4k_plus_1_bytes() -> None:
    for bad in (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), torch.zeros(3, 5, 8, 8), torch.zeros(1, 5, 8, 8)):
        with pytest.raises(ValueError):
            Pixels(bad, "", "bad", "film")
    assert torch.equal(to_bytes(from_bytes(pixels().frames)), pixels().frames)


@torch.no_grad()
def test_stage_two_clips_are_what_inference_would_see() -> None:
    one, two = streaming(wan_vae_one()), streaming(wan_vae_two())
    item = pixels(9)
    half = Size(32, 16)
    clip = StageTwoEncoder(two, lambda size: half, encode_text=lambda prompt: torch.full((2, 3), len(prompt)))(item)
    plain = joined(encode_stream(two, hybrid_reference(item.image, item.shrunk(half), SIZE)))
    assert torch.equal(clip.reference, plain) and torch.equal(clip.clean[:, 0], clip.reference[:, 0])
    assert clip.clean.shape == (4, 3, 2, 4) and clip.text is not None and clip.text[0, 0] == len(item.prompt)
    through = StageTwoEncoder(two, lambda size: half, one)(item)
    assert torch.equal(through.clean, clip.clean) and not torch.equal(through.reference, clip.reference)


def test_another_reference_maker_is_used() -> None:
    def still(image: Tensor, motion: object, size: Size) -> object:
        yield from (image, image.expand(-1, -1, 4, -1, -1))

    clip = StageTwoEncoder(streaming(wan_vae_two()), lambda size: Size(32, 16), make_reference=still)(pixels())
    plain = StageTwoEncoder(streaming(wan_vae_two()), lambda size: Size(32, 16))(pixels())
    assert clip.reference.shape == plain.reference.shape and not torch.equal(clip.reference, plain.reference)


def test_stage_one_clips_hold_what_stage_one_is_given() -> None:
    nano = streaming(tiny_pipeline("nano").vae)
    moved = StageOneEncoder(nano, "camera")(pixels(5, Motion(pan=0.5)))
    still = StageOneEncoder(nano, "camera")(pixels(5))
    empty = StageOneEncoder(nano, "zero")(pixels(5))
    assert torch.equal(moved.clean, still.clean) and torch.equal(moved.reference[:, 0], moved.clean[:, 0])
    assert not torch.equal(moved.reference, still.reference) and not torch.equal(empty.reference, still.reference)


def test_encoded_sources_are_clips(listing: Path) -> None:
    source = FilmSource(film_shots(listing), 5, ((SIZE, 1.0),))
    clip = Encoded(source, StageTwoEncoder(streaming(wan_vae_two()), lambda size: Size(32, 16))).at(1)
    assert clip.kind == "film" and clip.name.startswith("film.mp4@") and clip.transition is None


def test_references_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        Clip(torch.zeros(4, 2, 2, 2), torch.zeros(4, 3, 2, 2), None, None, "", "x", "film")
