"""What a user hears whose Python lacks a package that only some models need."""

from __future__ import annotations

from kraken_compiler.errors import UsageError


def missing_packages(what: str, error: ImportError, extra: str = "hf") -> UsageError:
    """An error that says what to install.

    Args:
        what: What cannot be done, e.g. "reading the GGUF file model.gguf".
        error: What importing said.
        extra: Which of our extras installs them.
    """
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return UsageError(
        f"{what} needs packages that are not installed: pip install 'kraken-compiler[{extra}]' ({reason})"
    )
