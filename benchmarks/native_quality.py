"""Does a Kraken model that is trained from scratch predict as well as a standard one of as many parameters?

    python benchmarks/quality_texts.py texts
    python benchmarks/native_quality.py texts/general --size 3M --tokens 1e6 --batch 4 --out native-quality

A GPT-2 and Kraken models of 2 and 4 lanes, of as many parameters within 2 %, are trained on the same rows of the same
texts in the same order, by the same loop. All are tuned alike: with every learning rate, every multiple of it for the
embeddings and every standard deviation of the embedding's first weights on few tokens, then with the best of these on
all tokens, once with every seed (of the first weights and of the order of the rows). Perplexity is that of the last
part of every text, which nobody was trained on. The tokenizer is learnt from the other parts. Every run that has ended
is kept in OUT, so that a call that was interrupted goes on, and calls with other --models may run beside each other;
--plot draws the curves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from ttft_parts.report import table

from kraken_compiler.capture import capture
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.native import KrakenConfig
from kraken_compiler.passes.lower import lower
from kraken_compiler.surroundings import fast_products
from kraken_compiler.text import replace_text
from kraken_compiler.texts.read import text_files
from kraken_compiler.training.devices import training_device
from kraken_compiler.training.from_scratch.build import new_model, trainer_of
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.from_scratch.tokenizer import train_tokenizer
from kraken_compiler.training.loop import train
from kraken_compiler.training.objective import NextToken
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.rows import TrainingText, parts_of_text, read_rows
from kraken_compiler.training.state import open_state, remove_run
from kraken_compiler.training.trainer import Trainer
from kraken_compiler.training.watch import StepRecord

STANDARD = "standard"
DEGREES = (2, 4)
MODELS = (STANDARD, *(f"kraken-{degree}" for degree in DEGREES))
CONTEXT = 256
WITHIN = 0.02


@dataclass(frozen=True)
class Size:
    """A standard model, and the heads of a lane of the Kraken models beside it, by degree."""

    layers: int
    width: int
    heads: int
    lane_heads: dict[int, int]
    vocabulary: int


SIZES = {
    "3M": Size(6, 192, 6, {2: 3, 4: 2}, 2048),
    "10M": Size(8, 304, 8, {2: 4, 4: 2}, 4096),
    "30M": Size(10, 480, 8, {2: 4, 4: 2}, 8192),
}
"""30M is for a GPU."""


class Line:
    """One line on standard error, with the step it is at."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stepped(self, record: StepRecord) -> None:
        if record.step % 20 == 0:
            line = f"\r{self.name}: {record.step} of {record.steps}, {record.tokens_per_second:,.0f} tokens/s "
            print(line, end="", file=sys.stderr)

    def evaluating(self, done: int, total: int) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        print(f"\r{self.name}: {step}: {loss:.4f}" + " " * 30, file=sys.stderr)


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    size = SIZES[options.size]
    files = [file for path in options.texts for file in text_files(path, "TEXTS")]
    settings = TrainSettings(
        steps=_steps(options.tokens, options),
        sequence=CONTEXT,
        batch=options.batch,
        precision=options.precision,
        evaluate_every=options.evaluate_every,
        save_every=options.evaluate_every,
        evaluate_tokens=65536,
    )
    tokenizer = train_tokenizer((parts_of_text(file, settings.hold_out)[0] for file in files), size.vocabulary)
    text = read_rows(files, [], tokenizer, size.vocabulary, CONTEXT, settings, joined=True)
    trained = settings.steps * settings.batch * CONTEXT
    print(f"{text.train.numel():,} tokens, of which every model reads {trained:,}; {text.held_out.numel():,} held out")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = hashlib.sha256(text.train.numpy().tobytes() + text.held_out.numpy().tobytes()).hexdigest()[:8]
    runs = Runs(options.out, f"{options.size}, rows {rows}, {settings.precision}", size, text, settings)
    tuned = {name: _tuned(runs, name, options) for name in options.models}
    ended = {name: [runs.get(name, tuned[name][0], seed) for seed in options.seeds] for name in options.models}
    print("\n".join(report(tuned, ended)))
    if options.plot:
        _plot(ended, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="texts, or directories of them")
    parser.add_argument("--size", choices=SIZES, default="3M")
    parser.add_argument("--tokens", type=float, default=4e6, help="how many each model reads")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--tuning-tokens", type=float, default=3e5, help="how many each reads while it is tuned")
    parser.add_argument("--rates", type=_numbers, default=(1e-3, 2e-3), help="learning rates that are tried")
    parser.add_argument(
        "--embedding-rates",
        type=_numbers,
        default=(1.0, 4.0),
        help="multiples of the learning rate that are tried for embeddings",
    )
    parser.add_argument(
        "--deviations",
        type=_numbers,
        default=(0.02, 0.05, 0.1),
        help="of the embedding's first weights, that are tried",
    )
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), help="which to train")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("native-quality"))
    parser.add_argument("--plot", type=Path, help="write the curves of the best runs there")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}: choose from {', '.join(MODELS)}")
    return options


