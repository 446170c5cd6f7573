"""Parts that come and go: the same bits, never two large parts at once, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v import parts, presets, sources
from swifti2v.arrangement import Arrangement, Need
from swifti2v.core import Request, RunError
from swifti2v.costs_tiles import DecodePlan, EncodePlan
from swifti2v.models.causal_vae import WanStreamingVAE
from swifti2v.overlap import Lanes
from swifti2v.tiny import tiny_pipeline

LARGE = ("text_encoder", "image_encoder", "transformer", "transformer_2")


def way(**changes: Any) -> Arrangement:
    cuts = {
        "decode": DecodePlan(2, 2, 1, True, 0, 0, 0, 0, 1, 1.0),
        "encode": EncodePlan(1, 2, 1, False, 0, 0, 0, 0, 1, 1.0),
    }
    told: dict[str, Any] = {"phased": True, "streamed": (), "from_disk": False, "encode_when": "lazy", "overlap": True}
    return Arrangement(**{**told, **cuts, "needs": (Need("refine", 1, 1),), "extra_seconds": 0.0, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    tiny_pipeline("wan").save_pretrained(folder)
    return folder


def asked(name: str = "tiny-wan", **fields: Any) -> tuple[Tensor, Request]:
    request, _ = presets.resolve(
        presets.get(name), prompt="slow pan left", seed=1, size="128x64", num_frames=17, **fields
    )
    return torch.rand(1, 3, 1, 64, 128) * 2 - 1, request


def made(pipeline: Any, photo: Tensor, request: Request, **more: Any) -> Tensor:
    return torch.cat([chunk.frames for chunk in pipeline.stream(photo, request, **more)], dim=2)


def loaded(pipeline: Any) -> set[str]:
    here = ((name, getattr(pipeline, name)) for name in LARGE)
    return {name for name, part in here if part is not None and next(part.parameters()).device.type != "meta"}


@pytest.mark.parametrize("overlap", [False, True])
def test_phases_give_the_same_bits(saved: Path, overlap: bool) -> None:
    photo, request = asked()
    whole = sources.load(presets.get("tiny-wan"), model=str(saved), dtype="float32")
    uncut = made(whole, photo, request)
    phased = parts.load(presets.get("tiny-wan"), way(decode=None, encode=None), model=str(saved), dtype="float32")
    assert loaded(phased) == set()
    assert torch.equal(made(phased, photo, request, lanes=Lanes(overlap)), uncut)
    assert loaded(phased) == set()
    assert phased.fingerprint()["settings"] == whole.fingerprint()["settings"]


def test_only_a_phase_s_own_parts_are_there(saved: Path) -> None:
    photo, request = asked()
    pipeline: Any = parts.load(presets.get("tiny-wan"), way(), model=str(saved), dtype="float32")
    seen: list[tuple[str, set[str]]] = []
    alive: list[weakref.ref[nn.Module]] = []

    def look(event: Any) -> None:
        if event.type == "progress":
            seen.append((event.phase, loaded(pipeline)))
            alive.extend(weakref.ref(getattr(pipeline, name)) for name in loaded(pipeline))

    made(pipeline, photo, request, emit=look)
    there = {phase: parts_of for phase, parts_of in seen}  # the last of each phase
    assert there == {
        "text": {"text_encoder", "image_encoder"},
        "motion": {"transformer"},
        "refine": {"transformer_2"},
    }
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)


def test_streamed_parts_give_the_same_bits(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' group offloading, host memory and disk; on a CPU from and to the same device."""
    photo, request = asked()
    expected = made(sources.load(presets.get("tiny-wan"), model=str(saved), dtype="float32"), photo, request)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for from_disk in (False, True):
        streamed = way(
            streamed=("text_encoder", "transformer", "transformer_2"), from_disk=from_disk, decode=None, encode=None
        )
        pipeline = parts.load(presets.get("tiny-wan"), streamed, model=str(saved), dtype="float32")
        assert torch.equal(made(pipeline, photo, request), expected)
        gc.collect()
        assert not list(tmp_path.glob("swifti2v-*"))


def test_the_vae_is_cut_as_arranged(saved: Path) -> None:
    photo, request = asked()
    plain = sources.load(presets.get("tiny-wan"), model=str(saved), dtype="float32")
    cut: Any = parts.load(presets.get("tiny-wan"), way(phased=False), model=str(saved), dtype="float32")
    stream = cut.residency.streaming(cut.vae_2)
    assert isinstance(stream, WanStreamingVAE) and (stream.tiling.rows, stream.tiling.columns) == (2, 2)
    assert torch.allclose(made(cut, photo, request), made(plain, photo, request), atol=1e-4)


