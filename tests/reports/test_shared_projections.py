"""Projections that more than one attention or FFN reads: fused parallel blocks, gates, keys that are queries, latents.

Shape legend: B batch, S sequence, D stream width, H heads, E head width, F FFN columns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from tests.lane_decoder import LaneDecoder
from tests.reports.small_models import COLUMNS, EXAMPLE, HEADS, LM, TOLERANCE, Attention, D, tokens
from tests.reports.small_models import relative_error as error_of_size
from tests.test_cache_families import one_by_one

pytestmark = pytest.mark.slow

E = D // HEADS


def by_head(x_BSD: Tensor, heads: int = HEADS) -> Tensor:
    """[B, H, S, E]."""
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, H, S, E]; [B, S, D]."""
    return (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        .transpose(1, 2)
        .flatten(2)
    )


class Fused(nn.Module):
    """One matrix into queries, keys, values and FFN columns, and one out of heads and columns (Flux, ViT-22B)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(D, 3 * D + COLUMNS), nn.Linear(D + COLUMNS, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        *qkv, columns = self.inward(x_BSD).split([D, D, D, COLUMNS], dim=-1)
        return self.outward(torch.cat([attend(*map(by_head, qkv)), F.gelu(columns)], dim=-1))


class FusedQueriesAndColumns(nn.Module):
    """One key head for all, gated columns, outputs that are summed, no biases (PaLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(D, D + 2 * E + 2 * COLUMNS, bias=False)
        self.out, self.down = nn.Linear(D, D, bias=False), nn.Linear(COLUMNS, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v, columns = self.inward(x_BSD).split((D, E, E, 2 * COLUMNS), dim=-1)
        up, gate = columns.chunk(2, dim=-1)
        return self.out(attend(by_head(q), by_head(k, 1), by_head(v, 1))) + self.down(up * F.silu(gate))


class FusedOut(nn.Module):
    """Columns first, normed queries and keys, and the whole scaled after the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.outward = nn.Linear(D, 3 * D), nn.Linear(D, COLUMNS), nn.Linear(COLUMNS + D, D)
        self.norm, self.scale = nn.LayerNorm(E), nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = map(by_head, self.qkv(x_BSD).chunk(3, dim=-1))
        heads = attend(self.norm(q), self.norm(k), v)
        return self.scale * self.outward(torch.cat((self.up(x_BSD).cos(), heads), dim=2)) / 2


class FusedSlices(nn.Module):
    """Slices of a matrix product without a module, columns in the middle, an exponential at 0 that is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D, 3 * D + COLUMNS))
        self.outward = nn.Linear(D + COLUMNS, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y = x_BSD @ self.weight
        q, columns, k, v = y[..., :D], y[..., D : D + COLUMNS], y[..., -2 * D : -D], y[..., -D:]
        heads = attend(*map(by_head, (q, k, v)))
        return F.linear(
            torch.cat([heads, columns.sigmoid()], -1), self.outward.weight.double().float(), self.outward.bias
        )


class FusedPieces(nn.Module):
    """Grouped queries and gated columns out of `tensor_split`, cut up by `narrow`."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(D, D + 4 * E + 2 * COLUMNS), nn.Linear(D + COLUMNS, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, kv, columns = self.inward(x_BSD).tensor_split([D, D + 4 * E], dim=-1)
        k, v = kv.narrow(-1, 0, 2 * E), kv.narrow(-1, -2 * E, 2 * E)
        up, gate = columns.tensor_split(2, dim=-1)
        heads = attend(by_head(q), by_head(k, 2), by_head(v, 2))
        return self.outward(torch.cat([up * F.silu(gate), heads], dim=-1))


class ParallelLM(LM):
    """Every layer is one block that adds once."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__(attention=block, ffn=nn.Identity)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        for layer, block in enumerate(self.attention):
            x_BSD = x_BSD + block(self.norms[layer](x_BSD))
        return self.head(x_BSD)


class SharedGate(nn.Module):
    """One gate for the attention's heads and for the FFN's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = Attention(), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate = self.gate(x_BSD).sigmoid()
        q, k, v = self.attention.split(x_BSD)
        return self.attention.out(attend(q, k, v) * gate) + self.down(self.up(x_BSD) * gate.square())


class GatedOutput(Attention):
    """What gates the heads also gates what leaves the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate = torch.tanh(self.gate(x_BSD))
        return self.out(attend(*self.split(x_BSD)) * gate) * gate


class KeysAreQueries(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 2 * D)

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, v = map(by_head, self.qkv(x_BSD).chunk(2, dim=-1))
        return q, q, v


class ValuesFromKeys(Attention):
    """Keys of all heads, and values that a second projection makes of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.k(x_BSD).relu() + 0.1
        return by_head(self.q(x_BSD)), by_head(keys), by_head(self.v(keys))


class RouterOfColumns(nn.Module):
    """Columns that also say, all together, how much of the FFN counts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.score = nn.Linear(D, COLUMNS), nn.Linear(COLUMNS, D), nn.Linear(COLUMNS, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x_BSD))
        return self.down(hidden) * self.score(hidden).sigmoid()


class TimesTheStream(Attention):
    """Heads and the stream that they come from meet again before the output projection."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.out(attend(*self.split(x_BSD)) * x_BSD + x_BSD.flip(-1))


class ColumnsTimesTheStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)) * x_BSD)


class NoNormsLM(LM):
    """What the branches read is the stream itself."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        for attention, ffn in zip(self.attention, self.ffn):
            x_BSD = x_BSD + attention(x_BSD) / 50
            x_BSD = x_BSD + ffn(x_BSD) / 50
        return self.head(x_BSD)


