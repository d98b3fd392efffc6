"""Trains a small Kraken model from scratch, compiles it, and lets it speak on one process per lane. Five minutes.

    python examples/train_kraken.py [--text FILE ...] [--out DIR] [--steps N]

The architecture is the Kraken paper's (arXiv 2408.07802): every layer has two lanes with streams of their own, which
meet once a layer. Without --text it learns from a collection of news out of the package `gensim`, 50,000 words: enough
to write what looks like news.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import NEWS, packaged, run

PROMPT = "The Prime Minister"
CONFIG = """\
batch = 16
sequence = 128
learning-rate = 3e-3
evaluate-every = 50

[model]
layers = 4
width = 128         # of one lane's stream
heads = 4           # of one lane
degree = 2          # lanes, and devices
vocabulary = 2048   # the tokenizer is learnt from the texts
context = 256
norm = "rms"
ffn = "swiglu"
positions = "rotary"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files or directories to learn from")
    parser.add_argument("--out", type=Path, default=Path("kraken-out"), help="where the models go")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=40, help="how many to generate")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config, model, artifact = (options.out / name for name in ("config.toml", "model", "model.kraken"))
    config.write_text(CONFIG)
    texts = options.text or [packaged("gensim", NEWS)]
    named = [argument for text in texts for argument in ("--text", str(text))]
    if model.exists():
        sys.exit(f"{model} is there; remove it to train anew")
    print(run("kraken-train", str(config), *named, "--steps", str(options.steps), "-o", str(model)))
    print(run("kraken-compile", str(model), "-o", str(artifact), "--force"))
    text = run("kraken-run", str(artifact), "--prompt", PROMPT, "--max-new-tokens", str(options.tokens))
    print(f"\n{PROMPT}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