def test_two_wan_checkpoints_by_phases(tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    twin: Any = tiny_pipeline("wan-refine")
    shared = {name: getattr(twin, name) for name in ("tokenizer", "text_encoder", "scheduler")}
    eyes = {"image_encoder": twin.image_encoder, "image_processor": twin.image_processor}
    one, two = tmp_path / "one", tmp_path / "two"
    WanImageToVideoPipeline(transformer=twin.transformer, vae=twin.vae, **shared, **eyes).save_pretrained(one)
    WanImageToVideoPipeline(transformer=twin.transformer_2, vae=twin.vae_2, **shared).save_pretrained(two)
    preset, model = presets.get("tiny-wan-refine"), f"{one},{two}"
    photo, request = asked("tiny-wan-refine")
    whole = sources.load(preset, model=model, dtype="float32")
    phased = parts.load(preset, way(decode=None, encode=None), model=model, dtype="float32")
    assert phased.fingerprint()["model_hashes"] == whole.fingerprint()["model_hashes"]
    assert torch.equal(made(phased, photo, request), made(whole, photo, request))


def test_a_finished_stage_one_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    from swifti2v.journal import Job, Manifest

    photo, request = asked()
    pipeline: Any = parts.load(presets.get("tiny-wan"), way(), model=str(saved), dtype="float32")
    with Job.create(tmp_path / "clip.job", Manifest(request=request, output="clip.mp4"), photo) as job:
        stream = pipeline.stream(photo, request, job=job)
        next(stream), next(stream)
        stream.close()
        assert loaded(pipeline) == set()
        pipeline.residency.parts["transformer"] = None  # loading it would fail
        assert made(pipeline, photo, request, job=job).shape[2] == 17


def test_untrained_stage_two_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    tiny_pipeline("wan", trained=False).save_pretrained(tmp_path)
    photo, request = asked()
    pipeline: Any = parts.load(presets.get("tiny-wan"), way(), model=str(tmp_path), dtype="float32")
    with pytest.raises(RunError, match=r"untrained|ignores its reference"):
        next(pipeline.stream(photo, request))
    assert loaded(pipeline) == set()


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    gc.collect()


def test_the_vaes_may_have_a_device_of_their_own(saved: Path) -> None:
    """On a CPU both are the same; what can be seen is that tensors go through the transformers' hooks."""
    photo, request = asked()
    plain = sources.load(presets.get("tiny-wan"), model=str(saved), dtype="float32")
    apart: Any = sources.load(presets.get("tiny-wan"), model=str(saved), dtype="float32", vae_device="cpu")
    assert all(part._hf_hook.io_same_device for part in (apart.transformer, apart.transformer_2))
    assert apart.fingerprint()["settings"]["vae_device"] == "cpu"
    assert torch.equal(made(apart, photo, request, lanes=Lanes(True)), made(plain, photo, request))


def test_a_profile_from_the_command_line_is_kept_by_the_job(saved: Path, tmp_path: Path) -> None:
    from swifti2v import produce
    from swifti2v.journal import Job
    from swifti2v.options import Options
    from swifti2v.order import prepare

    told: dict[str, Any] = {
        "prompt": "slow pan left",
        "preset": "tiny-wan",
        "size": "128x64",
        "num_frames": 33,
        "seed": 1,
    }
    told |= {"image": "examples/photo.jpg", "model": str(saved), "dtype": "float32", "keep_job": True}
    plain = produce.start(prepare(Options(**told, output=str(tmp_path / "plain.mp4"))), lambda event: None)
    order = prepare(Options(**told, profile="24gb", output=str(tmp_path / "fitted.mp4")))
    assert any("profile 24gb" in line for line in order.notices)
    lines: list[str] = []

    def stop(event: Any) -> None:
        lines.append(event.message)
        if event.type == "segment" and event.segment == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce.start(order, stop)
    assert {"text_encoder", "transformer", "transformer_2"} <= set(lines)  # told as they were loaded
    lines.clear()
    fitted = produce.resume(tmp_path / "fitted.job", lambda event: lines.append(event.message))
    assert "transformer" not in lines and "transformer_2" in lines  # Stage I was done
    with Job.open(tmp_path / "plain.job") as one, Job.open(tmp_path / "fitted.job") as two:
        assert produce.arrangement(two.manifest) is not None and produce.arrangement(one.manifest) is None
        for kind in ("motion", "segments"):
            pairs = list(zip(one.stream(kind), two.stream(kind), strict=True))  # type: ignore[arg-type]
            assert pairs and all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert plain.stat().st_size > 0 and fitted.stat().st_size > 0
