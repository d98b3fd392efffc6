"""Strange but plausible models: exact, or refused with the operator that is in the way and its module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError, VerificationError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from tests.lane_decoder import LaneDecoder
from tests.reports.small_models import (
    COLUMNS,
    EXAMPLE,
    FFN,
    HEADS,
    LM,
    TOLERANCE,
    VOCABULARY,
    Attention,
    D,
    relative_error,
    tokens,
)
from tests.test_cache_families import one_by_one

pytestmark = pytest.mark.slow


def masked(scores_BHQK: Tensor) -> Tensor:
    keep = torch.ones(scores_BHQK.shape[-2:], dtype=torch.bool).tril()
    return scores_BHQK.masked_fill(~keep, torch.finfo(scores_BHQK.dtype).min)


class Temperatures(Attention):
    """A learned factor of every head's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.linspace(0.2, 0.5, HEADS).view(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q @ k.transpose(-1, -2) * self.temperature).softmax(-1) @ v


class BestKeys(Attention):
    """Only a query's two best keys count."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = masked(q @ k.transpose(-1, -2) / 4)
        least = scores.topk(2, -1).values[..., -1:]
        return scores.masked_fill(scores < least, -1e9).softmax(-1) @ v


class SharedProjection(Attention):
    """One small projection for the keys of all heads, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Linear(D // HEADS, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.feature(q), self.feature(k), v)


class WrittenRotary(Attention):
    """A rotary embedding written into memory, between every two elements."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] / 7 ** torch.arange(D // HEADS // 2)

        def turn(t: Tensor) -> Tensor:
            out, even, odd = torch.empty_like(t), t[..., ::2], t[..., 1::2]
            out[..., ::2] = even * angle.cos() - odd * angle.sin()
            out[..., 1::2] = even * angle.sin() + odd * angle.cos()
            return out

        return super().attend(turn(q), turn(k), v)


class TurnedInPlace(Attention):
    """A rotary embedding in place, half by half, and what it makes copied once more."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle, half = torch.arange(q.shape[2])[:, None] / 7 ** torch.arange(8), D // HEADS // 2

        def turn(t: Tensor) -> Tensor:
            t, left, right = t.clone(), t[..., :half].clone(), t[..., half:].clone()
            t[..., :half].mul_(angle.cos()).sub_(right * angle.sin())
            t[..., half:].copy_(left * angle.sin() + right * angle.cos())
            return torch.zeros(t.shape).copy_(t)

        return super().attend(turn(q), turn(k), v)


class ShiftedTokens(FFN):
    """Every token reads the one before it; the first is left out."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.pad(self.up(x_BSD), (0, 0, 1, 0))[:, :-1]
        hidden[:, 0] = 1.0
        hidden[hidden < 0] = 0.0
        return self.down(hidden)


class DepthwiseConvolution(FFN):
    """A causal convolution of every column by itself, normalised in groups of 8 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(COLUMNS, COLUMNS, 3, groups=COLUMNS)
        self.norm = nn.GroupNorm(COLUMNS // 8, COLUMNS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.along(F.pad(self.up(x_BSD).transpose(1, 2), (2, 0)))
        return self.down(hidden.transpose(1, 2) + self.norm(self.up(x_BSD).flatten(0, 1)).view(*x_BSD.shape[:2], -1))


class LookedUp(FFN):
    """What the stream looks like picks a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.act = nn.Embedding(10, COLUMNS), nn.PReLU(COLUMNS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD) + self.table((x_BSD[..., 0] > 0).long() * 7)
        hidden = self.act(hidden.flatten(0, 1)).view_as(hidden) + (hidden[..., None] * torch.arange(3)).sin().sum(-1)
        return self.down(torch.maximum(hidden, torch.zeros_like(hidden) - 0.5))


class BatchNorm(FFN):
    """Of columns, with statistics that it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(COLUMNS)
        self.norm.running_mean, self.norm.running_var = torch.linspace(-1, 1, COLUMNS), torch.linspace(0.5, 3, COLUMNS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x_BSD).transpose(1, 2)).transpose(1, 2))


