"""Hosts of one core each, network namespaces joined by a link of a set rate, measured as `kraken-probe` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kraken_compiler.commands.probe import tiny_artifact
from kraken_compiler.latency.probe import Figures
from ttft_parts.network import UNLIMITED, network
from ttft_parts.ranks import started


def probed(links: Sequence[str], dtypes: Sequence[str], count: int) -> Iterator[tuple[str, Figures]]:
    """What the hosts do, by link; products, attention and copies are measured on the first one.

    Args:
        links: Rates in Gbit/s.
        dtypes: Element types of products.
        count: How many hosts there are.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kraken-probe-") as folder,
        network(count, "auto") as where,
        started(where, count, Path(folder) / "ranks", {}, "ttft_parts.probe_rank") as ranks,
    ):
        figures: Figures = {}
        for link in links:
            where.set_link(link)
            if not figures:
                artifact = tiny_artifact(Path(folder), count, dtypes[0])
                figures = ranks.tell("probe", dtypes=list(dtypes), artifact=str(artifact))[0]
            else:
                figures = {**figures, "all_reduce": ranks.tell("probe_sums")[0]}
            yield link, figures
        where.set_link(UNLIMITED)
