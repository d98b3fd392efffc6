"""The reports of a rank to its launcher: that it lives, how far it is, and how it failed.

Ranks write small files into a directory that the launcher made. Files outlive their writer, which is what is needed
of the reports of processes that die.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kraken_compiler.errors import RankFailedError, typed_line
from kraken_compiler.standard_streams import tell

RUN_DIRECTORY = "KRAKEN_RUN_DIRECTORY"
"""Environment variable: the directory of the reports to a local launcher; unset under plain torchrun."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torch's elastic launcher, ours or torchrun: where it looks for the reason of a failure."""
RUN_TIMEOUT = "KRAKEN_RUN_TIMEOUT"
"""Environment variable: seconds without progress after which a run is given up."""

LOGS = "logs"
"""Folder of a run's directory for what the elastic launcher keeps of every rank."""
_NOTES = "notes.txt"
_BEAT_SECONDS = 0.5
_LEAST_SHARE_OF_A_CORE = 0.05
"""The share of the time between two beats that tells computing on a crowded machine from waiting."""
_START_SECONDS = 90.0
_PEER_SIGNS = (
    *("connection closed by peer", "connection reset", "connection refused", "broken pipe", "socket timeout"),
    *("timed out waiting", "recvvalue failed", "sendbytes failed", "failed to recv", "remote process exited"),
    *("nccl communicator was aborted", "watchdog caught collective", "application timeout caused pair closure"),
    *("did not come to", "did not answer within"),
)


@dataclass(frozen=True)
class Failure:
    """The failure of a rank.

    Attributes:
        rank: Which one.
        time: Seconds since the epoch.
        summary: Type and message of the exception.
        traceback: The whole traceback.
        of_peer: True if the exception says only that another rank went away.
    """

    rank: int
    time: float
    summary: str
    traceback: str
    of_peer: bool


@dataclass(frozen=True)
class Heartbeat:
    """A rank's latest sign of life.

    Attributes:
        pid: Its process.
        main_thread: Identifier of its main thread.
        alive: When it wrote this, seconds since the epoch.
        progress: When its main thread last got something done.
        computed: When its main thread was last seen to compute.
        stage: What it said it is doing.
        extra: Seconds that this stage may take beyond the run's timeout.
        done: True once it has nothing left to do but exit.
        computes_in: Parts of the paths of files in which it computes its program, see `Backend`.
    """

    pid: int
    main_thread: int
    alive: float
    progress: float
    computed: float
    stage: str
    extra: float = 0.0
    done: bool = False
    computes_in: Sequence[str] = ()


