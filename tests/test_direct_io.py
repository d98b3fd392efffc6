"""Memory that is used again, and files that go past the page cache."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from kraken_compiler.capture.captured_model import digest_files
from kraken_compiler.weights.checkpoint import SafetensorsCheckpoint
from kraken_compiler.weights.io import direct_io, safetensors_writer
from kraken_compiler.weights.io.buffers import Buffers, aligned_buffer
from kraken_compiler.weights.io.direct_io import BLOCK, LargeFile, open_direct, would_flood_the_cache
from kraken_compiler.weights.io.safetensors_format import read_header, read_tensor
from kraken_compiler.weights.io.safetensors_writer import SafetensorsWriter

MIB = 1 << 20


def tensor_in(buffers: Buffers, size: int) -> torch.Tensor:
    return torch.frombuffer(buffers.take(size), dtype=torch.uint8, count=size)


def test_what_nobody_uses_is_used_again() -> None:
    buffers = Buffers(2 * MIB, 4)
    first = tensor_in(buffers, 4 * MIB)
    view, place = first.view(2, -1)[1], first.data_ptr()
    del first
    assert tensor_in(buffers, 3 * MIB).data_ptr() != place  # the view is in use
    del view
    assert tensor_in(buffers, 4 * MIB).data_ptr() == place


def test_what_is_in_use_is_never_given_away() -> None:
    buffers = Buffers(2 * MIB, 4)
    tensors = [tensor_in(buffers, (4 - number % 2) * MIB).fill_(number) for number in range(7)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_what_is_released_is_kept_by_its_users_alone() -> None:
    buffers = Buffers(2 * MIB, 4)
    first = tensor_in(buffers, 4 * MIB).fill_(7)
    buffers.release()
    assert tensor_in(buffers, 4 * MIB).fill_(9).data_ptr() != first.data_ptr()
    assert bool((first == 7).all())


@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_holds_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Tensors that begin and end within chunks, some longer than several of them."""
    if not direct:
        monkeypatch.setattr(safetensors_writer, "open_direct", lambda path: None)
    path = tmp_path / "lane.safetensors"
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate((3, 700_001, 5, 262_144, 1_300_000, 1))}
    file = SafetensorsWriter(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, {})
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
    file = SafetensorsWriter(tmp_path / "lane.safetensors", {"t": (torch.float32, (3 * MIB // 4,))}, {})
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


@pytest.mark.parametrize(
    ("system", "release", "direct"),
    [
        ("Linux", "5.11.22-7-generic", False),
        ("Linux", "4.18.0-477.el8.x86_64", False),
        ("Linux", "4.4.0", False),
        ("Linux", "unknown", False),
        ("Linux", "5.12.0-rc1", True),
        ("Linux", "6.8.0-31-generic", True),
        ("Linux", "10.0", True),
        ("FreeBSD", "4.11-RELEASE", True),
    ],
)
def test_kernels_that_lose_what_is_read_directly_get_none(
    large: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    system: str,
    release: str,
    direct: bool,
) -> None:
    request.addfinalizer(direct_io._keeps_what_is_read.cache_clear)
    direct_io._keeps_what_is_read.cache_clear()
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system, release=release))
    opened: list[int] = []
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments[1]) or 99)
    assert (open_direct(large, os.O_RDONLY) is not None) == direct
    assert [bool(flags & os.O_DIRECT) for flags in opened] == [True] * direct
    monkeypatch.undo()
    content = large.read_bytes()
    forget(large)
    assert read_back(large, 0, 4 * MIB) == content


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that ends within a block, of which the page cache has nothing."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(3 * MIB + 1234))
    forget(path)
    return path


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_back(path: Path, start: int, size: int, direct: bool = True) -> bytes:
    buffer = memoryview(aligned_buffer(size))
    with LargeFile(path, direct=direct) as file:
        return bytes(buffer[: file.read(buffer, start)])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cached", [0, MIB, 4 * MIB])
def test_a_large_file_is_read_whatever_is_cached(large: Path, direct: bool, cached: int) -> None:
    content = Path(large).read_bytes()
    forget(large)
    with large.open("rb", buffering=0) as file:
        file.read(cached)
    assert read_back(large, 0, 2 * MIB, direct) == content[: 2 * MIB]
    assert read_back(large, 2 * MIB, 2 * MIB, direct) == content[2 * MIB :]
    assert read_back(large, 4 * MIB, 2 * MIB, direct) == b""


def test_what_a_disk_does_not_do_is_done_as_usual(large: Path) -> None:
    """A disk of larger blocks, which refuses a direct read in the middle."""
    seen = []

    def preadv(file: int, buffers: list[memoryview], start: int) -> int:
        seen.append(start)
        if len(seen) == 2:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(file, [buffers[0][:MIB]], start)

    with mock.patch.object(direct_io, "os", SimpleNamespace(**vars(os) | {"preadv": preadv})):
        found = read_back(large, BLOCK, 4 * MIB)
    assert seen[:3] == [BLOCK, BLOCK + MIB, BLOCK + MIB]
    assert found == large.read_bytes()[BLOCK:]


def test_an_error_of_the_disk_names_the_file(large: Path) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with (
        mock.patch.object(direct_io, "os", SimpleNamespace(**vars(os) | {"preadv": preadv})),
        pytest.raises(OSError, match=f"Input/output error: '{large}'"),
    ):
        read_back(large, 0, MIB)


def test_what_would_flood_the_cache(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not would_flood_the_cache([large])
    monkeypatch.setattr(direct_io, "_SHARE_OF_MEMORY", 0.0)
    assert would_flood_the_cache([large])


def test_a_flooding_source_is_read_past_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors at odd places, read directly at first and as usual then; the hash is the same."""
    path = tmp_path / "model.safetensors"
    tensors = {"bytes": torch.randint(0, 255, (3,), dtype=torch.uint8), "a": torch.randn(500_000), "b": torch.randn(7)}
    save_file(tensors, path)
    usual = digest_files((path, path))
    monkeypatch.setattr(direct_io, "_SHARE_OF_MEMORY", 0.0)
    forget(path)
    opened = []

    def open_and_note(file: Path, mode: int) -> int | None:
        opened.append(file)
        return open_direct(file, mode)

    monkeypatch.setattr(direct_io, "open_direct", open_and_note)
    assert digest_files((path, path)) == usual
    assert len(opened) == 2
    checkpoint = SafetensorsCheckpoint.open((path,))
    for _ in range(3):
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(checkpoint.read_rows("a", 1000, 300_000), tensors["a"][1000:300_000])
    assert len(opened) == 2 + len(tensors) + 1
