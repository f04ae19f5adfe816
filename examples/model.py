"""The policies that the examples train: a small decoder made from scratch, or any causal LM of transformers."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
)


def character_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """Characters as tokens, built in memory; pads on the left, as generation needs."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def small_decoder(tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 3) -> Qwen3ForCausalLM:
    """A Qwen3 decoder with random weights from the global seed: about half a million parameters at the default size."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def load_policy(name_or_path: str | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer): the small decoder, or the checkpoint `name_or_path`.

    Weights are float32, since steps of an RL learning rate are lost in bfloat16 weights; on a GPU the forward pass runs
    in bfloat16 (`forward_precision`).
    """
    if name_or_path is None:
        tokenizer = character_tokenizer()
        return small_decoder(tokenizer).to(device), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32).to(device), tokenizer


def forward_precision(device: torch.device) -> torch.autocast:
    """The context of forward passes: bfloat16 on a GPU, the weights' own precision elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
