"""Cost of a form in one layer or one run of layers alone, the others being standard.

It is the order of the layers that matters, for choosing which of them take a form. The weights are the source's unless
somebody gives others, calibrated for the layer (`calibration/single_layers.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kraken_compiler.capture import Capture
from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.ir.program import Split
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import lane_logits, recorded
from kraken_compiler.lanes.reference import ReadLane, read_from_source
from kraken_compiler.passes.lower import lower_split
from kraken_compiler.progress import Advance
from kraken_compiler.text import json_text, number_text, replace_text, table

Run = tuple[int, int]
"""First and last layer, inclusive."""

Reader = Callable[[str, int], ReadLane]
"""Form and layer -> a reader of the weights of the program in which that layer alone has the form."""


@dataclass(frozen=True)
class RunCost:
    """Cost of a form in one run of layers.

    Attributes:
        form: Its name.
        first, last: The layers, inclusive.
        kl: KL to the source model, nats per token.
        top1_agreement: Share of positions with the same most likely next token.
    """

    form: str
    first: int
    last: int
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Sensitivity:
    """Costs, and what they were measured on.

    Attributes:
        source: Hash of the source model.
        degree: Number of lanes.
        lanes: Hash of the heads and columns that they have, "" for the order of the files.
        text, tokens: What was read, and how much of it.
        digest: Hash of the token ids, of those that layers were calibrated on, and of the weights' element types.
        calibrated: How many tokens every layer was calibrated on by itself; 0 if the weights are the source's.
        costs: In the order in which they were asked for.
    """

    source: str
    degree: int
    lanes: str
    text: str
    tokens: int
    digest: str
    calibrated: int
    costs: tuple[RunCost, ...]

    def of(self, form: str, run: Run) -> RunCost | None:
        """The cost of a form in a run of layers, if it was measured."""
        return next((cost for cost in self.costs if (cost.form, cost.first, cost.last) == (form, *run)), None)

    def cost(self, form: str, layer: int) -> float:
        """The KL of a form in one layer alone, which must have been measured."""
        run_cost = self.of(form, (layer, layer))
        assert run_cost is not None
        return run_cost.kl

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for people: for every layer, what the form costs there alone and from there to the end."""
        forms = list(dict.fromkeys(cost.form for cost in self.costs))
        count = max(cost.last for cost in self.costs) + 1
        header = ["layer", *(f"{form} {where}" for form in forms for where in ("there alone", "from there on"))]
        rows = [
            [str(layer), *(_text(self.of(form, run)) for form in forms for run in ((layer, layer), (layer, count - 1)))]
            for layer in range(count)
        ]
        how = f"each calibrated on {self.calibrated:,} tokens" if self.calibrated else "not calibrated"
        return [
            f"KL to the source in nats/token, on {self.tokens:,} tokens of {self.text}, {how}:",
            *table(header, rows),
        ]


def single_layers(count: int) -> list[Run]:
    """The runs of a single layer."""
    return [(layer, layer) for layer in range(count)]


def ends(count: int) -> list[Run]:
    """The runs from every layer to the last."""
    return [(layer, count - 1) for layer in range(count)]


