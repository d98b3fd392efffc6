"""What every rank of a benchmark does: it obeys its parent, one command after the other, and times generations.

Knows no torch, since there are ranks that must not.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ttft_parts.contenders import Contender, named


class RankLoop(ABC):
    """Holds the decoders of one prompt size, and times them. Its methods are the parent's commands.

    A decoder has `reset()`, `prefill(ids)` and `step(token)`; the latter two return logits, `[1, vocabulary]`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.rank: int = settings["rank"]
        self.degree: int = settings["degree"]
        self.decoders: dict[str, Any] = {}
        self.ids: Any = None

    @abstractmethod
    def make(self, contender: Contender, capacity: int) -> Any:
        """A decoder for so many tokens."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks have come here."""

    @abstractmethod
    def tokens(self, values: list[Any]) -> Any:
        """Token ids as the decoders take them."""

    @abstractmethod
    def as_array(self, logits: Any) -> npt.NDArray[np.float32]:
        """A copy of logits."""

    def hello(self) -> None:  # noqa: B027
        """Only to be answered: the group is complete."""

    def start_prompt(self, ids: list[list[int]]) -> None:
        """Forget the decoders of other sizes, and take this prompt."""
        self.decoders.clear()
        self.ids = self.tokens(ids)
        gc.unfreeze()
        gc.collect()

    def prepare(self, contender: str, new_tokens: int, logits_file: str) -> dict[str, Any] | None:
        """Make a decoder and generate with it once, compiling on the way; the logits of all tokens go to a file.

        None if this rank takes no part, because the contender is a single process.
        """
        one = named(contender)
        if self._is_left_out(one):
            return None
        began = time.perf_counter()
        decoder = self.make(one, self.ids.shape[1] + new_tokens)
        self._barrier_of(one)
        decoder.reset()
        logits = [self.as_array(decoder.prefill(self.ids))]
        tokens = [_best(logits[0])]
        for _ in range(new_tokens - 1):
            logits.append(self.as_array(decoder.step(self.tokens([tokens[-1]]))))
            tokens.append(_best(logits[-1]))
        if self.rank == 0:
            np.save(Path(logits_file), np.concatenate(logits))
        self.decoders[contender] = decoder
        # A used cache may be another specialisation than a new one.
        self.generate(contender, min(3, new_tokens))
        return {"tokens": tokens, "seconds": time.perf_counter() - began}

    def settle(self) -> None:
        """What exists now is not looked at by the garbage collector again."""
        gc.collect()
        gc.freeze()

    def generate(self, contender: str, new_tokens: int) -> dict[str, Any] | None:
        """One timed generation; TPOT is the mean over the tokens after the first, None if there are none.

        Where there are none, `kernel` says which share of its core the kernel had: most of it is the network stack.
        """
        one = named(contender)
        if self._is_left_out(one):
            return None
        decoder = self.decoders[contender]
        decoder.reset()
        gc.collect()
        gc.disable()
        try:
            self._barrier_of(one)
            kernel = 0.0 if new_tokens > 1 else kernel_seconds()
            began = time.perf_counter()
            tokens = [_best(decoder.prefill(self.ids))]
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                tokens.append(_best(decoder.step(self.tokens([tokens[-1]]))))
            last = time.perf_counter()
        finally:
            gc.enable()
        following = new_tokens - 1
        return {
            "tokens": tokens,
            "ttft": first - began,
            "tpot": (last - first) / following if following else None,
            "kernel": None if following else (kernel_seconds() - kernel) / (last - began),
        }

    def _is_left_out(self, contender: Contender) -> bool:
        return contender.alone and self.rank != 0

    def _barrier_of(self, contender: Contender) -> None:
        if not contender.alone:
            self.barrier()


def run_rank(make: Callable[[dict[str, Any]], object]) -> None:
    """Be a rank of a benchmark, on a core of its own if there is one: what every rank's module does when it is run.

    Args:
        make: Makes what obeys, from the settings.
    """
    settings = json.loads(sys.argv[1])
    _take_a_core(settings["rank"], settings["degree"])
    _obey(make(settings), settings["reply_to"])


def _obey(rank: object, reply_to: int) -> None:
    """Do what comes on standard input until the parent is gone, then leave at once.

    Args:
        rank: Who does it.
        reply_to: File descriptor that takes the answers.
    """
    with os.fdopen(reply_to, "w") as reply:
        for line in sys.stdin:
            arguments = json.loads(line)
            try:
                answer = {"result": getattr(rank, arguments.pop("do"))(**arguments)}
            except Exception as error:
                traceback.print_exc()
                text = str(error).strip().splitlines() or [""]
                answer = {"error": f"{type(error).__name__}: {text[0][:300]}"}
            reply.write(json.dumps(answer) + "\n")
            reply.flush()
    # Peers may be gone already, and nothing is left to wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _take_a_core(rank: int, degree: int) -> None:
    """Stay on one core, if there is one for every rank."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= degree:
        os.sched_setaffinity(0, {cores[rank]})


def kernel_seconds() -> float:
    """Seconds that the kernel has had this process's core, for calls, interrupts and what comes behind them.

    0 if it is on several cores.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) != 1:
        return 0.0
    (core,) = cores
    counts = {line.split()[0]: line.split()[1:] for line in Path("/proc/stat").read_text().splitlines()}
    _, _, system, _, _, interrupts, behind, *_ = counts[f"cpu{core}"]
    return (int(system) + int(interrupts) + int(behind)) / os.sysconf("SC_CLK_TCK")


def _best(logits: Any) -> int:
    return int(logits[0].argmax())
