"""What ranks run in the tests of running. Apart from the tests, so that a rank does not import pytest."""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kraken_compiler.backends.load import load
from kraken_compiler.errors import KrakenError
from kraken_compiler.ranks.session import Ranks
from tests.torch_ranks import group_of


def multiply(seconds: float) -> None:
    """Compute as a long prompt makes a rank compute: in few calls, without a word."""
    x = torch.randn(384, 384)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        x = torch.tanh(x @ x)


def think(seconds: float) -> None:
    """Compute in Python, as a slow tokenizer does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sorted(str(number) for number in range(1000))


WAYS = {"multiply": multiply, "think": think, "sleep": time.sleep}


def act(payload: Mapping[str, Any], ranks: Ranks) -> str:
    """Do what the payload says of this rank, one after the other, and meet; nothing is reported meanwhile."""
    ranks.status.progress("reading a long prompt")
    for way, seconds in payload["ranks"][ranks.rank]:
        WAYS[way](seconds)
    ranks.barrier()
    return "done"


def modules_of(payload: Mapping[str, Any], ranks: Ranks) -> list[str]:
    """Files of the modules that a user's scripts may be called like, and what is first looked at for more."""
    assert payload is not None
    return [str(module.__file__) for module in (queue, torch, np)] + sys.path


def say_pid_and_wait(payload: Mapping[str, Any], ranks: Ranks) -> None:
    """Leave the process id in a directory, and go on for long."""
    Path(payload["directory"], f"pid-{ranks.rank}").write_text(str(os.getpid()))
    time.sleep(600)


def load_and_run(payload: Mapping[str, Any], ranks: Ranks) -> list[str]:
    """What this rank hears that loads an artifact of its own and then the first one's, in turn with its peers."""
    group_of(ranks)
    heard = []
    for directory in (payload["artifacts"][ranks.rank], payload["artifacts"][0]):
        for turn in range(ranks.degree):
            if turn == ranks.rank:
                program = load(directory)
            ranks.barrier()
        ids = torch.tensor([[1, 2, 3]])
        try:
            program(ids)
            heard.append("ran")
        except KrakenError as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard
