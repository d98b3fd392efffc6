"""Buffers of ONNX devices: memory is made once for the largest array of a name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kraken_compiler.backends.onnx_ort.run.named_buffers import NamedBuffers

FLOAT32 = np.dtype(np.float32)


def address(array: npt.NDArray[np.float32]) -> int:
    return int(array.__array_interface__["data"][0])


def test_a_smaller_array_lies_in_the_memory_of_a_larger_one() -> None:
    buffers = NamedBuffers()
    prompt = buffers.take("x", (1, 512, 80), FLOAT32)
    assert buffers.take("x", (1, 512, 80), FLOAT32) is prompt
    shorter = buffers.take("x", (2, 250, 80), FLOAT32)
    assert shorter.shape == (2, 250, 80)
    assert shorter.flags.c_contiguous
    assert address(shorter) == address(prompt) == address(buffers.take("x", (1, 512, 80), FLOAT32))


def test_a_small_array_lies_beside_a_large_one() -> None:
    buffers = NamedBuffers()
    prompt = buffers.take("x", (1, 512, 80), FLOAT32)
    token = buffers.take("x", (1, 1, 80), FLOAT32)
    prompt[:], token[:] = 1, 2
    assert not np.shares_memory(prompt, token)
    assert buffers.take("x", (1, 512, 80), FLOAT32) is prompt
    assert buffers.take("x", (1, 1, 80), FLOAT32) is token
    assert buffers.take("x", (0, 8), FLOAT32).shape == (0, 8)


def test_a_larger_one_gets_memory_of_its_own() -> None:
    buffers = NamedBuffers()
    small, other = buffers.take("x", (4,), FLOAT32), buffers.take("y", (4,), FLOAT32)
    large = buffers.take("x", (400,), FLOAT32)
    large[:], other[:] = 1, 2
    assert not np.shares_memory(large, other)
    assert not np.shares_memory(large, small)
    assert buffers.take("x", (), FLOAT32).shape == ()
    assert address(buffers.take("x", (400,), FLOAT32)) == address(large)
