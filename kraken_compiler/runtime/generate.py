"""Greedy generation that recomputes the prefix for every token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor


def greedy(
    logits_of: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eos: Collection[int] = (),
    agree: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Generate token by token; the most likely one is taken.

    Args:
        logits_of: Token ids [1, sequence] -> logits [1, sequence or 1, vocabulary].
        prompt: Token ids, at least one.
        max_new_tokens: How many to generate at most.
        eos: Tokens that end the text; they are not given out.
        agree: Makes all ranks take one rank's choice, [1] -> [1]: their logits may differ in the last bits.
        device: Where the ids go.

    Yields:
        The new token ids.
    """
    ids = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            choice = logits_of(ids)[:, -1].argmax(dim=-1)
            if agree is not None:
                choice = agree(choice)
            token = int(choice)
            if token in eos:
                return
            yield token
            ids = torch.cat([ids, choice.view(1, 1)], dim=1)
