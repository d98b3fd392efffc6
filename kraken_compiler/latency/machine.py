"""What a machine does: a TOML file of measured or published figures, each with its source.

    name = "eight A100-40GB SXM"
    [memory]                        # bytes a second that go to or from memory, by how many lie side by side
    [launch]                        # seconds that the host takes for every kernel
    [[products]]                    # FLOP/s of [rows, in] @ [in, out], by rows and by the weight's numbers or columns
    [[attention]]                   # FLOP/s of attention, by queries
    [[all_reduce]]                  # seconds of one, by bytes, for every number of ranks

Between points figures are interpolated in logarithmic scales. Of an element type that has no table the nearest one that
has stands in, a wider type at half the speed of one of half its bits. Nothing else is assumed about a machine anywhere.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.latency.curve import between
from kraken_compiler.text import ENCODING, not_utf8

_FOLDER = "machines"
Figures = TypeVar("Figures", bound="Products | Attention")


def _ascending(values: list[float]) -> list[float]:
    if any(left >= right for left, right in pairwise(values)):
        raise ValueError("must ascend")
    return values


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Values = Annotated[list[Positive], Field(min_length=1)]
Places = Annotated[Values, AfterValidator(_ascending)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str = Field(min_length=1)


class Memory(_Table):
    """Bytes a second that one operator reads and writes together, by how many bytes there are."""

    bytes: Places
    rate: Values

    @model_validator(mode="after")
    def _is_even(self) -> Memory:
        _require_pairs(self.bytes, self.rate, "rate", "bytes")
        return self

    def seconds(self, moved: float) -> float:
        """Time to move that many bytes."""
        return moved / between(self.bytes, self.rate, moved) if moved > 0 else 0.0


class Launch(_Table):
    """Seconds of the host for a kernel (`eager`), and between two that run as one graph or compiled (`compiled`)."""

    eager: NotNegative
    compiled: NotNegative
    ahead: bool = False
    """The host begins kernels while the device still computes others, as for GPUs; a kernel waits for both."""
    step: NotNegative = 0.0
    """Seconds for every run of the whole program: what the host does before and after it."""


class Products(_Table):
    """FLOP/s of a product with a weight, by rows of the other operand and by numbers in the weight, or by its columns.

    Caches know how large a weight is, and a device of many cores how many tiles the result has.
    """

    dtypes: list[str] = Field(min_length=1)
    includes_memory: bool = False
    """The rates are those of products whose weights come from memory, and not of the arithmetic alone."""
    compiled: bool | None = None
    """They are those of compiled programs, or of programs that are not; None: of both."""
    rows: Places
    weights: Places | None = None
    columns: Places | None = None
    rate: Annotated[list[Values], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_even(self) -> Products:
        if (self.weights is None) == (self.columns is None):
            raise ValueError("products are known by weights or by columns, one of the two")
        _require_pairs(self.rows, self.rate, "rate", "rows")
        for row in self.rate:
            _require_pairs(self._places, row, "each row of rate", "weights" if self.weights else "columns")
        return self

    def at(self, rows: float, inside: float, columns: float) -> float:
        """FLOP/s."""
        place = columns if self.columns is not None else inside * columns
        return between(self.rows, [between(self._places, row, place) for row in self.rate], rows)

    @property
    def _places(self) -> list[float]:
        return self.weights or self.columns or []


class Attention(_Table):
    """FLOP/s of attention, products of queries with keys and of weights with values, by queries of a row."""

    dtypes: list[str] = Field(min_length=1)
    includes_memory: bool = False
    queries: Places
    rate: Values

    @model_validator(mode="after")
    def _is_even(self) -> Attention:
        _require_pairs(self.queries, self.rate, "rate", "queries")
        return self


class AllReduce(_Table):
    """Seconds of an all-reduce that is awaited at once, and how long of it the device computes nothing else."""

    ranks: int = Field(ge=2)
    bytes: Places
    seconds: Values
    busy: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_even(self) -> AllReduce:
        _require_pairs(self.bytes, self.seconds, "seconds", "bytes")
        _require_pairs(self.bytes, self.busy, "busy", "bytes")
        if any(busy > whole for busy, whole in zip(self.busy, self.seconds)):
            raise ValueError("busy is longer than seconds")
        return self

    def times(self, payload: float) -> tuple[float, float]:
        """Seconds of all of it, and those that the device is busy; beyond the last point both grow with the bytes."""
        beyond = max(1.0, payload / self.bytes[-1])
        whole = between(self.bytes, self.seconds, payload) * beyond
        # Interpolated as a share of the whole, since nothing may be busy for 0 seconds in a logarithmic scale.
        shares = [max(busy / seconds, 1e-9) for busy, seconds in zip(self.busy, self.seconds)]
        return whole, whole * between(self.bytes, shares, payload)


class Machine(BaseModel):
    """A machine of several devices, one lane on each.

    Attributes:
        name: What it is.
        memory, launch, products, attention, all_reduce: Its tables.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1)
    memory: Memory
    launch: Launch
    products: list[Products] = Field(min_length=1)
    attention: list[Attention] = Field(min_length=1)
    all_reduce: list[AllReduce] = []

    def reduces(self, ranks: int) -> AllReduce:
        """The table for that many ranks.

        Raises:
            UsageError: There is none; says for how many there are.
        """
        for table in self.all_reduce:
            if table.ranks == ranks:
                return table
        there = ", ".join(str(table.ranks) for table in self.all_reduce) or "none"
        raise UsageError(f"machine '{self.name}' has no all-reduce among {ranks} ranks; it has them for: {there}")

    def lines(self) -> list[str]:
        """What it does at most, as lines for people."""
        best = [
            f"products    {', '.join(one.dtypes)}: up to {max(map(max, one.rate)) / 1e9:,.0f} GFLOP/s"
            for one in self.products
        ]
        reduces = [
            f"all-reduce  {one.ranks} ranks: {one.seconds[0] * 1e6:.3g} us for {one.bytes[0]:.0f} bytes, "
            f"{one.bytes[-1] / one.seconds[-1] / 1e9:.3g} GB/s for {one.bytes[-1] / 2**20:.0f} MiB"
            for one in self.all_reduce
        ]
        return [self.name, f"memory      up to {max(self.memory.rate) / 1e9:,.0f} GB/s", *best, *reduces]

    def product_seconds(
        self, batch: int, rows: int, inside: int, columns: int, dtype: str, size: int, *, compiled: bool = True
    ) -> float:
        """Time of `batch` products [rows, inside] @ [inside, columns]: of computing or of moving, what is longer.

        Args:
            batch, rows, inside, columns: Their sizes.
            dtype: Of their numbers.
            size: Bytes of a number.
            compiled: Whether a compiled program multiplies, which may call another library.

        Raises:
            UsageError: The machine has no figures for this element type, nor for one like it.
        """
        table, stands_in = self._products(dtype, compiled)
        rate = table.at(rows, inside, columns) * _speed(dtype, stands_in)
        seconds = 2.0 * batch * rows * inside * columns / rate
        if table.includes_memory:
            return seconds
        return max(seconds, self.memory.seconds(float(size) * batch * (rows * inside + (inside + rows) * columns)))

    def attention_seconds(self, flops: float, queries: int, moved: float, dtype: str) -> float:
        """Time of an attention of so many floating-point operations that moves so many bytes."""
        table, stands_in = _nearest(self.attention, dtype, self.name, "attention")
        seconds = flops / between(table.queries, table.rate, queries) / _speed(dtype, stands_in)
        return seconds if table.includes_memory else max(seconds, self.memory.seconds(moved))

    def note_on_products(self, dtype: str, *, compiled: bool = True) -> str:
        """What a user should know of the times of products in an element type; "" if there are figures for it."""
        return _note("products", dtype, self._products(dtype, compiled)[1])

    def note_on_attention(self, dtype: str) -> str:
        """What a user should know of the times of attention in an element type; "" if there are figures for it."""
        return _note("attention", dtype, _nearest(self.attention, dtype, self.name, "attention")[1])

    def _products(self, dtype: str, compiled: bool) -> tuple[Products, str]:
        tables = [one for one in self.products if one.compiled in (None, compiled)]
        return _nearest(tables, dtype, self.name, "products")


