"""What can be chosen of a compiled model in vLLM: `--additional-config '{"kraken": {...}}'`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OPTIONS_KEY = "kraken"

AUTO, OWN, ENGINE, NONE = "auto", "own", "engine", "none"
_CHOICES = (AUTO, OWN, ENGINE, NONE)


@dataclass(frozen=True)
class EngineOptions:
    """Options of a compiled model.

    Attributes:
        collectives: What adds up the lanes' parts where something hides the sum: "own" is a side stream on GPUs and our
            messages on CPUs, "engine" vLLM's own all-reduce, awaited at once, "auto" takes "own" unless the ranks share
            memory, where a sum is over before it could be hidden, and "none" leaves sums out, which computes something
            else: the bound for benchmarks.
    """

    collectives: str = AUTO

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Self:
        """The options that were given.

        Raises:
            ValueError: There is no such option or value.
        """
        extra = vllm_config.additional_config
        given = extra.get(OPTIONS_KEY, {}) if isinstance(extra, dict) else {}
        if not isinstance(given, dict):
            raise ValueError(f"--additional-config: {OPTIONS_KEY} takes an object like {{'collectives': '{OWN}'}}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"--additional-config: kraken has no option '{unknown[0]}' (known: {', '.join(known)})")
        options = cls(**given)
        if options.collectives not in _CHOICES:
            choices = f"{', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}"
            raise ValueError(f"--additional-config: collectives '{options.collectives}': choose {choices}")
        return options
