"""All ranks of a run as one text generator: rank 0 gives orders, every rank carries them out.

Only rank 0 reads prompts, tokenizes and prints. What is to be done it sends to the others as JSON, so that they need
neither the same command line, nor files, nor a tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import position_limit, token_input, vocabulary
from kraken_compiler.runtime.decoder import Decoder, RecomputingDecoder
from kraken_compiler.runtime.generate import generate
from kraken_compiler.runtime.logits import logits_function
from kraken_compiler.runtime.sampling import Sampling
from kraken_compiler.runtime.session import Session

IDLE_SECONDS = 0.2
"""How long ranks sleep between two looks for an order. Waiting inside a collective for a person to type would run into
its timeout, and keep a GPU busy."""

_ORDER_SECONDS = 120.0
_COMPILE_SECONDS = 1800.0
_IDLE, _END = 0, -1


@dataclass(frozen=True)
class Order:
    """What to generate.

    Attributes:
        prompts: Token ids of every row.
        max_new_tokens: How many to generate at most.
        capacity: Most tokens of a row, prompt and new ones together.
        sampling: How tokens are chosen.
        eos: Tokens that end a row.
        compiled: Compile the program first.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    capacity: int
    sampling: Sampling
    eos: Sequence[int] = ()
    compiled: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `json.dumps(asdict(order))` wrote."""
        values = json.loads(text)
        return cls(**{**values, "sampling": Sampling(**values["sampling"])})


class Engine:
    """One rank's part.

    Attributes:
        artifact: What is run.
        session: This rank.
        vocabulary: Number of tokens the model knows, None if its graph does not say.
        positions: The longest sequence that the model takes, as far as its graph says.
    """

    def __init__(self, artifact: Artifact, program: RankProgram, session: Session) -> None:
        self.artifact = artifact
        self.session = session
        self._program = program
        self._decoder: tuple[tuple[int, int, bool], Decoder] | None = None
        manifest = artifact.manifest
        graph = Program(program.graph, manifest.weight_table, manifest.inputs, manifest.call, degree=manifest.degree)
        self.vocabulary = vocabulary(graph) if token_input(graph) is not None else None
        proven = manifest.cache.plan.limit if manifest.cache is not None else None
        self.positions = min(position_limit(graph), proven or sys.maxsize)

    def run(self, order: Order) -> Iterator[list[int | None]]:
        """Carry out an order, as rank 0: the others are told first.

        Yields:
            The new token of every row, None for one that has ended.

        Raises:
            UsageError: A token is none of the model's, or prompt and new tokens do not fit.
        """
        self._check(order)
        self._send(json.dumps(asdict(order)).encode())
        yield from self._carry_out(order)

    def idle(self) -> None:
        """Tell the other ranks, as rank 0, that there is nothing to do yet; to be called every `IDLE_SECONDS`."""
        self.session.status.progress("waiting for a prompt")
        self._size(_IDLE)

    def end(self) -> None:
        """Tell the other ranks, as rank 0, that there is nothing left to do."""
        self._size(_END)

    def follow(self) -> None:
        """Carry out orders, as any other rank, until rank 0 has no more."""
        self.session.status.progress("waiting for an order", extra=_ORDER_SECONDS)
        while (size := self._size(0)) != _END:
            if size == _IDLE:
                self.session.status.progress("waiting for a prompt")
                time.sleep(IDLE_SECONDS)
                continue
            content = torch.zeros(size, dtype=torch.uint8, device=self.session.device)
            dist.broadcast(content, src=0)
            order = Order.from_json(bytes(content.tolist()).decode())
            for _ in self._carry_out(order):
                pass

    def _check(self, order: Order) -> None:
        for token in (token for prompt in order.prompts for token in prompt):
            if token < 0 or (self.vocabulary is not None and token >= self.vocabulary):
                has = f"; the model has the tokens 0 to {self.vocabulary - 1}" if self.vocabulary is not None else ""
                raise UsageError(f"there is no token {token}{has}")
        needed = max(map(len, order.prompts)) + order.max_new_tokens
        if needed > self.positions:
            raise UsageError(
                f"prompt and new tokens need {needed} positions, the model has {self.positions}; "
                "shorten the prompt or ask for fewer new tokens"
            )

    def _carry_out(self, order: Order) -> Iterator[list[int | None]]:
        status = self.session.status
        extra = _COMPILE_SECONDS if order.compiled else 0.0
        status.progress("generating token 1", extra)
        decoder = self._decoder_for(order)
        rows = generate(
            decoder,
            order.prompts,
            order.max_new_tokens,
            sampling=order.sampling,
            eos=order.eos,
            agree=self._agreement(decoder),
            device=self.session.device,
        )
        for done, tokens in enumerate(rows, start=1):
            # The first step may compile as well: reading a prompt and appending a token are two programs.
            status.progress(f"generating token {done + 1}", extra if done == 1 else 0.0)
            yield tokens

    def _agreement(self, decoder: Decoder) -> Callable[[Tensor], Tensor] | None:
        """How the ranks come to the same choices; None if they make the same ones anyway."""
        session = self.session
        # Equal sums make equal logits only where the same kernels run, and another machine may have other ones.
        identical = session.one_machine and getattr(decoder, "identical_on_all_ranks", False)
        return None if session.degree == 1 or identical else first_rank_decides

    def _decoder_for(self, order: Order) -> Decoder:
        key = (len(order.prompts), order.capacity, order.compiled)
        if self._decoder is None or self._decoder[0] != key:
            # The old one's cache is let go before the new one's is made.
            self._decoder = None
            self._decoder = (key, self._new_decoder(*key))
        return self._decoder[1]

    def _new_decoder(self, batch: int, capacity: int, compiled: bool) -> Decoder:
        program, manifest = self._program, self.artifact.manifest
        if program.has_cache:
            return program.decoder(batch, capacity, compiled=compiled)
        if compiled:
            raise UsageError(f"--compile needs a program with a KV cache; this one has none{_why(manifest)}")
        return RecomputingDecoder(logits_function(manifest.inputs, manifest.call, program.run_flat), batch, capacity)

    def _send(self, content: bytes) -> None:
        self._size(len(content))
        dist.broadcast(torch.tensor(list(content), dtype=torch.uint8, device=self.session.device), src=0)

    def _size(self, size: int) -> int:
        """Rank 0's number, on every rank."""
        told = torch.tensor([size], dtype=torch.int64, device=self.session.device)
        dist.broadcast(told, src=0)
        return int(told)


def _why(manifest: Manifest) -> str:
    return f": {manifest.no_cache}" if manifest.no_cache else ""


def first_rank_decides(choice: Tensor) -> Tensor:
    """Rank 0's choice, on every rank: what `generate` calls `agree`."""
    choice = choice.contiguous()
    dist.broadcast(choice, src=0)
    return choice
