"""What ranks run in the tests of the communicators. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.communicators import sums
from kraken_compiler.ranks.communicators.choose import default_communicator
from kraken_compiler.ranks.communicators.communicator import Communicator, find
from kraken_compiler.ranks.communicators.message import MessageCommunicator
from kraken_compiler.ranks.session import Ranks
from tests.torch_ranks import device_of, group_of

SHAPES = ((1,), (3, 5), (2, 64, 128), (1, 300, 257), (), (1, 0, 4))
"""Small ones, which are copied, one of 300 KB, which is not, a scalar and an empty one."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A rank's part, which every rank can make."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def digest(tensor: Tensor) -> str:
    """The same for tensors that are the same to the last bit."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def check_sums(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Everything that does not end a rank; returns digests of the sums, and what was wrong."""
    group = group_of(ranks)
    sums.SHARED_BYTES = 400_000  # one of the sums of 300 KB, in float64, is added in shares
    digests: dict[str, list[str]] = {}
    wrong: list[str] = []
    for kind in ("message", "group"):
        for reduce_dtype in (None, torch.bfloat16):
            communicator = default_communicator("cpu", group, reduce_dtype, kind)
            assert communicator is default_communicator("cpu", group, reduce_dtype, kind)
            assert communicator.identical_on_all_ranks
            name = f"{kind} {reduce_dtype}"
            digests[name] = list(_sums(communicator, wrong))
            wrong += [f"{name}: {fault}" for fault in _gathers(communicator)]
            ranks.status.progress(name)
    wrong += _in_any_order(default_communicator("cpu", group))
    wrong += _reused_memory(default_communicator("cpu", group))
    return {"digests": digests, "wrong": wrong}


def _sums(communicator: Communicator, wrong: list[str]) -> list[str]:
    digests = []
    for dtype in DTYPES:
        for shape in SHAPES:
            parts = [part_of(rank, shape, dtype) for rank in range(communicator.degree)]
            mine = parts[communicator.rank].clone()
            total = communicator.wait(communicator.start(mine))
            want = sum(part.double() for part in parts)
            assert isinstance(want, Tensor)
            coarse = torch.bfloat16 if communicator.reduce_dtype is not None and dtype.itemsize > 2 else dtype
            tolerance = 4 * communicator.degree * torch.finfo(coarse).eps
            if total.dtype != dtype or total.shape != mine.shape:
                wrong.append(f"{communicator.name}: {total.dtype} {total.shape} for {dtype} {shape}")
            elif not torch.allclose(total.double(), want, rtol=tolerance, atol=tolerance):
                wrong.append(f"{communicator.name}: {dtype} {shape} is off by {(total - want).abs().max():.1e}")
            if not torch.equal(mine, parts[communicator.rank]):
                wrong.append(f"{communicator.name}: {dtype} {shape} changed the part")
            digests.append(digest(total))
    return digests


def _gathers(communicator: Communicator) -> list[str]:
    wrong = []
    for dtype in DTYPES:
        for dim in (0, 1, -1):
            parts = [part_of(rank, (2, 6, 3), dtype).transpose(0, 1) for rank in range(communicator.degree)]
            if not torch.equal(communicator.all_gather(parts[communicator.rank], dim), torch.cat(parts, dim)):
                wrong.append(f"all_gather of {dtype} along {dim}")
    return wrong


def _in_any_order(communicator: Communicator) -> list[str]:
    """Many in flight, big beside small; every rank awaits them in an order of its own."""
    sizes = [(1, 100), (2, 50_000), (3, 7)] * 8
    mine = [part_of(communicator.rank, size, torch.float32, seed) for seed, size in enumerate(sizes)]
    handles = [communicator.start(part) for part in mine]
    order = list(range(len(sizes)))
    random.Random(communicator.rank).shuffle(order)
    gathered = communicator.all_gather(torch.tensor([communicator.rank]), 0).tolist()
    wrong = [] if gathered == list(range(communicator.degree)) else [f"gathered {gathered} with sums in flight"]
    for number in order:
        total = communicator.wait(handles[number])
        want = sum(part_of(rank, sizes[number], torch.float32, number) for rank in range(communicator.degree))
        if not torch.allclose(total, want, atol=1e-5):  # type: ignore[arg-type]
            wrong.append(f"sum {number}, awaited in the order {order}")
    return wrong


