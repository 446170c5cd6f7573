"""Embeddings kept by content: a hit is bit for bit what a miss made, and nothing else is ever a hit."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v import presets, sources
from swifti2v.core import UsageError
from swifti2v.embeddings import Embeddings, check_folder
from swifti2v.memory import choose_placement
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.runs import Reporter
from swifti2v.tiny import tiny_pipeline

FOUND: dict[str, dict[str, str]] = {
    "model_hashes": {
        "text_encoder/model.safetensors": "aa", "stage_1/tokenizer/vocabulary": "bb",
        "image_encoder/model.safetensors": "cc", "transformer/model.safetensors": "dd",
    },
    "versions": {"torch": "2.13"},
    "settings": {"device": "cpu", "dtype": "float32", "threads": "1", "attention": "native"},
}  # fmt: skip


class Encoder:
    """Makes something else at every call, so that a hit shows."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.full((1, 4, 8), float(self.calls), dtype=torch.bfloat16)


def kept(folder: Path, told: list[str] | None = None, **more: Any) -> Embeddings:
    found = copy.deepcopy(FOUND)
    for name, value in more.pop("found", {}).items():
        found[name.split("/")[0]]["/".join(name.split("/")[1:])] = value
    return Embeddings(folder, found, ([] if told is None else told).append, **more)


def test_a_hit_is_what_the_miss_made_bit_for_bit(tmp_path: Path) -> None:
    drawn = torch.randn(1, 7, 16).bfloat16()
    drawn[0, 0, :3] = torch.tensor([float("inf"), -0.0, float("nan")])
    missed = kept(tmp_path / "new").text("pan left", 7, lambda: drawn)
    hit = kept(tmp_path / "new").text("pan left", 7, lambda: torch.zeros(1))
    assert missed is drawn and hit.dtype == drawn.dtype
    assert torch.equal(hit.view(torch.int16), drawn.view(torch.int16))


@pytest.mark.parametrize(
    "change",
    [
        {"found": {"model_hashes/text_encoder/model.safetensors": "other"}},
        {"found": {"model_hashes/stage_1/tokenizer/vocabulary": "other"}},
        {"found": {"versions/torch": "2.14"}},
        {"found": {"settings/dtype": "bfloat16"}},
        {"found": {"settings/threads": "2"}},
        {"prompt": "pan right"},
        {"tokens": 8},
    ],
)
def test_whatever_decides_the_bits_is_in_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    encoder = Encoder()
    kept(tmp_path).text("pan left", 7, encoder)
    more = dict(change)
    prompt, tokens = more.pop("prompt", "pan left"), more.pop("tokens", 7)
    other = kept(tmp_path, **more)
    assert not other.holds_text(prompt, tokens)
    assert float(other.text(prompt, tokens, encoder)[0, 0, 0]) == 2.0


def test_what_does_not_decide_them_is_not(tmp_path: Path) -> None:
    encoder = Encoder()
    kept(tmp_path).text("pan left", 7, encoder)
    for name in ("model_hashes/transformer/model.safetensors", "model_hashes/image_encoder/model.safetensors",
                 "settings/attention"):  # fmt: skip
        other = kept(tmp_path, found={name: "other"})
        assert other.holds_text("pan left", 7) and float(other.text("pan left", 7, encoder)[0, 0, 0]) == 1.0


def test_images_are_known_by_their_pixels(tmp_path: Path) -> None:
    encoder, photo = Encoder(), torch.rand(1, 3, 1, 8, 8)
    changed = photo.clone()
    changed[0, 0, 0, 0, 0] += 0.01
    cache = kept(tmp_path)
    for image in (photo, changed, photo.clone(), photo.reshape(1, 3, 1, 4, 16)):
        cache.image(image, encoder)
    assert encoder.calls == 3 and cache.holds_image(photo) and not cache.holds_image(photo + 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign"])
def test_damaged_entries_are_reported_and_made_again(tmp_path: Path, damage: str) -> None:
    encoder, told = Encoder(), list[str]()
    kept(tmp_path).text("pan left", 7, encoder)
    (entry,) = tmp_path.iterdir()
    data = entry.read_bytes()
    changed = {
        "cut": data[:-5], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b"", "text": b"words" * 40,
        "foreign": data.replace(b"states", b"stares"),
    }  # fmt: skip
    entry.write_bytes(changed[damage])
    cache = kept(tmp_path, told)
    assert float(cache.text("pan left", 7, encoder)[0, 0, 0]) == 2.0
    assert len(told) == 1 and "damaged and is made again" in told[0] and "\n" not in told[0]
    assert float(cache.text("pan left", 7, encoder)[0, 0, 0]) == 2.0 and len(told) == 1


def test_the_oldest_leave_and_strangers_stay(tmp_path: Path) -> None:
    encoder = Encoder()
    kept(tmp_path).text("0", 7, encoder)
    size = next(tmp_path.iterdir()).stat().st_size
    cache = kept(tmp_path, max_bytes=3 * size)
    (tmp_path / "notes.safetensors").write_bytes(b"x" * 10 * size)
    stale = tmp_path / f".{'0' * 64}.1.tmp"
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    for number in range(5):
        cache.text(str(number), 7, encoder)
        entry = cache._path(cache._text_key(str(number), 7))
        os.utime(entry, (1000 + number, 1000 + number))
    assert [cache.holds_text(str(number), 7) for number in range(5)] == [False, False, True, True, True]
    assert (tmp_path / "notes.safetensors").exists() and not stale.exists()
    assert kept(tmp_path / "small", max_bytes=size // 2).text("0", 7, encoder) is not None
    assert list((tmp_path / "small").iterdir()) == []


def test_a_folder_that_cannot_keep_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    encoder, told = Encoder(), list[str]()
    assert float(kept(tmp_path / "file" / "in", told).text("a", 7, encoder)[0, 0, 0]) == 1.0
    assert len(told) == 1 and "could not be kept" in told[0]


def test_folders_are_checked_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    check_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    for wrong in ("file", "file/in"):
        with pytest.raises(UsageError, match="file is not a folder"):
            check_folder(tmp_path / wrong)


def test_encoders_that_nobody_hashed_are_an_error(tmp_path: Path) -> None:
    cache = Embeddings(tmp_path, {**FOUND, "model_hashes": {}}, [].append)
    with pytest.raises(ValueError, match="not hashed"):
        cache.text("a", 7, Encoder())


def test_with_all_kept_no_encoder_is_needed(tmp_path: Path) -> None:
    """Conditions without a text or an image encoder, equal bit for bit."""
    tiny_pipeline("wan").save_pretrained(tmp_path / "weights")
    pipeline = SwiftI2VPipeline.from_pretrained(tmp_path / "weights")
    sources.place_pipeline(pipeline, choose_placement("cpu", "float32", 1))
    photo = torch.rand(1, 3, 1, 64, 128)
    request, _ = presets.resolve(pipeline.preset, prompt="pan left", seed=3, guidance_scale=2.0)

    def told() -> Any:
        with torch.no_grad():
            return pipeline.encode(photo, request, Reporter(None))

    plain = told()
    pipeline.embeddings = Embeddings(tmp_path / "cache", pipeline.fingerprint(), [].append)
    missed = told()
    assert len(list((tmp_path / "cache").iterdir())) == 3  # the prompt, the negative prompt, the photo
    pipeline.text_encoder.forward = pipeline.image_encoder.forward = None
    hit = told()
    for name in ("text", "negative_text", "image_embeds"):
        a, b, c = (getattr(conditions, name) for conditions in (plain, missed, hit))
        assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == c.dtype
