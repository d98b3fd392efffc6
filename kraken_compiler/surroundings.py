"""Modes that a caller may have switched on around us, and that must not get into a compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from kraken_compiler import _torch_compat as compat


@contextmanager
def undisturbed() -> Iterator[tuple[str, ...]]:
    """Compile as if nothing was switched on: without autocast, inference mode, fake tensors and the meta device.

    Yields:
        Notes about what was on and would have changed numbers.
    """
    notes = []
    with ExitStack() as stack:
        for device in _autocast_devices():
            dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
            notes.append(
                f"torch.autocast('{device}', {dtype}) was on around the compile and is no part of the lanes; "
                "call them under it, as the source, to have it"
            )
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(compat.without_dispatch_modes())
        # What we draw, to compare and to find out what depends on what, is not missing from the caller's numbers.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if torch.get_default_device().type == "meta":
            # It is for building modules; whatever is computed there has no values.
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(fast_products())
        yield tuple(notes)


@contextmanager
def fast_products() -> Iterator[None]:
    """Multiply float32 matrices on CPUs with oneDNN instead of MKL: on an AMD EPYC at 470 instead of 207 GFLOP/s.

    torch takes oneDNN for float32 only where products may be less exact than that. Where they would be, as on CPUs
    with matrix units for bfloat16, nothing is changed.
    """
    with _onednn_products() if _onednn_is_exact() else nullcontext():
        yield


@contextmanager
def _onednn_products() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.matmul.fp32_precision = before


@cache
def _onednn_is_exact() -> bool:
    """True if products are in float32 where torch allows less: bfloat16 is off by some thousandths."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = x.double() @ y.double()
    with _onednn_products():
        # Both as a product of matrices and as a linear, which torch hands over in different ways.
        products = (x @ y, torch.nn.functional.linear(x, y.T.contiguous()))
    return all(bool((product - exact).abs().max() < 1e-5 * exact.abs().max()) for product in products)


def autocast_is_on(device: torch.device) -> bool:
    """True inside `torch.autocast` for a kind of device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=False)
    kinds = dict.fromkeys(("cpu", "cuda", *([accelerator.type] if accelerator is not None else [])))
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]
