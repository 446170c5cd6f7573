"""Prompts to text states, with nano's own tokenizer and encoder at random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, T5EncoderModel, UMT5Config, UMT5EncoderModel

from swifti2v.models.text import clean_prompt, encode_prompts, nano_text_config, nano_tokenizer, truncated_prompt


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return nano_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(nano_text_config()).eval().requires_grad_(False)


def test_nano_encoder_is_small(encoder: T5EncoderModel) -> None:
    assert sum(p.numel() for p in encoder.parameters()) <= 800_000


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_cleaning_is_diffusers_cleaning(prompt: str) -> None:
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_states_are_zero_exactly_after_the_end(tokenizer: ByT5Tokenizer, encoder: T5EncoderModel) -> None:
    states = encode_prompts(tokenizer, encoder, ["a  &amp; b", "", "x" * 50], 16)
    assert states.shape == (3, 16, 128)
    assert (states != 0).any(dim=-1).sum(dim=1).tolist() == [6, 1, 16]
    assert (states[0, 6:] == 0).all()


def test_a_prompt_does_not_depend_on_its_batch_or_padding(tokenizer: ByT5Tokenizer, encoder: T5EncoderModel) -> None:
    alone = encode_prompts(tokenizer, encoder, ["zoom in"], 12)
    batched = encode_prompts(tokenizer, encoder, ["pan left slowly", "zoom in"], 32)
    torch.testing.assert_close(batched[1, :12], alone[0], atol=1e-5, rtol=1e-5)
    assert (batched[1, 8:] == 0).all()


def test_it_serves_umt5_as_wan_pads_it(tokenizer: ByT5Tokenizer) -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        states = encode_prompts(tokenizer, encoder, ["hi"], 8)
        ids = torch.tensor([[*tokenizer("hi").input_ids, 0, 0, 0, 0, 0]])
        whole = encoder(ids, ids.gt(0).long()).last_hidden_state[0]
    torch.testing.assert_close(states[0], torch.cat([whole[:3], torch.zeros(5, 16)]))


def test_training_the_encoder_is_possible(tokenizer: ByT5Tokenizer) -> None:
    encoder = T5EncoderModel(nano_text_config())
    encode_prompts(tokenizer, encoder, ["push in"], 10).square().mean().backward()
    assert encoder.shared.weight.grad is not None and encoder.shared.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [("hello", None), ("hello w", None), ("hello world", "orld"), ("zoom über alles", "ber alles"), ("a  b" * 3, "b")],
)
def test_what_is_cut_off_is_told(tokenizer: ByT5Tokenizer, prompt: str, lost: str | None) -> None:
    assert truncated_prompt(tokenizer, prompt, 8) == lost


def test_a_character_cut_in_half_counts_as_lost(tokenizer: ByT5Tokenizer) -> None:
    assert truncated_prompt(tokenizer, "zooms über", 8) == "über"


def test_tokenizer_and_encoder_survive_the_disk(
    tokenizer: ByT5Tokenizer, encoder: T5EncoderModel, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder")
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    copy = T5EncoderModel.from_pretrained(tmp_path / "text_encoder").eval().requires_grad_(False)
    expected = encode_prompts(tokenizer, encoder, ["naïve café"], 16)
    assert torch.equal(encode_prompts(again, copy, ["naïve café"], 16), expected)
