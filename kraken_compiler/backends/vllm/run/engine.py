"""vLLM as the engine of `kraken-run`: for prompts of one process, without a server."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import EngineSettings
from kraken_compiler.backends.sequences import require_tokens, token_bytes
from kraken_compiler.backends.vllm.run.environment import engine_environment
from kraken_compiler.errors import RankFailedError, UsageError, first_line
from kraken_compiler.standard_streams import tell

if TYPE_CHECKING:
    from kraken_compiler.generate.engine import GenerationRequest

_CAPACITY = 2048
_CACHE_BYTES = 1 << 28
"""Room for keys and values beside what the requests need: vLLM keeps some blocks to itself."""


class VllmEngine:
    """See `TextEngine`.

    Attributes:
        artifact, reads_source: See there.
    """

    reads_source = False

    def __init__(self, artifact: Artifact, llm: Any) -> None:
        self.artifact = artifact
        self._engine = llm.llm_engine
        self._longest = int(llm.llm_engine.vllm_config.model_config.max_model_len)
        self._vocabulary = int(llm.llm_engine.vllm_config.model_config.get_vocab_size())
        self._requests = 0

    @property
    def positions(self) -> int:
        """See `TextEngine`."""
        return self._longest

    def run(self, request: GenerationRequest) -> Iterator[list[int | None]]:
        """See `TextEngine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check(request)
        sampling = request.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p or 1.0,
            seed=sampling.seed if sampling.temperature else None,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(request.eos),
            ignore_eos=True,  # those that count are named
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        names = self._add(request.prompts, params)
        tokens: dict[str, deque[int]] = {name: deque() for name in names}
        running = set(names)
        try:
            while running or any(tokens.values()):
                while any(not tokens[name] for name in running):
                    for output in self._engine.step():
                        (completion,) = output.outputs
                        # The token that ends a row is none of its text.
                        new = (token for token in completion.token_ids if token not in request.eos)
                        tokens[output.request_id].extend(new)
                        if output.finished:
                            running.discard(output.request_id)
                if any(tokens.values()):
                    yield [tokens[name].popleft() if tokens[name] else None for name in names]
        finally:
            # Whoever has read enough leaves requests behind.
            self._engine.abort_request(list(running))

    def first_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """See `OwnEngine`."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True, detokenize=False)
        found: dict[str, npt.NDArray[np.float32]] = {}
        names = self._add(prompts, params)
        while len(found) < len(names):
            for output in self._engine.step():
                (completion,) = output.outputs
                (of_token,) = completion.logprobs
                row = np.full(self._vocabulary, -np.inf, np.float32)
                row[list(of_token)] = [entry.logprob for entry in of_token.values()]
                found[output.request_id] = row
        return [found[name] for name in names]

    def _add(self, prompts: Sequence[Sequence[int]], params: Any) -> list[str]:
        """Hand requests over; returns their names."""
        from vllm import TokensPrompt

        names = [str(self._requests + row) for row in range(len(prompts))]
        self._requests += len(names)
        for row, (name, prompt) in enumerate(zip(names, prompts)):
            of_row = params.clone()
            if params.seed is not None:
                # vLLM draws the same numbers for all requests of one seed.
                of_row.seed = _seed_of_row(params.seed, row)
            self._engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), of_row)
        return names

    def idle(self) -> None:
        """See `TextEngine`; its processes wait by themselves."""

    def note(self, text: str) -> None:
        """See `TextEngine`."""
        tell(f"note: {text}")

    def progress(self, stage: str) -> None:
        """See `TextEngine`; nobody watches it."""

    def _check(self, request: GenerationRequest) -> None:
        require_tokens(request.prompts, self._vocabulary)
        total = max(map(len, request.prompts)) + request.max_new_tokens
        if total > self._longest:
            raise UsageError(
                f"prompt and new tokens need {total} positions, the engine has room for {self._longest}; shorten the "
                "prompt, ask for fewer new tokens, or raise the context (--max-context)"
            )


@contextmanager
def vllm_engine(artifact: Artifact, settings: EngineSettings, *, compiled: bool) -> Iterator[VllmEngine]:
    """Start vLLM's processes, one for every lane, and end them.

    Args:
        artifact: An open artifact.
        settings: What is asked for.
        compiled: Let vLLM compile the graphs, which takes a minute.
    """
    with engine_environment(settings), _output_on_standard_error():
        from vllm import LLM

        cache = artifact.manifest.cache
        assert cache is not None, "only programs with a KV cache are written"
        limits = [limit for limit in (cache.plan.limit, artifact.manifest.source.max_positions) if limit is not None]
        capacity = settings.capacity or min([_CAPACITY, *limits])
        if limits and capacity > min(limits):
            raise UsageError(f"--max-context {capacity}: the model takes {min(limits)} tokens")
        try:
            llm = LLM(
                model=str(artifact.directory),
                tensor_parallel_size=artifact.manifest.degree,
                max_model_len=capacity,
                max_num_seqs=max(settings.rows, 1),
                enforce_eager=not compiled,
                kv_cache_memory_bytes=_CACHE_BYTES + settings.rows * capacity * _token_bytes(artifact),
                skip_tokenizer_init=True,
                disable_log_stats=True,
                max_logprobs=-1 if settings.checking else 20,
            )
        except ValueError as error:
            raise UsageError(f"vLLM refuses it: {' '.join(str(error).split())}") from error
        except RuntimeError as error:
            raise RankFailedError(f"vLLM could not start: {first_line(error)}") from error
    try:
        yield VllmEngine(artifact, llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _seed_of_row(seed: int, row: int) -> int:
    """A seed of 63 bits that depends on nothing but the arguments."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + row.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _token_bytes(artifact: Artifact) -> int:
    import torch

    assert artifact.manifest.cache is not None
    return token_bytes(artifact.manifest.cache.plan.caches, lambda dtype: getattr(torch, dtype).itemsize)


@contextmanager
def _output_on_standard_error() -> Iterator[None]:
    """Let processes that start meanwhile write to standard error: standard output is for the text."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