class StatusWriter:
    """The writer of a rank's reports. Without a run directory it does nothing.

    Attributes:
        computes_here: False once an accelerator computes, for which the main thread waits at full speed: then its
        processor time says nothing.
        computes_in: Where it computes, see `Heartbeat`.
    """

    computes_here = True
    computes_in: tuple[str, ...] = ()

    def __init__(self, rank: int, directory: Path | None) -> None:
        self._rank = rank
        self._directory = directory
        self._parent = os.getppid()
        self._stage = "starting"
        # Ranks start at different speeds: the first one waits for the last, and that is no hang.
        self._extra = _START_SECONDS
        self._done = False
        self._progress = self._computed = time.time()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def has_launcher(self) -> bool:
        """True if a launcher of ours started this rank: it hears of a failure, and ends the others."""
        return self._directory is not None

    @classmethod
    def from_environment(cls, rank: int) -> StatusWriter:
        """Report to the launcher that started this process, if one did."""
        directory = os.environ.get(RUN_DIRECTORY)
        return cls(rank, Path(directory) if directory else None)

    def start(self) -> None:
        """Begin to beat, and to answer a request for this process's stacks."""
        if self._directory is None:
            return
        # faulthandler writes from the signal itself, so a main thread stuck inside C code is shown too. Any thread may
        # get the signal, so all are written; the beat says which one is the main thread.
        self._stacks = stacks_file(self._directory, self._rank).open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._beat()
        threading.Thread(target=self._keep_beating, name="kraken-heartbeat", daemon=True).start()

    def progress(self, stage: str, extra: float = 0.0) -> None:
        """Say that something got done, what comes next, and how many seconds beyond the timeout that may take."""
        self._stage = stage
        self._extra = extra
        self._progress = time.time()
        if self._directory is not None:
            self._beat()

    def note(self, text: str) -> None:
        """Say what a user should know; the launcher shows it on standard error when the ranks have ended."""
        if self._directory is None:
            tell(f"note: {text}")
            return
        with (self._directory / _NOTES).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def finish(self) -> None:
        """Say that nothing is left to do."""
        self._done = True
        self._stop.set()
        if self._directory is not None:
            self._beat()

    def fail(self, error: BaseException) -> None:
        """Record why this rank ends, as torch's `ErrorHandler` does, so that torchrun shows it, too."""
        path = os.environ.get(ERROR_FILE)
        if not path:
            return
        now = time.time()
        details = {
            "py_callstack": "".join(traceback.format_exception(error)),
            "timestamp": str(int(now)),
            "time": now,  # torch's has whole seconds, too few to tell who failed first
            "of_peer": is_of_peer(error),
        }
        with suppress(OSError):  # the launcher may be gone, and the error itself is what matters
            Path(path).write_text(json.dumps({"message": {"message": typed_line(error), "extraInfo": details}}))

    def _keep_beating(self) -> None:
        last_time, last_total = time.monotonic(), _main_thread_seconds()
        while not self._stop.wait(_BEAT_SECONDS):
            if os.getppid() != self._parent:
                # The launcher is gone without having ended us; nobody is left to talk to.
                os._exit(1)
            now, total = time.monotonic(), _main_thread_seconds()
            if self.computes_here and total - last_total > _LEAST_SHARE_OF_A_CORE * (now - last_time):
                self._computed = time.time()
            last_time, last_total = now, total
            self._beat()

    def _beat(self) -> None:
        assert self._directory is not None
        thread = threading.main_thread().ident or 0
        beat = Heartbeat(
            os.getpid(),
            thread,
            time.time(),
            self._progress,
            self._computed,
            self._stage,
            self._extra,
            self._done,
            self.computes_in,
        )
        with self._lock:
            if self._directory.is_dir():
                _write(_beat_file(self._directory, self._rank), json.dumps(asdict(beat)))


def _main_thread_seconds() -> float:
    """Processor time of the main thread; of the process where the system does not tell.

    Other threads may spin while they wait for the main thread, as those of OpenMP do.
    """
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    main = threading.main_thread().ident
    if clock_of is None or main is None:
        return time.process_time()
    return time.clock_gettime(clock_of(main))


def is_of_peer(error: BaseException) -> bool:
    """True if an exception is what a rank sees when another one goes away."""
    text = str(error).lower()
    return isinstance(error, (RuntimeError, RankFailedError)) and any(sign in text for sign in _PEER_SIGNS)


def read_failures(directory: Path) -> dict[int, Failure]:
    """Every failure that was recorded, by rank."""
    failures = {}
    for path in directory.glob(f"{LOGS}/*/attempt_*/*/error.json"):
        message, rank = json.loads(path.read_text())["message"], int(path.parent.name)
        details = message["extraInfo"]
        failures[rank] = Failure(rank, details["time"], message["message"], details["py_callstack"], details["of_peer"])
    return failures


def read_heartbeats(directory: Path) -> dict[int, Heartbeat]:
    """Every rank's latest sign of life, by rank."""
    paths = directory.glob("beat-*.json")
    return {int(path.stem.removeprefix("beat-")): Heartbeat(**json.loads(path.read_text())) for path in paths}


def read_notes(directory: Path) -> list[str]:
    """The notes of the ranks for the user."""
    path = directory / _NOTES
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def stacks_file(directory: Path, rank: int) -> Path:
    """The file in which a rank writes its stacks on request."""
    return directory / f"stacks-{rank}.txt"


def read_stack(directory: Path, rank: int, beat: Heartbeat) -> str:
    """The stack of a rank's main thread, innermost call first; "" until it has answered."""
    path = stacks_file(directory, rank)
    sections = path.read_text(errors="replace").split("\n\n") if path.exists() else []
    return next((section.strip() for section in sections if f"0x{beat.main_thread:016x} " in section), "")


def _beat_file(directory: Path, rank: int) -> Path:
    return directory / f"beat-{rank}.json"


def _write(path: Path, text: str) -> None:
    """Write whole or not at all, so that a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
