"""Silence libraries while we call them: what they say is about their own internals; our users hear it from us."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kraken_compiler._torch_compat import silent_log


@contextmanager
def quiet_torch() -> Iterator[None]:
    """No warnings, and no log lines of torch."""
    with silent_log(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no log lines of transformers below errors."""
    import transformers.utils.logging

    hf_logging: Any = transformers.utils.logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
