"""Pictures of choices of forms: what a search has measured against what the load takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.quality.budget import Budget, Candidate, Choice, Traffic
from kraken_compiler.quality.plot import plot_choices, require_plot
from tests.test_cli_compile import done, refused, save_model
from tests.test_latency import TOML

pytest.importorskip("matplotlib", reason="the bench extra is not installed")


def choice(seconds: float | None) -> Choice:
    found = tuple(
        Candidate(
            ("kraken",) * count + ("standard",) * (4 - count),
            Traffic(800, 800 - 100 * count, 100 * count),
            0.03 * count,
            0.01 * count,
            0.3 * count,
            None if seconds is None else seconds * (1 - 0.1 * count),
        )
        for count in (1, 3, 4)
    )
    return Choice("KL at most 0.1", found[1], found, seconds)


@pytest.mark.parametrize(
    ("choices", "budget"),
    [
        ({"": choice(0.2)}, Budget(0.1)),
        ({"": choice(None)}, Budget(max_perplexity_increase=0.02)),
        ({"2 devices": choice(0.2), "4 devices": choice(0.1)}, Budget(0.1)),
        ({"": Choice("KL at most 0.1", None, (), 0.2)}, Budget(0.1)),
        ({}, Budget(0.1)),
    ],
    ids=["times", "bytes", "degrees", "nothing measured", "nothing searched"],
)
def test_what_is_drawn(tmp_path: Path, choices: dict[str, Choice], budget: Budget) -> None:
    chosen = next((one.best for one in choices.values()), None)
    plot_choices(tmp_path / "frontier.png", choices, budget, chosen)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    plot_choices(tmp_path / "frontier.svg", choices, budget, chosen)
    assert ("<!-- chosen -->" in (tmp_path / "frontier.svg").read_text()) == (chosen is not None)


def test_axes(tmp_path: Path) -> None:
    def texts(one: Choice, budget: Budget) -> str:
        plot_choices(tmp_path / "one.svg", {"": one}, budget, one.best)
        return (tmp_path / "one.svg").read_text()

    times = texts(choice(0.2), Budget(0.1))
    assert "<!-- predicted time of the load (ms) -->" in times
    assert "<!-- KL to the source (nats/token) -->" in times
    assert "<!-- standard -->" in times
    bytes_waited = texts(choice(None), Budget(max_perplexity_increase=0.02))
    assert "<!-- all-reduce bytes per token that are waited for -->" in bytes_waited
    assert "<!-- increase of the perplexity (%) -->" in bytes_waited


def test_places_where_nothing_can_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    require_plot(tmp_path / "one.png")
    with pytest.raises(UsageError, match=r"there is no format 'nonsense'; choose from .*png"):
        require_plot(tmp_path / "one.nonsense")
    with pytest.raises(InputFileError, match="there is no directory"):
        require_plot(tmp_path / "absent" / "one.png")
    with pytest.raises(InputFileError, match="it is a directory"):
        require_plot(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_picture_takes_a_budget(tmp_path: Path) -> None:
    assert "--plot draws what a search within a budget finds" in refused(2, "model", "--plot", tmp_path / "one.png")
    line = refused(2, "model", "--max-kl", "1", "--calibrate", "text", "--plot", tmp_path / "one.nonsense")
    assert "there is no format 'nonsense'" in line


@pytest.mark.slow
@pytest.mark.parametrize("auto", [(), ("--auto",)])
def test_a_search_is_drawn(tmp_path: Path, auto: tuple[str, ...]) -> None:
    model = save_model("llama", tmp_path / "llama")
    chosen = random.Random(0).choices(range(3, 97), k=9000)
    words, machine, plot = tmp_path / "words.txt", tmp_path / "machine.toml", tmp_path / "frontier.svg"
    words.write_text("\n".join(" ".join(f"w{word}" for word in chosen[at : at + 10]) for at in range(0, 9000, 10)))
    machine.write_text(TOML)
    search = ("--calibrate", words, "--calibrate-tokens", "4096", "--calibrate-passes", "0", "--max-kl", "10")
    load = ("--machine", machine, "--prompt", "32", "--new-tokens", "8")
    done(model, "--degree", "2", *auto, *search, *load, "-o", tmp_path / "out", "--no-verify", "--plot", plot)
    text = plot.read_text()
    assert "<!-- chosen -->" in text
    assert f"<!-- {'2 devices' if auto else 'measured'} -->" in text
