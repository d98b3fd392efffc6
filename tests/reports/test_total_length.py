"""What depends on the total length is no table: such a model gets no KV cache, and a note that says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.size_checks import require_generation
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.cache.step_builder import StepBuilder
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.prefixes import prefix_lengths, recomputed
from kraken_compiler.verify.replay import capacities, replay, split_lengths
from tests.reports import small_models
from tests.reports.cached_decoding import check_decode, lowered
from tests.reports.small_models import FFN, HEADS, Attention, D, tokens

pytestmark = pytest.mark.slow


class LM(small_models.LM):
    """One layer is enough to see what a cache makes of it."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention, ffn: Callable[[], nn.Module] = FFN) -> None:
        super().__init__(attention, ffn, layers=1)


ON_LENGTH = "depends on the total length"


class Scaled(Attention):
    """Queries scaled by a number that `scale` computes of the length."""

    def __init__(self, scale: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.scale = scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * self.scale(q, q.shape[2]), k, v)


def rotated(x: Tensor, angles_SE: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = angles_SE.cos(), angles_SE.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Rotary(Attention):
    """Rotary positions whose angles [S, E/2] `angles` computes."""

    def __init__(self, angles: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.angles = angles

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = self.angles(q.shape[2])
        return super().attend(rotated(q, angles), rotated(k, angles), v)


FREQUENCIES = 100.0 ** -torch.linspace(0, 1, D // HEADS // 2)


class Masked(Attention):
    """Attention with a bias [..., S, S] that `bias` computes, under a causal mask."""

    def __init__(self, bias: Callable[[int], Tensor], window: Callable[[int], int] = lambda length: 1 << 20) -> None:
        super().__init__()
        self.bias, self.window = bias, window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = (j <= i) & (i - j < self.window(length))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(seen, self.bias(length), -torch.inf))


SLOPES = 0.5 ** torch.arange(1.0, HEADS + 1)[:, None, None]


class Embedded(LM):
    """Learned positions looked up by an index [S] that `index` computes, times what `factor` computes."""

    def __init__(self, index: Callable[[int], Tensor], factor: Callable[[int], Tensor | float] = lambda n: 1.0) -> None:
        super().__init__()
        self.index, self.factor = index, factor

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(self.index(ids.shape[1])) * self.factor(ids.shape[1])


class Averaged(FFN):
    """An FFN whose result is divided by a number that follows from its input's shape."""

    def __init__(self, number: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.number = number

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD) / self.number(x_BSD)


class ScaledInside(Attention):
    """Scores that are scaled by what follows from the length, before the softmax."""

    def __init__(
        self, scaled: Callable[[Tensor, int], Tensor] = lambda scores, n: scores / (torch.full((), 1.0) * n).sqrt()
    ) -> None:
        super().__init__()
        self.scaled = scaled

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.split(x_BSD)
        scores = self.scaled(q @ k.transpose(2, 3), x_BSD.shape[1])
        seen = torch.ones(x_BSD.shape[1], x_BSD.shape[1], dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.project((weights @ v).transpose(1, 2).flatten(2))


class CutFromTheEnd(LM):
    """Rows of a table, the last of which is the last token's."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions.weight[-ids.shape[1] :]


class Numbered(LM):
    """Positions that are made by an operator of their own."""

    def __init__(self, numbers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.numbers = numbers
        self.place = nn.Linear(1, D)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.place(self.numbers(ids)[..., None])


def log_length(q: Tensor, length: int, *, beyond: float, power: int = 1) -> Tensor:
    return (torch.log(torch.full((), 1.0) * length) / math.log(beyond)).clamp_min(1.0) ** power


DEPENDING: dict[str, Callable[[], nn.Module]] = {
    "log of the length beyond 64": lambda: LM(partial(Scaled, partial(log_length, beyond=64, power=8))),
    "log of the length beyond 4096": lambda: LM(partial(Scaled, partial(log_length, beyond=4096))),
    "log of the length beyond 5000, in the FFN": lambda: LM(
        ffn=partial(Averaged, lambda x: (torch.ones(()) * x.shape[1]).clamp_min(5000.0))
    ),
    "a tensor of the length": lambda: LM(partial(Scaled, lambda q, n: 1 + torch.scalar_tensor(n) / 100)),
    "the number of positions": lambda: LM(partial(Scaled, lambda q, n: torch.arange(n).sum() * 1e-3)),
    "the last position": lambda: LM(partial(Scaled, lambda q, n: 1 + torch.arange(n)[-1] * 0.1)),
    "a rotary base that grows": lambda: LM(
        partial(Rotary, lambda n: torch.arange(n)[:, None] * FREQUENCIES ** (1 + torch.full((), 1.0) * n / 100))
    ),
    "a rotary base that grows beyond 512": lambda: LM(
        partial(Rotary, lambda n: torch.arange(n)[:, None] / (torch.full((8,), 1.0) * n / 512).clamp_min(1.0))
    ),
    "other frequencies beyond 300": lambda: LM(
        partial(
            Rotary, lambda n: torch.arange(n)[:, None] * torch.where(torch.arange(n).max() >= 300, 0.5, FREQUENCIES)
        )
    ),
    "angles from the end": lambda: LM(partial(Rotary, lambda n: (n - 1 - torch.arange(n))[:, None] * FREQUENCIES)),
    "positions from the end": lambda: Embedded(lambda n: n - 1 - torch.arange(n)),
    "positions counted down": lambda: Embedded(lambda n: torch.arange(n - 1, -1, -1)),
    "flipped positions": lambda: Embedded(lambda n: torch.arange(n).flip(0)),
    "rolled positions": lambda: Embedded(lambda n: torch.arange(n).roll(1)),
    "right-aligned positions": lambda: Embedded(lambda n: torch.arange(200 - n, 200)),
    "positions after the middle": lambda: Embedded(lambda n: (torch.arange(n) >= n // 2).long()),
    "relative positions": lambda: Numbered(lambda ids: torch.arange(ids.shape[1]) / ids.shape[1]),
    "a share of all": lambda: Numbered(lambda ids: torch.ones_like(ids, dtype=torch.float32).softmax(-1)),
    "a reverse sum": lambda: Numbered(lambda ids: torch.ones(ids.shape[1]).flip(0).cumsum(0).flip(0)),
    "a normalised table": lambda: Embedded(torch.arange, lambda n: 1 / torch.arange(n).float().norm()),
    "the sum of all positions": lambda: Embedded(
        torch.arange, lambda n: 1 + torch.arange(n).sum(dim=None, keepdim=True) / 99
    ),
    "the largest position": lambda: Embedded(torch.arange, lambda n: 1 + torch.arange(n).float().amax() / 99),
    "a factor of the length": lambda: Embedded(torch.arange, lambda n: n**-0.5),
    "a table cut from its end": CutFromTheEnd,
    "hidden values over the length": lambda: LM(ffn=partial(Averaged, lambda x: x.shape[1] / 16)),
    "hidden values over the root of the length": lambda: LM(
        ffn=partial(Averaged, lambda x: torch.full((), x.shape[1]).sqrt())
    ),
    "hidden values over a sum of ones": lambda: LM(ffn=partial(Averaged, lambda x: torch.ones(x.shape[1]).sum())),
    "a scale inside the softmax": lambda: LM(ScaledInside),
    "scores over the length, before the softmax": lambda: LM(partial(ScaledInside, lambda scores, n: scores / n * 16)),
    "slopes that shrink": lambda: LM(
        partial(Masked, lambda n: -SLOPES * (torch.arange(n)[:, None] - torch.arange(n)).abs() / (torch.ones(()) * n))
    ),
    "slopes that shrink beyond 600": lambda: LM(
        partial(
            Masked,
            lambda n: SLOPES * torch.arange(n) / (torch.ones(()) * n / 600).clamp_min(1.0),
        )
    ),
    "a window of half the length": lambda: LM(partial(Masked, lambda n: torch.zeros(1), lambda n: n // 2 + 1)),
}


@pytest.mark.parametrize("kind", DEPENDING)
def test_no_cache_where_the_length_matters(kind: str) -> None:
    program, _ = lowered(DEPENDING[kind]())
    assert program.cached is None
    assert ON_LENGTH in program.no_cache, program.no_cache
    assert "(node " in program.no_cache


class Met(FFN):
    """An FFN whose input is changed by what `meet` makes of all of it."""

    def __init__(self, meet: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.meet = meet

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(self.meet(x_BSD))


def of_flat(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of all tokens of all rows, one behind the other."""
    return lambda x_BSD: change(x_BSD.reshape(-1, D)).reshape(x_BSD.shape)


MEETING: dict[str, Callable[[Tensor], Tensor]] = {
    "the largest of all": lambda x: x / x.abs().amax(),
    "the norm of all": lambda x: x / torch.linalg.vector_norm(x),
    "the norm of all, the old way": lambda x: x / x.norm(),
    "the variance of all": lambda x: x / x.var(),
    "the sum over no dim": lambda x: x + x.sum(dim=None, keepdim=True) / 99,
    "the mean over no dim": lambda x: x - x.mean(dim=None, keepdim=True),
    "the mean of flat tokens": of_flat(lambda flat: flat - flat.mean(0)),
    "a running sum of flat tokens": of_flat(lambda flat: flat.cumsum(0)),
    "flat tokens backwards": of_flat(lambda flat: flat.flip(0)),
    "tokens taken for rows": lambda x: x + x.reshape(x.shape[1], x.shape[0], D).transpose(0, 1).contiguous(),
}


@pytest.mark.parametrize("kind", MEETING)
def test_no_cache_where_tokens_meet_outside_attention(kind: str) -> None:
    program, _ = lowered(LM(ffn=partial(Met, MEETING[kind])))
    assert program.cached is None
    assert "the sequence" in program.no_cache
    assert "'ffn.0'" in program.no_cache


STEADY: dict[str, Callable[[], nn.Module]] = {
    "learned positions": LM,
    "an offset": lambda: Embedded(lambda n: torch.arange(2, n + 2)),
    "positions up to a last row": lambda: Embedded(lambda n: torch.arange(n).clamp_max(9)),
    "a running sum": lambda: Numbered(lambda ids: torch.ones_like(ids).cumsum(1) / 100),
    "rotary": lambda: LM(partial(Rotary, lambda n: torch.arange(n)[:, None] * FREQUENCIES)),
    "rotary by outer": lambda: LM(partial(Rotary, lambda n: torch.outer(torch.arange(n).float(), FREQUENCIES))),
    "log of the position": lambda: LM(
        partial(Scaled, lambda q, n: torch.log(torch.arange(n)[:, None] + 2.0).clamp_min(1.5))
    ),
    "ALiBi from the key's position": lambda: LM(partial(Masked, lambda n: SLOPES * torch.arange(n))),
    "ALiBi from the end": lambda: LM(partial(Masked, lambda n: -SLOPES * (n - 1 - torch.arange(n)))),
    "ALiBi up to zero": lambda: LM(partial(Masked, lambda n: SLOPES * torch.arange(1 - n, 1))),
    "a window": lambda: LM(partial(Masked, lambda n: torch.zeros(1), lambda n: 5)),
}


class OtherBranch(LM):
    """Python's own `if` on the length: torch.export keeps the branch of the example, and which lengths take it."""

    def __init__(self, condition: Callable[[int], bool]) -> None:
        super().__init__()
        self.condition = condition

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * (2.0 if self.condition(ids.shape[1]) else 1.0)


def test_no_cache_where_a_growing_sequence_takes_other_branches() -> None:
    program, _ = lowered(OtherBranch(lambda n: n % 2 == 1))
    assert program.cached is None
    assert "the sequence size must" in program.no_cache


def test_a_branch_of_short_sequences_is_held_against_every_prompt() -> None:
    """A sequence that begins beyond the branch never comes back to it."""
    model = OtherBranch(lambda n: n < 9)
    program, read = lowered(model)
    check_decode(model, program, read, prompt=9)
    with pytest.raises(UsageError, match="would read 8 tokens, and the sequence size must be at least 9"):
        require_generation(program.call, program.inputs, 2, [9, 8], 4)


def test_a_branch_of_long_sequences_limits_the_cache() -> None:
    program, _ = lowered(OtherBranch(lambda n: n > 40))
    assert program.cached is not None
    assert program.cached.plan.limit == 40


def test_verification_sees_what_depends_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were such a table computed for the capacity, a replay would differ from runs of the prefixes."""
    monkeypatch.setattr(StepBuilder, "_length_dependence", lambda *operands: None)
    for kind, right in (("a tensor of the length", False), ("log of the position", True)):
        program, read = lowered((DEPENDING | STEADY)[kind](), degree=1)
        rank = RankProgram.from_program(program, read, communicator=NoCommunication(0, 1))
        lanes, ids = StreamingProgram(program, read_from_source(program, read)), tokens(3, 9)
        lengths, steps = split_lengths(*ids.shape)
        prefixes = prefix_lengths(lengths, steps)
        runs = lanes.run_each([[ids[:, :length]] for length in prefixes])
        want = recomputed({n: outputs[0] for n, outputs in zip(prefixes, runs, strict=True)}, lengths, steps)
        assert 9 not in capacities(9, None)
        for capacity in capacities(9, None):
            error = errors(torch.from_numpy(replay(rank.decoder(3, capacity), ids.numpy())), want)[1]
            assert (error < 1e-5) == right, f"{kind}, capacity {capacity}: {error}"


def test_replays_keep_to_the_limit() -> None:
    assert capacities(9, 9) == (9,)
    assert capacities(9, 20) == (10,)


TAKEN_AS_A_NUMBER: dict[str, Callable[[], nn.Module]] = {
    "linspace": lambda: Numbered(lambda ids: torch.linspace(0, 1, ids.shape[1])),
    "a root by math": lambda: LM(ffn=partial(Averaged, lambda x: math.sqrt(x.shape[1]))),
}
"""torch.export keeps the example's length of these."""


@pytest.mark.parametrize("kind", TAKEN_AS_A_NUMBER)
def test_no_cache_where_the_length_is_fixed(kind: str) -> None:
    program, _ = lowered(TAKEN_AS_A_NUMBER[kind]())
    assert program.cached is None
    assert program.no_cache == "a text cannot grow token by token (the sequence size must be 16)"


@pytest.mark.parametrize("kind", STEADY)
def test_what_depends_on_the_position_alone_keeps_its_cache(kind: str) -> None:
    model = STEADY[kind]()
    program, read = lowered(model)
    assert program.cached is not None, program.no_cache
    check_decode(model, program, read)


def test_limits_are_those_of_the_tables() -> None:
    """Positions that stop to grow end nowhere; an offset takes rows away."""
    limits = {kind: lowered(STEADY[kind]())[0].cached for kind in ("learned positions", "an offset", "rotary")}
    found = {kind: cached.plan.limit for kind, cached in limits.items() if cached is not None}
    # Learned positions also stand in the rotary model's embedding.
    assert found == {"learned positions": 256, "an offset": 254, "rotary": 256}
    stopping = lowered(STEADY["positions up to a last row"]())[0].cached
    assert stopping is not None
    assert stopping.plan.limit is None
