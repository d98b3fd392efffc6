"""More transformers families, built from the same operators as those of `families.py`: tested in one process only."""

from __future__ import annotations

from tests.zoo.builder import Builder
from tests.zoo.families import (
    BERT_SIZES,
    GPT_SIZES,
    GROUPED_EXPERTS,
    LATENT_SIZES,
    MIXED_WINDOWS,
    SIZES,
    encoder,
    family,
    modern,
)

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DECODERS = (
    modern("apertus", "apertus", kv_heads=4),
    modern("arcee", "arcee", kv_heads=4),
    modern(
        "deepseek_v2",
        "deepseek_v2",
        **LATENT_SIZES,
        **GROUPED_EXPERTS,
        q_lora_rank=None,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
    ),
    modern("ernie4_5", "ernie4_5", kv_heads=4),
    modern("exaone4", "exaone4", kv_heads=4),
    modern("gemma", "gemma", kv_heads=4, head_dim=8),
    modern("glm", "glm", kv_heads=4, head_dim=8),
    modern(
        "glm4_moe",
        "glm4_moe",
        kv_heads=4,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    modern("glm4_moe_lite", "glm4_moe_lite", **LATENT_SIZES, **GROUPED_EXPERTS, q_lora_rank=24),
    modern("minicpm3", "minicpm3", **LATENT_SIZES, q_lora_rank=24),
    modern("minimax_m2", "minimax_m2", kv_heads=4, head_dim=8, **_EXPERTS),
    modern("phimoe", "phimoe", kv_heads=4, num_local_experts=4),
    modern("granitemoe", "granitemoe", kv_heads=4, **_EXPERTS),
    modern("helium", "helium", kv_heads=4, head_dim=8),
    modern("hunyuan_v1_dense", "hunyuan_v1_dense", kv_heads=4, head_dim=8),
    modern("ministral", "ministral", kv_heads=4, head_dim=8),
    modern("nanochat", "nanochat", kv_heads=4),
    modern("nemotron", "nemotron", kv_heads=4),
    modern("olmo", "olmo", kv_heads=4),
    modern("olmo3", "olmo3", kv_heads=4, layer_types=MIXED_WINDOWS, sliding_window=6),
    modern("persimmon", "persimmon"),
    modern("seed_oss", "seed_oss", kv_heads=4, head_dim=8),
    modern("smollm3", "smollm3", kv_heads=4),
    modern("vaultgemma", "vaultgemma", kv_heads=4, head_dim=8),
    family("biogpt", "biogpt", {**SIZES, "max_position_embeddings": 64}),
    family("ctrl", "ctrl", {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "dff": 96}),
    family("gpt_bigcode", "gpt_bigcode", GPT_SIZES, kv_heads=1),
    # Its table of distances ends at 64 tokens.
    family("mpt", "mpt", {"d_model": 64, "n_heads": 8, "n_layers": 3, "max_seq_len": 64}),
)
_WITHOUT_CACHE = (
    encoder("electra", "electra", BERT_SIZES, embedding_size=32),
    encoder("ernie", "ernie", BERT_SIZES),
    encoder("esm", "esm", BERT_SIZES, pad_token_id=0, mask_token_id=3),
    encoder("megatron_bert", "megatron-bert", BERT_SIZES),
    encoder("modernbert", "modernbert", BERT_SIZES, pad_token_id=0),
    encoder("mpnet", "mpnet", BERT_SIZES),
    encoder("roformer", "roformer", BERT_SIZES, embedding_size=64),
)

MORE_FAMILIES: dict[str, Builder] = {builder.name: builder for builder in (*_DECODERS, *_WITHOUT_CACHE)}
"""Families that go through the same passes as others, so they are not run on ranks and devices as well."""
