"""`kraken::cached_attention` by itself; what it is in models, `passes/test_cache_attention.py` and the families say."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from kraken_compiler.ops import cached_attention as op_module
from tests.attention_cases import behind_a_past


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("past", [1, 11])
@pytest.mark.parametrize("tokens", [1, 2, 6, 20])
def test_tokens_see_their_past(kv_heads: int, past: int, tokens: int) -> None:
    have, want = behind_a_past(kv_heads, past=past, tokens=tokens)
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_kernel_that_needs_no_mask_is_given_none(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. On a CPU torch makes the mask after all, and says so; the numbers are the same."""
    seen: list[str] = []

    def knows(query: Tensor) -> bool:
        seen.append("asked")
        return True

    monkeypatch.setattr(op_module, "_knows_lower_right", knows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        have, want = behind_a_past(kv_heads)
    assert seen
    torch.testing.assert_close(have, want)
