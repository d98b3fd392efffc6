"""Tiny random transformers models, one or more for every family the compiler promises by name."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tests.zoo.builder import Builder

_EAGER_ONLY = {
    "gptj",
    "gpt_neo",
    "gpt_oss",
    "bloom",
    "codegen",
    "ctrl",
    "gemma2",
    "mamba",
    "megatron-bert",
    "mpt",
    "mpnet",
    "roformer",
    "vaultgemma",
}
"""Families without a scaled_dot_product_attention path."""

# The families disagree about what to call the same five sizes.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 96}
BERT_SIZES = {**SIZES, "max_position_embeddings": 64}
MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA2_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT_SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
"""Of multi-head latent attention."""
GROUPED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
}
"""Of which those of the best groups are picked; the config says from which layer on there are any."""
GPT_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "n_inner": 96}


def from_config(name: str, *, auto: str = "AutoModelForCausalLM", **config: Any) -> nn.Module:
    """A language model of a transformers family with the library's initial weights."""
    import transformers

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
    settings = transformers.AutoConfig.for_model(name, **{**ids, **config})
    attention = "eager" if name in _EAGER_ONLY else "sdpa"
    model = getattr(transformers, auto).from_config(settings, attn_implementation=attention)
    assert isinstance(model, nn.Module)
    return model


def family(
    name: str,
    model_type: str,
    sizes: dict[str, Any],
    *,
    vocab: int = 97,
    kv_heads: int = 8,
    no_cache: str = "",
    **config: Any,
) -> Builder:
    """A causal language model."""
    make = partial(from_config, model_type, vocab_size=vocab, **sizes, **config)
    return Builder(name, make, vocab=vocab, kv_heads=kv_heads, no_cache=no_cache)


def encoder(
    name: str, model_type: str, sizes: dict[str, Any], *, no_cache: str = "not causal", **config: Any
) -> Builder:
    """A masked language model: every token sees every other."""
    make = partial(from_config, model_type, auto="AutoModelForMaskedLM", vocab_size=97, **sizes, **config)
    return Builder(name, make, no_cache=no_cache)


def modern(name: str, model_type: str, *, kv_heads: int = 8, **config: Any) -> Builder:
    """A causal language model whose config calls its sizes what Llama's does."""
    config = {"num_key_value_heads": kv_heads, "max_position_embeddings": 64, **config}
    return family(name, model_type, SIZES, kv_heads=kv_heads, **config)


def _falcon(name: str, *, kv_heads: int, **config: Any) -> Builder:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return family(name, "falcon", sizes, kv_heads=kv_heads, num_kv_heads=kv_heads, ffn_hidden_size=96, **config)


_BUILDERS = (
    family("gpt2", "gpt2", GPT_SIZES),
    family(
        "gpt_neo",
        "gpt_neo",
        {"hidden_size": 64, "num_layers": 3, "num_heads": 8, "intermediate_size": 96, "max_position_embeddings": 64},
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=6,
    ),
    family("gptj", "gptj", GPT_SIZES, rotary_dim=4),
    family("codegen", "codegen", GPT_SIZES, rotary_dim=4),
    family("gpt_neox", "gpt_neox", SIZES, rotary_pct=0.5, max_position_embeddings=64),
    family("gpt_neox_sequential", "gpt_neox", SIZES, rotary_pct=0.5, use_parallel_residual=False),
    family(
        "opt",
        "opt",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "ffn_dim": 96},
        word_embed_proj_dim=64,
        max_position_embeddings=64,
    ),
    family("bloom", "bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 8}),
    _falcon("falcon", kv_heads=1, multi_query=True, parallel_attn=True),
    _falcon("falcon40", kv_heads=2, new_decoder_architecture=True),
    _falcon("falcon_alibi", kv_heads=8, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    modern("llama", "llama", kv_heads=2),
    modern("llama_bias", "llama", vocab=96, kv_heads=4, attention_bias=True, mlp_bias=True),
    modern("mistral", "mistral", kv_heads=4, head_dim=8, sliding_window=6),
    modern("qwen2", "qwen2", kv_heads=2, tie_word_embeddings=True),
    modern("qwen3", "qwen3", kv_heads=4, head_dim=16),
    modern("phi", "phi", kv_heads=8),
    modern("phi_qk_norm", "phi", kv_heads=4, qk_layernorm=True),
    modern("phi3", "phi3", kv_heads=2),
    modern("starcoder2", "starcoder2", kv_heads=2),
    modern("stablelm", "stablelm", vocab=98, kv_heads=2, qk_layernorm=True, use_qkv_bias=True),
    modern("stablelm_parallel", "stablelm", kv_heads=4, qk_layernorm=True, use_parallel_residual=True),
    modern("cohere", "cohere", kv_heads=2, use_qk_norm=True, logit_scale=0.25),
    modern(
        "granite",
        "granite",
        kv_heads=4,
        attention_multiplier=0.4,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
    ),
    modern("mixtral", "mixtral", kv_heads=2, num_local_experts=4, num_experts_per_tok=2),
    modern(
        "qwen2_moe",
        "qwen2_moe",
        kv_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    ),
    modern(
        "qwen3_moe",
        "qwen3_moe",
        kv_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        moe_intermediate_size=32,
    ),
    modern("olmoe", "olmoe", kv_heads=4, num_experts=8, num_experts_per_tok=3),
    # Norms after the branches, so after the sum of the experts, too.
    modern("flex_olmo", "flex_olmo", kv_heads=4, num_experts=4, num_experts_per_tok=2),
    # Sinks, experts with biases whose gate and up columns alternate, and activations that are cut off.
    modern(
        "gpt_oss",
        "gpt_oss",
        kv_heads=4,
        head_dim=8,
        layer_types=MIXED_WINDOWS,
        sliding_window=6,
        rope_parameters={**_YARN, "truncate": False},
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
    ),
    # Keys and values from a latent that every lane computes, next to one rotary key for all heads.
    modern("deepseek_v3", "deepseek_v3", **LATENT_SIZES, **GROUPED_EXPERTS, q_lora_rank=24, first_k_dense_replace=1),
    modern("glm4", "glm4", kv_heads=2, head_dim=8, partial_rotary_factor=0.5),
    modern("gemma2", "gemma2", kv_heads=4, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, **_GEMMA2_CAPS),
    modern("gemma3", "gemma3_text", kv_heads=4, head_dim=16, layer_types=MIXED_WINDOWS, sliding_window=6),
    modern("cohere2", "cohere2", kv_heads=4, layer_types=MIXED_WINDOWS, sliding_window=6),
    modern("olmo2", "olmo2", kv_heads=4),
    encoder("bert", "bert", BERT_SIZES),
    # Its positions count the tokens before them that are no padding.
    encoder("roberta", "roberta", BERT_SIZES, pad_token_id=0),
    encoder("albert", "albert", BERT_SIZES, embedding_size=32),
    encoder("distilbert", "distilbert", {"dim": 64, "n_layers": 3, "n_heads": 8, "hidden_dim": 96}),
)

FAMILIES: dict[str, Builder] = {builder.name: builder for builder in _BUILDERS}