def _reused_memory(communicator: Communicator) -> list[str]:
    """Once a sum is there its part's memory may be written to, as compiled code does."""
    part = torch.empty(200_000)
    for step in range(20):
        part.fill_(step + communicator.rank)
        total = communicator.wait(communicator.start(part))
        part.fill_(-1.0)
        want = communicator.degree * step + sum(range(communicator.degree))
        if not bool((total == want).all()):
            return [f"step {step}: memory was reused too early"]
    return []


def lose_a_peer(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Rank 1 does not take part in a sum, in the way that the payload says; what the others are told, and when."""
    group = group_of(ranks)
    communicator = MessageCommunicator.of_group(group, timeout=payload["timeout"])
    x = torch.ones(payload["elements"])
    assert communicator.wait(communicator.start(x))[0] == ranks.degree
    if ranks.rank == 1:
        if payload["how"] == "leave":
            communicator.close()
        time.sleep(payload["timeout"] + 2)
        communicator.close()
        return {}
    begin = time.monotonic()
    try:
        communicator.wait(communicator.start(x))
    except RankFailedError as error:
        failed = time.monotonic()
        communicator.close()
        return {"error": str(error), "seconds": failed - begin, "closing": time.monotonic() - failed}
    return {"error": "none"}


def die(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Rank 1 dies between two sums."""
    group = group_of(ranks)
    communicator = default_communicator("cpu", group)
    for step in range(20):
        communicator.wait(communicator.start(torch.ones(50_000)))
        if ranks.rank == 1 and step == 3:
            os._exit(3)


def disagree(payload: Mapping[str, Any], ranks: Ranks) -> str:
    """Ranks whose parts differ in shape; where a large part is expected a small one comes, and the other way round."""
    group = group_of(ranks)
    communicator = default_communicator("cpu", group)
    try:
        communicator.wait(communicator.start(torch.ones(payload["elements"][ranks.rank])))
    except RankFailedError as error:
        return str(error)
    return ""


def end_with_the_group(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Groups come and go; each has a communicator of its own that ends with it. The last sum is never lost."""
    group_of(ranks)
    totals, open_after = [], []
    for step in range(3):
        group = dist.new_group()
        assert group is not None
        communicator = default_communicator("cpu", group)
        handle = communicator.start(torch.full((300_000,), float(ranks.rank)))
        if ranks.rank == step % ranks.degree:
            time.sleep(0.3)  # its peers are gone from the sum before it looks
        totals.append(float(communicator.wait(handle).mean()))
        name = communicator.name
        dist.destroy_process_group(group)
        del communicator, group
        open_after.append(find(name) is not None)
    return {"totals": totals, "open": open_after}


def run_compiled(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Run an artifact eagerly and compiled with every kind of communicator."""
    artifact, device = open_artifact(payload["artifact"]), device_of(ranks)
    group_of(ranks)
    ids = torch.tensor(payload["ids"], device=device)
    differences, windows = {}, {}
    for kind in payload["kinds"]:
        program = RankProgram.load(artifact, communicator=kind, device=device)
        want = program.run_flat([ids])
        program.compile()
        assert program.compiled is not None
        for step in range(3):
            have = program.run_flat([ids])
            differences[f"{kind} {step}"] = max(float((a - b).abs().max()) for a, b in zip(have, want))
        windows[kind] = [len(window.gemms) for window in program.compiled.windows]
        ranks.status.progress(kind)
    return {"differences": differences, "windows": windows}
