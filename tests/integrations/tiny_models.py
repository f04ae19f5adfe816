"""Every causal language model of the installed transformers, with random weights and a few thousand parameters."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 64
WIDTH = """hidden_size d_model n_embd dim embed_dim embedding_size n_embed hidden_dim decoder_embed_dim embedding_dim
    word_embed_proj_dim attention_hidden_size lru_width conv_dim intermediate_size ffn_dim n_inner decoder_ffn_dim
    encoder_ffn_dim d_ff ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size block_dim block_ff_dim
    shared_intermediate_size feed_forward_size intermediate_size_mlp moe_shared_expert_intermediate_size
    dense_intermediate_size expert_ffn_hidden_size"""
COUNT = """num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers num_blocks
    num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads linear_num_key_heads linear_num_value_heads index_n_heads
    num_key_value_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads"""
HEAD = """head_dim kv_channels d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank state_size
    attention_head_dim linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state"""
SMALL = dict.fromkeys(WIDTH.split(), 32) | dict.fromkeys(COUNT.split(), 4) | dict.fromkeys(HEAD.split(), 8)
SMALL |= {"vocab_size": VOCAB, "unpadded_vocab_size": 60, "decoder_vocab_size": VOCAB, "mamba_d_head": 16}
SMALL |= {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "image_size": 16, "rotary_dim": 4}
SMALL |= {"qk_head_dim": 16, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1}
SMALL |= dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "context_length"], VOCAB)
"""Settings by the names that configs give them."""

DERIVED = {"head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"}
"""Counts that are None in some configs, to be computed from what is not small then."""

TREATMENT = {
    "logit_scale": 0.3,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.5,
    "output_multiplier": 0.5,
    "logits_mup_width_multiplier": 3.0,
    "final_logit_softcapping": 0.5,
    "logits_soft_cap": 0.5,
    "output_logit_soft_cap": 0.5,
}
"""What models do to their logits, strong enough to be seen. MPT has a `logit_scale` that its model never reads."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {"num_experts_per_token": 2, "num_hidden_layers": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a kind of model needs beside `SMALL`, or otherwise."""

NOT_BUILT = {
    "blt": "four nested models over patches of bytes",
    "cohere_compass_text": "the default config does not build",
    "dbrx": "the default config does not build",
    "dots3_note": "the default config is per layer",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, whose hidden states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states it reads",
    "mimo_v2_flash": "rotates a third of a head, which leaves nothing of a small one",
    "musicgen": "audio, the default config does not build",
    "musicgen_melody": "audio, the default config does not build",
}
"""Why a kind of model is left out."""


def small_config(config_class: type, **given: Any) -> Any:
    """A config of `config_class` and, inside it, of its parts."""
    plain = config_class()
    values = vars(plain)
    names = set(plain.to_dict())
    small = {name: SMALL[name] for name in names & SMALL.keys() if _is_count(values.get(name))}
    small |= {name: SMALL[name] for name in names & DERIVED if values.get(name) is None}
    small |= {name: TREATMENT[name] for name in names & TREATMENT.keys()}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = small_config(type(value)).to_dict()
        elif name.endswith(("token_id", "token_index")) and _is_count(value) and value >= VOCAB:
            small[name] = 1
    return config_class(**small | SPECIAL.get(config_class.model_type, {}) | given)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def causal_lms() -> list[str]:
    """The kinds of model, by the `model_type` of their configs."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def small_causal_lm(model_type: str) -> Any:
    """The causal language model of that kind, with weights of the global seed."""
    config = small_config(type(transformers.AutoConfig.for_model(model_type)))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
