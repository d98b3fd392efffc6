"""`probe_machine`: what the machine at hand does, as a file that times are predicted from."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kraken_compiler.errors import UsageError, os_errors_as
from kraken_compiler.latency.machine import Machine, parse_machine
from kraken_compiler.latency.probe import DTYPES, Figures, figure_count, machine_toml, probe, probe_rank, require_dtype
from kraken_compiler.options.probe import ProbeOptions
from kraken_compiler.progress import Advance, Progress, Silent
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import joined

_LOOK_SECONDS = 0.2


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
    if path.exists() and not options.force:
        raise UsageError(f"{path} is there; pass --force to replace it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no such directory")
    dtypes = list(options.dtypes) or list(DTYPES)
    for name in dtypes:
        require_dtype(name)
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
    partial = path.with_name(f"{path.name}.partial")
    with os_errors_as(f"--output: cannot write {path}"):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return machine


def _as_rank(dtypes: list[str], show: Progress) -> Figures | None:
    with joined() as ranks, show.steps("measure") as advance:
        figures = probe(ranks, dtypes, lambda done, total: advance(done, total, "figures"))
        return figures if ranks.rank == 0 else None


def _on_local_ranks(dtypes: list[str], degree: int, timeout: float, show: Progress) -> Figures:
    with tempfile.TemporaryDirectory(prefix="kraken-probe-") as folder, show.steps("measure") as advance:
        file = Path(folder) / "progress"
        file.write_bytes(b"")
        with _size_watched(file, figure_count(dtypes, degree), advance):
            payload = {"dtypes": dtypes, "progress": str(file)}
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