def _steps(tokens: float, options: argparse.Namespace) -> int:
    return round(tokens / (options.batch * CONTEXT))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@dataclass(frozen=True)
class Tuning:
    """What is tuned of a model.

    Attributes:
        rate: The highest learning rate.
        embedding_rate: The embeddings' learning rate, as a multiple of it.
        deviation: Standard deviation of the embedding's first weights.
    """

    rate: float
    embedding_rate: float
    deviation: float

    def __str__(self) -> str:
        return f"rate {self.rate:g}, embedding {self.deviation:g}, its rate {self.embedding_rate:g}"


class Runs:
    """The runs there are, and those that are made when they are asked for."""

    def __init__(self, out: Path, what: str, size: Size, text: TrainingText, settings: TrainSettings) -> None:
        self._out, self._what = out, what
        self._size, self._text, self._settings = size, text, settings

    def get(self, name: str, tuning: Tuning, seed: int, steps: int | None = None) -> dict[str, Any]:
        """The run of a model with a seed: parameters, seconds, curve, loss and perplexity. None takes all steps."""
        settings = replace(
            self._settings,
            learning_rate=tuning.rate,
            embedding_rate=tuning.embedding_rate,
            seed=seed,
            steps=steps or self._settings.steps,
        )
        key = f"{self._what}, {settings.steps} steps of {settings.batch}, {name}, {tuning}, seed {seed}"
        folder = self._out / key.replace(", ", "-").replace(" ", "_")
        record = folder.with_name(folder.name + ".json")
        if not record.exists():
            result = self._run(key, name, tuning, settings, folder)
            replace_text(record, json.dumps({"run": key, **result}, indent=1))
        found: dict[str, Any] = json.loads(record.read_text())
        return found

    def _run(self, key: str, name: str, tuning: Tuning, settings: TrainSettings, folder: Path) -> dict[str, Any]:
        if name == STANDARD:
            trainer = standard_trainer(self._size, tuning, settings)
        else:
            config = replace(
                kraken_config(self._size, int(name.partition("-")[2])), embedding_deviation=tuning.deviation
            )
            trainer = trainer_of(new_model(config, settings.seed), NextToken(), settings, training_device())
        parameters = sum(parameter.numel() for parameter in trainer.parameters.trained().values())
        state = open_state(folder, {"run": key}, restart=False)
        began = time.perf_counter()
        with fast_products():
            outcome = train(trainer, self._text.train, self._text.held_out, folder, state, Line(key))
        remove_run(folder)
        seconds = time.perf_counter() - began
        return {"parameters": parameters, "seconds": seconds, "curve": outcome.held_out, **outcome.after}


