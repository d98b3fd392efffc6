"""Settings of a training run, which is resumed only with those that it began with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import typer

from kraken_compiler.errors import UsageError

BFLOAT16 = "bfloat16"
PRECISIONS = ("float32", BFLOAT16)
_SEEDS = 1 << 63

_OF_NO_CONSEQUENCE = ("save_every", "evaluate_every")
"""Settings that may change from one part of a run to the next: the weights that come out are the same."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a training run.

    Attributes:
        steps: Number of optimizer steps.
        sequence: Tokens of a row, at most.
        batch: Rows of a step.
        learning_rate: AdamW's at its highest; None takes the default.
        warmup: Steps in which it grows from zero; None takes a tenth of all.
        clip: The gradient's largest global norm.
        weight_decay: AdamW's, of matrices.
        seed: Of the order of the rows and of weights that are drawn.
        precision: What products are computed in, float32 or bfloat16; None takes what the machine multiplies fastest.
            Weights, their gradients and the optimizer are float32.
        gradient_checkpointing: Compute the inside of every branch again in the backward pass instead of keeping it.
        hold_out: Share of every text that is not trained on.
        evaluate_tokens: How much of it is evaluated on, at most.
        save_every, evaluate_every: Steps between two checkpoints and two evaluations.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """AdamW's."""
    default_rate: ClassVar[float] = 1e-4
    """Of learning, if none is given."""

    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")]
    sequence: Annotated[int, typer.Option(help="Tokens of a row, at most. (default: 256)")] = 256
    batch: Annotated[int, typer.Option(help="Rows of a step. (default: 4)")] = 4
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's at its highest. (default: 1e-4)")] = None
    warmup: Annotated[
        int | None, typer.Option(help="Steps in which the learning rate grows. (default: a tenth of all)")
    ] = None
    clip: Annotated[float, typer.Option(help="The gradient's largest norm. (default: 1)")] = 1.0
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of matrices. (default: 0)")] = 0.0
    seed: Annotated[int, typer.Option(help="Of the order of the rows. (default: 0)")] = 0
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. (default: float32 on CPUs, bfloat16 on GPUs)")
    ] = None
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory: compute activations twice.")
    ] = False
    hold_out: Annotated[float, typer.Option(help="Share of every text to evaluate on. (default: 0.1)")] = 0.1
    evaluate_tokens: Annotated[int, typer.Option(help="How many tokens of it, at most. (default: 8192)")] = 8192
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints. (default: 50)")] = 50
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations. (default: 50)")] = 50

    def check(self) -> None:
        """Make sure that all of it can be done.

        Raises:
            UsageError: Something cannot.
        """
        for name in ("steps", "batch", "save_every", "evaluate_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("sequence", "evaluate_tokens"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "must be at least 2")
        require(self.peak > 0, "learning_rate", self.peak, "must be above 0")
        require(self.clip > 0, "clip", self.clip, "must be above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        require(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "must not be negative")
        require(0 < self.hold_out < 1, "hold_out", self.hold_out, "must lie between 0 and 1")
        require(-_SEEDS <= self.seed < _SEEDS, "seed", self.seed, "must have at most 64 bits")
        is_known = self.precision is None or self.precision in PRECISIONS
        require(is_known, "precision", self.precision, f"choose from {', '.join(PRECISIONS)}")

    @property
    def peak(self) -> float:
        """AdamW's highest learning rate."""
        return self.learning_rate if self.learning_rate is not None else self.default_rate

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that must be the same when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_NO_CONSEQUENCE}


def option_name(field: str) -> str:
    """A setting as the command line spells it."""
    return "--" + field.replace("_", "-")


def require(holds: bool, field: str, value: object, reason: str) -> None:
    """Refuse a setting unless something holds.

    Raises:
        UsageError: It does not.
    """
    if not holds:
        raise UsageError(f"{option_name(field)} {value}: {reason}")
