"""A model is after `transform` what it was before: nothing that was written down while it was traced stays in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kraken_compiler
from kraken_compiler.capture.untouched import untouched
from kraken_compiler.errors import UnsupportedModelError, UsageError
from tests.reports.small_models import EXAMPLE, FFN, LM, TOLERANCE, Attention, D, relative_error, tokens

SHARED: dict[str, Tensor] = {}
"""What some models of this file keep in a variable of their file."""


def table(length: Any) -> Tensor:
    return (torch.arange(length).float()[:, None] / 50).cos()


class Lazy(LM):
    """Builds its positions at the first call, and again when they are too short."""

    table: Tensor | None = None

    def embed(self, ids: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] < ids.shape[1]:
            self.table = table(ids.shape[1])
        return self.tokens(ids) + self.table[: ids.shape[1]]


class LazyBuffer(Attention):
    """Registers a buffer at the first call."""

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not hasattr(self, "phases"):
            self.register_buffer("phases", torch.arange(D).float() / D, persistent=False)
        return super().split(x_BSD + self.phases)


class InADict(FFN):
    """Keeps a table in a dict of the module, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.calls = [0]

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.calls[0] += 1
        self.kept["last"] = table(x_BSD.shape[1])
        return super().forward(x_BSD + self.kept["last"])


class InItsClass(FFN):
    """Keeps a table for all its instances."""

    common: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        type(self).common = table(x_BSD.shape[1])
        return super().forward(x_BSD + type(self).common)


class InItsFile(FFN):
    """Keeps a table in a variable of its file."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        SHARED["table"] = table(x_BSD.shape[1])
        return super().forward(x_BSD + SHARED["table"])


class Helper:
    """No module, but it holds tensors."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: list[Tensor] = []


class InAHelper(Attention):
    """Keeps what it computed in an object of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def project(self, y_BSD: Tensor) -> Tensor:
        self.helper.rows.append(y_BSD.mean())
        return super().project(y_BSD)


def closing_over() -> FFN:
    """Its function closes over a variable that it writes."""
    last: Tensor | None = None

    class InAClosure(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            nonlocal last
            last = table(x_BSD.shape[1])
            return super().forward(x_BSD + last)

        def seen(self) -> Tensor | None:
            return last

    return InAClosure()


@functools.lru_cache
def frequencies(width: int) -> Tensor:
    return torch.arange(width).float() / width


class InACachedFunction(FFN):
    """Calls a function that remembers what it returned."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD * frequencies(x_BSD.shape[-1]))


MODELS: dict[str, Callable[[], LM]] = {
    "attribute": Lazy,
    "buffer": lambda: LM(attention=LazyBuffer),
    "dict": lambda: LM(ffn=InADict),
    "class": lambda: LM(ffn=InItsClass),
    "file": lambda: LM(ffn=InItsFile),
    "object": lambda: LM(attention=InAHelper),
    "closure": lambda: LM(ffn=closing_over),
    "cached function": lambda: LM(ffn=InACachedFunction),
}


def _state(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        path: (
            dict(module._buffers),
            list(module._parameters),
            {name: value for name, value in vars(module).items() if not name.startswith("_")},
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_trace_stays(name: str) -> None:
    model = MODELS[name]()
    before = _state(model)
    try:
        lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    except (UnsupportedModelError, UsageError):
        lanes = None  # refused is right as well; wrong is what must not be
    assert _state(model) == before
    assert InItsClass.common is None
    assert not SHARED
    frequencies.cache_clear()
    output = model(tokens(2, 9))
    assert type(output) is Tensor
    assert output.isfinite().all()
    if lanes is not None:
        for size in ((2, 9), (1, 30)):
            assert relative_error(lanes, model, *size) < TOLERANCE
    InItsClass.common = None
    SHARED.clear()


@pytest.mark.parametrize("name", ["attribute", "dict"])
def test_most_are_captured(name: str) -> None:
    assert kraken_compiler.transform(MODELS[name](), 2, example_inputs=EXAMPLE).report is not None


def test_a_table_that_is_there_bounds_the_length() -> None:
    model = Lazy()
    model(tokens(1, 20))
    built = model.table
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert model.table is built
    assert relative_error(lanes, model, 3, 19) < TOLERANCE
    with pytest.raises(UsageError, match="the sequence size must be at most"):
        lanes(tokens(1, 30))


def test_a_failed_capture_leaves_nothing_either() -> None:
    class Fails(Lazy):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            return logits if logits.sum() > 0 else -logits

    model = Fails()
    with pytest.raises(UnsupportedModelError):
        kraken_compiler.transform(model, 2, example_inputs=EXAMPLE)
    assert "table" not in vars(model)
    assert type(model(tokens(1, 4))) is Tensor


def test_training_flags_and_gradients_stay() -> None:
    model = LM().train()
    model.ffn[0].eval()
    F.cross_entropy(model(tokens(2, 5)).flatten(0, 1), tokens(2, 5).flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    kraken_compiler.transform(model, 2, example_inputs=EXAMPLE)
    assert model.training
    assert not model.ffn[0].training
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())


def test_what_cannot_be_restored_is_refused() -> None:
    class Stubborn(list[Tensor]):
        """Keeps what it was given."""

        def clear(self) -> None:
            pass

    holder = nn.Module()
    holder.kept = Stubborn()
    refused = pytest.raises(UnsupportedModelError, match=r"Module\.kept, which cannot be restored")
    with refused, untouched(holder), FakeTensorMode():
        holder.kept.append(torch.ones(2))
