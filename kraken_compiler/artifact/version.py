"""The version of this package. Imports no torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """This package's version, "unknown" where it runs without being installed."""
    try:
        return version("kraken-compiler")
    except PackageNotFoundError:
        return "unknown"
