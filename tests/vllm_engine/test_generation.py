"""What vLLM generates with a compiled model is what our own ranks generate with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_engine.conftest import VOCABULARY, greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHUNK, LONGEST, NEW_TOKENS = 64, 256, 12


def prompts() -> list[list[int]]:
    """Eight of mixed length: one is longer than a chunk, and two begin as it does."""
    draw = random.Random(0)
    long = [draw.randrange(VOCABULARY) for _ in range(150)]
    others = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (1, 7, 20, 33, 47)]
    return [long, long[:100], [*long[:70], *others[2]], *others]


@contextmanager
def engine(artifact: Path, degree: int, collectives: str) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(
        model=str(artifact),
        tensor_parallel_size=degree,
        max_model_len=LONGEST,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        block_size=32,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        enforce_eager=True,
        additional_config={"kraken": {"collectives": collectives}},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generated(llm: Any, ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The tokens, and how many tokens of every prompt were in the cache."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in ids], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("form", ["standard", "kraken"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "bloom"])
def test_many_requests_at_once(compiled: Callable[..., Path], kind: str, form: str, degree: int) -> None:
    """Degree 2 adds up as ranks do that share memory, degree 3 as those of several hosts."""
    artifact = compiled(kind, degree, form)
    ids = prompts()
    want = [greedy(artifact, [one], NEW_TOKENS)[0] for one in ids[:1]] + greedy(artifact, ids[1:], NEW_TOKENS)
    with engine(artifact, degree, "auto" if degree == 2 else "own") as llm:
        have, _ = generated(llm, ids)
        again, cached = generated(llm, ids)
    assert len({token for row in want for token in row}) > NEW_TOKENS, "tokens that are all alike show nothing"
    assert have == want
    assert again == want
    assert cached[0] >= CHUNK, "the prefix cache was not hit"
