"""Does a Kraken model that is trained from scratch predict as well as a standard one of as many parameters?

    python benchmarks/quality_texts.py texts
    python benchmarks/native_quality.py texts/general --size 3M --tokens 4e6 --rates 1e-3,2e-3,4e-3 --out native-quality

A GPT-2 and Kraken models of 2 and 4 lanes, of as many parameters within 2 %, are trained on the same rows of the same
texts in the same order, by the same loop, once at every learning rate; at the best one of each, further seeds follow
(of the first weights and of the order of the rows). Perplexity is that of the last part of every text, which nobody was
trained on. The tokenizer is learnt from the other parts. Every run that has ended is kept in OUT, so that a call that
was interrupted goes on; --plot draws the curves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
        steps=round(options.tokens / (options.batch * CONTEXT)),
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
    what = f"{options.size}, {settings.steps} steps of {settings.batch} rows of {rows}, {settings.precision}"
    runs = Runs(options.out, what, size, text, settings)
    names = (STANDARD, *(f"kraken-{degree}" for degree in DEGREES))
    for rate in options.rates:
        for name in names:
            runs.get(name, rate, options.seeds[0])
    best = {
        name: min(options.rates, key=lambda rate, n=name: runs.get(n, rate, options.seeds[0])["loss"]) for name in names
    }
    for seed in options.seeds[1:]:
        for name in names:
            runs.get(name, best[name], seed)
    print("\n".join(report(runs, names, best, options)))
    if options.plot:
        _plot(runs, names, best, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="texts, or directories of them")
    parser.add_argument("--size", choices=SIZES, default="3M")
    parser.add_argument("--tokens", type=float, default=4e6, help="how many each model reads")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rates", type=_numbers, default=(1e-3, 2e-3, 4e-3), help="learning rates that are tried")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("native-quality"))
    parser.add_argument("--plot", type=Path, help="write the curves of the best runs there")
    return parser.parse_args()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


class Runs:
    """The runs there are, and those that are made when they are asked for."""

    def __init__(self, out: Path, what: str, size: Size, text: TrainingText, settings: TrainSettings) -> None:
        self._path, self._what = out / "runs.json", what
        self._size, self._text, self._settings = size, text, settings
        self.found: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def get(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """The run of a model at a learning rate with a seed: parameters, seconds, curve, loss and perplexity."""
        key = f"{self._what}, {name}, {rate:g}, seed {seed}"
        if key not in self.found:
            self.found[key] = self._run(key, name, replace(self._settings, learning_rate=rate, seed=seed))
            self._path.write_text(json.dumps(self.found, indent=1))
        return self.found[key]

    def _run(self, key: str, name: str, settings: TrainSettings) -> dict[str, Any]:
        if name == STANDARD:
            trainer = standard_trainer(self._size, settings)
        else:
            config = kraken_config(self._size, int(name.partition("-")[2]))
            trainer = trainer_of(new_model(config, settings.seed), NextToken(), settings, training_device())
        parameters = sum(parameter.numel() for parameter in trainer.parameters.trained().values())
        folder = self._path.parent / key.replace(", ", "-").replace(" ", "_")
        state = open_state(folder, {"run": key}, restart=False)
        began = time.perf_counter()
        with fast_products():
            outcome = train(trainer, self._text.train, self._text.held_out, folder, state, Line(key))
        remove_run(folder)
        seconds = time.perf_counter() - began
        return {"parameters": parameters, "seconds": seconds, "curve": outcome.held_out, **outcome.after}


def standard_trainer(size: Size, settings: TrainSettings) -> Trainer:
    """A GPT-2 of transformers, with its own first weights, as a lane program of one lane that computes all of it."""
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(_gpt2(size)).eval()
    captured = capture(model)
    program, _ = lower(captured.program, 1, STANDARD, cached=False)
    read_lane = read_from_source(program, captured.store.read)
    where = training_device()
    parameters = LaneParameters.of_all_lanes(program, read_lane, where)
    count = sum(parameter.numel() for parameter in parameters.trained().values())
    assert count == sum(parameter.numel() for parameter in model.parameters()), "embedding and head are one"
    return Trainer(LaneRunner(program, device=where), parameters, NextToken(), settings, device=where)


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


def report(runs: Runs, names: tuple[str, ...], best: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Every model's perplexity at every rate, and at the best one over all seeds."""
    header = ("model", "parameters", *(f"at {rate:g}" for rate in options.rates), "seeds", "perplexity", "to standard")
    rows = []
    means = {}
    for name in names:
        tried = [runs.get(name, rate, options.seeds[0]) for rate in options.rates]
        seeds = [runs.get(name, best[name], seed)["perplexity"] for seed in options.seeds]
        means[name] = fmean(seeds)
        spread = f" +- {stdev(seeds):.2f}" if len(seeds) > 1 else ""
        rows.append(
            (
                name,
                f"{tried[0]['parameters']:,}",
                *(f"{one['perplexity']:.2f}" for one in tried),
                str(len(seeds)),
                f"{means[name]:.2f}{spread}",
                f"{means[name] / means[STANDARD] - 1:+.1%}",
            )
        )
    return ["", *table(header, rows)]


def _plot(runs: Runs, names: tuple[str, ...], best: dict[str, float], options: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, name in enumerate(names):
        curves = [runs.get(name, best[name], seed)["curve"] for seed in options.seeds]
        for curve in curves:
            steps, losses = zip(*curve[1:])
            tokens = [step * options.batch * CONTEXT / 1e6 for step in steps]
            axes.plot(tokens, losses, color=f"C{number}", linewidth=1, label=name if curve is curves[0] else None)
    axes.set(xlabel="million tokens", ylabel="loss on held-out text, nats")
    axes.legend()
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
