"""A model is after `transform` what it was before: nothing that was written down while it was traced stays in it."""

from __future__ import annotations

import collections
import contextvars
import functools
import sys
import threading
import types
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

pytestmark = pytest.mark.slow

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


# where else code writes ----------------------------------------------------------------------------------------------


class Tables:
    """An object of a file, not of the model."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def of(self, x_BSD: Tensor) -> Tensor:
        self.last = table(x_BSD.shape[1])
        return self.last


class SlottedTables:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: Tensor | None = None


TABLES = Tables()
VARIABLE: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("VARIABLE", default=None)
FILE = types.ModuleType("tables_of_a_model")
exec(
    """
import torch

LAST = None

def of(x_BSD):
    global LAST
    LAST = (torch.arange(x_BSD.shape[1]).float()[:, None] / 50).cos()
    return LAST
""",
    vars(FILE),
)


def held_by(holder: Any, keep: Callable[[Any, Tensor], None]) -> Callable[[], LM]:
    """A model that keeps a table in an object of one of Python's own classes."""

    class Holding(FFN):
        def __init__(self) -> None:
            super().__init__()
            self.holder = holder()

        def forward(self, x_BSD: Tensor) -> Tensor:
            made = table(x_BSD.shape[1])
            keep(self.holder, made)
            return super().forward(x_BSD + made)

    return lambda: LM(ffn=Holding, layers=1)


def calling(of: Callable[[Tensor], Tensor]) -> Callable[[], LM]:
    class Calling(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            return super().forward(x_BSD + of(x_BSD))

    return lambda: LM(ffn=Calling, layers=1)


def of_variable(x_BSD: Tensor) -> Tensor:
    VARIABLE.set(table(x_BSD.shape[1]))
    kept = VARIABLE.get()
    assert kept is not None
    return kept


HELD: dict[str, tuple[Callable[[], LM], Callable[[LM], Any]]] = {
    "namespace": (
        held_by(types.SimpleNamespace, lambda holder, made: setattr(holder, "last", made)),
        lambda model: getattr(model.ffn[0].holder, "last", None),
    ),
    "local of a thread": (
        held_by(threading.local, lambda holder, made: setattr(holder, "last", made)),
        lambda model: getattr(model.ffn[0].holder, "last", None),
    ),
    "dict of its own class": (
        held_by(collections.UserDict, lambda holder, made: holder.update(last=made)),
        lambda model: model.ffn[0].holder.get("last"),
    ),
    "slots": (
        held_by(SlottedTables, lambda holder, made: setattr(holder, "last", made)),
        lambda model: model.ffn[0].holder.last,
    ),
    "object of the file": (calling(lambda x_BSD: TABLES.of(x_BSD)), lambda _: TABLES.last),
    "variable of another file": (calling(lambda x_BSD: FILE.of(x_BSD)), lambda _: vars(FILE)["LAST"]),
    "inside a function": (calling(lambda x_BSD: (lambda: FILE.of(x_BSD))()), lambda _: vars(FILE)["LAST"]),
    "context": (calling(of_variable), lambda _: VARIABLE.get()),
}


@pytest.mark.parametrize("name", HELD)
def test_nothing_of_the_trace_stays_elsewhere_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FILE.__name__, FILE)
    monkeypatch.setitem(vars(FILE), "LAST", None)
    make, kept = HELD[name]
    model = make()
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE, check=False)
    assert kept(model) is None
    assert relative_error(lanes, model, 3, 11) < TOLERANCE


def test_random_numbers_are_as_if_nothing_was_drawn() -> None:
    model, before = LM(layers=1), torch.get_rng_state()
    kraken_compiler.transform(model, 3, "kraken", example_inputs=EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


class Counter(FFN):
    """Counts its calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x_BSD)


class Shown(FFN):
    """Shows what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(96))

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x_BSD))
        self.last.copy_(hidden[0, 0])
        return self.down(hidden)


def test_what_nothing_reads_is_as_before() -> None:
    model = LM(ffn=Shown, layers=1)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert not model.ffn[0].last.any()  # type: ignore[union-attr, operator]
    assert relative_error(lanes, model, 3, 11) < TOLERANCE


class HiddenCounter(Counter):
    """Past autograd."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.calls.data[None].add_(1)
        return FFN.forward(self, x_BSD)


@pytest.mark.parametrize(
    ("kind", "what"), [(Counter, r"the tensor 'ffn\.0\.calls'"), (HiddenCounter, "a tensor of its own")]
)
def test_tensors_that_are_written_to_are_named(kind: type[Counter], what: str) -> None:
    model = LM(ffn=kind, layers=1)
    with pytest.raises(UnsupportedModelError, match=rf"module 'ffn\.0' .*its forward writes to {what}"):
        kraken_compiler.transform(model, 2, example_inputs=EXAMPLE)
    assert float(model.ffn[0].calls) == 0  # type: ignore[union-attr, arg-type]


def test_what_is_made_and_then_written_to_is_nothing_kept() -> None:
    class Written(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            scale = torch.tensor([1.0, 2.0])
            scale[0] = 3.0
            scale.mul_(0.5)
            return super().forward(x_BSD) * scale.sum()

    model = LM(ffn=Written, layers=1)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
