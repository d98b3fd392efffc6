"""All ranks of a run as one text generator: rank 0 sends requests, every rank carries them out. Imports no torch.

Only rank 0 reads prompts, tokenizes and prints. What is to be done it sends to the others as JSON, so that they need
neither the same command line, nor files, nor a tokenizer.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import RankModel
from kraken_compiler.backends.sequences import require_tokens
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import Array, CacheDecoder, Decoder, SplitDecoder, check_capacity, decoder_of
from kraken_compiler.generate.loop import generate
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.generate.split_threshold import LENGTHS, split_threshold
from kraken_compiler.ir.size_checks import BATCH, SEQUENCE, require_generation, token_rules
from kraken_compiler.ir.size_rules import broken_rule
from kraken_compiler.lanes.derived_inputs import reads_source
from kraken_compiler.ranks.session import Ranks

IDLE_SECONDS = 0.2
"""Seconds that ranks sleep between two looks for a request. Waiting inside a collective for a person to type would run
into its timeout, and keep a GPU busy."""

_FOLLOWER_SECONDS = 0.9 * IDLE_SECONDS
"""The others sleep less than rank 0, or what it told them meanwhile would pile up before the next request."""

_REQUEST_SECONDS = 120.0
_SLOWEST_ACCELERATOR = 1e12
"""Operations per second. What processors do is seen while they do it, what an accelerator does is not."""
_IDLE, _END = b"", b"end"
"""Messages of rank 0 instead of a request, which is a JSON object."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request to generate text.

    Attributes:
        prompts: Token ids of every row; what an encoder-decoder's answer begins with.
        max_new_tokens: How many to generate at most.
        capacity: Most tokens of a row, prompt and new ones together.
        sampling: How tokens are chosen.
        eos: Tokens that end a row.
        sources: Token ids of the text that an encoder-decoder reads, for every row.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    capacity: int
    sampling: Sampling
    eos: Sequence[int] = ()
    sources: Sequence[Sequence[int]] = ()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request that `json.dumps(asdict(request))` wrote."""
        values = json.loads(text)
        return cls(**{**values, "sampling": Sampling(**values["sampling"])})


class Engine:
    """One rank's part of a run; that of rank 0 is a `TextEngine`.

    Attributes:
        artifact: What is run.
        model: This rank's program.
        ranks: This rank.
        reads_source: True for an encoder-decoder, whose prompts are read by its encoder.
    """

    def __init__(self, artifact: Artifact, model: RankModel, ranks: Ranks) -> None:
        self.artifact = artifact
        self.model = model
        self.ranks = ranks
        self.reads_source = reads_source(artifact.manifest.inputs)
        self._decoder: tuple[tuple[int, int, Sequence[Sequence[int]]], Decoder] | None = None
        self._read: Sequence[int] = ()
        self._has_measured = False
        self._traced: Decoder | None = None

    def run(self, request: GenerationRequest) -> Iterator[list[int | None]]:
        """Carry out a request, as rank 0: the others are told first.

        Yields:
            The new token of every row, None for one that has ended.

        Raises:
            UsageError: A token is none of the model's, prompt and new tokens do not fit, or the model was not compiled
                for sequences of such lengths.
        """
        # Here and not where ranks carry it out: a request that is refused must not reach the others.
        self._check(request)
        self.ranks.broadcast(json.dumps(asdict(request)).encode())
        yield from self._carry_out(request)

    @property
    def positions(self) -> int:
        """The longest sequence that the model takes, as far as its graph says."""
        return self.model.positions

    def note(self, text: str) -> None:
        """Say what a user should know."""
        self.ranks.status.note(text)

    def progress(self, stage: str) -> None:
        """Say that something got done, and what comes next."""
        self.ranks.status.progress(stage)

    def idle(self) -> None:
        """Tell the other ranks, as rank 0, that there is nothing to do yet; to be called every `IDLE_SECONDS`."""
        self.ranks.status.progress("waiting for a prompt")
        self.ranks.broadcast(_IDLE)

    def end(self) -> None:
        """Tell the other ranks, as rank 0, that there is nothing left to do."""
        self.ranks.broadcast(_END)

    def follow(self) -> None:
        """Carry out requests, as any other rank, until rank 0 has no more."""
        self.ranks.status.progress("waiting for a request", extra=_REQUEST_SECONDS)
        while (content := self.ranks.broadcast(None)) != _END:
            if content == _IDLE:
                self.ranks.status.progress("waiting for a prompt")
                time.sleep(_FOLLOWER_SECONDS)
                continue
            for _ in self._carry_out(GenerationRequest.from_json(content.decode())):
                pass

    def _check(self, request: GenerationRequest) -> None:
        vocabulary, positions = self.model.vocabulary, self.model.positions
        require_tokens((*request.prompts, *request.sources), vocabulary)
        longest = max(map(len, request.sources), default=0)
        if longest > positions:
            raise UsageError(f"the prompt needs {longest} positions, the model has {positions}; shorten it")
        total = max(map(len, request.prompts)) + request.max_new_tokens
        if total > positions:
            raise UsageError(
                f"prompt and new tokens need {total} positions, the model has {positions}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        manifest = self.artifact.manifest
        lengths = list(map(len, request.prompts))
        if not request.sources:  # the sizes of those are compared at every step
            require_generation(manifest.call, manifest.inputs, len(lengths), lengths, request.max_new_tokens)
        check_capacity(total, request.capacity)
        if request.capacity > positions:
            raise UsageError(
                f"room for {request.capacity} tokens was asked for, the model has {positions} positions; "
                "lower the context (--max-context)"
            )

    def _carry_out(self, request: GenerationRequest) -> Iterator[list[int | None]]:
        status = self.ranks.status
        compiling = self.model.first_seconds
        rows, longest = len(request.prompts), max(map(len, request.prompts), default=0)
        reading = self._seconds_to_read(rows * max(longest, *map(len, request.sources), 0))
        again = self._seconds_to_read(rows * request.capacity) if self.artifact.manifest.cache is None else 0.0
        status.progress("generating token 1", compiling + reading)
        decoder = self._decoder_for(request)
        # Without a cache all is read again for every token.
        most = request.capacity if self.artifact.manifest.cache is None else longest
        self._measure_halves(decoder, most - self._known_tokens(decoder, request.prompts))
        if self.ranks.trace is not None and self._traced is not decoder:
            # Only now, so that what was run to measure halves is not in the trace.
            self.ranks.trace.name_runs(decoder)
            self._traced = decoder
        known = self._known_tokens(decoder, request.prompts)
        read, self._read = [*request.prompts[0]], ()
        steps = generate(
            decoder,
            request.prompts,
            request.max_new_tokens,
            sampling=request.sampling,
            eos=request.eos,
            agree=self._agreement(decoder, request.sampling),
            known=known,
        )
        for step, tokens in enumerate(steps, start=1):
            # The first step may compile as well: reading a prompt and appending a token are two programs.
            status.progress(f"generating token {step + 1}", again + (compiling if step == 1 else 0.0))
            read += [token for token in tokens[:1] if token is not None]
            yield tokens
        # The last token was chosen, perhaps not read.
        self._read = read[:-1]

    def _known_tokens(self, decoder: Decoder, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of a prompt the decoder has read: a conversation begins as it did before."""
        if len(prompts) > 1 or not isinstance(decoder, CacheDecoder):
            return 0
        (prompt,) = prompts
        most = min(len(prompt) - 1, len(self._read))  # something must be read, or there are no logits
        return next((place for place in range(most) if prompt[place] != self._read[place]), most)

    def _measure_halves(self, decoder: Decoder, tokens: int) -> None:
        """Measure from how many tokens on two halves are faster, once it matters; the decoder is empty after."""
        if self._has_measured or tokens < LENGTHS[0] or not isinstance(decoder, SplitDecoder) or not decoder.can_split:
            return
        manifest = self.artifact.manifest
        rules = token_rules(manifest.call, manifest.inputs)
        lengths = [length for length in LENGTHS if length <= decoder.capacity]
        lengths = [at for at in lengths if broken_rule(rules, {BATCH: decoder.batch, SEQUENCE: at}) is None]
        self._has_measured, self._read = True, ()
        setting = f"{self.model.setting} {os.environ.get('OMP_NUM_THREADS', '')}".strip()
        decoder.split_from = split_threshold(decoder, lengths, self.ranks, self.artifact.directory, setting)

    def _seconds_to_read(self, tokens: int) -> float:
        """Seconds that a slow accelerator takes to multiply so many tokens with its share of the weights."""
        manifest = self.artifact.manifest
        elements = sum(math.prod(spec.source_shape) for spec in manifest.weights) / manifest.degree
        return 2.0 * elements * tokens / _SLOWEST_ACCELERATOR

    def _agreement(self, decoder: Decoder, sampling: Sampling) -> Callable[[Array], Array] | None:
        """The function by which ranks agree on choices; None if they make the same ones anyway."""
        # The largest of the same numbers is the same everywhere. Drawing takes exponentials, of which numpy has several
        # kinds and picks one by the processor.
        chosen_alike = sampling.temperature == 0 or self.ranks.one_machine
        identical = decoder.identical_on_all_ranks and chosen_alike
        return None if self.ranks.degree == 1 or identical else first_rank_decides(self.ranks)

    def _decoder_for(self, request: GenerationRequest) -> Decoder:
        key = (len(request.prompts), request.capacity, request.sources)
        if self._decoder is None or self._decoder[0] != key:
            # The old one's cache is let go before the new one's is made.
            self._decoder = None
            self._read, self._has_measured = (), False
            self._decoder = (key, decoder_of(self.model, self.artifact.manifest, *key))
        return self._decoder[1]


def first_rank_decides(ranks: Ranks) -> Callable[[Array], Array]:
    """The `agree` of `generate` that gives rank 0's choice, on every rank."""

    def agree(choice: Array) -> Array:
        content = ranks.broadcast(choice.astype(np.int64).tobytes() if ranks.rank == 0 else None)
        return np.frombuffer(content, np.int64)

    return agree
