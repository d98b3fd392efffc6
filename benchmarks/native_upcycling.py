"""Is it worth beginning a Kraken model with the weights of a standard one?

    python benchmarks/own_tokens.py streams --rows 4096
    python benchmarks/native_upcycling.py streams/model --tokens streams/fit.npy --steps 160

A Kraken model that has the layers and heads of a standard one, and lanes as wide as their heads, is trained on the
same rows four times: from first weights that are drawn or from the standard model's (`--from`), on the next token or on
the standard model's predictions (`--teacher`), every one at every learning rate and every multiple of it for the
embeddings. Perplexity is that of rows which nobody was trained on. What is printed comes from `kraken-train`'s own
records, which stay in OUT: a call that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from ttft_parts.report import table

from kraken_compiler.cli.console import ConsoleProgress
from kraken_compiler.commands.train import RECORD_FILE, train_model
from kraken_compiler.native import KrakenConfig
from kraken_compiler.training.from_scratch.settings import TrainSettings

WAYS = {
    "drawn": (),
    "upcycled": ("begin",),
    "drawn, distilled": ("teacher",),
    "upcycled, distilled": ("begin", "teacher"),
}
"""The options of `kraken-train` that take the standard model."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GPT-2 whose embedding is its head, as a directory")
    parser.add_argument("--tokens", type=Path, required=True, help="token ids, [rows, tokens] in a .npy file")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rates", type=_numbers, default=(5e-4, 1e-3, 2e-3))
    parser.add_argument("--embedding-rates", type=_numbers, default=(1.0, 8.0), help="multiples, for embeddings")
    parser.add_argument("--deviation", type=float, default=0.1, help="of the embedding's weights where they are drawn")
    parser.add_argument("--out", type=Path, default=Path("native-upcycling"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = replace(kraken_config(options.model, options.degree), embedding_deviation=options.deviation)
    tried = tuple(product(options.rates, options.embedding_rates))
    records = {(way, rates): _record(options, config, way, *rates) for way, rates in product(WAYS, tried)}
    count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(options.model).parameters())
    trained = next(iter(records.values()))["trained_on_tokens"]
    print(f"{config.parameters:,} parameters, {config.degree} lanes of width {config.width}; standard: {count:,}")
    print(f"perplexity of held-out rows before training and after {trained:,} tokens, by learning rate\n")
    rows = []
    for way in WAYS:
        runs = [records[way, rates] for rates in tried]
        after = [f"{run['after']['perplexity']:.2f}" for run in runs]
        rows.append((way, f"{runs[0]['before']['perplexity']:.1f}", *after))
    columns = (f"{rate:g}, embeddings x{multiple:g}" for rate, multiple in tried)
    print("\n".join(table(("first weights", "before", *columns), rows)))
    return 0


def kraken_config(model: Path, degree: int) -> KrakenConfig:
    """The Kraken model that can begin with the weights of a GPT-2."""
    standard = AutoConfig.from_pretrained(model)
    heads = standard.num_attention_heads // degree
    return KrakenConfig(
        layers=standard.num_hidden_layers,
        width=standard.hidden_size // degree,
        heads=heads,
        degree=degree,
        vocabulary=standard.vocab_size,
        context=standard.max_position_embeddings,
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _record(
    options: argparse.Namespace, config: KrakenConfig, way: str, rate: float, embedding_rate: float
) -> dict[str, Any]:
    name = f"{way.replace(', ', '-')}-{rate:g}-{embedding_rate:g}-{options.steps}"
    target = options.out / name
    if not target.exists():
        settings = TrainSettings(
            steps=options.steps,
            batch=options.batch,
            sequence=config.context,
            learning_rate=rate,
            embedding_rate=embedding_rate,
            precision="float32",
        )
        standard_models = dict.fromkeys(WAYS[way], str(options.model))
        with ConsoleProgress(quiet=False).stage(name):
            train_model(config, settings, tokens=[options.tokens], output=target, **standard_models)
    record: dict[str, Any] = json.loads((target / RECORD_FILE).read_text())
    return record


if __name__ == "__main__":
    sys.exit(main())