def error(model: nn.Module, degree: int) -> float:
    lanes = kraken_compiler.transform(model, degree=degree, form="standard", example_inputs=EXAMPLE)
    return max(error_of_size(lanes, model, 2, 9), error_of_size(lanes, model, 1, 17))


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("block", [Fused, FusedQueriesAndColumns, FusedOut, FusedSlices, FusedPieces])
def test_parallel_blocks_that_share_a_matrix(block: Callable[[], nn.Module], degree: int) -> None:
    model = ParallelLM(block)
    lanes = kraken_compiler.transform(model, degree=degree, form="standard", example_inputs=EXAMPLE)
    assert max(error_of_size(lanes, model, 2, 9), error_of_size(lanes, model, 1, 17)) < TOLERANCE
    held = sum(weight.numel() for weight in lanes.parameters()) / degree
    assert held < 0.75 * sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("degree", [2, 3])
def test_a_gate_of_two_branches(degree: int) -> None:
    assert error(ParallelLM(SharedGate), degree) < TOLERANCE


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("attention", [GatedOutput, KeysAreQueries, ValuesFromKeys])
def test_projections_that_an_attention_reads_twice(attention: Callable[[], nn.Module], degree: int) -> None:
    assert error(LM(attention), degree) < TOLERANCE


def test_columns_that_are_read_as_a_whole() -> None:
    assert error(LM(ffn=RouterOfColumns), 3) < TOLERANCE


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("build", [LM, NoNormsLM])
def test_branches_that_read_the_stream_beside_their_projections(build: Callable[..., LM], degree: int) -> None:
    model = build(TimesTheStream, ColumnsTimesTheStream)
    source = capture(model, example_inputs=EXAMPLE)
    program, _ = lower(source.program, degree, "standard")
    # Four branches and the embedding; a norm of the whole stream needs no sum over lanes.
    assert len(calls_of(program, torch.ops.kraken.all_reduce_start.default)) == 5
    lanes = LaneModule.from_program(program, source.store.read)
    assert max(error_of_size(lanes, model, 2, 9), error_of_size(lanes, model, 1, 17)) < TOLERANCE
    ids = tokens(2, 11)
    with torch.no_grad():
        have, want = one_by_one(LaneDecoder(program, source.store.read, 2, 16), ids, 5, positional=False), model(ids)
    assert errors(have, want)[1] < TOLERANCE


def calls_of(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def test_a_norm_of_two_branches_is_named() -> None:
    class Normed(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(D)

        def forward(self, x_BSD: Tensor) -> Tensor:
            return self.norm(super().forward(x_BSD))

    with pytest.raises(UnsupportedModelError, match=r"'attention\.0\.norm' .*'rms_norm' stands between"):
        kraken_compiler.transform(ParallelLM(Normed), 2, "standard", example_inputs=EXAMPLE)


class SharedKeysLM(LM):
    """Every layer but the first reads the first one's keys and values."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD, shared = self.embed(ids), None
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            q, *own = attention.split(self.norms[2 * layer](x_BSD))
            shared = shared or own
            x_BSD = x_BSD + attention.out(attend(q, *shared))
            x_BSD = x_BSD + ffn(self.norms[2 * layer + 1](x_BSD))
        return self.head(x_BSD)


class OneLatentLM(LM):
    """One projection of the embedding gives all layers their keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(D, 2 * D)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        keys, values = map(by_head, self.latent(x_BSD).chunk(2, dim=-1))
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            q, *_ = attention.split(self.norms[2 * layer](x_BSD))
            x_BSD = x_BSD + attention.out(attend(q, keys, values))
            x_BSD = x_BSD + ffn(self.norms[2 * layer + 1](x_BSD))
        return self.head(x_BSD)


class MixedValuesLM(LM):
    """Every layer mixes the first one's values into its own (value residual)."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD, first = self.embed(ids), None
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            q, k, v = attention.split(self.norms[2 * layer](x_BSD))
            first = v if first is None else first
            x_BSD = x_BSD + attention.out(attend(q, k, (v + first) / 2))
            x_BSD = x_BSD + ffn(self.norms[2 * layer + 1](x_BSD))
        return self.head(x_BSD)


class FFNOfQueriesLM(LM):
    """The FFN also reads what the attention before it asked for."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            q, k, v = attention.split(self.norms[2 * layer](x_BSD))
            x_BSD = x_BSD + attention.out(attend(q, k, v))
            x_BSD = x_BSD + ffn(self.norms[2 * layer + 1](x_BSD) + q.transpose(1, 2).flatten(2))
        return self.head(x_BSD)


class FFNOfHeadsLM(LM):
    """Two branches of one point, of which one reads the other's attention before its projection."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            heads = attend(*attention.split(self.norms[2 * layer](x_BSD)))
            x_BSD = x_BSD + attention.out(heads) + ffn(self.norms[2 * layer + 1](heads))
        return self.head(x_BSD)


BYPASSES = "reads this past the sums"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (SharedKeysLM, BYPASSES),
        (OneLatentLM, BYPASSES),
        (MixedValuesLM, BYPASSES),
        (FFNOfQueriesLM, BYPASSES),
        (FFNOfHeadsLM, "is also read from outside the branch"),
    ],
)
def test_what_is_read_past_its_branch_is_refused_by_node(build: Callable[[], LM], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(build(), degree=2, form="standard", example_inputs=EXAMPLE)
    (rejection,) = caught.value.rejections
    assert reason in rejection.reason
    assert len(rejection.nodes) == 1
    assert "degree" not in rejection.hint
    assert "\n" not in str(caught.value)
