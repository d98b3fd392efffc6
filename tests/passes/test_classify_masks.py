"""What masks are known for: rules that show late, weights that decide, sizes that do not fit, reasons that are true."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.forms import KRAKEN
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.passes.stages import with_cache
from tests.passes.helpers import captured
from tests.passes.models import Attention, Gpt

OTHER_RULE = "not causal with at most a sliding window and ALiBi slopes"
STORED = "its mask depends on numbers that are stored among the weights"
CAP, STEEP = 3.0, 0.01

Mask = Callable[[Tensor, Tensor], Tensor]
"""A mask [S, S] from query positions [S, 1] and the key positions [S]."""


class Masked(Attention):
    """Attention whose mask a test chooses."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(positions[:, None], positions))


class Weighted(Attention):
    """Attention whose mask follows from a float weight of the checkpoint."""

    def __init__(self, weight: nn.Parameter | Tensor, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("w", weight)
        self.mask = mask

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        mask = self.mask(self.w, positions[:, None] - positions)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def lowered(attention: Callable[[], nn.Module]) -> LaneProgram:
    return with_cache(captured(Gpt(attention=attention)).lanes(2, KRAKEN))


def limit_of(program: LaneProgram) -> int | None:
    assert program.cached is not None, program.no_cache
    return program.cached.plan.limit


def window_of(program: LaneProgram) -> int:
    assert program.cached is not None, program.no_cache
    targets = torch.ops.kraken.cached_attention.default
    (node,) = (node for node in program.cached.step.graph.nodes if node.target is targets)
    return int(node.args[9])  # type: ignore[call-overload]


def causal(i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def bias(i: Tensor, j: Tensor, cost: Tensor) -> Tensor:
    return torch.where(i >= j, -cost, float("-inf"))


LATE: dict[str, Mask] = {
    "sinks and a window": lambda i, j: causal(i, j) & ((i - j < 80) | (j < 4)),
    "blocks": lambda i, j: causal(i, j) & (i // 16 - j // 16 < 5),
    "nested blocks": lambda i, j: causal(i, j) & (i // 10 // 10 == j // 10 // 10),
    "overlapping chunks": lambda i, j: causal(i, j) & ((i // 70 == j // 70) | ((i + 35) // 70 == (j + 35) // 70)),
    "capped slopes": lambda i, j: bias(i, j, ((i - j) * 0.03).clamp(max=CAP)),
    "slopes with a bend": lambda i, j: bias(i, j, torch.where(i - j < 90, (i - j) * 0.5, 45.0 + (i - j - 90) * STEEP)),
    "dilated far away": lambda i, j: causal(i, j) & ((i - j < 90) | ((i - j) % 2 == 0)),
    "root of a stride": lambda i, j: causal(i, j) & ((i - j).clamp(min=0).float().sqrt().floor() < 9.0) | (i == j),
    "a hole": lambda i, j: causal(i, j) & ((i - j < 10 * 10) | (i - j >= 11 * 10)),
    "sees what follows late": lambda i, j: causal(i, j) | ((j - i == 1) & (i > 40 * 3)),
}
"""Rules that are causal, or another known one, up to a length beyond every number in them."""


@pytest.mark.parametrize("kind", sorted(set(LATE) - {"root of a stride"}))
def test_a_rule_that_shows_late_is_seen(kind: str) -> None:
    program = lowered(partial(Masked, LATE[kind]))
    assert program.cached is None
    assert "not causal" in program.no_cache


WINDOWS: dict[str, tuple[Mask, int]] = {
    "scaled": (lambda i, j: causal(i, j) & ((i - j).float() / 50 < 2.0), 100),
    "a product": (lambda i, j: causal(i, j) & (i - j < torch.full((), 30) * 4), 120),
    "rooted": (lambda i, j: causal(i, j) & ((i - j).clamp(min=0).float().sqrt() < 10.0), 100),
    "root of a stride": (LATE["root of a stride"], 81),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_that_shows_late_is_known(kind: str) -> None:
    mask, window = WINDOWS[kind]
    assert window_of(lowered(partial(Masked, mask))) == window


PROVEN: dict[str, Mask] = {
    "comparison": causal,
    "lower triangle": lambda i, j: torch.ones(j.shape[0], j.shape[0], dtype=torch.bool).tril(),
    "upper triangle of low numbers": lambda i, j: torch.full((j.shape[0], j.shape[0]), float("-inf")).triu(1),
    "lower triangle of floats": lambda i, j: torch.zeros(j.shape[0], j.shape[0]).masked_fill(
        torch.ones(j.shape[0], j.shape[0]).tril() == 0, float("-inf")
    ),
    "window": lambda i, j: causal(i, j) & (i - j < 70),
    "scaled window": lambda i, j: causal(i, j) & ((i - j) / 35 < 2),
    "slopes": lambda i, j: bias(i, j, (i - j) * STEEP),
}


@pytest.mark.parametrize("kind", PROVEN)
def test_a_rule_that_is_proven_has_no_limit(kind: str) -> None:
    assert limit_of(lowered(partial(Masked, PROVEN[kind]))) is None


def test_a_rule_that_is_not_proven_holds_for_the_lengths_that_were_seen() -> None:
    limit = limit_of(lowered(partial(Masked, WINDOWS["rooted"][0])))
    assert limit is not None
    assert limit > 1000


def test_a_window_beyond_all_lengths_that_are_looked_at_is_a_limit() -> None:
    program = lowered(partial(Masked, lambda i, j: causal(i, j) & (i - j < 100_000)))
    assert (window_of(program), limit_of(program)) == (0, 100_000)
    program = lowered(partial(Masked, lambda i, j: causal(i, j) & ((i - j) / 1024 < 100)))
    assert (window_of(program), limit_of(program)) == (0, 102_400)


DECIDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "window": lambda w, d: (d >= 0) & (d < 300 * (1 + w[0, 0])),
    "cap": lambda w, d: torch.where(d >= 0, -(d * w[0, 0]).clamp(max=3), float("-inf")),
    "stored mask": lambda w, d: w[: d.shape[0], : d.shape[0]] != 0,
    "condition": lambda w, d: torch.where(d >= 0, torch.where(w[0, 0] > 2, -9.0, 0.0) * d, float("-inf")),
}


@pytest.mark.parametrize("kind", DECIDED)
def test_what_stored_numbers_decide_is_not_read_off_random_ones(kind: str) -> None:
    program = lowered(partial(Weighted, torch.ones(64, 64).tril(), DECIDED[kind]))
    assert program.cached is None
    assert STORED in program.no_cache


def test_slopes_may_be_stored() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    program = lowered(
        partial(Weighted, slopes, lambda w, d: torch.where(d >= 0, -w.exp()[:, None, None] * d, float("-inf"))[None])
    )
    assert limit_of(program) is None


def test_keys_that_are_no_tokens_have_a_reason() -> None:
    class Memory(Attention):
        """Learned keys and values before those of the tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Parameter(torch.randn(1, 4, 3, 4))

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            memory = self.memory[:, : q.shape[1], :, : q.shape[3]].expand(len(q), -1, -1, -1)
            mask = F.pad(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), (3, 0), value=True)
            keys, values = torch.cat([memory, k], 2), torch.cat([memory, v], 2)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    program = lowered(Memory)
    assert program.cached is None
    assert "its mask is not over pairs of tokens" in program.no_cache


def test_numbers_that_may_hide_nothing_are_called_so() -> None:
    program = lowered(partial(Masked, lambda i, j: torch.where(i >= j, 0.0, -1e4)))
    assert program.cached is None
    assert "-10000" in program.no_cache
    assert "encoder" not in program.no_cache


def test_a_mask_of_keys_alone_is_seen_as_what_it_is() -> None:
    program = lowered(partial(Masked, lambda i, j: (j < 3)[None]))
    assert program.cached is None
    assert "its attention is not causal" in program.no_cache


class Tabled(Attention):
    """Attention whose mask is cut from a table that is no weight."""

    def __init__(self, table: Tensor, cut: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.cut = cut

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.cut(self.table, torch.arange(q.shape[2])))


TABLES: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "mask": (torch.ones(90, 90).tril(), lambda table, i: table[: i.shape[0], : i.shape[0]] != 0),
    "positions": (
        torch.arange(90),
        lambda table, i: table[: i.shape[0], None] >= table[: i.shape[0]],
    ),
    "looked up": (torch.arange(90), lambda table, i: table[i][:, None] >= table[i]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_rule_holds_as_far_as_a_table_reaches(kind: str) -> None:
    assert limit_of(lowered(partial(Tabled, *TABLES[kind]))) == 90


def test_a_table_is_looked_at_in_full() -> None:
    table = torch.arange(90)
    table[80] = 3
    program = lowered(partial(Tabled, table, TABLES["positions"][1]))
    assert program.cached is None
    assert "not causal" in program.no_cache
