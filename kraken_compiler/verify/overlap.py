"""Checks that reduces have compute to hide behind: in programs as they were written, and in the runs of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import RanWindow, Window


def require_overlap(windows: Sequence[Window]) -> None:
    """Make sure that no reduce lost the compute that should hide it.

    Raises:
        VerificationError: A window that the form promises is empty; names the reduces.
    """
    empty_windows = [window for window in windows if window.promised and not window.gemms]
    if empty_windows:
        places = ", ".join(f"reduce {window.reduce} ({window.start} to {window.wait})" for window in empty_windows[:3])
        raise VerificationError(
            f"{len(empty_windows)} of {len(windows)} reduces lost their overlap: no matrix multiplication between "
            f"start and wait of {places}"
        )


def require_run_overlap(ranks: Sequence[Sequence[RanWindow]]) -> None:
    """Make sure that no rank ran a promised window without a matrix product.

    Args:
        ranks: The windows of every rank's run, rank 0 first.

    Raises:
        VerificationError: One did; names the ranks and the reduces.
    """
    empty_windows = [
        (rank, one.window)
        for rank, windows in enumerate(ranks)
        for one in windows
        if one.window.promised and not one.products
    ]
    if empty_windows:
        places = ", ".join(
            f"reduce {window.reduce} ({window.start} to {window.wait}) on rank {rank}"
            for rank, window in empty_windows[:3]
        )
        reduces = len({window.reduce for _, window in empty_windows})
        raise VerificationError(
            f"{reduces} of {len(ranks[0])} reduces lost their overlap in the run: no matrix product was "
            f"executed between start and wait of {places}"
        )
