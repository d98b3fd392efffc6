"""Compare a rewritten language model with its source on tokens: KL divergence, top-1 agreement, perplexity.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.formatting import number_text

LogitsOf = Callable[[Tensor], Tensor]
"""Token ids int64 [B, S] -> logits [B, S, V]."""


@dataclass(frozen=True)
class Quality:
    """What the rewrite costs on some text.

    Attributes:
        kl: Mean over tokens of KL(source || rewritten), in nats.
        top1_agreement: Share of positions at which both models' most likely next token is the same.
        perplexity: Of the rewritten model.
        source_perplexity: Of the source model.
        tokens: Number of positions compared.
        text: What was read.
    """

    kl: float
    top1_agreement: float
    perplexity: float
    source_perplexity: float
    tokens: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"on {self.tokens:,} tokens of {self.text}: KL to the source {number_text(self.kl, '.3g')} nats/token, "
            f"same top token {self.top1_agreement:.1%}, perplexity {number_text(self.perplexity, '.4g')} "
            f"(source {number_text(self.source_perplexity, '.4g')})"
        ]


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
        batches: Token ids, int64 [B, S], S at least 2; read once.
        text: What the tokens are, for the record.
        progress: Called with the number of tokens of every finished batch.

    Returns:
        The measurement, computed in float32.
    """
    kl = agreement = loss = source_loss = 0.0
    tokens = predicted = 0
    for ids in batches:
        # Row by row, because log-probabilities of a whole batch over a large vocabulary take more than the model does.
        for row, p_SV, q_SV in zip(ids, source(ids), rewritten(ids), strict=True):
            log_p, log_q = (F.log_softmax(logits_SV.float(), dim=-1) for logits_SV in (p_SV, q_SV))
            kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            agreement += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            following = row[1:, None]
            source_loss -= log_p[:-1].gather(-1, following).sum().item()
            loss -= log_q[:-1].gather(-1, following).sum().item()
            predicted += following.numel()
        tokens += ids.numel()
        if progress is not None:
            progress(ids.numel())
    assert tokens, "there is nothing to evaluate on"
    return Quality(
        kl=kl / tokens,
        top1_agreement=agreement / tokens,
        perplexity=_exp(loss / predicted),
        source_perplexity=_exp(source_loss / predicted),
        tokens=tokens,
        text=text,
    )


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def token_batches(ids: list[int], sequence: int = 256, batch: int = 2) -> list[Tensor]:
    """Cut one long list of token ids into batches of shape [batch, sequence]; the rest that fills no row is left out.

    A text shorter than one row gives one batch of that length.
    """
    if len(ids) < 2 * sequence:
        return [torch.tensor([ids[: max(2, len(ids))]])] if len(ids) >= 2 else []
    rows = torch.tensor(ids[: len(ids) // sequence * sequence]).view(-1, sequence)
    return list(torch.split(rows, batch))
