"""Whether reduces have something to hide behind: in programs as they were written, and in what ranks ran of them."""

from __future__ import annotations

from collections.abc import Sequence

from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import RanWindow, Window


def require_overlap(windows: Sequence[Window]) -> None:
    """Make sure that no reduce lost the compute that should hide it.

    Raises:
        VerificationError: A window that the form promises is empty; names the reduces.
    """
    lost = [window for window in windows if window.promised and not window.gemms]
    if lost:
        places = ", ".join(f"reduce {window.reduce} ({window.start} to {window.wait})" for window in lost[:3])
        raise VerificationError(
            f"{len(lost)} of {len(windows)} reduces lost their overlap: no matrix multiplication between start and "
            f"wait of {places}"
        )


def require_run_overlap(ranks: Sequence[Sequence[RanWindow]]) -> None:
    """Make sure that no rank ran a promised window without a matrix product.

    Args:
        ranks: The windows of every rank's run, rank 0 first.

    Raises:
        VerificationError: One did; names the ranks and the reduces.
    """
    lost = [
        (rank, one.window)
        for rank, windows in enumerate(ranks)
        for one in windows
        if one.window.promised and not one.products
    ]
    if lost:
        places = ", ".join(
            f"reduce {window.reduce} ({window.start} to {window.wait}) on rank {rank}" for rank, window in lost[:3]
        )
        reduces = len({window.reduce for _, window in lost})
        raise VerificationError(
            f"{reduces} of {len(ranks[0])} reduces lost their overlap in the run: no matrix product was "
            f"executed between start and wait of {places}"
        )
