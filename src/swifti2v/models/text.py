"""Prompts to text states: cleaning, tokens, zero padding; and nano's text encoder, which needs no outside files.

It serves UMT5 (Wan) and nano's byte-level T5 alike. It knows no guidance, no devices, no weights on disk.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import ftfy
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5Config

NANO_VOCABULARY = 384  # ByT5: 3 special tokens, 256 bytes, 125 sentinels


def clean_prompt(prompt: str) -> str:
    """Mend encoding accidents, unescape HTML twice, squeeze white space: diffusers' Wan pipeline does the same."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def nano_tokenizer() -> ByT5Tokenizer:
    """Bytes as tokens: no vocabulary file, any language."""
    return ByT5Tokenizer()


def nano_text_config() -> T5Config:
    """A T5 encoder of about half a million parameters, for ``transformers.T5EncoderModel``."""
    return T5Config(
        vocab_size=NANO_VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=64,
        dropout_rate=0.0,
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: Sequence[str], max_length: int
) -> Tensor:
    """Text states (b, max_length, d) in the encoder's dtype, exactly zero after each prompt's end token.

    Longer prompts are cut (``truncated_prompt`` tells what is lost). Gradients flow if the caller enables them.
    """
    device = get_module_execution_device(text_encoder)
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.to(device)
    states = text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
    # Cut by length, as Wan's pipeline does, and not by multiplication: padding may hold infinities in half precision.
    inside = torch.arange(max_length, device=device) < mask.gt(0).sum(dim=1, keepdim=True)
    return states.masked_fill(~inside[..., None].to(states.device), 0)


def truncated_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> str | None:
    """The part of the cleaned prompt that ``encode_prompts`` would cut off; None if all of it is read."""
    prompt = clean_prompt(prompt)
    ids = tokenizer(prompt, add_special_tokens=True, verbose=False).input_ids
    if len(ids) <= max_length:
        return None
    kept = tokenizer(prompt, add_special_tokens=True, truncation=True, max_length=max_length).input_ids
    read = str(tokenizer.decode(kept, skip_special_tokens=True))
    if prompt.startswith(read):  # also returns a character of which only some bytes fitted
        return prompt[len(read) :].strip()
    return str(tokenizer.decode(ids[len(kept) - 1 :], skip_special_tokens=True)).strip()
