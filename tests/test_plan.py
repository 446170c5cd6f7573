"""Plans are right: closed forms against meters, the measured table of the Wan models, and the journal's books."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v import costs, presets
from swifti2v.calibration import Calibration, stored_calibration
from swifti2v.core import Request, UsageError
from swifti2v.costs import EncoderCost, MobileDiTCost, NanoVAECost, Networks, WanDiTCost, WanVAECost
from swifti2v.meters import LiveBytes, measure
from swifti2v.models.causal_vae import streaming
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.plan import Plan, plan
from swifti2v.segments import CSG, windows

GIB, PETA = 2**30, 1e15
SHAPE = {"patch_size": (1, 2, 2), "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}
WAN22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def planned(name: str, size: str = "2560x1408", num_frames: int = 81, **fields: Any) -> Plan:
    preset = presets.get(name)
    request, _ = presets.resolve(preset, prompt="", seed=0, size=size, num_frames=num_frames, **fields)
    return plan(request, preset, networks=NANO if preset.family == "nano" else None)


# -- closed forms equal the meter ------------------------------------------------------------------------------------


def wan_dit(kind: str, **sizes: Any) -> tuple[nn.Module, WanDiTCost, Any]:
    """A Wan DiT on meta, its closed form, and a call of one forward (blocks, latent height, latent width)."""
    heads, head_dim = sizes["num_attention_heads"], sizes["attention_head_dim"]
    image = {"image_dim": 20, "added_kv_proj_dim": heads * head_dim} if kind == "clip" else {}
    channels = {"clip": (36, 16), "block": (12, 4), "token": (4, 4)}[kind]
    cls = SwiftI2VTransformer3DModel if kind == "block" else WanTransformer3DModel
    common = {"text_dim": 24, "freq_dim": 32, "ffn_dim": 70, **sizes}
    with torch.device("meta"):
        net = cls(in_channels=channels[0], out_channels=channels[1], **common, **image)
    cost = WanDiTCost(
        heads=heads,
        head_dim=head_dim,
        layers=sizes["num_layers"],
        in_channels=channels[0],
        out_channels=channels[1],
        ffn=common["ffn_dim"],
        text_dim=common["text_dim"],
        freq_dim=common["freq_dim"],
        image_tokens=257 if image else 0,
        image_dim=20 if image else 0,
        timesteps=kind,
    )

    def forward(t: int, h: int, w: int) -> Any:
        meta = {"device": "meta"}
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 512, common["text_dim"], **meta)}
        latents = channels[1] if kind == "block" else channels[0]
        inputs["hidden_states"] = torch.empty(1, latents, t, h, w, **meta)
        counts = {"clip": (1,), "block": (1, t), "token": (1, t * h * w // 4)}
        inputs["timestep"] = torch.empty(counts[kind], **meta)
        if kind == "block":
            inputs["reference_hidden_states"] = torch.empty(1, channels[0] - latents, t, h, w, **meta)
            inputs["frame_indices"] = torch.arange(t, **meta)
        if image:
            inputs["encoder_hidden_states_image"] = torch.empty(1, 257, 20, **meta)
        return lambda: net(**inputs, return_dict=False)

    return net, cost, forward


@pytest.mark.parametrize("kind", ["clip", "block", "token"])
@pytest.mark.parametrize(("t", "h", "w"), [(1, 2, 2), (3, 4, 6), (5, 8, 10)])
def test_wan_dit_equals_the_meter(kind: str, t: int, h: int, w: int) -> None:
    net, cost, forward = wan_dit(kind, **SHAPE)
    assert cost.parameters == size_of(net)
    assert measure(forward(t, h, w)).flops.total == cost.flops(t, h * w // 4)


@pytest.mark.parametrize("kind", ["clip", "block", "token"])
@pytest.mark.parametrize("ffn", [1024, 4096])
def test_wan_dit_peak(kind: str, ffn: int) -> None:
    """Wide enough that small change does not count: within 5 % in float32."""
    sizes = {"num_layers": 2, "num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": ffn}
    _, cost, forward = wan_dit(kind, **sizes)
    assert measure(forward(5, 80, 80)).peak_bytes == pytest.approx(cost.activation_bytes(5, 1600, 4), rel=0.05)


def mobile(**changes: Any) -> tuple[MobileTransformer3DModel, MobileDiTCost]:
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "reference_channels": 8,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "attention_pattern": ("linear", "softmax", "linear"),
        "patch_size": 2,
        "cross_attention_dim": 20,
        "motion_embedding": False,
        "absolute_positions": True,
        "prediction": "residual",
        **changes,
    }
    net = MobileTransformer3DModel(**config).eval()
    return net, MobileDiTCost.from_config(dict(net.config), text_tokens=16)


def mobile_forward(net: MobileTransformer3DModel, t: int, h: int, w: int) -> Any:
    c = net.config
    like = next(net.parameters())
    inputs: dict[str, Any] = {"hidden_states": like.new_zeros(1, c.in_channels, t, h, w), "timestep": torch.ones(1, t)}
    if c.cross_attention_dim:
        inputs["encoder_hidden_states"] = like.new_zeros(1, 16, c.cross_attention_dim)
    if c.reference_channels:
        inputs["reference_hidden_states"] = like.new_zeros(1, c.reference_channels, t, h, w)
    return lambda: net(**inputs, return_dict=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "all"},
        {"qk_norm": "none", "patch_size": 1},
        {"cross_attention_dim": None, "absolute_positions": False},
        {"motion_embedding": True, "reference_channels": 0, "prediction": "velocity", "ffn_ratio": 1.7},
        {"reference_channels": 16, "prediction": "gated"},
    ],
)
def test_mobile_dit_equals_the_meter(changes: dict[str, Any]) -> None:
    net, cost = mobile(**changes)
    assert cost.parameters == size_of(net)
    tokens = 6 * 10 // net.config.patch_size**2
    assert measure(mobile_forward(net, 3, 6, 10)).flops.total == cost.flops(3, tokens)
    net.to(torch.bfloat16)
    assert measure(mobile_forward(net, 3, 6, 10)).flops.total == replace(cost, dense=True).flops(3, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "t", "h", "w"),
    [
        ({}, 5, 24, 40),
        ({}, 5, 44, 80),
        ({"in_channels": 48, "out_channels": 48, "reference_channels": 96, "prediction": "gated"}, 5, 24, 40),
        ({"in_channels": 96, "out_channels": 96, "reference_channels": 96}, 5, 24, 40),
    ],
)
def test_mobile_dit_peak(dtype: torch.dtype, changes: dict[str, Any], t: int, h: int, w: int) -> None:
    """Run for real: the meta device lays convolutions out differently. With many channels the end is the peak."""
    net, cost = mobile(hidden_size=96, attention_pattern=("linear", "linear"), **changes)
    net.to(dtype)
    predicted = cost.activation_bytes(t, h * w // 4, dtype.itemsize)
    assert measure(mobile_forward(net, t, h, w)).peak_bytes == pytest.approx(predicted, rel=0.1)


def nano_vae(**changes: Any) -> tuple[NanoVAE, NanoVAECost]:
    net = NanoVAE(**{**dict(SHIPPED_VAE), **changes}).eval()
    return net, NanoVAECost.from_config(dict(net.config))


def test_nano_vae_equals_the_meter() -> None:
    for changes in ({}, {"image_width": 24, "image_layers": 1, "video_width": 40, "video_layers": 3}):
        net, cost = nano_vae(**changes)
        assert cost.parameters == size_of(net)
        assert cost.buffer_bytes == sum(buffer.nbytes for buffer in net.buffers())
        pixels, latents = torch.zeros(1, 3, 9, 32, 48), torch.zeros(1, net.latent_channels, 3, 2, 3)
        assert measure(partial(net.encode_chunk, pixels)).flops.total == cost.encode_flops(6, 3)
        assert measure(partial(net.decode_chunk, latents)).flops.total == cost.decode_flops(6, 3)


@pytest.mark.parametrize(
    ("gated", "net"),
    [
        (
            True,
            lambda: T5EncoderModel(
                T5Config(
                    vocab_size=40,
                    d_model=16,
                    d_kv=8,
                    d_ff=30,
                    num_layers=2,
                    num_heads=3,
                    feed_forward_proj="gated-gelu",
                )
            ),
        ),
        (
            False,
            lambda: T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=30, num_layers=2, num_heads=3)),
        ),
    ],
)
def test_t5_equals_the_meter(gated: bool, net: Any) -> None:
    with torch.device("meta"):
        encoder = net()
        ids = torch.zeros(1, 10, dtype=torch.long)
    cost = EncoderCost.from_t5(encoder.config.to_dict(), tokens=10)
    assert cost.gated is gated
    assert cost.parameters == size_of(encoder)
    assert measure(lambda: encoder(ids)).flops.total == cost.flops()


def test_full_size_parameters_are_those_of_the_real_models() -> None:
    with torch.device("meta"):
        umt5 = UMT5EncoderModel(
            UMT5Config(
                vocab_size=256384,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
            )
        )
        pixels = torch.empty(1, 3, 224, 224)
    assert costs.UMT5_XXL.parameters == size_of(umt5)
    assert costs.CLIP_H.parameters == size_of(clip)
    assert measure(lambda: clip(pixels)).flops.total == costs.CLIP_H.flops()
    assert costs.WAN21_I2V_14B.parameters == 16_394_878_784
    assert costs.WAN22_TI2V_5B.parameters == 4_999_787_712
    assert costs.SWIFTI2V_5B.parameters == 4_999_787_712 + 589_824


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_wan_vae_constants_are_derived_on_meta(name: str) -> None:
    with torch.device("meta"):
        vae = (AutoencoderKLWan(**WAN22) if name == "2.2" else AutoencoderKLWan()).to(torch.bfloat16)
    cost = costs.WAN22_VAE if name == "2.2" else costs.WAN21_VAE
    assert cost.parameters == size_of(vae)
    for h, w in ((4, 4), (6, 10)):
        flops, peaks, caches = stream_costs(vae, cost, h, w)
        assert flops["encode"] == [cost.encode_flops(h * w, 1), cost.encode_flops(h * w, 3)]
        assert flops["decode"] == [cost.decode_flops(h * w, 1), cost.decode_flops(h * w, 3)]
        assert caches == {"encode": cost.encode_state(h * w, 2), "decode": cost.decode_state(h * w, 2)}
        assert peaks["encode"] == pytest.approx(cost.encode_bytes(h * w, 1, 2), rel=0.05)
        assert peaks["decode"] == pytest.approx(cost.decode_bytes(h * w, 1, 2), rel=0.05)


def stream_costs(vae: Any, cost: WanVAECost, h: int, w: int) -> tuple[dict[str, Any], dict[str, int], dict[str, int]]:
    """FLOPs of 1 and of 3 blocks, peak of the third, and the cache left, streamed block by block on meta."""
    stream = streaming(vae)
    like = {"device": "meta", "dtype": torch.bfloat16}
    frames = [torch.empty(1, 3, t, h * cost.stride, w * cost.stride, **like) for t in (1, 4)]
    latent = torch.empty(1, cost.latent_channels, 1, h, w, **like)
    flops: dict[str, Any] = {}
    peaks, caches = {}, {}
    for verb, step in (("encode", stream.encode_chunk), ("decode", stream.decode_chunk)):
        state: Any = None
        total, seen = 0, []
        with LiveBytes() as live:
            for block in range(3):
                chunk = latent if verb == "decode" else frames[min(block, 1)]
                live.reset_peak()
                out: list[Any] = []

                def call(chunk: Any = chunk, state: Any = state, step: Any = step, out: list[Any] = out) -> None:
                    out.extend(step(chunk, state))

                total += measure(call).flops.total
                state = out[1]
                del out, call
                seen.append(total)
            peaks[verb], caches[verb] = live.peak, live.current
        flops[verb] = [seen[0], seen[2]]
    return flops, peaks, caches


# -- the table of specs/wan_in_diffusers.md section 2.4 --------------------------------------------------------------


def test_the_wan_plan_is_the_table() -> None:
    made = planned("wan")
    motion, refine = made.row("motion"), made.row("refine")
    assert (motion.tokens, motion.windows, motion.forwards) == (18_480, 1, 4)
    assert (refine.tokens, refine.windows, refine.forwards) == (17_600, 7, 28)
    rounded = {row.phase: round(row.flops / PETA, 2) for row in made.rows}
    assert rounded["motion"] == 2.95
    assert rounded["motion decode"] == 0.16
    assert rounded["reference"] == 1.03
    assert rounded["refine"] == 7.01
    assert rounded["decode"] == 5.40
    assert made.flops / PETA == pytest.approx(16.6, rel=0.005)
    assert made.row("reference").activation_bytes / GIB == pytest.approx(12.7, rel=0.02)
    assert made.row("decode").activation_bytes / GIB == pytest.approx(36.1, rel=0.02)
    n = costs.WAN
    assert n.stage_two.activation_bytes(5, 3520, 2) / GIB == pytest.approx(1.37, rel=0.05)
    assert n.stage_one.activation_bytes(21, 880, 2) / GIB == pytest.approx(2.0, rel=0.05)
    weights = [n.text, n.image, n.stage_one, n.stage_two, n.vae_2, n.vae]
    assert [round(2 * part.parameters / GIB, 1) for part in weights if part] == [10.6, 1.2, 30.5, 9.3, 1.3, 0.2]


@pytest.mark.parametrize(
    ("m", "n", "tokens", "pflop", "gib"),
    [
        (1, 1, 10_560, 10.62, 0.83),
        (2, 1, 14_080, 7.69, 1.10),
        (3, 1, 17_600, 7.01, 1.37),
        (3, 2, 21_120, 8.93, 1.64),
        (4, 1, 21_120, 6.72, 1.64),
        (4, 2, 24_640, 8.17, 1.92),
        (5, 1, 24_640, 6.73, 1.92),
        (5, 2, 28_160, 7.92, 2.19),
        (5, 3, 31_680, 9.23, 2.46),
        (6, 2, 31_680, 8.07, 2.46),
        (7, 2, 35_200, 7.86, 2.74),
        (10, 2, 45_760, 8.30, 3.55),
        (20, 0, 73_920, 10.68, 5.74),
    ],
)
def test_csg_variants_are_the_table(m: int, n: int, tokens: int, pflop: float, gib: float) -> None:
    row = planned("wan", csg=CSG(segment_blocks=m, neighbor_blocks=n)).row("refine")
    assert row.tokens == tokens
    assert row.flops / PETA == pytest.approx(pflop, rel=0.005)
    assert costs.SWIFTI2V_5B.activation_bytes(tokens // 3520, 3520, 2) / GIB == pytest.approx(gib, rel=0.05)


def test_other_rows_of_the_table() -> None:
    assert planned("wan", "1920x1088").row("refine").flops / PETA == pytest.approx(3.4, rel=0.02)
    assert planned("wan", "3840x2176").row("refine").flops / PETA == pytest.approx(25.0, rel=0.005)
    forty_with_guidance = planned("wan", num_inference_steps=40, guidance_scale=5.0).row("motion")
    assert forty_with_guidance.flops / PETA == pytest.approx(58.9, rel=0.005)
    assert 4 * costs.WAN21_I2V_14B.flops(21, 30 * 52) / PETA == pytest.approx(6.75, rel=0.005)
    assert costs.WAN22_TI2V_5B.activation_bytes(5, 3520, 2) / GIB == pytest.approx(3.28, rel=0.05)


@pytest.mark.slow
def test_full_size_wan_equals_the_meter() -> None:
    meta = {"device": "meta", "dtype": torch.bfloat16}
    with torch.device("meta"):
        net = SwiftI2VTransformer3DModel().to(torch.bfloat16)
    z, text = torch.empty(1, 48, 5, 88, 160, **meta), torch.empty(1, 512, 4096, **meta)
    positions = torch.arange(5, device="meta")
    cost = measure(
        lambda: net(
            z,
            torch.empty(1, 5, device="meta"),
            text,
            reference_hidden_states=z,
            frame_indices=positions,
            return_dict=False,
        )
    )
    assert cost.flops.total == costs.SWIFTI2V_5B.flops(5, 3520)
    assert cost.peak_bytes == pytest.approx(costs.SWIFTI2V_5B.activation_bytes(5, 3520, 2), rel=0.05)


# -- nano: the whole run under the meter -----------------------------------------------------------------------------

SHIPPED_VAE = {
    key: value
    for key, value in json.loads((Path(costs.__file__).parent / "nano" / "vae" / "config.json").read_text()).items()
    if not key.startswith("_")
}
_DIT = {
    "in_channels": 96,
    "out_channels": 96,
    "reference_channels": 96,
    "prediction": "residual",
    "hidden_size": 256,
    "num_attention_heads": 8,
    "ffn_ratio": 2.5,
    "patch_size": 2,
    "motion_embedding": False,
    "absolute_positions": True,
    "qk_norm": "linear",
    "cross_attention_dim": None,
}
_ONE = _DIT | {"attention_pattern": ["linear", "softmax"], "cross_attention_dim": 128, "qk_norm": "all"}
_TWO = _DIT | {"attention_pattern": ["linear"] * 6, "reference_channels": 192, "prediction": "gated"}
NANO = Networks(
    text=EncoderCost(3, 128, 128, 256, 128, vocabulary=384, heads=4, position_buckets=32),
    stage_one=MobileDiTCost.from_config(_ONE, 128),
    stage_two=MobileDiTCost.from_config(_TWO, 128),
    vae=NanoVAECost.from_config(SHIPPED_VAE),
    vae_2=NanoVAECost.from_config(SHIPPED_VAE),
)


def whole_run(size: str, num_frames: int) -> tuple[int, int]:
    """Peak of live tensors of one nano clip (one step a stage, thin networks, shipped VAE), and the plan's."""
    from swifti2v.reference import fit_image
    from swifti2v.tiny import tiny_pipeline

    pipeline = tiny_pipeline("nano")
    pipeline.vae = NanoVAE(**SHIPPED_VAE).eval()
    pipeline.to(torch.bfloat16 if Calibration().itemsize == 2 else torch.float32)  # as choose_placement would
    preset = presets.get("nano")
    pipeline.preset = preset
    steps = {"num_inference_steps": 1, "num_inference_steps_2": 1}
    request, _ = presets.resolve(preset, prompt="pan", seed=0, size=size, num_frames=num_frames, **steps)
    networks = Networks(
        text=NANO.text,
        stage_one=MobileDiTCost.from_config(dict(pipeline.transformer.config), preset.prompt_tokens),
        stage_two=MobileDiTCost.from_config(dict(pipeline.transformer_2.config), preset.prompt_tokens),
        vae=NanoVAECost.from_config(SHIPPED_VAE),
        vae_2=NanoVAECost.from_config(SHIPPED_VAE),
    )
    predicted = plan(request, preset, networks=networks).activation_bytes
    source = torch.zeros(3, request.height, request.width, dtype=torch.uint8)
    with LiveBytes() as live:
        photo = fit_image(source, request.size)
        live.reset_peak()
        for chunk in pipeline.stream(photo, request):
            del chunk  # as the writer does
    return live.peak, predicted


