"""The loop that generates text: a batch of prompts, one token per row and step. Imports no torch.

Ranks must choose the same tokens, or they would go on with different texts and wait for each other for ever. Their
logits are not the same to the last bit in general: collectives may sum in another request on every rank, and libraries
pick kernels by device and by number of threads; at a near tie that is another token, greedy or sampled. So `agree`
sends rank 0's choice to all at every step, [batch] whole numbers, which holds whatever the logits do. It can be left
out where logits are identical, as they are where ranks gather them: a choice is a function of the logits, the seed, the
row and the step; a greedy one of nothing but comparisons, a sampled one of how a processor computes exponentials too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import Array, CacheDecoder, Decoder, check_capacity
from kraken_compiler.generate.sampling import Sampling

GREEDY = Sampling()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos: Collection[int] = (),
    agree: Callable[[Array], Array] | None = None,
    known: int = 0,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts.

    Args:
        decoder: The model; its batch is the number of prompts.
        prompts: Token ids of every row, at least one each; rows may differ in length.
        max_new_tokens: How many to generate at most.
        sampling: How tokens are chosen.
        eos: Tokens that end a row; they are not given out.
        agree: Makes all ranks take one rank's choice, int64 [batch] -> int64 [batch].
        known: How many tokens of every prompt the decoder, a `CacheDecoder`, has read; it forgets all others.

    Yields:
        The new token of every row, None for a row that has ended. Ends when all rows have.

    Raises:
        UsageError: A prompt has no tokens, or prompt and new tokens do not fit.
    """
    assert len(prompts) == decoder.batch, f"{len(prompts)} prompts for a batch of {decoder.batch}"
    if not all(prompts):
        raise UsageError("the prompt has no tokens")
    check_capacity(max(map(len, prompts)) + max_new_tokens, decoder.capacity)
    if known:
        assert isinstance(decoder, CacheDecoder), "it has read nothing"
        decoder.rewind(known)
    else:
        decoder.reset()
    return _generate(decoder, [prompt[known:] for prompt in prompts], max_new_tokens, sampling, frozenset(eos), agree)


def _generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos: frozenset[int],
    agree: Callable[[Array], Array] | None,
) -> Iterator[list[int | None]]:
    running = [True] * len(prompts)
    choice: Array | None = None
    for step in range(max_new_tokens):
        logits = decoder.prefill(*pad(prompts)) if choice is None else decoder.step(choice)
        choice = sampling.choose(logits, step)
        if agree is not None:
            choice = agree(choice)
        tokens: list[int] = choice.tolist()
        running = [alive and token not in eos for alive, token in zip(running, tokens)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, tokens)]


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Lists of token ids as a batch: ids, int64 [batch, sequence], padded on the right, and lengths, int64 [batch]."""
    lengths = [len(prompt) for prompt in prompts]
    rows = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    return np.array(rows, np.int64), np.array(lengths, np.int64)


def pack(input_ids: Array, attention_mask: Array | None = None) -> tuple[Array, Array]:
    """Bring a batch padded on either side into the form that a decoder reads.

    Args:
        input_ids: Token ids [batch, sequence].
        attention_mask: [batch, sequence], not zero where there is a token; None means everywhere.

    Returns:
        Ids, int64 [batch, sequence], padded with 0 on the right, and lengths, int64 [batch].

    Raises:
        UsageError: The shapes differ, a row has no token, or a mask has holes.
    """
    ids = input_ids.astype(np.int64)
    if attention_mask is None:
        attention_mask = np.ones_like(ids)
    if ids.ndim != 2 or attention_mask.shape != ids.shape:
        raise UsageError(
            f"input_ids and attention_mask must both be [batch, sequence], "
            f"not {list(ids.shape)} and {list(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    lengths = mask.sum(axis=1)
    if not (lengths > 0).all():
        raise UsageError(f"attention_mask: row {int(lengths.argmin())} has no token")
    columns = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    first = mask.argmax(axis=1)[:, None]
    inside = (columns >= first) & (columns < first + lengths[:, None])
    if not np.array_equal(inside, mask):
        row = int((inside != mask).any(axis=1).argmax())
        raise UsageError(f"attention_mask: row {row} has a hole; rows may be padded on the left and right only")
    source = np.minimum(columns + first, ids.shape[1] - 1)
    packed_ids = np.where(columns < lengths[:, None], np.take_along_axis(ids, source, axis=1), 0)
    return packed_ids[:, : int(lengths.max())], lengths
