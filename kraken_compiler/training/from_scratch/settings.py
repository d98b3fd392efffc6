"""Settings of a training from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from kraken_compiler.training.settings import RunSettings, require


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """Settings of a training from scratch, see `RunSettings`.

    Attributes:
        embedding_rate: Learning rate of what is looked up (embeddings of tokens and positions), as a multiple of
            `learning_rate`.
        ranks: Number of processes: as many as lanes have a lane each, any other number have all lanes and rows of
            their own; None trains in this process.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    default_rate: ClassVar[float] = 1e-3

    batch: Annotated[int, typer.Option(help="Rows of a step. (default: 16)")] = 16
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's at its highest. (default: 1e-3)")] = None
    embedding_rate: Annotated[
        float, typer.Option(help="The embeddings' learning rate, as a multiple of the others'. (default: 1)")
    ] = 1.0
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of matrices. (default: 0.1)")] = 0.1
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the rows. (default: 0)")] = 0
    hold_out: Annotated[float, typer.Option(help="Share of every text to evaluate on. (default: 0.05)")] = 0.05
    evaluate_tokens: Annotated[int, typer.Option(help="How many tokens of it, at most. (default: 32768)")] = 32768
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints. (default: 200)")] = 200
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations. (default: 200)")] = 200
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes: as many as lanes train a lane each, any other number all lanes on rows of their own. "
            "(default: this one)",
        ),
    ] = None

    def check(self) -> None:
        super().check()
        require(self.embedding_rate > 0, "embedding_rate", self.embedding_rate, "must be above 0")
        require(self.ranks is None or self.ranks >= 1, "ranks", self.ranks, "must be at least 1")

    @property
    def processes(self) -> int:
        """How many processes train."""
        return self.ranks or 1
