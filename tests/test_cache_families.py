"""Every family with a KV cache: token for token what a full recomputation gives, however the tokens come in."""

from __future__ import annotations

import torch
from torch import Tensor

from kraken_compiler.ir.program import LaneProgram
from tests.lane_decoder import LaneDecoder
from tests.table_notes import note
from tests.test_families import EVERY_FAMILY, lane_program, recognized
from tests.zoo import SUPPORTED, random_tokens

TOKENS, CAPACITY = 13, 16
PROMPTS = (8, 5, 2)
"""Prompt lengths of a ragged batch; the tokens after them are decoded one by one."""

WINDOWS = {
    "gpt_neo": [0, 6, 0],
    "mistral": [6, 6, 6],
    "gemma2": [6, 0, 6],
    "gemma3": [6, 0, 6],
    "cohere2": [6, 0, 6],
    "gpt_oss": [6, 0, 6],
}
HEADS = {"llama": 1, "llama_bias": 2, "falcon": 1, "phi3": 1, "plain_fused_llama": 1, "gpt2": 4}
"""KV heads that one of two lanes keeps."""


def positions_of(starts: Tensor, tokens: int) -> Tensor:
    return starts[:, None] + torch.arange(tokens)


def one_by_one(decoder: LaneDecoder, ids: Tensor, prompt: int, *, positional: bool) -> Tensor:
    """A prompt that all rows have in length, then every token on its own."""
    zero = torch.zeros(len(ids), dtype=torch.int64)
    parts = [decoder.run(ids[:, :prompt], positions_of(zero, prompt), positional=positional)]
    for place in range(prompt, ids.shape[1]):
        parts.append(decoder.run(ids[:, place : place + 1], positions_of(zero + place, 1), positional=positional))
    return torch.cat(parts, dim=1)


def in_chunks(decoder: LaneDecoder, ids: Tensor) -> Tensor:
    """A prompt in two parts, as a second turn of a conversation comes."""
    zero = torch.zeros(len(ids), dtype=torch.int64)
    first = decoder.run(ids[:, :5], positions_of(zero, 5))
    rest = ids[:, 5:]
    return torch.cat([first, decoder.run(rest, positions_of(zero + 5, rest.shape[1]))], dim=1)


def in_halves(decoder: LaneDecoder, ids: Tensor, cuts: tuple[int, int]) -> Tensor:
    """A prompt of five tokens as two halves, the rest as two halves behind it: all rows alike, or each by itself."""
    zero = torch.zeros(len(ids), dtype=torch.int64)
    first = decoder.run(ids[:, :5], positions_of(zero, 5), cut=min(cuts[0], 4))
    positional = cuts[0] > cuts[1]
    rest = decoder.run(ids[:, 5:], positions_of(zero + 5, ids.shape[1] - 5), positional=positional, cut=cuts[1])
    return torch.cat([first, rest], dim=1)


def ragged(decoder: LaneDecoder, ids: Tensor) -> Tensor:
    """Prompts of different lengths, padded on the right with tokens that must not matter; [batch, 1 + steps, v]."""
    lengths = torch.tensor(PROMPTS)
    padded = ids[:, : max(PROMPTS)].clone()
    padded[torch.arange(max(PROMPTS)) >= lengths[:, None]] = 1
    zero = torch.zeros(len(ids), dtype=torch.int64)
    parts = [decoder.run(padded, positions_of(zero, max(PROMPTS)), picks=lengths[:, None] - 1)]
    for step in range(TOKENS - max(PROMPTS)):
        at = lengths[:, None] + step
        parts.append(decoder.run(ids.gather(1, at), at))
    return torch.cat(parts, dim=1)


def checked(have: Tensor, want: Tensor, what: str) -> float:
    """The largest relative error, which must be rounding."""
    error: float = ((have - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5, f"{what} differs by {error:.1e}"
    return error


@EVERY_FAMILY
def test_the_cache_changes_nothing(name: str) -> None:
    read = recognized(name).read
    if SUPPORTED[name].no_cache:
        program = lane_program(name, 2, "kraken")
        assert program.cached is None
        assert SUPPORTED[name].no_cache in program.no_cache
        note("cache", name, reason=program.no_cache)
        return
    found, found_in_halves = [], []
    for form in ("standard", "kraken"):
        program = lane_program(name, 2, form, overlap="tokens")
        ids = random_tokens(SUPPORTED[name].vocab, len(PROMPTS), TOKENS)
        want = full_logits(program, read, ids)

        def decoder(batch: int = len(PROMPTS), program: LaneProgram = program) -> LaneDecoder:
            return LaneDecoder(program, read, batch, CAPACITY)

        for positional in (False, True):
            have = one_by_one(decoder(), ids, 7, positional=positional)
            found.append(checked(have, want, f"{form}, positional {positional}"))
        found.append(checked(one_by_one(decoder(1), ids[:1], 4, positional=False), want[:1], f"{form}, batch 1"))
        found.append(checked(in_chunks(decoder(), ids), want, f"{form}, in chunks"))
        rows, at = torch.arange(len(PROMPTS))[:, None], torch.tensor(PROMPTS)[:, None] - 1
        steps = torch.arange(TOKENS - max(PROMPTS) + 1)
        found.append(checked(ragged(decoder(), ids), want[rows, at + steps], f"{form}, ragged"))
        assert program.cached is not None
        assert not program.cached.no_split
        for cuts in ((1, 4), (4, 7), (7, 1)):
            found_in_halves.append(checked(in_halves(decoder(), ids, cuts), want, f"{form}, cut at {cuts}"))
    note("cache", name, error=max(found), halves=max(found_in_halves))
    check_plan(name, lane_program(name, 2, "kraken"))


def full_logits(program: LaneProgram, read: object, ids: Tensor) -> Tensor:
    from kraken_compiler.lanes.reference import StreamingProgram, read_from_source

    return StreamingProgram(program, read_from_source(program, read)).run_flat([ids])[program.call.logits]  # type: ignore[arg-type]


def check_plan(name: str, program: LaneProgram) -> None:
    """The plan says what the model is: heads per lane, windows, how far its positions reach."""
    assert program.cached is not None
    plan = program.cached.plan
    assert len(plan.caches) == SUPPORTED[name].layers
    attentions = [
        node for node in program.cached.step.graph.nodes if node.target is torch.ops.kraken.cached_attention.default
    ]
    assert [node.args[9] for node in attentions] == WINDOWS.get(name, [0] * len(attentions))
    if name in HEADS:
        assert {cache.heads for cache in plan.caches} == {HEADS[name]}
    assert plan.limit is None or plan.limit == SUPPORTED[name].max_positions
