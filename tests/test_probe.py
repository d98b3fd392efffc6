"""`kraken-probe`: what it measures is a machine, and what goes wrong leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.commands.probe import probe_machine
from kraken_compiler.errors import UsageError
from kraken_compiler.latency import probe as probe_module
from kraken_compiler.latency.machine import Machine, load_machine, parse_machine
from kraken_compiler.latency.probe import figure_count, machine_toml, probe
from kraken_compiler.options.probe import ProbeOptions
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small figures."""
    monkeypatch.setattr(probe_module, "_MOVED", (1 << 12, 1 << 14))
    monkeypatch.setattr(probe_module, "_ROWS", (1, 8))
    monkeypatch.setattr(probe_module, "_SIDES", (16, 32))
    monkeypatch.setattr(probe_module, "_QUERIES", (1, 8))
    monkeypatch.setattr(probe_module, "_COLD_BYTES", 1 << 12)


def alone() -> Ranks:
    return Ranks(Place.alone(), StatusWriter(0, None), None)


@pytest.mark.usefixtures("short")
def test_figures_are_a_machine(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    figures = probe(alone(), ["float32", "bfloat16"], lambda done, total: told.append((done, total)))
    count = figure_count(["float32", "bfloat16"], 1)
    assert told == [(done, count) for done in range(1, count + 1)]
    file = tmp_path / "machine.toml"
    file.write_text(machine_toml('a "quoted" name', figures))
    found = load_machine(str(file))
    assert found.name == 'a "quoted" name'
    assert found.product_seconds(1, 8, 32, 32, "bfloat16", 2) > 0
    assert found.launch.eager > 0
    assert found.all_reduce == []
    assert "products    float32" in found.lines()[2]


def test_an_unknown_element_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype int64"):
        probe_machine(tmp_path / "here.toml", ProbeOptions(dtypes=("int64",)))


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is there; pass --force"):
        probe_machine(file)
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match="there is no such directory"):
        probe_machine(tmp_path / "absent" / "machine.toml")


@pytest.mark.slow
def test_two_ranks_measure_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real figures of products take long; here they are those of a rank alone, and sums are real."""
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "machine.toml"
    shown: list[Any] = []

    class Watch:
        def stage(self, name: str) -> Any:
            raise AssertionError(name)

        def steps(self, name: str) -> Any:
            from contextlib import nullcontext

            return nullcontext(lambda done, total, unit: shown.append((done, total)))

    found = probe_machine(file, ProbeOptions(ranks=2, dtypes=("float32",), name="here"), progress=Watch())
    assert isinstance(found, Machine)
    assert parse_machine(file.read_text(), "it") == found
    table = found.reduces(2)
    assert all(busy <= whole for busy, whole in zip(table.busy, table.seconds, strict=True))
    assert table.seconds[-1] > table.seconds[0]
    assert shown[-1][1] == figure_count(["float32"], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["machine.toml"]
