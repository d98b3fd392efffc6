"""Writes artifacts in forked children and kills them with SIGKILL between any two calls of the file system.

Run as `python -m tests.killed_writes DIRECTORY SEED`; prints what was found as JSON. A process of its own, because a
process with threads must not fork.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from kraken_compiler.artifact import reservation
from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.weights.write_shards import write_lane_shards
from tests.toy_lane_program import toy_program, toy_sources

CALLS = (
    "open",
    "close",
    "write",
    "pwrite",
    "ftruncate",
    "fsync",
    "mkdir",
    "rename",
    "unlink",
    "rmdir",
    "scandir",
    "listdir",
)
SHA256 = "0" * 64
SOURCE = Source(kind="huggingface", name="toy")


class ShardsAndGraph:
    """The torch backend's files; the graph is only a stand-in, which takes no time."""

    name = "torch"
    writes_all_weights = True
    noted_options: ClassVar[dict[str, Any]] = {}

    def write(
        self, program: Program, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[()]:
        (directory / "lane.json").write_bytes(b"graph" * 1000)
        write_lane_shards(program, read, directory, progress)
        return ()

    def complete(self, *arguments: object) -> None:
        """There is nothing beside the lanes."""


def write(target: Path, note: str, swap: bool = True, digest: str = SHA256) -> list[str]:
    """Write the artifact; returns what was read for it."""
    tensors, reads = toy_sources(), []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return tensors[name]

    def check(partial: Path) -> dict[str, object]:
        open_artifact(partial)
        return {"passed": True}

    options: dict[str, Any] = {"source": SOURCE, "digest": lambda: digest, "backends": [ShardsAndGraph()]}
    options["check"] = check
    with mock.patch.object(reservation, "exchange", reservation.exchange if swap else lambda *_: False):
        write_artifact(
            toy_program(2), SourceReader(read), target, report={"note": note}, force=True, resumable=True, **options
        )
    return reads


@contextmanager
def killed_at(call: int) -> Iterator[list[int]]:
    """Let the process die before a call of the file system, counted from 0; a negative one never comes."""
    seen = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if seen[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return function(*args, **kwargs)

        return counted

    sys.addaudithook(lambda event, _: counting(lambda: None)() if event == "open" else None)
    with mock.patch.multiple(os, **{name: counting(getattr(os, name)) for name in CALLS}):
        yield seen


def forked(action: Callable[[], object], kill_after_s: float | None = None) -> int:
    """Run it in a child; returns how the child ended, as `os.waitpid` says it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def note_of(target: Path) -> str:
    """The note of the artifact; "none" or "damaged" without one."""
    if not target.exists():
        return "none"
    try:
        return str(open_artifact(target).report()["note"])
    except InputFileError as error:
        return f"damaged: {error}"


def calls_of(target: Path, note: str, swap: bool) -> tuple[int, int]:
    """How many calls a write makes, and how many of them before the artifact takes its place."""
    counted = target.parent / "calls"

    def action() -> None:
        before = [0]
        with killed_at(-1) as seen:
            move = reservation.Reservation.put_in_place

            def moved(held: reservation.Reservation) -> None:
                before[0] = seen[0]
                move(held)

            with mock.patch.object(reservation.Reservation, "put_in_place", moved):
                write(target, note, swap)
            counts = (seen[0], before[0])
        counted.write_text(json.dumps(counts))

    assert forked(action) == 0
    calls, before = json.loads(counted.read_text())
    counted.unlink()
    return calls, before


def kill_between_calls(place: Path, seed: int, points: int, *, replaces: bool, swap: bool) -> dict[str, int]:
    """Kill at random calls and at the decisive ones, look, let the next write finish; returns how often what was there.

    Args:
        place: An empty directory.
        seed, points: Which calls, and how many.
        replaces: There is an artifact already.
        swap: The file system can swap directories.
    """
    target = place / "toy.kraken"
    calls, moves = calls_of(target, "old", swap)
    if replaces:
        calls, moves = calls_of(target, "old", swap)
    chosen = {*random.Random(seed).sample(range(calls), points), *range(moves, min(moves + 20, calls))}
    found: dict[str, int] = {}
    for call in sorted(chosen):
        if not replaces:
            shutil.rmtree(target)

        def action(call: int = call) -> None:
            with killed_at(call):
                write(target, "new", swap)

        ended = forked(action)
        after = note_of(target) if os.WIFSIGNALED(ended) else f"not killed at {call}: {ended}"
        found[after] = found.get(after, 0) + 1
        write(target, "old")
        if note_of(target) != "old" or [path.name for path in place.iterdir()] != [target.name]:
            found["next write failed"] = found.get("next write failed", 0) + 1
    return found


def kill_any_time(place: Path, seed: int, times: int) -> dict[str, int]:
    """Kill one write after another at random moments, each taking over from the one before."""
    target, chance = place / "toy.kraken", random.Random(seed)
    began = time.perf_counter()
    write(target, "old")
    longest = 1.5 * (time.perf_counter() - began)
    found: dict[str, int] = {}
    before = "old"
    for number in range(times):
        forked(lambda number=number: write(target, str(number)), chance.uniform(0, longest))
        after = note_of(target)
        what = "old" if after == before else "new" if after == str(number) else after
        found[what] = found.get(what, 0) + 1
        before = after
    write(target, "last")
    found["left over"] = len(list(place.iterdir())) - 1
    return found


def resumed(place: Path, *, damage: bool = False, other_source: bool = False) -> dict[str, Any]:
    """Die in the middle of the weights, and see what the next write reads."""
    target = place / "toy.kraken"
    sources = write(place / "reference.kraken", "reference")

    def action() -> None:
        tensors = toy_sources()

        def read(name: str) -> torch.Tensor:
            if name == sources[-2]:
                time.sleep(0.2)  # reading is ahead of writing
                os.kill(os.getpid(), signal.SIGKILL)
            return tensors[name]

        options: dict[str, Any] = {"source": SOURCE, "digest": lambda: SHA256, "backends": [ShardsAndGraph()]}
        options["resumable"] = True
        write_artifact(toy_program(2), SourceReader(read), target, **options)

    forked(action)
    if damage:
        shard = place / ".toy.kraken.partial" / "artifact" / "lanes" / "lane-1.safetensors"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    again = write(target, "again", digest="1" * 64 if other_source else SHA256)
    same = [
        open_artifact(target).manifest.files[f"lanes/{name}.safetensors"]
        == open_artifact(place / "reference.kraken").manifest.files[f"lanes/{name}.safetensors"]
        for name in ("lane-0", "lane-1", "shared")
    ]
    return {"sources": len(sources), "read_again": len(again), "same": all(same)}


def main(directory: Path, seed: int) -> None:
    torch.set_num_threads(1)
    toy_program(2)
    # A killed process loses nothing that it gave to the system; waiting for the disk only takes time.
    os.fsync = lambda _: None

    def place(name: str) -> Path:
        (directory / name).mkdir()
        return directory / name

    results = {
        "nothing before": kill_between_calls(place("a"), seed, 15, replaces=False, swap=True),
        "replaced": kill_between_calls(place("b"), seed, 15, replaces=True, swap=True),
        "replaced in two steps": kill_between_calls(place("c"), seed, 15, replaces=True, swap=False),
        "at any time": kill_any_time(place("d"), seed, 25),
        "resumed": resumed(place("e")),
        "resumed with damage": resumed(place("f"), damage=True),
        "resumed with another source": resumed(place("g"), other_source=True),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
