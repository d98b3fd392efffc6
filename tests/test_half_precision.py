"""Models in bfloat16: casts inside norms and attention survive the rewrite, in every family."""

from __future__ import annotations

import pytest
import torch

import kraken_compiler
from tests.zoo import SUPPORTED, logits_of, token_batch

# Eager attention in float32, fused and decomposed norms, ALiBi, and plain code: one of each kind keeps this fast.
KINDS = ("llama", "gpt_neo", "gptj", "bloom", "cohere", "falcon_alibi", "plain_in_place")


@pytest.mark.parametrize("name", KINDS)
def test_standard_form_equals_the_source_in_bfloat16(name):
    model = SUPPORTED[name]().to(torch.bfloat16)
    ids = token_batch(model, 2, 16)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs={"input_ids": ids})
    given = token_batch(model, 3, 9, seed=1)
    have, want = logits_of(lanes, given), logits_of(model, given)
    assert have.dtype == want.dtype
    error = (have.float() - want.float()).norm() / want.float().norm()
    assert error < 3e-2, f"{name}: relative error {error:.1e}"
