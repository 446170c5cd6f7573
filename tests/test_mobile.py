"""MobileI2V on tiny twins, with an LTX VAE and on motion fields: the spec's acceptance tests (section 7), resuming."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from swifti2v import motion_field, presets
from swifti2v.core import Chunk, Event, Request, Size, UsageError
from swifti2v.images import read_image
from swifti2v.journal import Job, Manifest
from swifti2v.mobile import MobileI2VPipeline, levels
from swifti2v.models.ltx_vae import LTXCodec
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.positions import rope_tables
from swifti2v.motion_score import motion_score
from swifti2v.reference import fit_image
from swifti2v.segments import CSG
from swifti2v.tiny import ltx_vae, tiny_mobile

FAMILIES = ["mobile", "mobile-nano"]
SIDE = {"mobile": Size(72, 52), "mobile-nano": Size(192, 128)}  # 72x52 is a multiple of 4 alone
STRIDE = {"mobile": 8, "mobile-nano": 4}


def request(family: str, frames: int = 17, **fields: Any) -> Request:
    preset = presets.get(f"tiny-{family}")
    made, _ = presets.resolve(preset, prompt="", size=str(SIDE[family]), num_frames=frames, seed=3, **fields)
    assert made.size == SIDE[family]
    return made


def photo(family: str) -> Tensor:
    size = SIDE[family]
    return torch.rand(1, 3, 1, size.height, size.width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def video(pipeline: MobileI2VPipeline, family: str, made: Request, **kwargs: Any) -> Tensor:
    return torch.cat([chunk.frames for chunk in pipeline.stream(photo(family), made, **kwargs)], dim=2)


class Watch:
    """Every call of the transformer: what went in."""

    def __init__(self, pipeline: MobileI2VPipeline) -> None:
        self.calls: list[dict[str, Any]] = []
        self.hook = pipeline.transformer.register_forward_pre_hook(
            lambda _m, _a, kwargs: self.calls.append(kwargs), with_kwargs=True
        )


# --- noise levels -----------------------------------------------------------------------------------------------


def test_thirty_steps_are_those_of_the_published_sampler() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(30)
    ours = levels(30, 3.0)
    np.testing.assert_allclose(ours, stock.sigmas.numpy(), atol=1e-6)
    assert [round(1000 * s, 1) for s in ours[:4]] == [1000.0, 988.3, 976.0, 963.1]
    assert ours[0] == 1.0 and ours[-1] == 0.0 and round(ours[-2], 4) == 0.0089


def test_one_and_two_steps_are_not_the_schedulers_trap() -> None:
    assert levels(2, 3.0) == (1.0, 0.75, 0.0) and levels(1, 3.0) == (1.0, 0.0)
    trap = FlowMatchEulerDiscreteScheduler(shift=3.0)
    trap.set_timesteps(2)
    assert trap.sigmas[1] < 0.01


@given(st.integers(1, 100), st.floats(0.5, 12))
def test_levels_fall_from_one_to_zero(steps: int, shift: float) -> None:
    found = levels(steps, shift)
    assert len(found) == steps + 1 and (found[0], found[-1]) == (pytest.approx(1, abs=1e-12), 0)
    assert all(a > b for a, b in pairwise(found))


# --- acceptance tests of the spec's section 7 ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_0_is_pinned_bit_by_bit_and_sees_no_noise(family: str, steps: int) -> None:
    pipeline, made = tiny_mobile(family), request(family, num_inference_steps=steps)
    watch = Watch(pipeline)
    anchor = next(iter(pipeline.latents(photo(family), made)))
    whole = torch.cat(list(pipeline.latents(photo(family), made)), dim=2)
    assert torch.equal(whole[:, :, :1], anchor)
    assert len(watch.calls) == steps  # one segment
    for call, sigma in zip(watch.calls, levels(steps, made.shift)[:-1], strict=True):
        assert torch.equal(call["hidden_states"][:, :, :1], anchor)
        assert call["timestep"][0, 0] == 0 and torch.allclose(call["timestep"][:, 1:], torch.tensor(1000 * sigma))
        assert call["frame_indices"].tolist() == list(range(whole.shape[2]))
    assert not torch.equal(whole[:, :, 1], whole[:, :, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_motion_score_and_seed_matter_and_text_does_not(family: str) -> None:
    pipeline, made = tiny_mobile(family), request(family)
    first = video(pipeline, family, made)
    assert torch.equal(first, video(pipeline, family, made))
    assert torch.equal(first, video(pipeline, family, made.model_copy(update={"prompt": "zoom in"})))
    assert torch.equal(first, video(pipeline, family, made.model_copy(update={"motion_score": None})))  # 2.0
    assert not torch.equal(first, video(pipeline, family, made.model_copy(update={"motion_score": 5.0})))
    assert not torch.equal(first, video(pipeline, family, made.model_copy(update={"seed": 4})))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"negative_prompt": "blurry"}, "has no text"),
        ({"guidance_scale": 4.5}, "guidance_scale 4.5"),
        ({"num_inference_steps_2": 8}, "one stage"),
        ({"guidance_scale_2": 2.0}, "one stage"),
        ({"shift_2": 2.0}, "one stage"),
        ({"strength_2": 0.5}, "one stage"),
        ({"encode": "ahead"}, "one stage"),
        ({"motion_sha256": "ab"}, "motion: .*one stage"),
        ({"motion_score": -1}, "motion_score -1"),
        ({"motion_score": 101.0}, "motion_score 101"),
        ({"motion_score": float("nan")}, "motion_score nan"),
    ],
)
def test_what_it_cannot_do_is_refused(family: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        request(family, **fields)


def test_a_prompt_is_answered_with_a_notice_and_others_refuse_a_motion_score() -> None:
    _, notices = presets.resolve(presets.get("mobile"), prompt="pan left", seed=1)
    assert len(notices) == 1 and "does not read text" in notices[0]
    for name in ("nano", "wan", "wan-refine"):
        with pytest.raises(UsageError, match="motion_score 2"):
            presets.resolve(presets.get(name), prompt="", seed=1, motion_score=2.0)


def test_a_recorded_request_is_held_to_the_same_rules() -> None:
    made = request("mobile")
    assert presets.check(made).name == "tiny-mobile"
    with pytest.raises(UsageError, match="guidance_scale 3"):
        presets.check(made.model_copy(update={"guidance_scale": 3.0}))
    with pytest.raises(UsageError, match="8k\\+1"):
        presets.check(made.model_copy(update={"num_frames": 21}))


def test_a_square_grid_has_a_table_for_each_axis_and_720p_is_squeezed_as_published() -> None:
    """The original's cache forgot the scale: on square grids x got y's table. Rows and columns must differ here."""
    cos, _ = rope_tables(torch.arange(3), (4, 4), 72, 16)
    table = cos.unflatten(0, (3, 4, 4))
    y, x = table[..., 24:48], table[..., 48:]
    assert torch.equal(y, x.transpose(1, 2)) and not torch.equal(y, x)
    published, _ = rope_tables(torch.arange(3), (23, 40), 72, 16)
    angle = torch.arange(23) / 1.4375
    torch.testing.assert_close(published.unflatten(0, (3, 23, 40))[0, :, 0, 24], angle.cos())
    torch.testing.assert_close(published.unflatten(0, (3, 23, 40))[0, 0, :, 48], (torch.arange(40) / 2.5).cos())


@given(t=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4))
def test_tokens_go_in_and_come_out_in_the_same_order(t: int, h: int, w: int) -> None:
    """t-major, then rows, then columns: without layers, identity weights return the latents where they were."""
    net = MobileTransformer3DModel(4, 4, 8, 2, attention_pattern=(), motion_embedding=False).eval()
    with torch.no_grad():
        for layer, eye in ((net.patch_embed, torch.eye(8, 4)), (net.proj_out, torch.eye(4, 8))):
            layer.weight.copy_(eye), layer.bias.zero_()
        net.final_table.zero_(), net.time_embed.linear_2.weight.zero_(), net.time_embed.linear_2.bias.zero_()
        z = torch.randn(1, 4, t, h, w)
        out = net(z, torch.zeros(1, t), return_dict=False)[0]
        padded = torch.cat([z, torch.zeros_like(z)], dim=1).movedim(1, -1)  # the final norm sees 8 channels
        expected = torch.nn.functional.layer_norm(padded, (8,), eps=1e-6)[..., :4].movedim(-1, 1)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("rows", "latent"), [(720, 23), (1080, 34), (540, 17), (352, 11), (4, 1), (32, 1), (36, 2)])
def test_ceil_geometry(rows: int, latent: int) -> None:
    grid, size = presets.get("mobile").grid, Size(128, rows)
    assert grid.is_legal(size) and grid.snap(size) == size
    assert grid.stage_two.latent_size(size) == Size(4, latent)
    assert grid.stage_two.tokens_per_block(Size(1280, 720)) == 920  # 2,760 in three blocks
    codec = LTXCodec(ltx_vae())
    z = codec.encode(torch.zeros(1, 3, 1, rows, 4))
    assert z.shape == (1, 8, 1, latent, 1)
    assert codec.decode(z, rows, 4).shape == (1, 3, 1, rows, 4)


def test_the_published_vaes_geometry_on_meta() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo()
        assert vae.encoder(torch.empty(1, 3, 1, 720, 1280)).shape[2:] == (1, 23, 40)
        assert vae.encoder(torch.empty(1, 3, 17, 180, 160)).shape[2:] == (3, 6, 5)
        assert vae.decoder(torch.empty(1, 128, 3, 6, 5)).shape == (1, 3, 17, 192, 160)


# --- the LTX codec ------------------------------------------------------------------------------------------------


def test_block_0_is_the_photos_latent_and_the_mode_repeats() -> None:
    codec, clip = LTXCodec(ltx_vae()), torch.rand(1, 3, 17, 36, 64) * 2 - 1
    z = codec.encode(clip)
    assert z.shape == (1, 8, 3, 2, 2) and torch.equal(z, codec.encode(clip))
    torch.testing.assert_close(z[:, :, :1], codec.encode(clip[:, :, :1]), atol=1e-5, rtol=0)


def test_decoding_is_cropped_at_the_top_left() -> None:
    vae = ltx_vae()
    z = torch.randn(1, 8, 2, 2, 3)
    whole = vae.decode(z).sample.detach().clamp(-1, 1)
    assert whole.shape == (1, 3, 9, 64, 96)
    assert torch.equal(LTXCodec(vae).decode(z, 52, 72), whole[..., :52, :72])


def test_latent_norms() -> None:
    vae = ltx_vae()
    vae.latents_mean.copy_(torch.arange(8)), vae.latents_std.copy_(torch.arange(1, 9))
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    raw, normed = LTXCodec(vae).encode(pixels), LTXCodec(vae, latent_norm="per_channel").encode(pixels)
    shape = (1, 8, 1, 1, 1)
    torch.testing.assert_close(normed, (raw - torch.arange(8).view(shape)) / torch.arange(1, 9).view(shape))
    same = [LTXCodec(vae, None, norm).decode(z, 32, 32) for norm, z in (("raw", raw), ("per_channel", normed))]
    torch.testing.assert_close(*same, atol=1e-4, rtol=0)


def test_misfits_are_refused_at_load() -> None:
    scaled = AutoencoderKLLTXVideo(**{**ltx_vae().config, "scaling_factor": 0.41407})
    with pytest.raises(ValueError, match=r"scaling_factor 0\.41407"):
        LTXCodec(scaled)
    assert LTXCodec(scaled, latent_norm="per_channel").latent_norm == "per_channel"
    with pytest.raises(ValueError, match="latent_norm 'log'"):
        LTXCodec(ltx_vae(), latent_norm="log")
    one, two = tiny_mobile("mobile"), tiny_mobile("mobile-nano")
    for parts, says in (
        ({"transformer": one.transformer, "vae": two.vae, "preset": "tiny-mobile-nano"}, "takes 8 channels"),
        ({"transformer": two.transformer, "vae": two.vae, "preset": "tiny-mobile"}, "strides and channels"),
        ({"transformer": two.transformer, "vae": two.vae, "preset": "tiny-nano"}, "not one of MobileI2V's"),
        (
            {"transformer": two.transformer, "vae": two.vae, "preset": "tiny-mobile-nano", "latent_norm": "raw"},
            "field",
        ),
        ({"transformer": mute(), "vae": one.vae, "preset": "tiny-mobile"}, "motion embedding"),
    ):
        with pytest.raises(ValueError, match=says):
            MobileI2VPipeline(scheduler=None, **parts)  # type: ignore[arg-type]


def mute() -> MobileTransformer3DModel:
    return MobileTransformer3DModel(8, 8, 48, 2, attention_pattern=("linear",), motion_embedding=False)


# --- longer clips, streaming, resuming ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_frame_0_then_the_frames_of_every_segment(family: str) -> None:
    s, pipeline, events = STRIDE[family], tiny_mobile(family), list[Event]()
    per = presets.get(f"tiny-{family}").defaults["csg"].segment_blocks
    frames = s * (2 * per + 1) + 1
    log: list[str] = []

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == "progress" and event.phase == "refine":
            log.append(f"refine {event.segment}")

    chunks: list[Chunk] = []
    for chunk in pipeline.stream(photo(family), request(family, frames), emit=emit):
        chunks.append(chunk)
        log.append(f"chunk {chunk.segment}")
    assert [c.frames.shape[2] for c in chunks] == [1, s * per, s * per, s]
    assert [c.start for c in chunks] == [0, 1, 1 + s * per, 1 + 2 * s * per]
    assert all(c.frames.shape[3:] == (SIDE[family].height, SIDE[family].width) for c in chunks)
    assert all(c.num_segments == 3 and c.frames.abs().max() <= 1 for c in chunks)
    assert events[0].type == "started" and events[-1].type == "completed"
    assert [e.segment for e in events if e.type == "segment"] == [1, 2, 3]
    if family == "mobile-nano":
        assert log[0] == "chunk 0" and log.index("chunk 1") < log.index("refine 2")


def test_longer_clips_of_mobile_are_windows_of_two_blocks_and_a_neighbor() -> None:
    pipeline = tiny_mobile("mobile")
    watch = Watch(pipeline)
    list(pipeline.latents(photo("mobile"), request("mobile", 41, num_inference_steps=1)))
    assert [c["hidden_states"].shape[2] for c in watch.calls] == [3, 4, 3]
    assert [c["timestep"][0].tolist() for c in watch.calls] == [[0, 1000, 1000], [0, 0, 1000, 1000], [0, 0, 1000]]
    assert [c["frame_indices"].tolist() for c in watch.calls] == [[0, 1, 2], [0, 0, 1, 2], [0, 1, 2]]


def test_nano_is_told_the_photo_in_every_block() -> None:
    pipeline = tiny_mobile("mobile-nano")
    told = motion_field.reference(pipeline.vae, photo("mobile-nano"))
    watch = Watch(pipeline)
    list(pipeline.latents(photo("mobile-nano"), request("mobile-nano", 33, num_inference_steps=1)))
    for call, blocks in zip(watch.calls, (5, 6), strict=True):  # anchor, neighbor, four blocks
        assert torch.equal(call["reference_hidden_states"], told.expand(-1, -1, blocks, -1, -1))
        assert not call["hidden_states"][:, :, 0].any()  # frame 0 has not moved


def test_nanos_segments_follow_each_other_without_a_jump() -> None:
    """The field goes on from where the segment before left it: frames beside a boundary differ as others do."""
    pipeline, made = tiny_mobile("mobile-nano"), request("mobile-nano", 33)
    latents = torch.cat(list(pipeline.latents(photo("mobile-nano"), made)), dim=2)
    alike = torch.cat([latents[:, :, :1], latents[:, :, 1:2].expand(-1, -1, 8, -1, -1)], dim=2)
    smooth = photo("mobile-nano").cumsum(-1) / 40
    frames = torch.cat(list(motion_field.decode_stream(alike.split([1, 4, 4], dim=2), smooth, 2.0)), dim=2)
    steps = (frames[:, :, 1:] - frames[:, :, :-1]).abs().mean(dim=(0, 1, 3, 4))
    assert steps.max() < 2 * steps.min()


class Memory:
    """A journal in memory that fails after a number of saves: what a crash leaves is what was saved."""

    def __init__(self, lives: int) -> None:
        self.lives, self.done = lives, list[Tensor]()

    def motion(self) -> list[Tensor]:
        return []

    def stream(self, kind: str) -> Iterator[Tensor]:
        yield from list(self.done if kind == "segments" else [])

    def save_motion(self, number: int, latents: Tensor, blocks: Any) -> None:
        raise AssertionError("there is no Stage I")

    def save_segment(self, number: int, latents: Tensor, blocks: Any) -> None:
        assert number == len(self.done) and len(blocks) == latents.shape[2]
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        self.done.append(latents)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_at_every_save_equals_undisturbed(family: str) -> None:
    pipeline, made = tiny_mobile(family), request(family, 41)
    segments = 3
    whole = video(pipeline, family, made)
    for lives in range(segments):
        journal = Memory(lives)
        with pytest.raises(KeyboardInterrupt):
            video(pipeline, family, made, job=journal)
        journal.lives = 99
        steps: list[Event] = []
        assert torch.equal(whole, video(pipeline, family, made, job=journal, emit=steps.append))
        assert sum(e.type == "progress" and e.phase == "refine" for e in steps) == 2 * (segments - lives)


def test_a_real_job_holds_what_was_finished(tmp_path: Path) -> None:
    pipeline, made = tiny_mobile("mobile-nano"), request("mobile-nano", 41)
    job = Job.create(tmp_path / "a.job", Manifest(request=made, output="a.mp4"), photo("mobile-nano"))
    chunks = pipeline.stream(photo("mobile-nano"), made, job=job)
    first = [next(chunks), next(chunks)]
    chunks.close()
    job.close()
    with Job.open(tmp_path / "a.job") as again:
        assert len(again.segments()) == 1 and again.motion() == []
        resumed = list(pipeline.stream(photo("mobile-nano"), made, job=again))
    for a, b in zip(first, resumed, strict=False):
        assert torch.equal(a.frames, b.frames)


def test_the_renoising_sampler_for_students() -> None:
    pipeline, made = tiny_mobile("mobile"), request("mobile")
    other = video(pipeline, "mobile", made.model_copy(update={"sampler_2": "renoise"}))
    assert other.isfinite().all() and not torch.equal(other, video(pipeline, "mobile", made))


def test_other_windows_and_the_turbo_decoder() -> None:
    turbo, made = tiny_mobile("mobile", turbo=True), request("mobile", 25, csg=CSG(segment_blocks=1))
    frames = video(turbo, "mobile", made)
    assert frames.shape == (1, 3, 25, 52, 72)
    plain = video(tiny_mobile("mobile"), "mobile", made)
    assert plain.shape == frames.shape and not torch.equal(plain, frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_first_frame_and_misuse(family: str) -> None:
    pipeline, made = tiny_mobile(family), request(family)
    exact = video(pipeline, family, made.model_copy(update={"exact_first_frame": True}))
    assert torch.equal(exact[:, :, :1], photo(family))
    with pytest.raises(ValueError, match="use fit_image"):
        next(pipeline.stream(photo(family)[..., :-4], made))
    with pytest.raises(ValueError, match="one stage"):
        next(pipeline.stream(photo(family), made, motion=[]))


# --- diffusers' side of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_call_has_diffusers_names(family: str, tmp_path: Path) -> None:
    pipeline, size = tiny_mobile(family), SIDE[family]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8))
    asked: dict[str, Any] = {"image": picture, "height": size.height, "width": size.width, "seed": 1}
    frames = pipeline(**asked, output_type="pt").frames
    assert frames.shape == (1, 17, 3, size.height, size.width)
    assert torch.equal(frames, pipeline(**asked, prompt="zoom in", output_type="pt", return_dict=False)[0])
    assert not torch.equal(frames, pipeline(**asked, motion_score=9.0, output_type="pt").frames)
    seeded = [
        pipeline(**{**asked, "seed": None}, generator=torch.Generator().manual_seed(5), output_type="pt").frames
        for _ in range(2)
    ]
    assert torch.equal(*seeded)
    seen: list[int] = []
    pipeline(**asked, num_inference_steps=3, callback_on_step_end=lambda _p, step, _t, _k: seen.append(step))
    assert seen == [1, 2, 3]
    with pytest.raises(UsageError, match="guidance_scale 4"):
        pipeline(**asked, guidance_scale=4.5)
    with pytest.raises(UsageError, match="has no text"):
        pipeline(**asked, negative_prompt="blur")


@pytest.mark.parametrize("turbo", [False, True])
def test_saved_and_loaded(turbo: bool, tmp_path: Path) -> None:
    pipeline, made = tiny_mobile("mobile", turbo=turbo), request("mobile")
    pipeline.save_pretrained(tmp_path / "saved")
    again = MobileI2VPipeline.from_pretrained(tmp_path / "saved")
    assert again.preset.name == "tiny-mobile" and again.config.latent_norm == "raw"
    assert (again.decoder is not None) == turbo
    assert torch.equal(video(pipeline, "mobile", made), video(again, "mobile", made))
    hashes = again.fingerprint()["model_hashes"]
    assert {name.split("/")[0] for name in hashes} >= {"transformer", "vae", "scheduler", "model_index.json"}


def test_a_folder_without_vae_shares_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, made = tiny_mobile("mobile-nano"), request("mobile-nano")
    pipeline.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vae").rename(tmp_path / "vae")
    with pytest.raises(OSError):
        MobileI2VPipeline.from_pretrained(tmp_path / "saved")
    monkeypatch.setattr(presets.Preset, "vae_folder", tmp_path / "vae")
    again = MobileI2VPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(video(pipeline, "mobile-nano", made), video(again, "mobile-nano", made))
    hashes = again.fingerprint()["model_hashes"]
    assert {name.split("/")[0] for name in hashes} >= {"transformer", "vae"}


def test_from_parts(tmp_path: Path) -> None:
    pipeline, made = tiny_mobile("mobile", turbo=True), request("mobile")
    pipeline.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "whole"
    given = (folder / "transformer", folder, folder / "decoder")  # a folder, or one that holds it
    again = MobileI2VPipeline.from_parts(*given, preset="tiny-mobile")
    assert torch.equal(video(pipeline, "mobile", made), video(again, "mobile", made))
    with pytest.raises(UsageError, match="no config"):
        MobileI2VPipeline.from_parts(tmp_path / "gone", folder)


# --- the weights that ship -------------------------------------------------------------------------------------------


def test_shipped_weights_move_the_photo_as_much_as_asked_and_otherwise_with_every_seed() -> None:
    pytest.importorskip("cv2")
    pipeline = MobileI2VPipeline.from_pretrained("mobile-nano")
    source = read_image(Path(__file__).parent.parent / "examples" / "photo.jpg")
    fields, scores = [], []
    for seed, score in ((1, 1.0), (2, 1.0), (1, 3.0)):
        told = {"size": "640x384", "seed": seed, "motion_score": score, "photo_size": source.size}
        made, _ = presets.resolve(pipeline.preset, prompt="", **told)
        assert (made.num_frames, made.num_inference_steps) == (17, 2)
        fitted = fit_image(source.pixels, made.size, made.fit)
        fields.append(torch.cat(list(pipeline.latents(fitted, made)), dim=2))
        clip = torch.cat([chunk.frames for chunk in pipeline.stream(fitted, made)], dim=2)
        torch.testing.assert_close(clip[:, :, 0], fitted[:, :, 0])
        scores.append(motion_score(clip[0]) / score)
    assert all(0.6 < ratio < 1.3 for ratio in scores)
    assert (fields[0] - fields[1]).norm() > 0.4 * fields[0].norm()