@pytest.mark.parametrize(("size", "num_frames"), [("256x192", 29), ("384x256", 33)])
def test_nano_activation_peak(size: str, num_frames: int) -> None:
    measured, predicted = whole_run(size, num_frames)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["640x384", "1280x704", "2560x1408"])
def test_nano_activation_peak_at_real_sizes(size: str) -> None:
    measured, predicted = whole_run(size, 41)
    assert predicted == pytest.approx(measured, rel=0.1)


# -- the plan itself -------------------------------------------------------------------------------------------------


@given(
    blocks=st.integers(1, 100),
    m=st.integers(1, 8),
    n=st.integers(0, 4),
    steps=st.integers(1, 8),
    scale=st.sampled_from([1.0, 4.0]),
)
@settings(max_examples=60, deadline=None)
def test_forwards_are_what_the_windows_say(blocks: int, m: int, n: int, steps: int, scale: float) -> None:
    csg = CSG(segment_blocks=m, neighbor_blocks=n)
    fields = {"num_inference_steps_2": steps, "guidance_scale_2": scale, "csg": csg}
    made = planned("nano", "640x384", 4 * blocks + 1, **fields)
    cut = list(windows(blocks + 1, segment_blocks=m, neighbor_blocks=n))
    row = made.row("refine")
    network = replace(NANO.stage_two, dense=Calibration().itemsize == 2)
    passes = steps * (2 if scale > 1 else 1)
    assert (row.windows, row.forwards) == (len(cut), passes * len(cut))
    assert row.flops == passes * sum(network.flops(len(w.blocks), 240) for w in cut)


