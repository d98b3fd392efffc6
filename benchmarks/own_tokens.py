"""Lets a model without a tokenizer write the token ids that it is then calibrated, healed and measured on.

    python benchmarks/own_tokens.py OUT [--model DIR] [--rows 1024] [--tokens 128]

Writes OUT/fit.npy, and OUT/held.npy with an eighth as many rows that are for measuring alone: int64 [rows, tokens],
each row begun by a random token and sampled at temperature 1; and OUT/model, the model with its weights as safetensors.
The model is a Hugging Face directory; without one it is the trained GPT-2 of the package `microformer-mgm`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaged_model import microformer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

_ROWS_AT_ONCE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="default: the packaged GPT-2")
    parser.add_argument("--rows", type=int, default=1024, help="how many to fit on")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model or microformer()).eval()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out / "model")
    for name, rows in (("fit", options.rows), ("held", max(1, options.rows // 8))):
        sizes = [min(_ROWS_AT_ONCE, rows - start) for start in range(0, rows, _ROWS_AT_ONCE)]
        written = [_sampled(model, size, options.tokens) for size in tqdm(sizes, desc=name)]
        np.save(options.out / f"{name}.npy", torch.cat(written).numpy())


def _sampled(model: Any, rows: int, tokens: int) -> Tensor:
    start = torch.randint(model.config.vocab_size, (rows, 1))
    with torch.no_grad():
        # No token ends a row: all are of one length.
        found: Tensor = model.generate(
            start, do_sample=True, top_k=0, min_length=tokens, max_length=tokens, eos_token_id=None, pad_token_id=0
        )
    return found


if __name__ == "__main__":
    main()
