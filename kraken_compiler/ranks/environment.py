"""A rank's settings in the environment: its place among the ranks, and its timeout. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from kraken_compiler.errors import UsageError
from kraken_compiler.ranks.heartbeat import RUN_TIMEOUT

DEFAULT_TIMEOUT = 60.0
"""Seconds without progress after which a run is given up."""

SLOWEST_DISK = 50e6
"""Bytes per second at which a file is read and hashed at the least."""

LONGEST_TIMEOUT = 31_536_000.0
"""A year, in seconds. Far longer ones overflow in the clocks that ranks wait by."""

_BACKSTOP_SECONDS = 86_400.0


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks.

    Attributes:
        rank: Number among all ranks.
        degree: How many there are.
        local_rank, local_degree: The same among those of this machine.
        knows_machine: False if nothing said how many ranks this machine has; then `local_degree` is that of all.
    """

    rank: int
    degree: int
    local_rank: int
    local_degree: int
    knows_machine: bool = True

    @property
    def one_machine(self) -> bool:
        """True if all ranks are known to be here."""
        return self.knows_machine and self.local_degree == self.degree

    @classmethod
    def from_environment(cls) -> Self:
        """The place that torchrun, our launcher or whatever else started the ranks gave this process.

        Raises:
            UsageError: The environment does not say which rank this is.
        """
        try:
            rank, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            local_degree = int(os.environ.get("LOCAL_WORLD_SIZE", degree))
        except KeyError as error:
            raise UsageError(
                f"{error.args[0]} is not set; start this through kraken-run or torchrun, or set RANK and WORLD_SIZE"
            ) from None
        except ValueError:
            variables = {
                name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            }
            assignments = " and ".join(f"{name}={value}" for name, value in variables.items() if value is not None)
            raise UsageError(f"{assignments} are no whole numbers") from None
        if not 0 <= rank < degree:
            raise UsageError(f"RANK={rank} is none of WORLD_SIZE={degree} ranks, which are numbered from 0")
        return cls(rank, degree, local_rank, local_degree, "LOCAL_WORLD_SIZE" in os.environ)

    @classmethod
    def alone(cls) -> Self:
        """The place of a process that has no peers."""
        return cls(0, 1, 0, 1)


def require_timeout(seconds: float) -> None:
    """Make sure that ranks can be given that long.

    Raises:
        UsageError: It is no number of seconds, or more than a year.
    """
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise UsageError(
            f"--timeout {seconds:g}: give a number of seconds above 0 and at most {LONGEST_TIMEOUT:,.0f}, a year"
        )


def collective_timeout(timeout: float | None) -> float:
    """Seconds after which a collective whose peers do not answer raises.

    Args:
        timeout: What the user asked for; None asks the launcher.
    """
    if timeout is not None:
        return timeout
    under_launcher = os.environ.get(RUN_TIMEOUT)
    if under_launcher is None:
        return DEFAULT_TIMEOUT
    # The launcher's watchdog sees all ranks and can tell which one hangs and which only takes long to load or to
    # compute, so it is given the first word.
    return float(under_launcher) + _BACKSTOP_SECONDS


@contextmanager
def with_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for child processes; whoever starts them passes on ours and takes no others."""
    old_values = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old_values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
