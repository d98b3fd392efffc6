"""What is switched on around a compile, and that it is off again after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kraken_compiler import surroundings
from kraken_compiler.surroundings import fast_products, undisturbed


def precision() -> str:
    """What torch allows oneDNN in products of float32 matrices."""
    settings: Any = torch.backends.mkldnn
    return str(settings.matmul.fp32_precision)


def test_fast_products_are_products_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(300, 300, generator=generator) for _ in range(2))
    before = precision()
    with fast_products():
        product, linear = x @ y, torch.nn.functional.linear(x, y)
    assert precision() == before
    torch.testing.assert_close(product, (x.double() @ y.double()).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear, (x.double() @ y.double().T).float(), rtol=1e-5, atol=1e-4)


def test_they_are_not_taken_where_they_are_less_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_onednn_is_exact", lambda: False)
    before = precision()
    with undisturbed():
        assert precision() == before


def test_a_compile_takes_them_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_onednn_is_exact", lambda: True)
    before = precision()
    with undisturbed():
        assert precision() == "bf16"
    assert precision() == before
