"""Weights that are the lanes' own: trained lane by lane, no longer parts of the source's tensors.

The weight table can say so by itself. The lanes' tensors of one weight, one behind the other along the first dim, are
a source tensor of which lane i owns the i-th block; so whoever reads, writes or runs a lane program needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kraken_compiler.ir.program import LaneProgram, Stage
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import DimShard, WeightSpec

PREFIX = "lanes/"
"""Prefix of such weights' source names; no model's own names have it."""

ReadLane = Callable[[WeightSpec, int], Tensor]
"""Function that gives the local tensor of one weight on one lane."""

Row = tuple[str, tuple[DimShard, ...], float]
"""Key of a weight: source, shards, scale. The programs with a KV cache have names of their own for them."""


def with_lane_tensors(program: LaneProgram, names: Collection[str]) -> LaneProgram:
    """A program whose weights in `names` are tensors of the lanes, no parts of the source's.

    A weight that all lanes hold alike stays one whole tensor.

    Args:
        program: A lane program; it is not changed.
        names: Names in its weight table.
    """
    rows = {_row(program.weights[name]): PREFIX + name for name in names}
    main = _with_lane_sources(program, rows)
    cached = program.cached
    if cached is not None:
        split = cached.split
        cached = replace(
            cached,
            step=_with_lane_sources(cached.step, rows),
            tables=_with_lane_sources(cached.tables, rows),
            split=None if split is None else replace(split, program=_with_lane_sources(split.program, rows)),
        )
    halves = program.rows
    if halves is not None:
        halves = replace(halves, program=_with_lane_sources(halves.program, rows))
    return replace(main, cached=cached, rows=halves)


def has_lane_tensors(table: Iterable[WeightSpec]) -> bool:
    """True if some weights of a weight table are the lanes' own."""
    return any(spec.source.startswith(PREFIX) for spec in table)


def lane_tensor_reader(
    table: Mapping[str, WeightSpec], degree: int, read_lane: ReadLane, read: SourceReader
) -> SourceReader:
    """The reader of the source tensors of a program made by `with_lane_tensors`.

    Args:
        table: Its weight table.
        degree: Number of lanes.
        read_lane: Gives the lanes' tensors.
        read: Gives the tensors that still are the source's.
    """
    lane_specs = {spec.source: spec for spec in table.values() if spec.source.startswith(PREFIX)}

    def read_source(source: str) -> Tensor:
        spec = lane_specs.get(source)
        if spec is None:
            return read(source)
        if spec.shared:
            return read_lane(spec, 0)
        return torch.cat([read_lane(spec, lane) for lane in range(degree)])

    return SourceReader(read_source, lambda source: None if source in lane_specs else read.rows_of(source))


def in_blocks(spec: WeightSpec, source: str, degree: int) -> WeightSpec:
    """A weight whose source tensor holds those of the lanes, one behind the other along the first dim."""
    size, *rest = spec.shape
    blocks = tuple(((lane * size, (lane + 1) * size),) for lane in range(degree))
    return replace(spec, source=source, source_shape=(degree * size, *rest), shards=(DimShard(0, blocks),), scale=1.0)


def _with_lane_sources(program: Stage, rows: Mapping[Row, str]) -> Stage:
    table = {
        name: _lane_spec(spec, rows[_row(spec)], program.degree) if _row(spec) in rows else spec
        for name, spec in program.weights.items()
    }
    return replace(program, weights=table)


def _lane_spec(spec: WeightSpec, source: str, degree: int) -> WeightSpec:
    if spec.shared:
        return replace(spec, source=source, source_shape=spec.shape, scale=1.0)
    return in_blocks(spec, source, degree)


def _row(spec: WeightSpec) -> Row:
    return spec.source, spec.shards, spec.scale
