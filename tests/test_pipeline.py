"""The pipeline end to end on tiny twins of every preset: streaming, resume, diffusers' own features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from swifti2v import presets
from swifti2v.core import Chunk, Event, Request, RunError, UsageError
from swifti2v.journal import Job, Manifest
from swifti2v.lora import load_lora
from swifti2v.models.causal_vae import decode_stream, streaming
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import CSG
from swifti2v.tiny import tiny_pipeline

FAMILIES = ["nano", "wan", "wan-refine"]


def request(family: str, frames: int = 33, **fields: Any) -> Request:
    preset = presets.get(f"tiny-{family}")
    made, _ = presets.resolve(preset, prompt="slow pan left", size="128x64", num_frames=frames, seed=3, **fields)
    return made


def photo() -> Tensor:
    return torch.rand(1, 3, 1, 64, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1


def video(pipeline: SwiftI2VPipeline, made: Request, **kwargs: Any) -> Tensor:
    return torch.cat([chunk.frames for chunk in pipeline.stream(photo(), made, **kwargs)], dim=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_frame_0_then_segments_in_order(family: str) -> None:
    pipeline, events = tiny_pipeline(family), list[Event]()
    log: list[str] = []
    chunks: list[Chunk] = []

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == "progress" and event.phase in ("motion", "refine"):
            log.append(f"{event.phase} {event.segment}")

    for chunk in pipeline.stream(photo(), request(family), emit=emit):
        chunks.append(chunk)
        log.append(f"chunk {chunk.segment}")
    assert [c.frames.shape[2] for c in chunks] == [1, 12, 12, 8] and [c.start for c in chunks] == [0, 1, 13, 25]
    assert log[0] == "chunk 0"
    assert log.index("chunk 1") < log.index("refine 2") and log.index("chunk 2") < log.index("refine 3")
    assert events[0].type == "started" and events[-1].type == "completed"
    assert [e.segment for e in events if e.type == "segment"] == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_repeats_and_seed_and_prompt_matter(family: str) -> None:
    pipeline, made = tiny_pipeline(family), request(family, 17)
    first = video(pipeline, made)
    assert torch.equal(first, video(pipeline, made))
    assert not torch.equal(first, video(pipeline, made.model_copy(update={"seed": 4})))
    assert not torch.equal(first, video(pipeline, made.model_copy(update={"prompt": "zoom in"})))
    assert torch.equal(first, video(pipeline, made.model_copy(update={"encode": "ahead"})))


class Memory:
    """A journal in memory that fails after a number of saves: what a crash leaves is what was saved."""

    def __init__(self, lives: int) -> None:
        self.lives, self.windows, self.done = lives, list[Tensor](), list[Tensor]()

    def motion(self) -> list[Tensor]:
        return list(self.windows)

    def stream(self, kind: str) -> Iterator[Tensor]:
        yield from list(self.windows if kind == "motion" else self.done)

    def save_motion(self, number: int, latents: Tensor, blocks: Any) -> None:
        assert number == len(self.windows) and len(blocks) == latents.shape[2]
        self._live()
        self.windows.append(latents)

    def save_segment(self, number: int, latents: Tensor, blocks: Any) -> None:
        assert number == len(self.done) and len(blocks) == latents.shape[2]
        self._live()
        self.done.append(latents)

    def _live(self) -> None:
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1


@pytest.mark.parametrize("family", ["nano", "wan"])
def test_resumed_at_every_save_equals_undisturbed(family: str) -> None:
    pipeline, made = tiny_pipeline(family), request(family)  # 9 blocks: 3 Stage I windows, 3 segments
    whole = video(pipeline, made)
    for lives in range(6):
        journal, total = Memory(lives), 0
        with pytest.raises(KeyboardInterrupt):
            video(pipeline, made, job=journal)
        journal.lives = 99
        steps: list[Event] = []
        again = video(pipeline, made, job=journal, emit=steps.append)
        total = sum(e.type == "progress" and e.phase in ("motion", "refine") for e in steps)
        assert torch.equal(whole, again)
        assert total == 2 * (6 - lives)


def test_real_job_holds_what_was_finished(tmp_path: Path) -> None:
    pipeline, made = tiny_pipeline("nano"), request("nano")
    job = Job.create(tmp_path / "a.job", Manifest(request=made, output="a.mp4"), photo())
    chunks = pipeline.stream(photo(), made, job=job)
    first = [next(chunks), next(chunks)]
    chunks.close()
    job.close()
    with Job.open(tmp_path / "a.job") as again:
        assert len(again.segments()) == 1 and len(again.motion()) >= 1
        resumed = list(pipeline.stream(photo(), made, job=again))
    for a, b in zip(first, resumed, strict=False):
        assert torch.equal(a.frames, b.frames)


def test_untrained_stage_two_is_refused_with_the_way_out() -> None:
    with pytest.raises(RunError, match="wan-refine"):
        next(tiny_pipeline("wan", trained=False).stream(photo(), request("wan")))


def test_motion_from_outside_replaces_stage_one() -> None:
    pipeline, made = tiny_pipeline("nano"), request("nano", 17)
    own = torch.cat(list(pipeline.motion(photo(), made)), dim=2)
    assert own.shape == (1, 3, 17, 16, 32)
    whole = video(pipeline, made)
    torch.testing.assert_close(whole, video(pipeline, made, motion=own.split([3, 5, 9], dim=2)))
    with pytest.raises(RunError, match="ends after"):
        video(pipeline, made, motion=own[:, :, :9].split(3, dim=2))


def test_exact_first_frame_and_frame_0_is_the_decoded_anchor() -> None:
    pipeline, made = tiny_pipeline("nano"), request("nano", 9)
    exact = video(pipeline, made.model_copy(update={"exact_first_frame": True}))
    assert torch.equal(exact[:, :, :1], photo())
    plain = video(pipeline, made)
    assert torch.equal(exact[:, :, 1:], plain[:, :, 1:]) and not torch.equal(plain[:, :, :1], photo())


def test_streamed_video_equals_one_shot_decode_of_the_latents() -> None:
    pipeline, made = tiny_pipeline("wan"), request("wan")
    journal = Memory(99)
    streamed = video(pipeline, made, job=journal)
    vae = streaming(pipeline.vae_2)
    anchor = pipeline.vae_2.encode(photo()).latent_dist.mode()
    latents = torch.cat([anchor, *journal.done], dim=2)
    assert torch.equal(streamed, torch.cat(list(decode_stream(vae, [latents])), dim=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_makes_the_same_video(family: str, tmp_path: Path) -> None:
    pipeline, made = tiny_pipeline(family), request(family, 9)
    expected = video(pipeline, made)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = SwiftI2VPipeline.from_pretrained(tmp_path / "model")
    assert loaded.preset.name == f"tiny-{family}"
    # Weights in a mapped file are aligned differently, so kernels may round differently; two loads must not differ.
    torch.testing.assert_close(video(loaded, made), expected, atol=1e-4, rtol=0)
    again = SwiftI2VPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(video(again, made), video(loaded, made))
    hashes = loaded.fingerprint()["model_hashes"]
    assert any(name.endswith(".safetensors") for name in hashes)


def test_from_wan_widens_or_keeps(tmp_path: Path) -> None:
    parts = tiny_pipeline("wan-refine")
    for name, used in (("one", ("transformer", "vae")), ("two", ("transformer_2", "vae_2"))):
        for folder, component in zip(("transformer", "vae"), used, strict=True):
            getattr(parts, component).save_pretrained(tmp_path / name / folder)
    for preset, channels in (("tiny-wan", 8), ("tiny-wan-refine", 4)):
        made = SwiftI2VPipeline.from_wan(tmp_path / "one", tmp_path / "two", preset=preset, torch_dtype=torch.float32)
        assert made.transformer_2.config.in_channels == channels
        assert getattr(made.transformer_2.config, "reference_is_untrained", False) == (preset == "tiny-wan")


def test_call_speaks_diffusers(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("nano")
    image = Image.fromarray((np.random.default_rng(0).random((70, 140, 3)) * 255).astype("uint8"))
    kwargs: dict[str, Any] = {"image": image, "prompt": "zoom in", "height": 64, "width": 128, "num_frames": 9}
    steps: list[int] = []
    frames = pipeline(
        **kwargs, seed=1, callback_on_step_end=lambda p, i, t, k: steps.append(i), output_type="np"
    ).frames
    assert frames.shape == (1, 9, 64, 128, 3) and frames.min() >= 0 and frames.max() <= 1 and steps
    drawn = [
        pipeline(**kwargs, generator=torch.Generator().manual_seed(5), output_type="pt", return_dict=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*drawn)
    with pytest.raises(UsageError, match="num_frames"):
        pipeline(**{**kwargs, "num_frames": 0})


@pytest.mark.parametrize(
    "policy",
    [
        {"neighbor_blocks": 0},
        {"segment_blocks": 1, "neighbor_blocks": 2},
        {"rope_positions": "window"},
        {"rope_positions": "absolute"},
        {"neighbor_timestep": "current"},
        {"neighbor_reference": "generated"},
        {"round_timesteps_bf16": True},
    ],
)
def test_every_open_question_of_the_paper_is_a_setting_with_effect(policy: dict[str, Any]) -> None:
    pipeline, made = tiny_pipeline("wan"), request("wan")
    base = video(pipeline, made)
    assert not torch.equal(base, video(pipeline, made.model_copy(update={"csg": CSG(**policy)})))


# --- diffusers' own features ---------------------------------------------------------------------------------


def lora_file(path: Path, model: torch.nn.Module, scale: float = 0.3) -> Path:
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = scale * torch.randn(
                module.out_features, 4, generator=generator
            )
    save_file(tensors, path)
    return path


def test_lora_loads_stacks_and_unloads(tmp_path: Path) -> None:
    pipeline, made = tiny_pipeline("wan"), request("wan", 9)
    base = video(pipeline, made)
    file = lora_file(tmp_path / "few_step.safetensors", pipeline.transformer)
    load_lora(pipeline, file, adapter_name="few_step", stage="one")
    one = video(pipeline, made)
    load_lora(pipeline, file, adapter_name="low_res", stage="one")
    two = video(pipeline, made)
    assert not torch.equal(base, one) and not torch.equal(one, two)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(base, video(pipeline, made))


@pytest.mark.parametrize("family", ["nano", "wan"])
def test_group_offload_changes_nothing(family: str) -> None:
    pipeline, made = tiny_pipeline(family), request(family, 9)
    base = video(pipeline, made)
    for model in (pipeline.transformer, pipeline.transformer_2):
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    assert torch.equal(base, video(pipeline, made))


def test_torchao_weight_only_quantization_stays_close(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    from swifti2v.models.wan import SwiftI2VTransformer3DModel

    pipeline, made = tiny_pipeline("wan"), request("wan", 9)
    base = video(pipeline, made)
    pipeline.transformer_2.save_pretrained(tmp_path / "two")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pipeline.transformer_2 = SwiftI2VTransformer3DModel.from_pretrained(tmp_path / "two", quantization_config=config)
    quantized = video(pipeline, made)
    assert not torch.equal(base, quantized)
    assert float((base - quantized).abs().mean()) < 0.1 * float(base.std())


def test_attention_backend_native_math_stays_close() -> None:
    pipeline, made = tiny_pipeline("wan"), request("wan", 9)
    base = video(pipeline, made)
    for model in (pipeline.transformer, pipeline.transformer_2):
        model.set_attention_backend("_native_math")
    try:
        torch.testing.assert_close(base, video(pipeline, made), atol=1e-4, rtol=1e-4)
    finally:  # the active backend is process-wide
        for model in (pipeline.transformer, pipeline.transformer_2):
            model.set_attention_backend("native")


@pytest.mark.slow
def test_regional_compile_stays_close() -> None:
    pipeline, made = tiny_pipeline("wan"), request("wan", 33)
    base = video(pipeline, made)
    pipeline.transformer_2.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(base, video(pipeline, made), atol=1e-4, rtol=1e-4)
