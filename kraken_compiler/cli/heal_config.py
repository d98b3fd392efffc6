"""The options of `kraken-heal`, from the command line and a file."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from kraken_compiler.cli.options import DEFAULT_TIMEOUT
from kraken_compiler.errors import UsageError
from kraken_compiler.runtime.environment import LONGEST_TIMEOUT

if TYPE_CHECKING:
    from kraken_compiler.quality.healing.settings import HealSettings


class HealConfig(BaseModel):
    """The keys of a config file: the long names of the command line's options. None takes `HealSettings`' default."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, strict=True, alias_generator=lambda name: name.replace("_", "-")
    )

    text: list[str] = []
    tokens: list[str] = []
    output: str | None = None
    source: str | None = None
    tensorboard: str | None = None
    steps: int | None = None
    sequence: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    clip: float | None = None
    weight_decay: float | None = None
    seed: int | None = None
    lora: int | None = None
    precision: str | None = None
    gradient_checkpointing: bool | None = None
    ranks: bool | None = None
    hold_out: float | None = None
    evaluate_tokens: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    restart: bool = False
    force: bool = False
    trust_pickle: bool = False
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0, le=LONGEST_TIMEOUT)

    def settings(self) -> HealSettings:
        """How to train.

        Raises:
            UsageError: Nobody said for how many steps.
        """
        from kraken_compiler.quality.healing.settings import HealSettings

        if self.steps is None:
            raise UsageError("say for how many steps: --steps N")
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(HealSettings)}
        return HealSettings(**{name: value for name, value in given.items() if value is not None})
