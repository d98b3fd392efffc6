"""Constants of the tokens' shape meet operators that do not broadcast: with a cache they have the batch's rows, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.verify.compare import errors
from tests.lane_decoder import LaneDecoder
from tests.reports import small_models
from tests.reports.cached_decoding import check_decode, lowered
from tests.reports.small_models import TOLERANCE, Attention, D, tokens

pytestmark = pytest.mark.slow


class LM(small_models.LM):
    """One layer is enough to see what a cache makes of it."""

    def __init__(
        self, attention: Callable[[], nn.Module] = Attention, ffn: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__(attention, ffn or small_models.FFN, layers=1)


EXPERTS = 4


class Experts(nn.Module):
    """The best two of four FFNs, weighed by what `dense` makes of the router's choice, [B, S, experts]."""

    def __init__(self, dense: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS)
        self.experts = nn.ModuleList(small_models.FFN(columns=32) for _ in range(EXPERTS))
        self.dense = dense

    def forward(self, x_BSD: Tensor) -> Tensor:
        best, chosen = self.router(x_BSD).topk(2, -1)
        weights = self.dense(x_BSD, best.softmax(-1), chosen)
        return sum(weights[..., n : n + 1] * expert(x_BSD) for n, expert in enumerate(self.experts))


def scattered(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, weights)


def scattered_and_added(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:-1], EXPERTS).scatter_add(-1, chosen, weights)


def scattered_in_place(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], x.shape[1], EXPERTS).scatter_(-1, chosen, weights)


def scattered_ones(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    mask = torch.full((*x.shape[:2], EXPERTS), 0.25).scatter(2, chosen, 1.0)
    return mask * 0.5


def one_hot_sum(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return (F.one_hot(chosen, EXPERTS) * weights[..., None]).sum(2)


class Widened(small_models.FFN):
    """An FFN whose input `widen` gives more columns, by constants."""

    def __init__(self, widen: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.widen = widen
        self.up = nn.Linear(width, 96)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(self.widen(x_BSD))


class Extended(LM):
    """A constant in the embedding, or behind the head."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.tokens = nn.Embedding(97, D - 4) if before else self.tokens
        nn.init.normal_(self.tokens.weight, std=0.2)

    def embed(self, ids: Tensor) -> Tensor:
        if not self.before:
            return super().embed(ids)
        return torch.cat([self.tokens(ids), torch.ones(*ids.shape, 4)], -1) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits if self.before else torch.cat([logits, torch.zeros(*ids.shape, 3)], -1)


class FoldedLogits(LM):
    """Sizes that are computed of the number of tokens, behind the head."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)[..., :96]
        folded = logits.reshape(ids.shape[0] * ids.shape[1], 2, 48) * torch.tensor([[1.0], [2.0]])
        return folded.reshape(ids.shape[0], ids.shape[1], 96)


class RowNumbers(LM):
    """What follows from the number of a row in its batch is no table."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + torch.arange(ids.shape[0])[:, None, None] * 0.1


class FirstKey(Attention):
    """Every query begins with a constant that has no sequence, [B, H, 1, E]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q + torch.ones(q.shape[0], self.heads, 1, q.shape[3]) * 0.1, k, v)


KEEPING: dict[str, Callable[[], nn.Module]] = {
    "scatter": lambda: LM(ffn=partial(Experts, scattered)),
    "scatter of a number": lambda: LM(ffn=partial(Experts, scattered_ones)),
    "scatter in place": lambda: LM(ffn=partial(Experts, scattered_in_place)),
    "scatter_add": lambda: LM(ffn=partial(Experts, scattered_and_added)),
    "cat": lambda: LM(ffn=partial(Widened, lambda x: torch.cat([x, torch.ones(*x.shape[:2], 8)], -1), D + 8)),
    "cat with positions": lambda: LM(
        ffn=partial(
            Widened,
            lambda x: torch.cat([(torch.arange(x.shape[1]) / 9)[None, :, None].expand(x.shape[0], -1, 2), x], -1),
            D + 2,
        )
    ),
    "stack": lambda: LM(
        ffn=partial(Widened, lambda x: torch.stack([x, torch.full(x.shape, 0.5)], -1).flatten(2), 2 * D)
    ),
    "concatenate": lambda: LM(
        ffn=partial(Widened, lambda x: torch.concatenate([x, torch.ones(*x.shape[:2], 8)], -1), D + 8)
    ),
    "expand_as": lambda: LM(ffn=partial(Widened, lambda x: x + x.mean(-1, keepdim=True).expand_as(x), D)),
    "where": lambda: LM(ffn=partial(Widened, lambda x: torch.where(x > 0, x, torch.full(x.shape, -0.1)), D)),
    "full_like": lambda: LM(
        ffn=partial(Widened, lambda x: torch.cat([x, torch.full_like(x[..., :4], 2.0)], -1), D + 4)
    ),
    "in the embedding": lambda: Extended(before=True),
    "behind the head": lambda: Extended(before=False),
    "without a sequence": lambda: LM(FirstKey),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_batches_of_any_size(kind: str) -> None:
    model = KEEPING[kind]()
    program, read = lowered(model)
    assert program.cached is not None, program.no_cache
    for batch in (1, 3):
        check_decode(model, program, read, batch=batch)


def test_sizes_behind_the_head() -> None:
    """There the tokens are those that were picked, not those that were read."""
    model, ids = FoldedLogits(), tokens(3, 9)
    program, read = lowered(model)
    check_decode(model, program, read)
    decoder, picks = LaneDecoder(program, read, 3, 12), torch.tensor([[8], [4], [6]])
    logits = decoder.run(ids, torch.arange(9).expand(ids.shape), picks=picks)
    want = model(ids)[torch.arange(3)[:, None], picks]
    assert errors(logits, want.detach())[1] <= TOLERANCE


def test_ragged_rows() -> None:
    """Rows that stand at different places have tables of their own; see `check_decode` for those that do not."""
    model = KEEPING["cat with positions"]()
    program, read = lowered(model)
    check_decode(model, program, read, batch=2, positional=True)


def test_rows_that_differ_get_no_cache() -> None:
    program, _ = lowered(RowNumbers())
    assert program.cached is None
    assert "differs between the rows of a batch" in program.no_cache
