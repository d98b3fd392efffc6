"""Modes that a caller may have switched on around us, and that must not get into a compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
        yield tuple(notes)


def autocast_is_on(device: torch.device) -> bool:
    """True inside `torch.autocast` for a kind of device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=False)
    kinds = dict.fromkeys(("cpu", "cuda", *([accelerator.type] if accelerator is not None else [])))
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]
