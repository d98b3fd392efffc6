"""Our safetensors reader and writer against the safetensors package, and on damaged files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.io import safetensors_writer
from kraken_compiler.weights.io.safetensors_format import DTYPES, byte_view, read_header, read_tensor
from kraken_compiler.weights.io.safetensors_writer import new_safetensors
from kraken_compiler.weights.store import MemoryStore


def samples() -> dict[str, torch.Tensor]:
    tensors = {
        name: torch.zeros(2, 3, dtype=dtype) if dtype.is_complex else torch.arange(6).reshape(2, 3).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "strided": torch.randn(4, 3).t()}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_safetensors(path, layout, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = samples()
    write(tmp_path / "w.safetensors", tensors)
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert bytes(byte_view(loaded[name])) == bytes(byte_view(tensor.contiguous()))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in samples().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    entries = read_header(tmp_path / "w.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = read_tensor(name, entries[name])
        assert read.dtype == tensor.dtype
        assert bytes(byte_view(read)) == bytes(byte_view(tensor))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b"[]",
    ],
)
def test_headers_that_describe_no_tensors(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(InputFileError, match="is damaged: its header does not describe tensors"):
        read_header(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputFileError, match=r"cannot read .*w\.safetensors: No such file"):
        read_header(path)
    write(path, {"a": torch.ones(1000)})
    entry = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputFileError, match="is truncated: its header describes"):
        read_header(path)
    with pytest.raises(InputFileError, match="is truncated: tensor 'a' is incomplete"):
        read_tensor("a", entry)
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputFileError, match="tensor 'a' has an element type that torch does not know"):
        read_tensor("a", read_header(path)["a"])


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"cannot write .*w\.safetensors: No such file or directory"):
        write(tmp_path / "none" / "w.safetensors", {"a": torch.ones(3)})


@pytest.mark.parametrize("room", [0, 200], ids=["full", "fills up on the way"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    def pwrite(file: int, data: memoryview, start: int) -> int:
        if start >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(file, data[:50], start)

    monkeypatch.setattr(safetensors_writer, "os", SimpleNamespace(**vars(os) | {"pwrite": pwrite}))
    with pytest.raises(InputFileError, match=r"cannot write .*w\.safetensors: No space left on device"):
        write(tmp_path / "w.safetensors", {"a": torch.ones(300)})


def test_a_forgotten_tensor_is_our_bug(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (1,)), "b": (torch.float32, (1,))}
    with (
        pytest.raises(AssertionError, match=r"never written: \['b'\]"),
        new_safetensors(tmp_path / "w.safetensors", layout) as writer,
    ):
        writer.append("a", torch.ones(1))


def test_memory_store_shares() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    store = MemoryStore({"w": weight})
    store.validate()
    assert store.names() == ("w",)
    assert store.read("w").data_ptr() == weight.data_ptr()
    assert not store.read("w").requires_grad
