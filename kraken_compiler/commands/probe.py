"""`probe_machine`: what the machine at hand does, as a file that times are predicted from."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import DEFAULT_BACKEND, backend_named
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.errors import UsageError, os_errors_as
from kraken_compiler.latency.machine import Machine, parse_machine
from kraken_compiler.latency.predict import Load, Predictor
from kraken_compiler.latency.probe import DTYPES, Figures, Note, figure_count, machine_toml, probe
from kraken_compiler.native import KrakenConfig, KrakenLM
from kraken_compiler.options.dtypes import dtype_named
from kraken_compiler.options.probe import ProbeOptions
from kraken_compiler.progress import Advance, Progress, Silent
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks, joined
from kraken_compiler.text import replace_text

_LOOK_SECONDS = 0.2
_STEPS = 20
"""Of a tiny program, that are timed after as many others."""


def probe_machine(
    output: str | os.PathLike[str], options: ProbeOptions | None = None, *, progress: Progress | None = None
) -> Machine | None:
    """Measure products, attention, copies and all-reduces, and write them to a machine file.

    Started by torchrun or with RANK and WORLD_SIZE set, this process is one of the ranks, which may be on several
    hosts; else it starts them here.

    Args:
        output: The TOML file.
        options: What is asked for; None takes the defaults.
        progress: Is told how far it is.

    Returns:
        The machine; None on ranks other than 0, which write nothing.

    Raises:
        UsageError: There is no such element type, or the file is there and may not be replaced.
        InputFileError: The file cannot be written.
        RankFailedError: A rank died or hung.
    """
    options = options if options is not None else ProbeOptions()
    path, show = Path(output), progress or Silent()
    if path.is_dir() or not path.name:
        raise UsageError(f"--output {path}: is a directory; name a file")
    if path.exists() and not options.force:
        raise UsageError(f"{path} is there; pass --force to replace it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no such directory")
    dtypes = list(options.dtypes) or list(DTYPES)
    for name in dtypes:
        dtype_named(name)
    if "RANK" in os.environ:
        figures = _as_rank(dtypes, show)
    else:
        ranks = options.ranks or (torch.accelerator.device_count() if torch.accelerator.is_available() else 2)
        figures = _on_local_ranks(dtypes, ranks, options.timeout, show)
    if figures is None:
        return None
    text = machine_toml(options.name or socket.gethostname(), figures)
    machine = parse_machine(text, str(path))
    # Complete or not at all: a file of half the figures would be a slower machine.
    with os_errors_as(f"--output: cannot write {path}"):
        replace_text(path, text)
    return machine


def probe_rank(payload: Mapping[str, Any], ranks: Ranks) -> Figures:
    """One of several local ranks: notes how far it is by the size of a file."""
    progress = Path(payload["progress"])

    def note(done: int, total: int) -> None:
        ranks.status.progress(f"figure {done} of {total}")
        if ranks.rank == 0:
            progress.write_bytes(b"." * done)

    return measured_figures(ranks, payload["dtypes"], Path(payload["artifact"]), note)


def measured_figures(ranks: Ranks, dtypes: Sequence[str], artifact: Path, note: Note) -> Figures:
    """All figures, and what a run of a whole program takes beside what they predict of it.

    Args:
        ranks: This rank; all must call it together.
        dtypes: Element types.
        artifact: See `tiny_artifact`.
        note: Is told how far it is.
    """
    figures = probe(ranks, dtypes, note)
    backend = backend_named(DEFAULT_BACKEND)
    opened, model = open_model(artifact, ranks, lambda _: backend)
    decoder, graphs = model.decoder(1, 2 * _STEPS + 1), backend.run_graphs(opened)
    assert decoder is not None, "it was compiled with a cache"
    assert graphs is not None, "it was compiled with a cache"
    token = np.zeros(1, np.int64)
    decoder.prefill(token[None], np.ones(1, np.int64))
    seconds = []
    for _ in range(2 * _STEPS):
        ranks.barrier()
        began = time.perf_counter()
        decoder.step(token)
        seconds.append(time.perf_counter() - began)
    machine = Machine.model_validate({"name": "here", **figures})
    predicted = Predictor(machine, fused=False).predict(graphs, Load(_STEPS, 1, 2)).tpot
    figures["launch"]["step"] = max(0.0, statistics.median(seconds[_STEPS:]) - predicted)
    return figures


def tiny_artifact(folder: Path, degree: int, dtype: str) -> Path:
    """A program that computes next to nothing, for as many ranks as there are."""
    config = KrakenConfig(layers=2, width=16, heads=1, degree=degree, vocabulary=64, context=4 * _STEPS)
    compile_model(KrakenLM(config).eval(), folder / "tiny.kraken", dtype=dtype, verify=False, force=True)
    return folder / "tiny.kraken"


def _as_rank(dtypes: list[str], show: Progress) -> Figures | None:
    with joined() as ranks, tempfile.TemporaryDirectory(prefix="kraken-probe-") as folder:
        # Every host makes its own: what is random in it must be alike.
        torch.manual_seed(0)
        artifact = tiny_artifact(Path(folder), ranks.degree, dtypes[0])
        with show.steps("measure") as advance:
            figures = measured_figures(ranks, dtypes, artifact, lambda done, total: advance(done, total, "figures"))
        return figures if ranks.rank == 0 else None


def _on_local_ranks(dtypes: list[str], degree: int, timeout: float, show: Progress) -> Figures:
    with tempfile.TemporaryDirectory(prefix="kraken-probe-") as folder:
        artifact = tiny_artifact(Path(folder), degree, dtypes[0])
        file = Path(folder) / "progress"
        file.write_bytes(b"")
        with show.steps("measure") as advance, _size_watched(file, figure_count(dtypes, degree), advance):
            payload = {"dtypes": dtypes, "progress": str(file), "artifact": str(artifact)}
            function = f"{probe_rank.__module__}:{probe_rank.__name__}"
            figures: Figures = run_ranks(function, degree, payload, timeout=timeout)[0]
    return figures


@contextmanager
def _size_watched(file: Path, total: int, advance: Advance) -> Iterator[None]:
    """Tell how far the ranks are: rank 0 says it by the size of a file."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(_LOOK_SECONDS):
            advance(file.stat().st_size, total, "figures")

    watcher = threading.Thread(target=look, name="kraken-probe-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()