class ColumnFactors(FFN):
    """Factors that are computed from weights, with dims of size 1 around them."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.summand = nn.Parameter(torch.rand(COLUMNS) + 0.5), nn.Parameter(torch.rand(1, COLUMNS, 1))

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD).transpose(1, 2) * self.factor.exp().view(-1, 1) + self.summand.sin().view(COLUMNS, 1)
        return self.down(hidden.transpose(1, 2) * self.summand.cos().view(-1))


class MovedDims(Attention):
    """Rarer spellings of the same layout, and queries and keys of length 1."""

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(x_BSD).unsafe_chunk(3, -1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))
            .swapdims(1, 2)
            .view_as(part.unflatten(-1, (self.heads, -1)).movedim((2,), (1,)))
            for part in parts
        )
        return F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1), v

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.project(self.attend(*self.split(x_BSD)).moveaxis(1, 2).flatten(2))


class TokenShift(LM):
    """The embedding adds the previous token's, with no weights in between."""

    def embed(self, ids: Tensor) -> Tensor:
        x_BSD = super().embed(ids)
        shifted = torch.zeros_like(x_BSD)
        shifted[:, 1:] = x_BSD[:, :-1]
        return x_BSD + shifted


class EmptyWrites(FFN):
    """Slices that end before they begin: nothing is written."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD).clone()
        hidden[..., 5:3] = 1.0
        x_BSD = x_BSD.clone()
        x_BSD[..., 60:60] += 2.0
        x_BSD[..., -3:-5].fill_(3.0)
        return self.down(hidden) + self.down(self.up(x_BSD))


class GatedHalves(Attention):
    """Half of what a head gives gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 4 * D)

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(x_BSD).split([D, D, 2 * D], -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given, gate = super().attend(q, k, v).chunk(2, -1)
        return given * gate.sigmoid()


class UnusedIds(LM):
    """Ids that are never given."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill(torch.arange(VOCABULARY) >= VOCABULARY - 7, -torch.inf)


EXACT = {
    "temperatures": lambda: LM(Temperatures),
    "best keys": lambda: LM(BestKeys),
    "shared projection": lambda: LM(SharedProjection),
    "written rotary": lambda: LM(WrittenRotary),
    "turned in place": lambda: LM(TurnedInPlace),
    "shifted tokens": lambda: LM(ffn=ShiftedTokens),
    "depthwise convolution": lambda: LM(ffn=DepthwiseConvolution),
    "looked up": lambda: LM(ffn=LookedUp),
    "batch norm": lambda: LM(ffn=BatchNorm),
    "column factors": lambda: LM(ffn=ColumnFactors),
    "moved dims": lambda: LM(MovedDims),
    "token shift": TokenShift,
    "empty writes": lambda: LM(ffn=EmptyWrites),
    "gated halves": lambda: LM(GatedHalves),
    "unused ids": UnusedIds,
}


@pytest.mark.parametrize(("name", "degree"), [(name, (2, 4)[number % 2]) for number, name in enumerate(EXACT)])
def test_is_exact(name: str, degree: int) -> None:
    model = EXACT[name]()
    lanes = kraken_compiler.transform(model, degree, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE
    assert relative_error(lanes, model, 2, 29) <= TOLERANCE


class SortedHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v.sort(1).values)


class RolledHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v.roll(1, 1))


class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(HEADS, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probabilities = masked(torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-1, -2), self.mix)).softmax(-1)
        return probabilities @ v


class SigmoidAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(masked(q @ k.transpose(-1, -2))) @ v


class SummedColumns(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.up(x_BSD).cumsum(-1))


class RolledColumns(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.up(x_BSD).roll(1, -1))


class OverwrittenColumns(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD)
        hidden[..., [0, 3]] = 0.0
        return self.down(hidden)


class ScatteredColumns(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD)
        return self.down(hidden.masked_scatter(hidden < 0, hidden.abs()))


class ManyBestKeys(Attention):
    """More keys than the tokens that a branch is probed with."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = masked(q @ k.transpose(-1, -2) / 4)
        least = scores.topk(4, -1).values[..., -1:]
        return scores.masked_fill(scores < least, -1e9).softmax(-1) @ v


class RecurrentColumns(FFN):
    def __init__(self) -> None:
        super().__init__()
        self.along = nn.GRU(COLUMNS, COLUMNS, batch_first=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.along(self.up(x_BSD))[0])


class BranchOfABranch(FFN):
    """The second FFN reads what the first gave, which lanes have only parts of."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm = FFN(), nn.LayerNorm(D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = super().forward(x_BSD)
        return y_BSD + self.second(self.norm(y_BSD))


class Conditional(FFN):
    """`torch.cond` on a size or on numbers."""

    def __init__(self, condition: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(torch.cond(self.condition(x_BSD), lambda x: 3 * x, lambda x: x.clone(), (x_BSD,)))


class FoldedHeads(Attention):
    """Heads are part of the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))).view(q.shape)