def load_machine(name: str) -> Machine:
    """A machine from a TOML file, or a ready-made one by its name.

    Raises:
        UsageError: There is no such file, and no such name.
        InputFileError: The file cannot be read, or is no machine; says where.
    """
    path = Path(name)
    if path.suffix != ".toml" and name in machine_names():
        return parse_machine(
            files("kraken_compiler.latency").joinpath(_FOLDER, f"{name}.toml").read_text(ENCODING), name
        )
    if not path.exists():
        raise UsageError(f"there is no machine '{name}': give a .toml file, or one of {', '.join(machine_names())}")
    try:
        return parse_machine(path.read_text(ENCODING), str(path))
    except UnicodeDecodeError as error:
        raise not_utf8(path, "--machine") from error
    except OSError as error:
        raise InputFileError(f"--machine: cannot read {path}: {error.strerror or error}") from error


def machine_names() -> list[str]:
    """The ready-made machines."""
    folder = files("kraken_compiler.latency").joinpath(_FOLDER)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def parse_machine(text: str, where: str) -> Machine:
    """A machine from the text of a file, called `where` in messages.

    Raises:
        InputFileError: It is no machine; says where.
    """
    try:
        return Machine.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputFileError(f"--machine: {where}: {place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"--machine: {where} is no TOML: {error}") from error


def _nearest(tables: Sequence[Figures], dtype: str, machine: str, what: str) -> tuple[Figures, str]:
    """The table for an element type, or that for the one of the nearest number of bits; and which type that is."""
    exact = next((table for table in tables if dtype in table.dtypes), None)
    if exact is not None:
        return exact, dtype
    there = [(table, name) for table in tables for name in table.dtypes]
    similar = [entry for entry in there if _bits(entry[1]) and _bits(dtype)]
    if not similar:
        names = ", ".join(name for _, name in there) or "none"
        raise UsageError(f"machine '{machine}' has no figures for {what} in {dtype}; it has: {names}")
    return min(similar, key=lambda entry: abs(math.log2(_share_of_bits(dtype, entry[1]))))


def _speed(dtype: str, stands_in: str) -> float:
    """Speed of an element type over that of the one whose figures stand in: wider numbers take longer."""
    return min(1.0, _share_of_bits(dtype, stands_in))


def _share_of_bits(dtype: str, stands_in: str) -> float:
    return 1.0 if dtype == stands_in else _bits(stands_in) / _bits(dtype)


def _note(what: str, dtype: str, stands_in: str) -> str:
    if dtype == stands_in:
        return ""
    speed = _speed(dtype, stands_in)
    how = "at their speed" if speed == 1.0 else f"at {speed:g} times their speed"
    return (
        f"{what} in {dtype} are estimated from figures for {stands_in}, {how}: the machine's file has none of their own"
    )


def _bits(dtype: str) -> int:
    """Bits of a number by the name of its type; 0 if it says none."""
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 0


def _require_pairs(places: Sequence[Any], values: Sequence[Any], what: str, of: str) -> None:
    if len(places) != len(values):
        raise ValueError(f"{what} has {len(values)} entries, {of} {len(places)}")
