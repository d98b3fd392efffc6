"""What ranks run in the runtime's tests. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import fx

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.insert_collectives import with_real_collectives
from kraken_compiler.backends.load import load
from kraken_compiler.backends.torch_dist.lanes import load_program
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import InputFileError, KrakenError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.weights.store import MemoryStore
from tests.torch_ranks import group_of
from tests.toy_lane_program import toy_sources

START = torch.ops.kraken.all_reduce_start.default


def add_up(ranks: Ranks) -> None:
    """A sum over all ranks."""
    ranks.wait(ranks.start(np.ones(4)))


def keep_reducing(ranks: Ranks) -> None:
    """What the ranks that behave do while one does not."""
    for _ in range(2000):
        add_up(ranks)
        time.sleep(0.05)


def misbehave(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Rank 1 ends or hangs in the way that the payload says, in the middle of its work."""
    for _ in range(3):
        add_up(ranks)
        ranks.status.progress("reducing")
    if ranks.rank != 1:
        keep_reducing(ranks)
    if payload["how"] == "raise":
        fail_on_purpose()
    elif payload["how"] == "input":
        raise InputFileError("/some/where/lane-1.safetensors: truncated")
    elif payload["how"] == "exit":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    elif payload["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif payload["how"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        # Asked for its stack it goes on for a moment, and should still be found here.
        oversleep()
    elif payload["how"] == "sleep":
        oversleep()


def fail_on_purpose() -> None:
    raise ValueError("rank one fails on purpose")


def oversleep() -> None:
    time.sleep(600)


def sleep_for_long(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Say which process this is, then hang."""
    with open(f"{payload['directory']}/pid-{ranks.rank}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def check_dtypes(ranks: Ranks) -> None:
    """Every dtype that weights have can be summed and gathered, also along a middle dim and not contiguous."""
    group = group_of(ranks)
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(torch.ops.kraken.wait.default, (graph.call_function(START, (x,)),))
    graph.output((total, graph.call_function(torch.ops.kraken.all_gather.default, (x, 1, ranks.degree))))
    module = with_real_collectives(fx.GraphModule({}, graph), group.group_name, ranks.degree)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        mine = torch.arange(24, dtype=dtype).view(2, 4, 3).transpose(1, 2) + ranks.rank
        total, gathered = module(mine)
        parts = [mine - ranks.rank + rank for rank in range(ranks.degree)]
        assert torch.equal(total, sum(parts))
        assert torch.equal(gathered, torch.cat(parts, dim=1))


def check_rank_program(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Compare a rank's program with the single-process module in every way that needs a real group."""
    group_of(ranks)
    three = open_artifact(payload["three"])
    ids = torch.tensor(payload["ids"])
    reference = LaneModule.from_program(load_program(three), MemoryStore(toy_sources()).read)(ids)
    loaded = load(payload["three"])
    assert isinstance(loaded, RankProgram)
    differences = {}

    def compare(name: str, output: Any) -> None:
        assert list(output) == ["logits", "hidden"]
        differences[name] = max(float((output[key] - reference[key]).abs().max()) for key in output)

    compare("loaded", loaded(ids))
    compare("by name", loaded(input_ids=ids))
    built = RankProgram.from_program(load_program(three), MemoryStore(toy_sources()).read)
    compare("built", built(ids))
    check_dtypes(ranks)

    # Two of the three ranks run the program of degree 2; the third takes no part.
    pair = dist.new_group([0, 1])
    errors = []
    if ranks.rank < 2:
        compare("pair", load(payload["two"], group=pair)(ids))
    for attempt in (
        lambda: load(payload["two"]),
        lambda: RankProgram.load(three, lane=(ranks.rank + 1) % 3),
    ):
        try:
            attempt()
        except KrakenError as error:
            errors.append(f"{type(error).__name__}: {error}")
    moved = built.to("meta")
    factories = [node for node in moved.graph.graph.nodes if "device" in node.kwargs]
    assert factories
    assert all(node.kwargs["device"] == torch.device("meta") for node in factories)
    return {"rank": ranks.rank, "threads": torch.get_num_threads(), "differences": differences, "errors": errors}


def backend_name(payload: Mapping[str, Any], ranks: Ranks) -> str:
    """The communication library that this rank's group uses."""
    return str(dist.get_backend(group_of(ranks)))
