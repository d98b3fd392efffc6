"""What ranks without torch run in the tests of `Ranks`: `python -m tests.array_ranks CHECK OPTIONS`.

Prints what it found as one line of JSON; a refusal is one of the things to find.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kraken_compiler.errors import KrakenError, RankFailedError
from kraken_compiler.ranks.communicators import peers, sums
from kraken_compiler.ranks.communicators.agreement import Claims
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks

Array = npt.NDArray[Any]

SHAPES = ((1,), (3, 5), (2, 64, 128), (1, 300, 257), (1, 512, 640), (), (1, 0, 4))
"""Small ones, which are copied, larger ones, which are not, one of 1.25 MiB in float32, a scalar and an empty one."""
DTYPES = tuple(np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def part_of(rank: int, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> Array:
    """A rank's part, which every rank can make."""
    return np.asarray(np.random.default_rng([seed, rank]).standard_normal(shape), dtype)


def added(parts: list[Array]) -> Array:
    """Parts added as a communicator must add them."""
    total = parts[0].copy()
    for part in parts[1:]:
        total = np.asarray(total + part)
    return total


def check_sums(communicator: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """Everything that does not end a rank; returns digests of the sums, and what was wrong."""
    sums.SHARED_BYTES = 600_000  # the largest are added in shares, rounded ones too
    digests: list[str] = []
    wrong: list[str] = []
    for reduce_dtype in (None, BFLOAT16):
        communicator.reduce_dtype = reduce_dtype
        for dtype in DTYPES:
            for shape in SHAPES:
                digests.append(_sum(communicator, shape, dtype, wrong))
            _gathers(communicator, dtype, wrong)
    communicator.reduce_dtype = None
    _scattered(communicator, wrong)
    _in_any_order(communicator, wrong)
    _reused_memory(communicator, wrong)
    _broadcasts(communicator, wrong)
    return {"digests": digests, "wrong": wrong}


def _sum(communicator: Ranks, shape: tuple[int, ...], dtype: np.dtype[Any], wrong: list[str]) -> str:
    parts = [part_of(rank, shape, dtype) for rank in range(communicator.degree)]
    mine = parts[communicator.rank].copy()
    rounded = communicator.reduce_dtype is not None and dtype.itemsize > 2
    sent = [part.astype(communicator.reduce_dtype).astype(dtype) if rounded else part for part in parts]
    total = communicator.wait(communicator.start(mine))
    what = f"{dtype} {shape}, sent as {communicator.reduce_dtype}"
    if total.dtype != dtype or total.shape != shape or not isinstance(total, np.ndarray):
        wrong.append(f"{what}: got {total.dtype} {total.shape}")
    elif total.tobytes() != _in_shares(added(sent), communicator, rounded).tobytes():
        wrong.append(f"{what}: wrong sum")
    if np.shares_memory(total, mine) or mine.tobytes() != parts[communicator.rank].tobytes():
        wrong.append(f"{what}: the part was changed")
    return hashlib.sha256(total.tobytes()).hexdigest()


def _in_shares(total: Array, communicator: Ranks, rounded: bool) -> Array:
    """A sum as all ranks get it: what is added in shares is rounded again on its way back."""
    if not rounded or communicator.degree == 2 or total.size * 2 < sums.SHARED_BYTES:
        return total
    assert communicator.reduce_dtype is not None
    return total.astype(communicator.reduce_dtype).astype(total.dtype)


def _gathers(communicator: Ranks, dtype: np.dtype[Any], wrong: list[str]) -> None:
    for shape in ((2, 6, 3), (1, 400, 300), (2, 0, 3)):
        for axis in (0, 1, -1):
            parts = [part_of(rank, shape, dtype).swapaxes(0, 1) for rank in range(communicator.degree)]
            whole = communicator.all_gather(parts[communicator.rank], axis)
            want = np.concatenate(parts, axis)
            if whole.shape != want.shape or whole.dtype != dtype or whole.tobytes() != want.tobytes():
                wrong.append(f"all_gather of {dtype} {shape} along {axis}")


def _scattered(communicator: Ranks, wrong: list[str]) -> None:
    """Parts that do not lie in one piece, and whole numbers, which are not rounded."""
    parts = [part_of(rank, (300, 400), DTYPES[0]) for rank in range(communicator.degree)]
    total = communicator.wait(communicator.start(parts[communicator.rank].T[::2]))
    if total.tobytes() != added([part.T[::2] for part in parts]).tobytes():
        wrong.append("a part that does not lie in one piece")
    communicator.reduce_dtype = BFLOAT16
    whole = communicator.wait(communicator.start(np.array([100_001], np.int64)))
    communicator.reduce_dtype = None
    if whole.tolist() != [100_001 * communicator.degree]:
        wrong.append(f"whole numbers: {whole}")


def _in_any_order(communicator: Ranks, wrong: list[str]) -> None:
    """Many in flight, big beside small; every rank awaits them in an order of its own."""
    sizes = [(1, 100), (2, 200_000), (3, 7)] * 6
    mine = [part_of(communicator.rank, size, DTYPES[0], seed) for seed, size in enumerate(sizes)]
    handles = [communicator.start(part) for part in mine]
    order = list(range(len(sizes)))
    random.Random(communicator.rank).shuffle(order)
    gathered = communicator.all_gather(np.array([communicator.rank]), 0).tolist()
    told = communicator.broadcast(b"in between" if communicator.rank == 0 else None)
    if gathered != list(range(communicator.degree)) or told != b"in between":
        wrong.append(f"gathered {gathered} and was told {told!r} with sums in flight")
    for number in order:
        total = communicator.wait(handles[number])
        want = added([part_of(rank, sizes[number], DTYPES[0], number) for rank in range(communicator.degree)])
        if total.tobytes() != want.tobytes():
            wrong.append(f"sum {number}, awaited in the order {order}")


def _reused_memory(communicator: Ranks, wrong: list[str]) -> None:
    """Once a sum is there its part's memory may be written to."""
    part = np.empty(400_000, np.float32)
    for step in range(20):
        part.fill(step + communicator.rank)
        total = communicator.wait(communicator.start(part))
        part.fill(-1.0)
        if not (total == communicator.degree * step + sum(range(communicator.degree))).all():
            wrong.append(f"step {step}: memory was reused too early")


def _broadcasts(communicator: Ranks, wrong: list[str]) -> None:
    messages = [b"", b"one", bytes(1 << 20)]
    for message in messages:
        if communicator.broadcast(message if communicator.rank == 0 else None) != message:
            wrong.append(f"broadcast of {len(message)} bytes")
        if communicator.rank == 0:
            # The others must be waited for, not rank 0.
            time.sleep(0.01)
        communicator.barrier()


def leave_at_once(communicator: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """Who has its sum leaves, and the others still get theirs."""
    handles = [communicator.start(np.ones(size, np.float32)) for size in (500_000, 3)]
    if communicator.rank == 1:
        time.sleep(0.5)
    return {"totals": [float(communicator.wait(handle).mean()) for handle in handles]}


def lose_a_peer(communicator: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 leaves a sum in the way that the options say; what the others are told, and when."""
    x = np.ones(500_000, np.float32)
    began = time.monotonic()
    try:
        # What is still on its way from a rank that dies is lost, so even this first sum may miss it; and who comes
        # late is told so when it starts a sum.
        assert communicator.wait(communicator.start(x))[0] == communicator.degree
        if communicator.rank == 1:
            if options["how"] == "die":
                communicator.start(x)
                os._exit(3)
            time.sleep(options["timeout"] + 2)
            return {}
        for handle in [communicator.start(x) for _ in range(3)]:
            communicator.wait(handle)
    except RankFailedError as error:
        failed = time.monotonic()
        communicator.close()
        return {"error": str(error), "seconds": failed - began, "closing": time.monotonic() - failed}
    return {}


def disagree(communicator: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """Parts of different size."""
    communicator.wait(communicator.start(np.ones(4 + communicator.rank, np.float32)))
    return {}


def nothing(communicator: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """The ranks only meet."""
    return {"rank": communicator.rank, "degree": communicator.degree}


CHECKS: dict[str, Callable[[Ranks, dict[str, Any]], dict[str, Any]]] = {
    "sums": check_sums,
    "leave": leave_at_once,
    "lose": lose_a_peer,
    "disagree": disagree,
    "nothing": nothing,
}


def main(check: str, text: str) -> None:
    options: dict[str, Any] = json.loads(text)
    communicator = None
    try:
        place = Place.from_environment()
        if "buffer_bytes" in options:
            peers.BUFFER_BYTES = options["buffer_bytes"]
        communicator = Ranks.rendezvous(place, StatusWriter(place.rank, None), options["timeout"])
        communicator.agree(Claims(options.get("claims", {})))
        found = CHECKS[check](communicator, options)
    except KrakenError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    if communicator is not None:
        communicator.close()
        communicator.close()
    print(json.dumps(found | {"torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main(*sys.argv[1:])
