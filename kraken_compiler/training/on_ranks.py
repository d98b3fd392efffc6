"""A training on local ranks: starts them and passes on what rank 0 says."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kraken_compiler.errors import os_errors_as
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.training.loop import Outcome, train
from kraken_compiler.training.rows import TrainingText
from kraken_compiler.training.state import read_state
from kraken_compiler.training.trainer import Trainer
from kraken_compiler.training.watch import SilentWatch, ToFile, Watch, pass_on
from kraken_compiler.weights.io.safetensors_writer import new_safetensors

_ROWS, _EVENTS = "rows.safetensors", "events.jsonl"
_LISTEN_SECONDS = 0.2


def train_on_ranks(
    function: str,
    count: int,
    payload: Mapping[str, Any],
    text: TrainingText,
    folder: Path,
    watch: Watch,
    timeout: float,
) -> Outcome:
    """Call a function on ranks that trains, and returns its `Outcome` as plain values.

    Args:
        function: "package.module:function", see `run_ranks`; it calls `train_on_rank`.
        count: Number of ranks.
        payload: What it is given.
        text: What is trained on.
        folder: Where the run's state is.
        watch: Is told what happens.
        timeout: Seconds without progress, beyond what work like this takes, after which a rank counts as hanging.

    Raises:
        RankFailedError: A rank died or hung.
        UsageError, InputFileError: See `train`.
    """
    rows = {"train": text.train, "held_out": text.held_out}
    with new_safetensors(folder / _ROWS, {name: (one.dtype, tuple(one.shape)) for name, one in rows.items()}) as file:
        for name, one in rows.items():
            file.append(name, one)
    with _event_listener(folder / _EVENTS, watch):
        outcome = run_ranks(function, count, payload, timeout=timeout)[0]
    held_out = tuple((int(step), float(loss)) for step, loss in outcome.pop("held_out"))
    return Outcome(**outcome, held_out=held_out)


def train_on_rank(trainer: Trainer, ranks: Ranks, folder: Path) -> Outcome:
    """One rank's part of `train_on_ranks`, once it has built what it trains."""
    rows = load_file(folder / _ROWS)
    # All ranks must have read the state before one of them writes the next.
    state = read_state(folder)
    ranks.barrier()
    watch = ToFile(folder / _EVENTS) if ranks.rank == 0 else SilentWatch()
    return train(trainer, rows["train"], rows["held_out"], folder, state, watch, ranks.status.progress)


@contextmanager
def _event_listener(path: Path, watch: Watch) -> Iterator[None]:
    """Pass on what rank 0 writes to a file, until it has ended and all is read."""
    with os_errors_as(f"{path}: cannot be written"):
        path.write_text("")
    end = threading.Event()

    def listen() -> None:
        with path.open(encoding="utf-8") as file:
            rest = ""
            while True:
                last = end.is_set()
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    pass_on(line, watch)
                if last:
                    return
                end.wait(_LISTEN_SECONDS)

    listener = threading.Thread(target=listen, name="kraken-training-events", daemon=True)
    listener.start()
    try:
        yield
    finally:
        end.set()
        listener.join()
