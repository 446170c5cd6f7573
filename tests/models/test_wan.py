"""The windowed DiT against diffusers' own WanTransformer3DModel on the same tiny weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor

from swifti2v.models.wan import SwiftI2VTransformer3DModel, SwiftI2VTransformerBlock, rope_frames

TINY: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
IMAGE_TO_VIDEO = TINY | {"in_channels": 20, "image_dim": 12, "added_kv_proj_dim": 48}
BLOCKS, SIDE = 5, 8
TOKENS = (SIDE // 2) ** 2
POSITIONS = torch.tensor([0, 7, 8, 9, 10])
LEVELS = torch.tensor([[0.0, 0.0, 700.0, 700.0, 700.0], [0.0, 250.0, 1000.0, 900.0, 1.0]])


@pytest.fixture
def base() -> WanTransformer3DModel:
    return WanTransformer3DModel(**TINY).eval()


@pytest.fixture
def widened(base: WanTransformer3DModel) -> SwiftI2VTransformer3DModel:
    return SwiftI2VTransformer3DModel.from_wan(base, reference_channels=8)


@pytest.fixture
def trained(base: WanTransformer3DModel) -> SwiftI2VTransformer3DModel:
    """Widened, its own weights, and new columns that are no longer zero."""
    model = SwiftI2VTransformer3DModel.from_wan(copy.deepcopy(base), reference_channels=8)
    with torch.no_grad():
        model.patch_embedding.weight[:, 8:].normal_(std=0.1)
    return model


def inputs(batch: int = 1, blocks: int = BLOCKS) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 8, blocks, SIDE, SIDE, generator=g),
        "encoder_hidden_states": torch.randn(batch, 12, 16, generator=g),
        "timestep": LEVELS[:batch, :blocks],
    }


def reference(batch: int = 1, blocks: int = BLOCKS) -> Tensor:
    return torch.randn(batch, 8, blocks, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: torch.nn.Module, **changes: Any) -> Tensor:
    return model(**(inputs() | changes)).sample


def windowed(model: torch.nn.Module, **changes: Any) -> Tensor:
    return run(model, **({"reference_hidden_states": reference(), "frame_indices": POSITIONS} | changes))


def per_token(timestep: Tensor) -> Tensor:
    return timestep.repeat_interleave(TOKENS, dim=1)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


class TestWidening:
    def test_levels_per_block_equal_the_stock_levels_per_token(self, base: Any, widened: Any) -> None:
        x = inputs(batch=2)
        with torch.no_grad():
            expected = base(**(x | {"timestep": per_token(x["timestep"])})).sample
            got = widened(**x, reference_hidden_states=reference(2)).sample
        assert distance(got, expected) <= 1e-6

    def test_levels_per_item_and_per_token_keep_the_stock_numerics(self, base: Any, widened: Any) -> None:
        for level in (torch.tensor([700.0]), per_token(LEVELS[:1])):
            expected = run(base, timestep=level)
            assert distance(run(widened, timestep=level, reference_hidden_states=reference()), expected) <= 1e-7
        unwidened = SwiftI2VTransformer3DModel.from_wan(base, reference_channels=0)
        assert torch.equal(run(unwidened, timestep=torch.tensor([700.0])), run(base, timestep=torch.tensor([700.0])))

    def test_base_stays_as_it_was(self, base: Any) -> None:
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        config, before = dict(base.config), run(base, timestep=torch.tensor([700.0]))
        model = SwiftI2VTransformer3DModel.from_wan(base, reference_channels=8)
        with torch.no_grad():
            model.patch_embedding.weight.fill_(1.0)
        assert base.config == config and torch.equal(run(base, timestep=torch.tensor([700.0])), before)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())

    def test_config_tells(self, base: Any, widened: Any) -> None:
        assert widened.config.reference_is_untrained
        assert (widened.config.in_channels, widened.config.num_layers) == (16, 2)
        assert not SwiftI2VTransformer3DModel.from_wan(base, reference_channels=0).config.reference_is_untrained
        assert not SwiftI2VTransformer3DModel(**TINY).config.reference_is_untrained
        widened.register_to_config(reference_is_untrained=False)
        assert not widened.config.reference_is_untrained

    def test_nothing_is_left_on_meta_and_dtypes_stay(self, base: Any) -> None:
        base.blocks.to(torch.bfloat16)
        model = SwiftI2VTransformer3DModel.from_wan(base)
        assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert model.scale_shift_table.dtype == torch.float32
        assert all(p.requires_grad for p in model.parameters())
        assert not model.training

    def test_gradient_reaches_the_new_columns(self, widened: Any) -> None:
        widened(**inputs(), reference_hidden_states=reference()).sample.pow(2).mean().backward()
        new, old = widened.patch_embedding.weight.grad[:, 8:], widened.patch_embedding.weight.grad[:, :8]
        assert 0.1 < (new.abs().mean() / old.abs().mean()).item() < 10

    def test_untrained_ignores_the_reference_and_trained_does_not(self, widened: Any, trained: Any) -> None:
        other = reference() + 1
        assert torch.equal(windowed(widened), windowed(widened, reference_hidden_states=other))
        assert distance(windowed(trained), windowed(trained, reference_hidden_states=other)) > 1e-3

    def test_missing_reference_is_refused(self, widened: Any) -> None:
        with pytest.raises(ValueError, match="8 latent and reference channels together; this model takes 16"):
            run(widened)


class TestPositions:
    @settings(max_examples=15)
    @given(st.lists(st.integers(0, 63), min_size=1, max_size=8))
    def test_gather_is_rows_of_the_full_table(self, positions: list[int]) -> None:
        rope = SwiftI2VTransformer3DModel(**TINY).rope
        full = rope(torch.empty(1, 1, 64, 6, 4))
        got = rope(torch.empty(1, 1, len(positions), 6, 4), torch.tensor(positions))
        for table, rows in zip(full, got, strict=True):
            assert torch.equal(rows, table.view(64, 6, -1)[positions].reshape(rows.shape))

    def test_counting_is_the_default(self, trained: Any) -> None:
        assert torch.equal(windowed(trained, frame_indices=torch.arange(BLOCKS)), windowed(trained, frame_indices=None))

    def test_shift_changes_nothing_and_the_anchor_gap_does(self, trained: Any) -> None:
        plain = windowed(trained, frame_indices=torch.arange(BLOCKS))
        assert distance(windowed(trained, frame_indices=torch.arange(BLOCKS) + 7), plain) <= 2e-6
        assert distance(windowed(trained), plain) > 1e-4

    @pytest.mark.parametrize("positions", [torch.arange(BLOCKS - 1), torch.arange(BLOCKS)[None]])
    def test_wrong_shape_is_refused(self, trained: Any, positions: Tensor) -> None:
        with pytest.raises(ValueError, match="frame_indices of shape"):
            windowed(trained, frame_indices=positions)

    def test_stock_model_with_rope_frames(self, base: Any, widened: Any) -> None:
        with rope_frames(base, POSITIONS):
            got = run(base, timestep=per_token(LEVELS[:1]))
        assert distance(got, windowed(widened)) <= 1e-6
        assert distance(got, run(base, timestep=per_token(LEVELS[:1]))) > 1e-4

    def test_rope_frames_restores_the_tables(self, base: Any) -> None:
        tables, copies = (base.rope.freqs_cos, base.rope.freqs_sin), (base.rope.freqs_cos.clone(),)
        with pytest.raises(RuntimeError, match="stop"), rope_frames(base, POSITIONS):
            assert base.rope.freqs_cos is not tables[0]
            raise RuntimeError("stop")
        assert base.rope.freqs_cos is tables[0] and base.rope.freqs_sin is tables[1]
        assert torch.equal(tables[0], copies[0])
        assert "freqs_cos" in dict(base.rope.named_buffers()) and "rope.freqs_cos" not in base.state_dict()

    @pytest.mark.parametrize("positions", [[0, 64], [-1, 0], list(range(65))])
    def test_rope_frames_refuses_positions_outside_the_table(self, base: Any, positions: list[int]) -> None:
        with pytest.raises(ValueError, match=r"0\.\.63"), rope_frames(base, torch.tensor(positions)):
            pass


class TestStageOne:
    def test_image_to_video_configuration(self) -> None:
        base = WanTransformer3DModel(**IMAGE_TO_VIDEO).eval()
        model = SwiftI2VTransformer3DModel.from_wan(base, reference_channels=0)
        call = {
            "hidden_states": torch.randn(1, 20, BLOCKS, SIDE, SIDE),
            "encoder_hidden_states": torch.randn(1, 512, 16),
            "encoder_hidden_states_image": torch.randn(1, 7, 12),
            "timestep": torch.tensor([700.0]),
        }
        assert torch.equal(run(model, **call), run(base, **call))
        with rope_frames(base, POSITIONS):
            expected = run(base, **call)
        assert distance(run(model, **call, frame_indices=POSITIONS), expected) <= 1e-6
        by_block = call | {"timestep": torch.full((1, BLOCKS), 700.0)}
        assert distance(run(model, **by_block), run(base, **call)) <= 1e-6


class TestCheckpoints:
    def test_round_trip(self, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path)
        loaded = SwiftI2VTransformer3DModel.from_pretrained(tmp_path).eval()
        assert torch.equal(windowed(loaded), windowed(trained))
        assert loaded.config.reference_is_untrained and loaded.config.num_layers == 2
        assert all(type(block) is SwiftI2VTransformerBlock for block in loaded.blocks)

    def test_stock_class_loads_ours_and_the_reverse(self, base: Any, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path / "ours")
        stock = WanTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
        both = torch.cat([inputs()["hidden_states"], reference()], dim=1)
        got = run(stock, hidden_states=both, timestep=per_token(LEVELS[:1]))
        assert distance(got, windowed(trained, frame_indices=None)) <= 1e-6
        base.save_pretrained(tmp_path / "stock")
        loaded = SwiftI2VTransformer3DModel.from_pretrained(tmp_path / "stock").eval()
        assert torch.equal(run(loaded, timestep=torch.tensor([5.0])), run(base, timestep=torch.tensor([5.0])))

    def test_bf16_load_keeps_its_fp32_islands(self, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path)
        loaded = SwiftI2VTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
        single = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
        assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.1.norm2.weight"} <= single
        assert any("time_embedder" in name for name in single)
        assert loaded.rope.freqs_cos.dtype == torch.float32
        assert loaded.blocks[0].attn1.to_q.weight.dtype == loaded.patch_embedding.weight.dtype == torch.bfloat16
        half = {k: v.bfloat16() for k, v in inputs().items() if k != "timestep"}
        got = windowed(loaded, **half, reference_hidden_states=reference().bfloat16())
        assert got.dtype == torch.bfloat16 and distance(got, windowed(trained)) < 0.1


class TestDiffusersFeatures:
    def test_native_attention_backend_is_equal(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.set_attention_backend("native")
        assert torch.equal(windowed(trained), expected)

    def test_fused_projections_are_equal(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.fuse_qkv_projections()
        assert distance(windowed(trained), expected) <= 1e-6

    def test_gradient_checkpointing_is_equal(self, trained: Any) -> None:
        grads = []
        for enable in (False, True):
            model = copy.deepcopy(trained).train()
            if enable:
                model.enable_gradient_checkpointing()
            call = inputs() | {"reference_hidden_states": reference(), "frame_indices": POSITIONS}
            model(**call).sample.pow(2).mean().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert torch.equal(*grads)

    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_group_offload_is_exact(self, trained: Any, level: str) -> None:
        expected = windowed(trained)
        trained.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
        assert torch.equal(windowed(trained), expected)

    def test_adapter_attaches_scales_and_fuses(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"]), adapter_name="a")
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        adapted = windowed(trained)
        assert distance(adapted, expected) > 1e-3
        assert distance(windowed(trained, attention_kwargs={"scale": 0.0}), expected) <= 1e-6
        trained.fuse_lora()
        assert distance(windowed(trained), adapted) <= 1e-5

    def test_caching_hooks_know_the_layer(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        with trained.cache_context("cond"):
            assert torch.equal(windowed(trained), expected)

    def test_tuple_output(self, trained: Any) -> None:
        call = inputs() | {"reference_hidden_states": reference(), "frame_indices": POSITIONS}
        with torch.no_grad():
            (got,) = trained(**call, return_dict=False)
        assert torch.equal(got, windowed(trained))

    @pytest.mark.slow
    def test_repeated_blocks_compile_without_breaks(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.compile_repeated_blocks(fullgraph=True)
        assert distance(windowed(trained), expected) <= 1e-5

    @pytest.mark.slow
    def test_whole_model_compiles_without_breaks(self, trained: Any) -> None:
        expected = windowed(trained)
        trained.compile(fullgraph=True)
        assert distance(windowed(trained), expected) <= 1e-5
