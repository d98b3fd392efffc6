"""Settings of a healing run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kraken_compiler.training.settings import RunSettings, require

LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 1e-3
"""Defaults for whole weights and for LoRA; how they were found is told in docs/healing.md."""


@dataclass(frozen=True)
class HealSettings(RunSettings):
    """Settings of a healing run, see `RunSettings`.

    Attributes:
        learning_rate: None takes 1e-4, for LoRA 1e-3.
        lora: Rank of the low-rank updates that are trained instead of the weights; None trains the weights.
        ranks: One process per lane.
    """

    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's at its highest. (default: 1e-4, with --lora 1e-3)")
    ] = None
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train updates of this rank instead of whole weights.")
    ] = None
    ranks: Annotated[bool, typer.Option("--ranks", help="One process per lane.")] = False

    def check(self) -> None:
        super().check()
        require(self.lora is None or self.lora >= 1, "lora", self.lora, "must be at least 1")

    @property
    def peak(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATE if self.lora is None else LORA_LEARNING_RATE