def test_memory_does_not_grow_with_length() -> None:
    long = [planned("nano", "1280x704", frames).activation_bytes for frames in (81, 161, 321, 4001)]
    assert long[2] <= 1.05 * long[0]  # Stage I latents of the whole clip are kept: 42 kB a frame here
    assert (long[3] - long[0]) / (4001 - 81) < 0.2e6


def test_a_plan_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; from swifti2v import presets; from swifti2v.plan import plan; p = presets.get('wan');"
        "r, _ = presets.resolve(p, prompt='', seed=0); t = time.perf_counter(); plan(r, p);"
        "print('torch' in sys.modules, time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, seconds = done.stdout.split()
    assert imported == "False"
    assert float(seconds) < 0.05


def test_json_and_lines_say_the_same() -> None:
    made = planned("nano")
    record = json.loads(made.to_json())
    assert record["flops"] == made.flops == sum(row["flops"] for row in record["rows"])
    assert record["disk_bytes"] == made.job_bytes + 2 * made.file_bytes
    text = "\n".join(made.lines())
    assert all(row.phase in text for row in made.rows)
    assert "17,600" in text
    assert "run doctor" in text
    assert "7.01 PFLOP" in "\n".join(planned("wan").lines())


def test_seconds_follow_the_calibration() -> None:
    preset = presets.get("nano")
    request, _ = presets.resolve(preset, prompt="", seed=0)
    slow, fast = (
        plan(
            request,
            preset,
            Calibration(1e9 * k, 4e9 * k, 1e9 * k, 1e9 * k, 1e6 * k, rss_bytes=10**9, measured=True),
            networks=NANO,
        )
        for k in (1.0, 2.0)
    )
    assert slow.seconds is not None and fast.seconds is not None
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert "measured by doctor" in slow.lines()[-1]
    assert planned("wan").seconds is None


def test_a_calibration_survives_its_file_and_damage_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    assert stored_calibration(path) is None
    made = Calibration(float32_flops=1e11, rss_bytes=5, measured=True)
    made.save(path)
    assert stored_calibration(path) == made
    for damage in ("", "[]", "{", '{"schema": 99}', '{"schema": 1, "unknown": 3}'):
        path.write_text(damage)
        assert stored_calibration(path) is None


def test_missing_nano_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        costs.networks_of("nano", tmp_path, 128)


def test_every_preset_has_a_plan() -> None:
    for preset in presets.PRESETS.values():
        request, _ = presets.resolve(preset, prompt="", seed=0)
        networks = NANO if preset.family == "nano" else None
        made = plan(request, preset, networks=networks)  # type: ignore[arg-type]
        assert isinstance(request, Request)
        assert made.disk_bytes > 0
        assert len(made.lines()) == len(made.rows) + 5
    started = time.perf_counter()
    planned("nano", "640x384", 4001)
    assert time.perf_counter() - started < 0.5
