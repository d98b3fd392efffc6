"""Rotary embeddings in complex numbers: lanes, caches and devices compute them in real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import replay, split_lengths
from tests.reports.small_models import (
    COLUMNS,
    EXAMPLE,
    FFN,
    HEADS,
    LM,
    POSITIONS,
    TOLERANCE,
    Attention,
    D,
    relative_error,
    tokens,
)

pytestmark = pytest.mark.slow

E = D // HEADS


def angles(length: int) -> Tensor:
    """[S, E / 2]."""
    return torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(0, E, 2) / E))


def turned(t_BHSE: Tensor, turns_SE: Tensor) -> Tensor:
    """Every two neighbours of a head are a complex number; it is multiplied by its position's."""
    pairs = t_BHSE.float().reshape(*t_BHSE.shape[:-1], -1, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns_SE).flatten(-2).type_as(t_BHSE)


class Reported(Attention):
    """The report's: the turns are made from a length and an angle, in every layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2]).float()[:, None] * (torch.arange(8) + 1) / 9
        turns = torch.polar(torch.ones_like(angle), angle)
        return super().attend(turned(q, turns), turned(k, turns), v)


class Table(Attention):
    """A complex buffer, cut to the length, with a dim for the heads."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        turns = torch.polar(torch.ones(POSITIONS, E // 2), angles(POSITIONS))
        self.register_buffer("turns", turns, persistent=self.persistent)

    def turns_of(self, length: int) -> Tensor:
        return self.turns[:length].view(1, 1, length, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turns = self.turns_of(q.shape[2])
        return super().attend(turned(q, turns), turned(k, turns), v)


class UnsavedTable(Table):
    persistent = False


class BackwardsTable(Table):
    """Looked up by position, and turned the other way."""

    def turns_of(self, length: int) -> Tensor:
        return self.turns[torch.arange(length)].conj()


class Exponential(Attention):
    """e to an imaginary power; queries and keys in the layout of their projections."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turns = torch.exp(1j * angles(q.shape[2]))[:, None]
        q, k = (turned(t.transpose(1, 2), turns).transpose(1, 2) for t in (q, k))
        return super().attend(q, k, v)


class Halves(Attention):
    """The halves of a head are the two parts of its numbers, and only queries and keys of the first half turn."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = angles(q.shape[2])
        turns = torch.complex(angle.cos(), angle.sin())[..., : E // 4]

        def turn(t: Tensor) -> Tensor:
            real, imag, rest = t.split([E // 4, E // 4, E // 2], -1)
            z = torch.complex(real, imag) * turns
            return torch.cat([z.real, z.imag, rest], -1)

        return super().attend(turn(q), turn(k), v)


class Chosen(Table):
    """The first positions do not turn; turns are spread over heads by hand."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turns = torch.where(torch.arange(q.shape[2])[:, None] > 3, self.turns[: q.shape[2]], 1.0)
        turns = turns.broadcast_to(1, 1, *turns.shape)

        def turn(t: Tensor) -> Tensor:
            pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns.expand_as(pairs)).flatten(-2)

        return super(Table, self).attend(turn(q), turn(k), v)


class ComplexFFN(FFN):
    """Not a rotary embedding: quotients, squares, lengths, what is between real and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(COLUMNS // 2, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        real, imag = self.up(x_BSD).chunk(2, -1)
        z = torch.complex(real, imag)
        z = (z * z.conj() + 2j * z - z**2) / (z.abs() + 1 + 1j) + real + (0.5 - z) / 3
        return self.down(z.real + z.angle() * z.imag)


MODELS: dict[str, Callable[[], nn.Module]] = {
    one.__name__: lambda one=one: LM(one)
    for one in (Reported, Table, UnsavedTable, BackwardsTable, Exponential, Halves, Chosen)
} | {"ComplexFFN": lambda: LM(ffn=ComplexFFN)}


@pytest.mark.parametrize(("name", "degree"), [(name, 2 + number % 2) for number, name in enumerate(MODELS)])
def test_lanes_are_exact(name: str, degree: int) -> None:
    model = MODELS[name]()
    lanes = kraken_compiler.transform(model, degree, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE
    assert relative_error(lanes, model, 2, 29) <= TOLERANCE
    assert lanes.program.cached is not None, lanes.program.no_cache
    assert not any(
        node.meta["val"].is_complex() for node in lanes.program.graph.nodes if _is_tensor(node.meta.get("val"))
    )


class Einsum(Table):
    """The product is an einsum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def turn(t: Tensor) -> Tensor:
            pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(torch.einsum("bhse,se->bhse", pairs, self.turns[: t.shape[2]])).flatten(-2)

        return super(Table, self).attend(turn(q), turn(k), v)


def test_products_that_sum_are_exact() -> None:
    model = LM(Einsum)
    lanes = kraken_compiler.transform(model, 3, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("name", ["Table", "ComplexFFN"])
def test_a_rank_with_a_cache_is_exact(name: str) -> None:
    model, ids = MODELS[name](), tokens(3, 13)
    captured = capture(model, example_inputs=EXAMPLE)
    program, _ = lower(captured.program, 1, "standard")
    rank = RankProgram.from_program(program, captured.store.read, communicator=NoCommunication(0, 1))
    want = expected(model(ids).detach(), *split_lengths(*ids.shape))
    assert (
        torch.from_numpy(replay(rank.decoder(3, 16), ids.numpy())) - want
    ).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("name", ["Reported", "Halves"])
def test_onnx_devices_are_exact(name: str, tmp_path: Path) -> None:
    model, ids = MODELS[name](), tokens(3, 13)
    captured = capture(model, example_inputs=EXAMPLE)
    program, _ = lower(captured.program, 2, "standard")
    OnnxBackend().write(program, captured.store.read, tmp_path)
    models = [DeviceModel.load(tmp_path / device_file(device)) for device in range(2)]

    def act(collectives: Ranks) -> tuple[Tensor, Tensor]:
        device = DeviceProgram(models[collectives.rank], collectives, threads=1)
        whole = device.run(whole_feeds(device.model, {"ids": ids.numpy()}))[LOGITS]
        return torch.from_numpy(whole.copy()), torch.from_numpy(replay(ArrayDecoder(device, *ids.shape), ids.numpy()))

    want = model(ids).detach()
    for whole, cached in together(2, act):
        assert (whole - want).abs().max() <= TOLERANCE * want.abs().max()
        steps = expected(want, *split_lengths(*ids.shape))
        assert (cached - steps).abs().max() <= TOLERANCE * steps.abs().max()


class Spectrum(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(torch.fft.fft(F.gelu(self.up(x_BSD)), dim=-1).real)


class ComplexWeight(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.Parameter(torch.polar(torch.ones(E // 2), torch.arange(E // 2).float()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(turned(q, self.turns), k, v)


class ComplexHead(LM):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 1j


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: LM(ffn=Spectrum), "module 'ffn.0' (node fft_fft): it computes with complex numbers"),
        (lambda: LM(ComplexWeight), "its parameter 'attention.0.turns' is complex"),
        (ComplexHead, "it returns a complex tensor"),
    ],
)
def test_what_has_no_real_form_is_refused(model: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(model(), 2, "standard", example_inputs=EXAMPLE)
    assert words in str(caught.value)
    assert "degree" not in str(caught.value)
    assert "\n" not in str(caught.value)