def measure_sensitivity(
    captured: Capture,
    split: Split,
    form_runs: Iterable[tuple[str, Run]],
    batches: Sequence[Tensor],
    text: str,
    *,
    calibrated: Sequence[Tensor] = (),
    reader: Reader | None = None,
    cache: Path | None = None,
    advance: Advance | None = None,
) -> Sensitivity:
    """Measure what forms cost in runs of layers.

    Args:
        captured: The source model.
        split: Its program, split over the lanes.
        form_runs: Form names and runs of layers.
        batches: Token ids, int64 [B, S]; the source's logits for all of them are kept in memory.
        text: What the tokens are, for the record.
        calibrated: The token ids that the weights of `reader` were calibrated on.
        reader: Gives the weights of single layers; None takes the source's.
        cache: A file that remembers costs; those of another model, split, text or calibration are forgotten.
        advance: Is told how many runs are done.

    Raises:
        UsageError: An unknown form.
        InputFileError: The cache cannot be read or written.
    """
    tokens, calibrated_tokens = (sum(ids.numel() for ids in several) for several in (batches, calibrated))
    dtypes = sorted({str(spec.torch_dtype) for spec in split.weights.values()})
    content = [*(ids.numpy().tobytes() for ids in (*batches, *calibrated)), repr(dtypes).encode()]
    digest = hashlib.sha256(b"".join(content)).hexdigest()
    lanes = hashlib.sha256(repr(sorted(split.assignment.items())).encode()).hexdigest() if split.assignment else ""
    empty = Sensitivity(captured.origin.sha256, split.degree, lanes, text, tokens, digest, calibrated_tokens, ())
    sensitivity = _load(cache, empty) if cache is not None else empty
    order = list(dict.fromkeys(form_runs))
    missing_runs = [(form, run) for form, run in order if sensitivity.of(form, run) is None]
    if missing_runs:
        sensitivity = _measure(captured, split, sensitivity, missing_runs, batches, reader, advance)
        if cache is not None:
            _save(cache, sensitivity)
    costs = tuple(cost for form, run in order if (cost := sensitivity.of(form, run)) is not None)
    return replace(sensitivity, costs=costs)


def _measure(
    captured: Capture,
    split: Split,
    sensitivity: Sensitivity,
    missing_runs: Sequence[tuple[str, Run]],
    batches: Sequence[Tensor],
    reader: Reader | None,
    advance: Advance | None,
) -> Sensitivity:
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    source_logits = [source(ids) for ids in batches]
    costs = list(sensitivity.costs)
    for number, (form, (first, last)) in enumerate(missing_runs, start=1):
        program = lower_split(split, form, range(first, last + 1), cached=False)
        read_lane = reader(form, first) if reader is not None else read_from_source(program, captured.store.read)
        quality = evaluate(recorded(source_logits), lane_logits(program, read_lane), batches, sensitivity.text)
        costs.append(RunCost(form, first, last, quality.kl, quality.top1_agreement))
        if advance is not None:
            advance(number, len(missing_runs), "runs of layers")
    return replace(sensitivity, costs=tuple(costs))


def costs_alone(path: Path, source: str, degree: int) -> dict[tuple[str, int], float]:
    """What forms cost in single layers, from a file that remembers them; nothing if there is none.

    Args:
        path: The file.
        source, degree: Of the model in question; costs of another one are left out.

    Returns:
        KL by form and layer.

    Raises:
        InputFileError: The file cannot be read, or is none of these.
    """
    found = _read(path)
    if found is None or (found.source, found.degree) != (source, degree):
        return {}
    alone = [cost for cost in found.costs if cost.first == cost.last]
    return {(cost.form, cost.first): cost.kl for cost in alone}


def _load(path: Path, empty: Sensitivity) -> Sensitivity:
    """Read the costs of the same measurement from a file; none if it is of another one."""
    found = _read(path)
    return found if found is not None and replace(found, costs=()) == empty else empty


def _read(path: Path) -> Sensitivity | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        costs = tuple(_cost(**cost) for cost in data.pop("costs"))
        return Sensitivity(**data, costs=costs)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"{path}: is no record of sensitivities; remove it to measure again") from error


def _cost(form: str, first: int, last: int, kl: float | None, top1_agreement: float | None) -> RunCost:
    """A cost as a file has it, where null is what JSON has no number for."""
    numbers = (math.nan if value is None else float(value) for value in (kl, top1_agreement))
    return RunCost(str(form), int(first), int(last), *numbers)


def _save(path: Path, sensitivity: Sensitivity) -> None:
    with os_errors_as(f"{path}: cannot be written"):
        replace_text(path, json_text(sensitivity.to_dict()))


def _text(cost: RunCost | None) -> str:
    return "-" if cost is None else number_text(cost.kl, ".4f")
