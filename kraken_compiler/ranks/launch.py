"""Starts local ranks through torch's elastic launcher, and explains the failure of one."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kraken_compiler import errors
from kraken_compiler.errors import InputFileError, KrakenError, RankFailedError, UsageError
from kraken_compiler.ranks import start_rank
from kraken_compiler.ranks.communicators.rendezvous import RENDEZVOUS
from kraken_compiler.ranks.environment import DEFAULT_TIMEOUT, require_timeout, with_environment
from kraken_compiler.ranks.heartbeat import (
    LOGS,
    RUN_DIRECTORY,
    RUN_TIMEOUT,
    Failure,
    read_failures,
    read_heartbeats,
    read_notes,
)
from kraken_compiler.ranks.start_rank import LAUNCHER
from kraken_compiler.ranks.watchdog import Verdict, Watchdog
from kraken_compiler.standard_streams import tell

WORKER = "kraken_compiler.generate.worker"

_SHUTDOWN_SECONDS = 5
_LOG_TAIL_LINES = 40
_LOOPBACK = "127.0.0.1"


def launch(
    degree: int,
    arguments: Sequence[str],
    *,
    module: str = WORKER,
    timeout: float = DEFAULT_TIMEOUT,
    show_output: bool = True,
) -> None:
    """Run `python -m module arguments...` as `degree` local ranks and wait for them.

    Other than with `python -m`, no module is looked for in the working directory. Rank 0's standard output goes to this
    process's; nothing else of the ranks is shown unless one fails. When this returns or raises, or this process ends in
    any other way, no rank is left running.

    Args:
        degree: Number of ranks.
        arguments: Command line of every rank.
        module: The module that every rank runs.
        timeout: Seconds without progress after which a rank counts as hanging.
        show_output: False hides rank 0's standard output too.

    Raises:
        RankFailedError: A rank died or hung; its own traceback comes first.
        InputFileError, UsageError: A rank raised one; the first is raised again here.
    """
    if degree < 1:
        raise UsageError(f"cannot start {degree} ranks")
    require_timeout(timeout)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from kraken_compiler._torch_compat import launch_config

    with tempfile.TemporaryDirectory(prefix="kraken-run-") as name, _signals_restored(), _quiet_elastic():
        directory = Path(name)
        redirects = dict.fromkeys(range(degree), Std.ALL)
        if show_output:
            redirects[0] = Std.ERR
        config = launch_config(
            _SHUTDOWN_SECONDS,
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=degree,
            logs_specs=DefaultLogsSpecs(log_dir=str(directory / LOGS), redirects=redirects),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.05,
        )
        watchdog = Watchdog(directory, degree, timeout)
        with _reserved_port() as port, with_environment(_rank_environment(degree, directory, timeout, port)), watchdog:
            try:
                elastic_launch(config, sys.executable)("-P", start_rank.__file__, module, *arguments)
            except ChildFailedError as error:
                exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
                raise _explain(directory, exit_codes, watchdog.verdict) from None
            except SignalException as error:
                if error.sigval == signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise SystemExit(128 + int(error.sigval)) from None
        for note in read_notes(directory):
            tell(f"note: {note}")


def threads_per_rank(degree: int) -> int:
    """Threads each of `degree` local ranks should compute with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // degree)


def _rank_environment(degree: int, directory: Path, timeout: float, port: int) -> dict[str, str]:
    values = {
        LAUNCHER: str(os.getpid()),
        RUN_DIRECTORY: str(directory),
        RUN_TIMEOUT: str(timeout),
        # Ranks without torch meet here: at the elastic launcher's own port they would find its store.
        RENDEZVOUS: f"{_LOOPBACK}:{port}",
        "PYTHONUNBUFFERED": "1",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        values["OMP_NUM_THREADS"] = str(threads_per_rank(degree))
    if "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net/lo").exists():
        # All ranks are here, and the host's own name may not resolve.
        values["GLOO_SOCKET_IFNAME"] = "lo"
    return values


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that nobody else is given while the ranks start; a rank may listen there."""
    with socket.socket() as holder:
        # A port is shared by sockets that all allow it, as ZeroMQ's do, until one of them listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((_LOOPBACK, 0))
        yield holder.getsockname()[1]


def _explain(directory: Path, exit_codes: Mapping[int, int], verdict: Verdict | None) -> KrakenError:
    """The error for the rank that failed first of its own accord."""
    failures = read_failures(directory)
    if verdict is not None:
        stack = f"\n{verdict.stack}" if verdict.stack else ""
        return RankFailedError(f"rank {verdict.rank} hangs: it {verdict.reason}{stack}")
    own_failures = [failure for failure in failures.values() if not failure.of_peer]
    if own_failures:
        return _as_error(min(own_failures, key=lambda failure: failure.time))
    # The launcher ends the others with SIGTERM, so any other end without a record came from elsewhere.
    unexplained_ranks = [rank for rank in sorted(exit_codes) if rank not in failures]
    for rank in sorted(unexplained_ranks, key=lambda rank: exit_codes[rank] == -signal.SIGTERM):
        if exit_codes[rank] != -signal.SIGTERM or failures:
            return RankFailedError(_death_message(directory, rank, exit_codes[rank]))
    if failures:
        return _as_error(min(failures.values(), key=lambda failure: failure.time))
    rank = min(exit_codes)
    return RankFailedError(_death_message(directory, rank, exit_codes[rank]))


def _as_error(failure: Failure) -> KrakenError:
    kind = getattr(errors, failure.summary.partition(":")[0], None)
    if kind in (InputFileError, UsageError):
        error: KrakenError = kind(failure.summary.partition(": ")[2])
        return error
    return RankFailedError(f"rank {failure.rank} failed: {failure.summary}\n{failure.traceback.rstrip()}")


def _death_message(directory: Path, rank: int, exit_code: int) -> str:
    beat = read_heartbeats(directory).get(rank)
    end = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with code {exit_code}"
    if exit_code == -signal.SIGTERM:
        end = "stopped answering its peers"
    while_ = f" while {beat.stage}" if beat is not None else ""
    tail = _log_tail(directory, rank)
    return f"rank {rank} {end}{while_}" + (f"\n{tail}" if tail else "")


def _log_tail(directory: Path, rank: int) -> str:
    logs = sorted((directory / LOGS).glob(f"*/attempt_*/{rank}/stderr.log"))
    lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    return "\n".join(lines[-_LOG_TAIL_LINES:])


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back the signal handlers that the elastic launcher replaces and leaves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    old_handlers: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Keep the elastic launcher's log lines off the terminal; what failed is told by our error."""
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher"))
    ]
    old_levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, old_levels):
            logger.setLevel(level)
