"""The fewest tokens that are read faster in two halves: measured where the model runs, once. Imports no torch.

Whether a half's reduces hide behind the other half depends on the links, the cores and the model, and two halves cost
something of their own: smaller products, twice as many calls.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kraken_compiler.artifact.read import MEASURED_FILE
from kraken_compiler.generate.decoder import SplitDecoder
from kraken_compiler.ranks.halves_timing import is_faster, time_both
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.text import json_text

LENGTHS = (64, 128, 256, 512, 1024)
"""Lengths worth trying. What is shorter is read at once."""

_SECONDS = 5.0
"""After so long no longer length is tried."""
_MOST_BYTES = 1 << 20


def split_threshold(
    decoder: SplitDecoder, lengths: Sequence[int], ranks: Ranks, directory: Path, setting: str
) -> int | None:
    """Measure, or look up what was measured on this machine. All ranks call it together; the decoder is empty after.

    Args:
        decoder: What reads tokens.
        lengths: Which to try, in this order until one is faster in halves.
        ranks: This rank; rank 0 measures and decides.
        directory: The artifact's, in which rank 0 keeps what it measured, if it may.
        setting: What the times depend on besides machine, ranks and lengths: the backend, for instance.

    Returns:
        None if two halves were not faster at any length.
    """
    key = f"{platform.node()} {ranks.degree} {decoder.batch} {setting}"
    measured = _kept(directory).get(key) if ranks.rank == 0 else None
    measured = _from_first(ranks, measured)
    if measured is None:
        measured = _measure(decoder, lengths, ranks)
        if ranks.rank == 0:
            _keep(directory, key, measured)
    threshold: int | None = measured["split_from"]
    return threshold


def _measure(decoder: SplitDecoder, lengths: Sequence[int], ranks: Ranks) -> dict[str, Any]:
    times: list[list[float]] = []
    threshold = None
    began = time.perf_counter()
    for tokens in lengths:
        if not _from_first(ranks, time.perf_counter() - began < _SECONDS):
            break
        ranks.status.progress(f"measuring whether {tokens} tokens are read faster in two halves")
        whole, halves = time_both(partial(_seconds, decoder, ranks, tokens))
        times.append([tokens, whole, halves])
        if _from_first(ranks, is_faster(whole, halves)):
            threshold = tokens
            break
    decoder.split_from = None
    decoder.reset()
    return {"split_from": threshold, "seconds": times}


def _seconds(decoder: SplitDecoder, ranks: Ranks, tokens: int, in_halves: bool) -> float:
    ids = np.zeros((decoder.batch, tokens), np.int64)
    decoder.reset()
    decoder.split_from = 1 if in_halves else None
    ranks.barrier()
    began = time.perf_counter()
    decoder.prefill(ids, np.full(decoder.batch, tokens))
    return time.perf_counter() - began


def _from_first(ranks: Ranks, value: Any) -> Any:
    """What rank 0 thinks, on every rank."""
    return json.loads(ranks.broadcast(json.dumps(value).encode() if ranks.rank == 0 else None))


def _kept(directory: Path) -> dict[str, Any]:
    """What was measured before; nothing if the file is missing or is none of ours."""
    path = directory / MEASURED_FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {
        key: entry
        for key, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("split_from"), int | None)
    }


def _keep(directory: Path, key: str, measured: dict[str, Any]) -> None:
    """Keep what was measured, if the artifact may be written to: else it is measured again next time."""
    path = directory / MEASURED_FILE
    partial = path.with_name(f"{MEASURED_FILE}.new")
    try:
        partial.write_text(json_text({**_kept(directory), key: measured}), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
