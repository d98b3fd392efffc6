"""Writes docs/models.md and the list of models in docs/what-it-takes.md from what the tests noted: `make tables`."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.zoo import FAMILIES, MORE_FAMILIES, NORMS, OTHER_INPUTS, PLAIN, REJECTED

ROOT = Path(__file__).resolve().parent.parent
PAGE, OVERVIEW = ROOT / "docs" / "models.md", ROOT / "docs" / "what-it-takes.md"
BEGIN, END = "<!-- models: written by `make tables` -->", "<!-- end of models -->"

_HEAD = """# Models

Every model that the tests compile, and how closely what comes out equals what went in. `make tables` writes this page
from the tests' own findings. The models are tiny and have random weights, three layers or two and two; the numbers are
the largest relative errors of the logits over several batch and sequence sizes, in float32.

- **standard**: all lanes in one process against the source model, degrees 2 and 4.
- **3, 5**: the same at degrees that divide neither heads nor FFN columns, which are padded.
- **forms**: how many of the other forms were lowered at degrees 2 and 4, change the function and keep their schedule.
- **on ranks**: so many real processes against all lanes in one process, in these forms; `standard` and `kraken` with
  the KV cache, too.
- **KV cache**: prompts of different lengths and token by token, against recomputation.
- **halves**: run as two halves, against the lanes run at once: prefills cut between `tokens` at several places, also
  behind a past; without a cache, batches cut between `rows`.
- **ONNX**: two devices on stock ONNX Runtime against the lanes, standard and kraken, with the KV cache too.

"""
_COLUMNS = (
    "| model | standard | 3, 5 | forms | on ranks | KV cache | halves | ONNX |\n|---|---|---|---|---|---|---|---|\n"
)

_MORE = """## More families of transformers

In one process only, at degrees 2 and 3: `standard` against the source, `kraken` as another function, and this with the
KV cache (prompts of different lengths, then token by token) against recomputation.

| model | standard | KV cache |
|---|---|---|
"""

_DIRECTORIES = """
## Encoder-decoders from directories

Saved with `save_pretrained`, compiled from the directory and compared with what `from_pretrained` loads from it, source
and target of different lengths. `kraken-compile` and `kraken-verify` take them, and `kraken-run` those of two texts.

| directory | degree | standard |
|---|---|---|
"""

_QUANTIZED = """
## Quantised weights

Linear layers of `llama` that torchao quantised (some also of `plain_gpt` and `gpt_neox`), in `standard` form at degree
2 or 4 against the quantised source, and in `kraken` on two ranks and two ONNX devices, with the KV cache.

| weights | standard | on ranks | ONNX |
|---|---|---|---|
"""

_TRAINED = """## Trained models

Real models that packages carry, on real inputs: what they compute, not only how close it is. The error is that of the
standard form against the source, or of ranks against all lanes in one process.

| model | given | compiled as | error | what came out |
|---|---|---|---|---|
"""

Notes = dict[str, dict[str, dict[str, Any]]]
"""What was noted, by check and model."""


def main(folder: Path) -> None:
    """Write both."""
    notes: Notes = defaultdict(dict)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        notes[content["check"]][content["model"]] = content
    PAGE.write_text(_page(notes))
    before, _, rest = OVERVIEW.read_text().partition(BEGIN)
    OVERVIEW.write_text(before + model_list() + rest.partition(END)[2])


def model_list() -> str:
    """What the overview says of the models, between its marks."""
    text = (
        f"[{len(FAMILIES) + len(OTHER_INPUTS)} models of transformers](models.md), from tiny random configs: "
        f"{_names([*FAMILIES, *OTHER_INPUTS])}; {len(MORE_FAMILIES)} more in one process: {_names(MORE_FAMILIES)}; "
        f"and {len(PLAIN) + len(NORMS)} that are plain `nn.Module` code: {_names([*PLAIN, *NORMS])}. "
        f"Rejected, with module path, node and reason: {_names(REJECTED)}."
    )
    return "\n".join([BEGIN, *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), END])


def _names(models: Iterable[str]) -> str:
    return ", ".join(sorted(models))


def _page(notes: Notes) -> str:
    parts = [_HEAD]
    for title, models in (
        ("Families of transformers", [*FAMILIES, *OTHER_INPUTS]),
        ("Plain modules", [*PLAIN, *NORMS]),
    ):
        rows = "".join(f"| {' | '.join(_row(notes, model))} |\n" for model in sorted(models))
        parts.append(f"## {title}\n\n{_COLUMNS}{rows}\n")
    parts.append(_MORE)
    for model, found in sorted(notes["more"].items()):
        parts.append(f"| `{model}` | {_error(found['error'])} | {_error(found['cache']) or 'none'} |\n")
    parts.append(_DIRECTORIES)
    for model, found in sorted(notes["directories"].items()):
        parts.append(f"| `{model}` directory | {found['degree']} | {_error(found['error'])} |\n")
    parts.append(_QUANTIZED)
    for weights, found in sorted(notes["quantized"].items()):
        others = (notes[check].get(weights) for check in ("quantized_ranks", "quantized_onnx"))
        cells = (_error(other["error"]) if other else "not run" for other in others)
        parts.append(f"| {weights} | {_error(found['standard'])} | {' | '.join(cells)} |\n")
    parts.append(f"\n{_TRAINED}")
    for _, found in sorted(notes["trained"].items()):
        cells = (found["of"], found["given"], found["compiled"], _error(found["error"]), found["outcome"])
        parts.append(f"| {' | '.join(cells)} |\n")
    parts.append("\n## What is rejected\n\nWith the module path and the node that are in the way.\n\n")
    parts += (f"- `{model}`: {found['reason']}\n" for model, found in sorted(notes["rejected"].items()))
    parts.append("\nMade up for the tests:\n\n")
    invented = (found for _, found in sorted(notes["invented"].items()))
    parts += (f"- {found['what'].splitlines()[0]} *{found['reason']}*\n" for found in invented)
    return "".join(parts)


def _row(notes: Notes, model: str) -> tuple[str, ...]:
    lanes, uneven, ranks, cache, onnx = (notes[check][model] for check in ("lanes", "uneven", "ranks", "cache", "onnx"))
    return (
        f"`{model}`",
        _error(lanes["error"]),
        ", ".join(map(_error, uneven["errors"].values())),
        str(len(lanes["forms"]) - 1),
        f"{ranks['degree']}: {', '.join(ranks['forms'])} {_error(ranks['error'])}",
        _error(cache["error"]) if "error" in cache else f"none: {_reason(cache['reason'])}",
        _halves(cache, ranks),
        f"{_error(onnx['standard'])}, {_error(onnx['kraken'])}",
    )


def _halves(cache: dict[str, Any], ranks: dict[str, Any]) -> str:
    """How well a model runs in two halves, and which."""
    errors = {"tokens": cache.get("halves"), "rows": ranks.get("rows")}
    return next((f"{what} {_error(error)}" for what, error in errors.items() if error is not None), "")


def _reason(rejection: str) -> str:
    """What stands behind module and node in a message."""
    return re.sub(r"^unsupported: (module '.*?'|the model)( \(node .*?\))?: ", "", rejection)


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.0e}" if error else "0"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
