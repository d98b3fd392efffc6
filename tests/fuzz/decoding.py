"""How random decoders are decoded with a KV cache: prompts of different lengths, then token after token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kraken_compiler.generate.decoder import Decoder

VOCABULARY = 31

ROWS, TOKENS = 3, 24
CAPACITY = 29
"""More than what is decoded: a value that belongs to the capacity would show."""

PROMPTS = (7, 3, 1)
STEPS = TOKENS - max(PROMPTS)


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, int64."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def decoded(decoder: Decoder) -> Tensor:
    """Logits [rows, steps + 1, vocabulary] after the prompts and after every token behind them."""
    ids, lengths = token_ids(ROWS, TOKENS, seed=2).numpy(), np.array(PROMPTS)
    decoder.reset()
    results = [decoder.prefill(ids[:, : max(PROMPTS)], lengths).copy()]
    for step in range(STEPS):
        results.append(decoder.step(ids[np.arange(ROWS), lengths + step]).copy())
    return torch.from_numpy(np.stack(results, 1))