REFUSED = {
    "folded heads": (lambda: LM(FoldedHeads), "attention.0", "scaled_dot", "no dim of heads by themselves"),
    "a branch on a size": (
        lambda: LM(ffn=partial(Conditional, lambda x: x.shape[1] > 20)),
        "ffn.0",
        "cond",
        "branches or loops inside the graph",
    ),
    "a branch on numbers": (
        lambda: LM(ffn=partial(Conditional, lambda x: x.sum() > 0)),
        "ffn.0",
        "cond",
        "branches or loops inside the graph",
    ),
    "sorted heads": (lambda: LM(SortedHeads), "attention.0", "sort", "mixes the heads"),
    "rolled heads": (lambda: LM(RolledHeads), "attention.0", "roll", "'roll' moves heads"),
    "talking heads": (lambda: LM(TalkingHeads), "attention.0", "softmax", "no branch of the residual stream holds"),
    "sigmoid": (lambda: LM(SigmoidAttention), "attention.0", "matmul", "no branch of the residual stream holds"),
    "many best keys": (lambda: LM(ManyBestKeys), "attention.0", "topk", "selected index k out of range"),
    "summed columns": (lambda: LM(ffn=SummedColumns), "ffn.0", "cumsum", "mixes the columns"),
    "rolled columns": (lambda: LM(ffn=RolledColumns), "ffn.0", "roll", "'roll' does not give a lane"),
    "overwritten columns": (lambda: LM(ffn=OverwrittenColumns), "ffn.0", "index_put", "mixes the columns"),
    "scattered columns": (lambda: LM(ffn=ScatteredColumns), "ffn.0", "masked_scatter", "mixes the columns"),
    "recurrent columns": (lambda: LM(ffn=RecurrentColumns), "ffn.0.along", "gru", "mixes the columns"),
    "a branch of a branch": (lambda: LM(ffn=BranchOfABranch), "ffn.0.norm", "layer_norm", "output of another branch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_in_the_way_is_named(name: str) -> None:
    build, path, operator, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(build(), 2, "standard", example_inputs=EXAMPLE)
    (rejection,) = caught.value.rejections
    assert rejection.path == path
    assert rejection.nodes[0].startswith(operator)
    assert reason in rejection.reason
    assert "another degree" not in str(rejection)


class KeptKeys(Attention):
    """Keys are kept in a tensor that is no buffer, as in Meta's llama."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.zeros(4, 64, HEADS, D // HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[: k.shape[0], : k.shape[2]] = k.transpose(1, 2)
        return super().attend(q, self.keys[: k.shape[0], : k.shape[2]].transpose(1, 2), v)


def test_a_write_to_what_is_kept_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"its forward writes to the tensor 'attention.0.keys'") as caught:
        kraken_compiler.transform(LM(KeptKeys), 2, "standard", example_inputs=EXAMPLE)
    assert "\n" not in str(caught.value)


class Unstackable(LM):
    def embed(self, ids: Tensor) -> Tensor:
        return torch.vstack((torch.zeros(0), super().embed(ids)))


def test_the_tracers_log_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot trace it"):
        kraken_compiler.transform(Unstackable(), 2, "standard", example_inputs=EXAMPLE)
    assert not capfd.readouterr().err


class UnevenGroups(FFN):
    """Groups of 32 columns: three lanes can have whole ones, two cannot."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        groups = self.up(x_BSD).unflatten(-1, (3, 32))
        return self.down((groups / groups.norm(dim=-1, keepdim=True)).flatten(-2))


def test_another_degree_is_named_where_one_works() -> None:
    model = LM(ffn=UnevenGroups)
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert "Degree 3 works." in str(caught.value)
    lanes = kraken_compiler.transform(model, 3, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE


class BlocksOfTokens(FFN):
    """Blocks of 8 tokens, of which the few tokens that a branch is tried on fill none."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        blocks, tokens = x_BSD.shape[1] // 8, x_BSD.shape[1]
        return self.down(F.gelu(self.up(x_BSD)).unflatten(1, (blocks, tokens // blocks)).flatten(1, 2))


def test_a_size_that_is_no_number_for_a_few_tokens() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(LM(ffn=BlocksOfTokens), 2, "standard", example_inputs=EXAMPLE)
    (rejection,) = caught.value.rejections
    assert rejection.path == "ffn.0"
    assert "cannot be found out on a few tokens: a size is divided by one that is 0 there" in rejection.reason


@pytest.mark.parametrize(
    ("name", "degree"), [("batch norm", 3), ("column factors", 3), ("moved dims", 3), ("gated halves", 2)]
)
def test_is_exact_with_padding_and_a_cache(name: str, degree: int) -> None:
    model = EXACT[name]()
    source = capture(model, example_inputs=EXAMPLE)
    program, _ = lower(source.program, degree, "standard")
    ids = tokens(2, 11)
    with torch.no_grad():
        have, want = one_by_one(LaneDecoder(program, source.store.read, 2, 16), ids, 5, positional=False), model(ids)
    assert errors(have, want)[1] <= TOLERANCE


class NormedEmbedding(LM):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.norm(super().embed(ids).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.BatchNorm1d(D, track_running_stats=False), "takes the statistics of its batch"),
        (lambda: nn.GroupNorm(4, D), "normalises over the sequence"),
    ],
)
def test_norms_over_tokens_have_no_cache(norm: Callable[[], nn.Module], reason: str) -> None:
    model = NormedEmbedding(norm())
    source = capture(model, example_inputs=EXAMPLE)
    program, _ = lower(source.program, 2, "standard")
    assert reason in program.no_cache
    lanes = LaneModule.from_program(program, source.store.read)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE


def test_a_refusal_is_all_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    class Unfolded(Attention):
        def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, -1))
            return q, k[:, :1].tile(1, HEADS, 1, 1), v

    with pytest.raises(UnsupportedModelError):
        kraken_compiler.transform(LM(Unfolded), 2, "standard", example_inputs=EXAMPLE)
    captured = capfd.readouterr()
    assert not captured.out
    assert not captured.err


def test_operators_that_cannot_be_batched_run_lane_by_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise RuntimeError("Batching rule not implemented for aten::moveaxis.int")

        return fail

    model = LM(layers=1)
    lanes = kraken_compiler.transform(model, 3, "standard", example_inputs=EXAMPLE, check=False)
    monkeypatch.setattr(torch, "vmap", unknown)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE
    lanes(torch.ones(2, 5, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None for parameter in lanes.parameters())


class TokensForColumns(LM):
    """The numbers of a token are taken for those of others."""

    def embed(self, ids: Tensor) -> Tensor:
        x_BSD = super().embed(ids)
        return x_BSD + x_BSD.reshape(len(x_BSD), D, x_BSD.shape[1]).transpose(1, 2)


def test_a_reshape_that_takes_tokens_for_something_else_has_no_cache() -> None:
    source = capture(TokensForColumns(), example_inputs=EXAMPLE)
    program, _ = lower(source.program, 2, "standard")
    assert "takes the sequence for another dim" in program.no_cache


class CountsCalls(LM):
    calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids) * self.calls


class AsksForGradients(LM):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (2 if torch.is_grad_enabled() else 1)


@pytest.mark.parametrize(
    ("model", "cause"), [(CountsCalls, "when it is called again"), (AsksForGradients, "whether it is traced")]
)
def test_what_the_model_does_that_its_trace_does_not(model: Callable[[], nn.Module], cause: str) -> None:
    with pytest.raises(VerificationError, match=cause):
        kraken_compiler.transform(model(), 2, "standard", example_inputs=EXAMPLE)


class Encoder(nn.Module):
    """torch's own encoder, to which a true flag means that a token is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        layer = nn.TransformerEncoderLayer(D, HEADS, COLUMNS, batch_first=True)
        # Nested tensors have zeros where tokens are hidden, and only where it is not traced.
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.eval()

    def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(ids), src_key_padding_mask=hidden))


def test_flags_that_hide_everything_are_not_what_is_compared() -> None:
    model = Encoder()
    example = (*EXAMPLE, torch.zeros(2, 16, dtype=torch.bool))
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=example)
    hidden = torch.arange(9) >= torch.tensor([9, 6, 4])[:, None]
    with torch.no_grad():
        assert errors(lanes(tokens(3, 9), hidden), model(tokens(3, 9), hidden))[1] <= TOLERANCE
