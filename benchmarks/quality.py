"""What each form costs zero-shot, calibrated and healed, on text like the calibration's and on text of another kind.

    python benchmarks/quality.py --calibrate TEXT [TEXT ...] --own FILE [--other FILE] [--forms ...] [--heal-steps N]

Every form is compiled in all layers and in the last half of them (--layers takes one alone), calibrated on the texts,
then healed on the same texts. KL, top-1 agreement and perplexity against the source model are measured on FILEs that
are not among the texts: `--own` is of a kind that they contain, `--other` of one that they do not. Nothing of a FILE is
read for anything else.
What was compiled and healed is kept in --out, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from packaged_model import packaged_model

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.registry import lanes_in
from kraken_compiler.capture import Capture, capture
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.heal import heal_artifact
from kraken_compiler.ir.forms import FORMS, STANDARD
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.quality.measure import measure_quality
from kraken_compiler.text import table
from kraken_compiler.texts.read import TextChoice
from kraken_compiler.texts.token_files import is_token_file

_LAYERS = {"all": lambda count: None, "last-half": lambda count: f"{count // 2}-{count - 1}"}


def main() -> None:
    options = _options()
    model = options.model or packaged_model()
    captured = capture(model)
    options.out.mkdir(parents=True, exist_ok=True)
    standard, _ = lower(captured.program, options.degree, "standard", cached=False)
    count = len(standard.layers.layers)
    rows: list[dict[str, Any]] = []
    for form in options.forms:
        for layers in (_LAYERS[choice](count) for choice in options.layers):
            program, _ = lower(captured.program, options.degree, form, layers, cached=False)
            row = {"form": form, "layers": layers or "all", "zero-shot": _measured(captured, program, options)}
            name = f"{form}-{layers or 'all'}"
            calibrated = options.out / f"{name}.kraken"
            row["calibration_s"] = _calibrate(model, calibrated, form, layers, options)
            row["calibrated"] = _measured_artifact(captured, calibrated, options)
            if options.heal_steps:
                healed = options.out / f"{name}.healed.kraken"
                row["healing_s"] = _heal(calibrated, healed, options)
                row["healed"] = _measured_artifact(captured, healed, options)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    print("\n".join(_table(rows, _kinds(options))))
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="anything kraken-compile takes; default: the packaged SmolLM2-135M")
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="texts, or directories of them")
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--own", type=Path, required=True, help="text of a kind that was calibrated on")
    parser.add_argument("--other", type=Path, help="text of another kind, if there is one")
    parser.add_argument("--tokens", type=int, default=8192, help="how much of each to measure on")
    changed = [name for name in FORMS if name != STANDARD.name]
    parser.add_argument("--forms", nargs="+", default=changed, choices=changed)
    parser.add_argument("--layers", nargs="+", default=list(_LAYERS), choices=_LAYERS)
    parser.add_argument("--heal-steps", type=int, default=0, help="0: do not heal")
    parser.add_argument("--heal-batch", type=int, default=4)
    parser.add_argument("--heal-learning-rate", type=float, help="default: kraken-heal's")
    parser.add_argument("--out", type=Path, default=Path("quality-out"), help="where artifacts go")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def _calibrate(
    model: str | Path, target: Path, form: str, layers: str | None, options: argparse.Namespace
) -> float | None:
    """Compile a calibrated artifact; returns the seconds it took, None if it was there."""
    if target.exists():
        return None
    began = time.perf_counter()
    compile_model(
        model,
        target,
        degree=options.degree,
        form=form,
        layers=layers,
        calibrate=options.calibrate,
        calibrate_tokens=options.calibrate_tokens,
        text=options.other or options.own,
        text_tokens=512,
        verify=False,
    )
    return time.perf_counter() - began


def _heal(calibrated: Path, target: Path, options: argparse.Namespace) -> float | None:
    """Heal an artifact; returns the seconds it took, None if it was there."""
    if target.exists():
        return None
    began = time.perf_counter()
    files = [file for path in options.calibrate for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    tokens = [file for file in files if is_token_file(file)]
    texts = [file for file in files if file not in tokens]
    settings = HealSettings(
        steps=options.heal_steps,
        batch=options.heal_batch,
        learning_rate=options.heal_learning_rate,
        evaluate_tokens=2048,
    )
    heal_artifact(calibrated, settings, texts=texts, tokens=tokens, output=target)
    return time.perf_counter() - began


def _measured_artifact(captured: Capture, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    lanes = lanes_in(open_artifact(directory))
    assert lanes is not None
    return _measured(captured, lanes.program, options, lanes.read_lane)


def _measured(captured: Capture, program: Any, options: argparse.Namespace, read_lane: Any = None) -> dict[str, Any]:
    found = {}
    for kind in _kinds(options):
        choice = TextChoice(getattr(options, kind), options.tokens)
        quality = measure_quality(captured, program, choice, read_lane=read_lane)
        assert not isinstance(quality, str), quality
        found[kind] = {key: value for key, value in quality.to_dict().items() if key != "by_position"}
    return found


def _kinds(options: argparse.Namespace) -> list[str]:
    return ["own", "other"] if options.other else ["own"]


def _table(rows: list[dict[str, Any]], kinds: list[str]) -> list[str]:
    states = [state for state in ("zero-shot", "calibrated", "healed") if state in rows[0]]
    header = ["form", "layers", *(f"{state}, {kind}" for state in states for kind in kinds)]
    cells = [
        [
            row["form"],
            row["layers"],
            *(f"{row[state][kind]['kl']:.3f}" for state in states for kind in kinds),
        ]
        for row in rows
    ]
    return ["KL to the source in nats/token:", *table(header, cells)]


if __name__ == "__main__":
    main()
