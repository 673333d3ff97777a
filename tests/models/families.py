"""Tiny models of the families of transformers, with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 96
LAYERS = 4
SPREAD = 3.0
"""Weights so wide that attention matters: with those of a fresh model, hardly anything does."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
"""What is made small, by the names that configurations have for it."""

LATENT = {  # attention over compressed keys and values: the sizes of a head are their own
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8, "n_ctx": 512},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "minicpm3": LATENT,
    "longcat_flash": LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""What a family needs beside or instead."""


TEXT = {
    name: SIZES[name]
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
}
GEMMA = {
    **TEXT,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
WHOLE: dict[str, dict[str, Any]] = {
    "gemma4_text": GEMMA | {"global_head_dim": 8},
    "gemma3n_text": GEMMA | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS},
    "lfm2_moe": TEXT
    | {
        name: SIZES[name]
        for name in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
    }
    | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "falcon_h1": TEXT | MAMBA | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    "bamba": TEXT | MAMBA | {"attn_layer_indices": [1, 3], "mamba_chunk_size": 16},
    "zamba2": TEXT
    | {
        "layers_block_type": ["mamba", "hybrid"] * (LAYERS // 2),
        "hybrid_layer_ids": [1, 3],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
    },
}
"""Families whose configurations are given whole: their sizes depend on one another."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A small configuration of `family`, with `changes`; its kinds of layers are all there."""
    kind = CONFIG_MAPPING[family]
    if family in WHOLE:
        return kind(**WHOLE[family] | changes)
    default = kind()
    taken = inspect.signature(kind.__init__).parameters
    given = {name: size for name, size in SIZES.items() if hasattr(default, name) or name in taken}
    layers = getattr(default, "layer_types", None)
    if layers:
        given["layer_types"] = (list(dict.fromkeys(layers)) * LAYERS)[:LAYERS]
    return kind(**given | OWN.get(family, {}) | changes)


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A float32 model of `tiny_config`, the same each time, with sdpa where the family has it."""
    return model_of(tiny_config(family, **changes))


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """The same for a configuration."""
    torch.manual_seed(0)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError:  # the family has no sdpa
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return spread(model)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with wide weights, in evaluation mode."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(SPREAD if weight.ndim > 1 else 1.0)
    return model.eval()
