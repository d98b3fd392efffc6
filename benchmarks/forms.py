"""What each form costs and saves on a real model, before any calibration.

    python benchmarks/forms.py [MODEL] [--degree N] [--text FILE]

For every form, in all layers and in the last half of them: the all-reduces of one forward pass and how many bytes per
token of them are hidden behind matrix products (from the schedule), and KL divergence, top-1 agreement and perplexity
against the source model (measured on text). Speed is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from packaged_model import packaged_model

from kraken_compiler.capture import capture
from kraken_compiler.ir.forms import FORMS, STANDARD
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.measure import measure_quality
from kraken_compiler.text import table
from kraken_compiler.texts.read import TextChoice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="anything kraken-compile takes; default: the packaged SmolLM2-135M")
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--text", type=Path, help="default: the built-in sample")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()

    captured = capture(options.model or packaged_model())
    standard, _ = lower(captured.program, options.degree, "standard")
    count = len(standard.layers.layers)
    rows: list[dict[str, Any]] = []
    for form in FORMS.values():
        for layers in (None,) if form is STANDARD else (None, f"{count // 2}-{count - 1}"):
            print(f"{form.name}, layers {layers or 'all'}", file=sys.stderr)
            program, _ = lower(captured.program, options.degree, form, layers)
            reduces = program.plan.reduces
            hidden = {window.reduce for window in program.windows if window.gemms}
            quality = measure_quality(captured, program, TextChoice(options.text))
            assert not isinstance(quality, str), quality
            rows.append(
                {
                    "form": form.name,
                    "layers": layers or "all",
                    "reduces": len(reduces),
                    "hidden_share": sum(reduce.bytes_per_token for reduce in reduces if reduce.index in hidden)
                    / sum(reduce.bytes_per_token for reduce in reduces),
                    **quality.to_dict(),
                }
            )
    print(f"{rows[0]['tokens']} tokens of {rows[0]['text']}; source perplexity {rows[0]['source_perplexity']:.1f}\n")
    header = ("form", "layers", "all-reduces", "hidden", "KL (nats/token)", "same top token", "perplexity")
    print("\n".join(table(header, map(_cells, rows))))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["form"],
        row["layers"],
        str(row["reduces"]),
        f"{row['hidden_share']:.0%}",
        f"{row['kl']:.2f}",
        f"{row['top1_agreement']:.0%}",
        f"{row['perplexity']:.1f}",
    )


if __name__ == "__main__":
    main()