def _tuned(runs: Runs, name: str, options: argparse.Namespace) -> tuple[Tuning, dict[Tuning, float]]:
    """The best of what is tried for a model, and the perplexity of each on few tokens."""
    tried = {
        tuning: runs.get(name, tuning, options.seeds[0], _steps(options.tuning_tokens, options))["perplexity"]
        for tuning in (
            Tuning(*values) for values in product(options.rates, options.embedding_rates, options.deviations)
        )
    }
    return min(tried, key=lambda tuning: tried[tuning]), tried


def standard_trainer(size: Size, tuning: Tuning, settings: TrainSettings) -> Trainer:
    """A GPT-2 of transformers, with its own first weights, as a lane program of one lane that computes all of it."""
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(_gpt2(size)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(tuning.deviation / model.config.initializer_range)
    captured = capture(model)
    program, _ = lower(captured.program, 1, STANDARD, cached=False)
    read_lane = read_from_source(program, captured.store.read)
    where = training_device()
    parameters = LaneParameters.of_all_lanes(program, read_lane, where)
    count = sum(parameter.numel() for parameter in parameters.trained().values())
    assert count == sum(parameter.numel() for parameter in model.parameters()), "embedding and head are one"
    runner = LaneRunner(program, device=where)
    return Trainer(runner, parameters, NextToken(), settings, device=where, embedding_rate=settings.embedding_rate)


def _gpt2(size: Size) -> GPT2Config:
    return GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=CONTEXT,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def kraken_config(size: Size, degree: int) -> KrakenConfig:
    """The Kraken model of that degree which has the parameters of the standard one, as nearly as its width allows."""
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in GPT2LMHeadModel(_gpt2(size)).parameters())
    heads = size.lane_heads[degree]

    def configs() -> Iterator[KrakenConfig]:
        for width in range(heads * 8, size.width + 1, heads):
            yield KrakenConfig(
                layers=size.layers,
                width=width,
                heads=heads,
                degree=degree,
                vocabulary=size.vocabulary,
                context=CONTEXT,
            )

    nearest = min(configs(), key=lambda config: abs(config.parameters - wanted))
    assert abs(nearest.parameters / wanted - 1) < WITHIN, f"{nearest.parameters} parameters are not {wanted}"
    return nearest


def report(tuned: dict[str, tuple[Tuning, dict[Tuning, float]]], ended: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every model's perplexity with all that was tried on few tokens, and with the best of it on all, by seed."""
    tried = [tuning for _, perplexities in tuned.values() for tuning in perplexities]
    lines = ["", "tuning: perplexity after few tokens", ""]
    rows = [(str(tuning), *(f"{tuned[name][1][tuning]:.1f}" for name in tuned)) for tuning in dict.fromkeys(tried)]
    lines += table(("", *tuned), rows)
    means = {name: fmean(run["perplexity"] for run in runs) for name, runs in ended.items()}
    rows = []
    for name, runs in ended.items():
        seeds = [run["perplexity"] for run in runs]
        spread = f" +- {stdev(seeds):.1f}" if len(seeds) > 1 else ""
        compared = f"{means[name] / means[STANDARD] - 1:+.1%}" if STANDARD in means else ""
        each = " ".join(f"{one:.1f}" for one in seeds)
        rows.append(
            (name, f"{runs[0]['parameters']:,}", str(tuned[name][0]), each, f"{means[name]:.1f}{spread}", compared)
        )
    header = ("model", "parameters", "tuned", "perplexity by seed", "mean", "to standard")
    return [*lines, "", *table(header, rows)]


def _plot(ended: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (name, runs) in enumerate(ended.items()):
        for run in runs:
            steps, losses = zip(*run["curve"][1:])
            tokens = [step * options.batch * CONTEXT / 1e6 for step in steps]
            axes.plot(tokens, losses, color=f"C{number}", linewidth=1, label=name if run is runs[0] else None)
    axes.set(xlabel="million tokens", ylabel="loss on held-out text, nats")
    axes.legend()
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
