"""Compare a rewritten language model with its source on tokens: KL divergence, top-1 agreement, perplexity.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.lanes.logits import LogitsOf
from kraken_compiler.text import number_text

_RANGES = (16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class ByPosition:
    """The figures of `Quality` for every position of a row: entry s is for the logits after s + 1 tokens.

    Attributes:
        kl, top1_agreement: As in `Quality`.
        perplexity, source_perplexity: Of the token that follows; one entry less, for a row's last token has none.
        rows: How many rows had that position.
    """

    kl: tuple[float, ...]
    top1_agreement: tuple[float, ...]
    perplexity: tuple[float, ...]
    source_perplexity: tuple[float, ...]
    rows: tuple[int, ...]

    def ranges(self) -> Iterator[tuple[int, int, float]]:
        """Ranges of positions that grow with their distance from the start: first, last, mean KL."""
        first = 0
        for last in (*(edge for edge in _RANGES if edge < len(self.kl)), len(self.kl)):
            if last == first:
                continue
            weights = self.rows[first:last]
            mean = sum(kl * rows for kl, rows in zip(self.kl[first:last], weights)) / sum(weights)
            yield first, last - 1, mean
            first = last


@dataclass(frozen=True)
class Quality:
    """Measured cost of a rewrite on some text.

    Attributes:
        kl: Mean over tokens of KL(source || rewritten), in nats.
        kl_error: Standard error of `kl`, from its spread over rows; NaN for a single row.
        top1_agreement: Share of positions at which both models' most likely next token is the same.
        perplexity: Of the rewritten model.
        source_perplexity: Of the source model.
        tokens: Number of positions compared.
        text: What was read.
        by_position: The same position by position.
    """

    kl: float
    kl_error: float
    top1_agreement: float
    perplexity: float
    source_perplexity: float
    tokens: int
    text: str
    by_position: ByPosition

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The measurement as lines for people."""
        error = "" if math.isnan(self.kl_error) else f" +- {number_text(self.kl_error, '.1g')}"
        parts = [f"{first}-{last}: {number_text(kl, '.3g')}" for first, last, kl in self.by_position.ranges()]
        return [
            f"on {self.tokens:,} tokens of {self.text}: KL to the source {number_text(self.kl, '.3g')}{error} "
            f"nats/token, same top token {self.top1_agreement:.1%}, perplexity {number_text(self.perplexity, '.4g')} "
            f"(source {number_text(self.source_perplexity, '.4g')})",
            *([f"KL at positions {', '.join(parts)}"] if len(parts) > 1 else []),
        ]


class _Sums:
    """Sums over rows, for every position; they grow with the longest row."""

    def __init__(self) -> None:
        # Rows of the table: KL, agreement, loss, source's loss, rows, rows with a following token.
        self.table = torch.zeros((6, 0), dtype=torch.float64)

    def add(self, values: list[Tensor]) -> None:
        length = values[0].shape[0]
        if length > self.table.shape[1]:
            self.table = F.pad(self.table, (0, length - self.table.shape[1]))
        for into, value in zip(self.table, values, strict=True):
            into[: value.shape[0]] += value.to(into.device)

    def totals(self) -> list[float]:
        totals: list[float] = self.table.sum(dim=1).tolist()
        return totals

    def means(self) -> ByPosition:
        kl, agreement, loss, source_loss, rows, targets = self.table
        positions = int((targets > 0).sum())
        return ByPosition(
            kl=tuple((kl / rows).tolist()),
            top1_agreement=tuple((agreement / rows).tolist()),
            perplexity=tuple(map(_exp, (loss / targets)[:positions].tolist())),
            source_perplexity=tuple(map(_exp, (source_loss / targets)[:positions].tolist())),
            rows=tuple(map(int, rows.tolist())),
        )


def evaluate(
    source: LogitsOf,
    rewritten: LogitsOf,
    batches: Iterable[Tensor],
    text: str,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Measure a rewritten model against its source.

    Args:
        source, rewritten: The two models.
        batches: Token ids, int64 [B, S], S at least 2; read once, so that a text of any length can be streamed.
        text: What the tokens are, for the record.
        progress: Called with the number of tokens of every finished batch.

    Returns:
        The measurement, computed in float32.
    """
    sums = _Sums()
    row_means: list[float] = []
    for ids in batches:
        # Row by row, because log-probabilities of a whole batch over a large vocabulary take more than the model does.
        for row, p_SV, q_SV in zip(ids, source(ids), rewritten(ids), strict=True):
            values = _compare_row(row, p_SV, q_SV)
            sums.add(values)
            row_means.append(values[0].mean().item())
        if progress is not None:
            progress(ids.numel())
    kl, agreement, loss, source_loss, tokens, targets = sums.totals()
    assert tokens, "there is nothing to evaluate on"
    spread = torch.tensor(row_means, dtype=torch.float64)
    return Quality(
        kl=kl / tokens,
        kl_error=(spread.std() / math.sqrt(len(spread))).item() if len(spread) > 1 else math.nan,
        top1_agreement=agreement / tokens,
        perplexity=_exp(loss / targets),
        source_perplexity=_exp(source_loss / targets),
        tokens=int(tokens),
        text=text,
        by_position=sums.means(),
    )


def _compare_row(row: Tensor, p_SV: Tensor, q_SV: Tensor) -> list[Tensor]:
    """KL, agreement, losses of both models and counts for the positions of one row."""
    log_p, log_q = (F.log_softmax(logits_SV.float(), dim=-1) for logits_SV in (p_SV, q_SV))
    following = row[1:, None]
    ones = torch.ones(row.shape[0], dtype=torch.float64)
    return [
        divergence(log_q, log_p).double(),
        (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        -log_q[:-1].gather(-1, following)[:, 0].double(),
        -log_p[:-1].gather(-1, following)[:, 0].double(),
        ones,
        ones[1:],
    ]


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) in nats, [...], of logarithms of probabilities [..., V]; what p never gives counts nothing."""
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms.masked_fill_(log_p == -math.inf, 0.0).sum(-1)


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)
