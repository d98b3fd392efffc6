"""The parent's end of the ranks: starts them on their hosts, tells all of them the same, collects what they answer.

A command is one line of JSON on a rank's standard input, an answer one line on a pipe of its own; whatever libraries
print goes to a log file. When the parent dies, the ranks read an end of file and leave.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ttft_parts.network import Network

TORCH_RANK = "ttft_parts.rank_main"
"""What a rank with torch runs."""
SECONDS_PER_COMMAND = 900.0
"""The longest single command compiles a model for one shape."""
_SECONDS_TO_LEAVE = 10.0

_RUN = "import runpy, sys; sys.path.append(sys.argv.pop(2)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
"""Runs a module of the folder of benchmarks. The packages come first: that folder also has an `onnx`."""


class RanksFailedError(RuntimeError):
    """A rank died or does not answer: nothing more can be measured with this group."""


class CommandError(RuntimeError):
    """A command failed on a rank, which is still there; the text says why."""


@dataclass
class Ranks:
    """A group of rank processes, ready for commands."""

    processes: list[subprocess.Popen[str]]
    replies: list[IO[bytes]]
    logs: list[Path]
    _partial: list[bytes] = field(default_factory=list)

    def tell(self, do: str, **arguments: Any) -> list[Any]:
        """Run a command on all ranks at once; returns every rank's result, in the order of the ranks.

        Raises:
            CommandError: It failed on a rank.
            RanksFailedError: A rank is gone, or has not answered in time.
        """
        line = json.dumps({"do": do, **arguments}) + "\n"
        for rank, process in enumerate(self.processes):
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                raise RanksFailedError(self._why(rank, "is gone")) from None
        answers = self._answers(do)
        failed = dict.fromkeys(answer["error"] for answer in answers if "error" in answer)
        if failed:
            raise CommandError("; ".join(failed))
        return [answer["result"] for answer in answers]

    def _answers(self, do: str) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + SECONDS_PER_COMMAND
        with selectors.DefaultSelector() as selector:
            for rank, reply in enumerate(self.replies):
                selector.register(reply, selectors.EVENT_READ, rank)
            while len(answers) < len(self.replies):
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    late = [rank for rank in range(len(self.replies)) if rank not in answers]
                    raise RanksFailedError(self._why(late[0], f"has not answered '{do}'"))
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        raise RanksFailedError(self._why(key.data, f"died during '{do}'"))
                    self._partial[key.data] += chunk
                    if self._partial[key.data].endswith(b"\n"):
                        answers[key.data] = json.loads(self._partial[key.data])
                        self._partial[key.data] = b""
        return [answers[rank] for rank in range(len(self.replies))]

    def _why(self, rank: int, what: str) -> str:
        return f"rank {rank} {what}; the end of its log:\n{self.logs[rank].read_text(errors='replace')[-3000:]}"


@contextmanager
def started(
    where: Network, degree: int, directory: Path, settings: dict[str, Any], module: str = TORCH_RANK
) -> Iterator[Ranks]:
    """Ranks on the hosts of a network; they are gone when the context ends.

    Args:
        where: The hosts.
        degree: How many ranks.
        directory: For logs and the file through which the ranks find each other; every host sees the same files.
        settings: What the module takes.
        module: What a rank runs.
    """
    directory.mkdir(parents=True)
    ranks = Ranks([], [], [], [b""] * degree)
    meet = f"{where.address}:{_free_port()}"
    try:
        for rank in range(degree):
            _start(ranks, where, rank, directory, settings | {"rank": rank, "degree": degree}, module, meet)
        ranks.tell("hello")
        yield ranks
    finally:
        _end(ranks)


def _start(
    ranks: Ranks, where: Network, rank: int, directory: Path, settings: dict[str, Any], module: str, meet: str
) -> None:
    read_end, write_end = os.pipe()
    ranks.replies.append(os.fdopen(read_end, "rb"))
    ranks.logs.append(directory / f"rank-{rank}.log")
    settings |= {"reply_to": write_end, "store": str(directory / "store"), "interface": where.interface}
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(settings["degree"]),
        "KRAKEN_MEET": meet,
        "GLOO_SOCKET_IFNAME": where.interface,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    command = [sys.executable, "-P", "-c", _RUN, module, str(Path(__file__).resolve().parents[1]), json.dumps(settings)]
    try:
        with ranks.logs[rank].open("w") as log:
            process = subprocess.Popen(
                where.command(rank, command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                pass_fds=[write_end],
                # Ctrl-C is for the parent alone, which then ends the ranks in order.
                start_new_session=True,
            )
    finally:
        os.close(write_end)
    ranks.processes.append(process)


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port: int = listening.getsockname()[1]
        return port


def _end(ranks: Ranks) -> None:
    for process in ranks.processes:
        assert process.stdin is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            continue
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    for process in ranks.processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for reply in ranks.replies:
        reply.close()
