"""Multi-head latent attention: keys and values from a latent, and one rotary key for all heads beside it.

Shape legend: B batch, S sequence, D stream width, H heads, L latent, N and R parts of a head without and with rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.capture import capture
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import split_lengths
from tests.lane_decoder import LaneDecoder
from tests.reports.small_models import EXAMPLE, HEADS, LM, TOLERANCE, D, logits, relative_error, tokens
from tests.test_cache_families import one_by_one
from tests.test_onnx_families import computed_by_devices

pytestmark = pytest.mark.slow


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [..., S, R]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** -(torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


class Latent(nn.Module):
    """DeepSeek-V2's, with a norm of the latent, and queries of low rank where `queries` is not 0."""

    def __init__(self, latent: int = 16, rotary: int = 8, plain: int = 16, queries: int = 0) -> None:
        super().__init__()
        self.sizes = [latent, rotary]
        self.plain = plain
        self.down = nn.Linear(D, latent + rotary)
        self.up = nn.Linear(latent, HEADS * (plain + D // HEADS))
        width = HEADS * (plain + rotary)
        norm = nn.RMSNorm(queries or 1)
        self.q = (
            nn.Sequential(nn.Linear(D, queries), norm, nn.Linear(queries, width)) if queries else nn.Linear(D, width)
        )
        self.norm, self.out = nn.RMSNorm(latent), nn.Linear(D, D)

    def by_head(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x_BSD: Tensor) -> Tensor:
        latent, rotary = self.down(x_BSD).split(self.sizes, dim=-1)
        keys, values = self.by_head(self.up(self.norm(latent))).split([self.plain, D // HEADS], dim=-1)
        plain, turning = self.by_head(self.q(x_BSD)).split([self.plain, self.sizes[1]], dim=-1)
        rotary = rotated(rotary).unsqueeze(1).expand(-1, HEADS, -1, -1)
        y = F.scaled_dot_product_attention(
            torch.cat([plain, rotated(turning)], -1), torch.cat([keys, rotary], -1), values, is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class OneMatrix(Latent):
    """Queries of low rank, latent and rotary key come from one matrix, as servers pack it, and nothing is normed."""

    def __init__(self) -> None:
        super().__init__(queries=12)
        self.down = nn.Linear(D, 12 + sum(self.sizes), bias=False)
        self.q, self.norm = nn.Linear(12, HEADS * (self.plain + self.sizes[1])), nn.Identity()

    def forward(self, x_BSD: Tensor) -> Tensor:
        y = self.down(x_BSD)
        queries, latent, rotary = y[..., :12], y[..., 12 : -self.sizes[1]], y[..., -self.sizes[1] :]
        keys, values = self.by_head(self.up(latent)).split([self.plain, D // HEADS], dim=-1)
        plain, turning = self.by_head(self.q(queries)).split([self.plain, self.sizes[1]], dim=-1)
        rotary = rotated(rotary)[:, None].repeat(1, HEADS, 1, 1)
        scores = torch.cat([plain, rotated(turning)], -1) @ torch.cat([keys, rotary], -1).mT / 5.0
        mask = torch.full(scores.shape[-2:], -torch.inf).triu(1)
        return self.out(((scores + mask).softmax(-1) @ values).transpose(1, 2).flatten(2))


class KeyIsLatent(Latent):
    """Values come from the very keys that all heads share: the whole projection is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.q = nn.Linear(D, 16), nn.Linear(16, D), nn.Linear(D, HEADS * 16)

    def forward(self, x_BSD: Tensor) -> Tensor:
        latent = self.down(x_BSD)
        keys, values = latent[:, None].expand(-1, HEADS, -1, -1), self.by_head(self.up(latent))
        y = F.scaled_dot_product_attention(self.by_head(self.q(x_BSD)), keys, values, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Absorbed(Latent):
    """Attention over the latents themselves; each head's up-projections stand before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.q = nn.Linear(D, 16), nn.Linear(D, HEADS * 12)
        self.key_up = nn.Parameter(torch.zeros(HEADS, 12, 16))
        self.value_up = nn.Parameter(torch.zeros(HEADS, 16, D // HEADS))

    def forward(self, x_BSD: Tensor) -> Tensor:
        latent = self.norm(self.down(x_BSD))[:, None]
        y = F.scaled_dot_product_attention(
            self.by_head(self.q(x_BSD)) @ self.key_up, latent, latent, is_causal=True, enable_gqa=True, scale=0.3
        )
        return self.out((y @ self.value_up).transpose(1, 2).flatten(2))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "latent": Latent,
    "latent as wide as the rotary part": lambda: Latent(8, 8),
    "narrow latent": lambda: Latent(4, 10, queries=20),
    "one matrix": OneMatrix,
    "the latent is the key": KeyIsLatent,
    "absorbed": Absorbed,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**EXPERTS, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**EXPERTS, "qk_rope_head_dim": 18},
    "minicpm3": {"head_dim": 8},
}


def family(name: str) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.15)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                nn.init.normal_(buffer, std=0.3)
    return model


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules(name: str, degree: int) -> None:
    model = LM(PLAIN[name])
    lanes = kraken_compiler.transform(model, degree=degree, form="standard", example_inputs=EXAMPLE)
    assert max(relative_error(lanes, model, 2, 9), relative_error(lanes, model, 1, 17)) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = family(name)
    lanes = kraken_compiler.transform(model, degree=3, form="standard")
    assert max(relative_error(lanes, model, 2, 9), relative_error(lanes, model, 1, 17)) < TOLERANCE


@pytest.mark.parametrize(("name", "degree"), [("deepseek_v3", 2), ("narrow latent", 3)])
def test_cached_decoding_in_one_process_and_as_devices(name: str, degree: int, tmp_path: Path) -> None:
    """Token after token, and prompts of different lengths in one batch."""
    model = family(name) if name in FAMILIES else LM(PLAIN[name])
    source = capture(model, example_inputs=None if name in FAMILIES else EXAMPLE)
    program, _ = lower(source.program, degree, "standard")
    assert program.cached is not None, program.no_cache
    key_dim = 24 if name in FAMILIES else 26
    assert [(cache.key_dim, cache.value_dim == key_dim) for cache in program.cached.plan.caches] == [
        (key_dim, False)
    ] * 2
    ids = tokens(2, 11)
    with torch.no_grad():
        want = logits(model(ids))
        have = one_by_one(LaneDecoder(program, source.store.read, 2, 16), ids, 5, positional=False)
    assert errors(have, want)[1] < TOLERANCE
    OnnxBackend().write(program, source.store.read, tmp_path)
    for whole, cached in computed_by_devices(tmp_path, [ids], degree):
        assert errors(whole, want)[1] < TOLERANCE
        assert errors(cached, expected(want, *split_lengths(2, 11)))[1] < TOLERANCE
