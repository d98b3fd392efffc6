"""Memory that is used again, and files that go past the page cache."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest
import torch

from kraken_compiler.weights import lane_file
from kraken_compiler.weights.direct_io import Buffers, open_direct
from kraken_compiler.weights.lane_file import LaneFile
from kraken_compiler.weights.safetensors_format import read_header, read_tensor

MIB = 1 << 20


def tensor_in(buffers: Buffers, size: int) -> torch.Tensor:
    return torch.frombuffer(buffers.take(size), dtype=torch.uint8, count=size)


def test_what_nobody_uses_is_used_again() -> None:
    buffers = Buffers()
    first = tensor_in(buffers, 4 * MIB)
    view, place = first.view(2, -1)[1], first.data_ptr()
    del first
    assert tensor_in(buffers, 3 * MIB).data_ptr() != place  # the view is in use
    del view
    assert tensor_in(buffers, 4 * MIB).data_ptr() == place


def test_what_is_in_use_is_never_given_away() -> None:
    buffers = Buffers()
    tensors = [tensor_in(buffers, (4 - number % 2) * MIB).fill_(number) for number in range(7)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("direct", [True, False])
def test_a_lane_file_holds_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Tensors that begin and end within chunks, some longer than several of them."""
    if not direct:
        monkeypatch.setattr(lane_file, "open_direct", lambda path: None)
    path = tmp_path / "lane.safetensors"
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate((3, 700_001, 5, 262_144, 1_300_000, 1))}
    file = LaneFile(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, {})
    assert (file._direct is not None) <= direct
    file.cut(0)
    for name, tensor in tensors.items():
        file.append(name, tensor)
    mark = file.mark
    file.close()
    content = path.read_bytes()
    assert (mark.end, mark.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    entries = read_header(path)
    assert all(torch.equal(read_tensor(name, entries[name]), tensor) for name, tensor in tensors.items())


def test_a_direct_write_that_a_limit_cuts_short_says_why(tmp_path: Path) -> None:
    file = LaneFile(tmp_path / "lane.safetensors", {"t": (torch.float32, (3 * MIB // 4,))}, {})
    file.cut(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + MIB // 2 + 100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.append("t", torch.randn(3 * MIB // 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.close()


def test_a_file_that_is_not_there_is_no_file_without_direct_writes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_direct(tmp_path / "nothing")
