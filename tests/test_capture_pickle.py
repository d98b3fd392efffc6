"""Capture of pickled modules: never without trust, and a bare state dict says what is missing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_modules_need_trust(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    model = Model()
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        InputFileError, match=r"is a pickle, which can run any code .*torch\.export\.save.*--trust-pickle"
    ):
        capture(path, example_inputs=(torch.randn(2, 3, 4),))

    captured = capture(path, example_inputs=(torch.randn(2, 3, 4),), trust_pickle=True)
    assert captured.origin.kind == "pickle"
    assert captured.origin.path == str(path)
    torch.testing.assert_close(captured.store.read("linear.weight"), model.linear.weight.detach())
    before = captured.origin.sha256
    path.write_bytes(path.read_bytes() + b"\0")
    assert capture_origin(path) != before


def capture_origin(path: Path) -> str:
    from kraken_compiler.capture.captured_model import digest_files

    return digest_files((path,))


def test_nothing_runs_without_trust(tmp_path: Path) -> None:
    for name, save in {"t.pt": torch.save, "p.pkl": lambda value, path: path.write_bytes(pickle.dumps(value))}.items():
        path = tmp_path / name
        save(Bomb(tmp_path / "ran"), path)
        with pytest.raises(InputFileError, match="can run any code"):
            capture(path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}], ids=["bare", "nested"]
)
@pytest.mark.parametrize("trust", [False, True])
def test_state_dicts_say_what_is_missing(tmp_path: Path, wrap: Any, trust: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(wrap(Model().state_dict()), path)
    with pytest.raises(
        InputFileError, match=r"bare state dict \(2 tensors\): the architecture is missing.*config\.json"
    ):
        capture(path, trust_pickle=trust)


def test_pickles_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([1, 2], path)
    with pytest.raises(InputFileError, match="holds a list, not a model"):
        capture(path)
    torch.save(Bomb(tmp_path / "ran"), path)
    with pytest.raises(InputFileError, match=r"holds a NoneType, not an nn\.Module"):
        capture(path, trust_pickle=True)


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Model(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputFileError, match="is truncated or damaged"):
        capture(path, trust_pickle=True)
    path.write_bytes(b"\x80\x02garbage")
    with pytest.raises(InputFileError, match=r"cannot be unpickled|is truncated or damaged") as caught:
        capture(path, trust_pickle=True)
    assert "\n" not in str(caught.value)


def test_classes_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(Model(), path)
    monkeypatch.delattr(f"{__name__}.Model")
    with pytest.raises(InputFileError, match=r"cannot be unpickled: .*class must be importable where you run this"):
        capture(path, trust_pickle=True)
