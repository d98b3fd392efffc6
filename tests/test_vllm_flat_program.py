"""What vLLM runs of every family: sequences of different lengths in one row give each the logits it has alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.backends.vllm.format import HIDDEN, IDS, POSITIONS, TABLE, EngineAttention
from kraken_compiler.backends.vllm.write.flat_program import FlatProgram, flattened
from kraken_compiler.ir.program import InputSpec, LaneProgram, Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.lanes.reference import Lanes, ReadLane, StreamingProgram, read_from_source
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION
from tests.test_cache_families import full_logits
from tests.test_families import EVERY_FAMILY, lane_program, recognized
from tests.zoo import SUPPORTED, random_tokens

LENGTHS = (8, 1, 11, 5)


class Attend:
    """Stands for the engine's attention, lane after lane."""

    def __init__(self, flat: FlatProgram, prepared: list[Any], read_lane: ReadLane) -> None:
        self.flat, self.prepared, self.read_lane = flat, prepared, read_lane
        self.calls: Counter[int] = Counter()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
        one, lane = self.flat.record.attentions[number], self.calls[number]
        self.calls[number] += 1
        slopes, sinks = (self._of_lane(place, lane) for place in (one.slopes, one.sinks))
        return attend(one, query, key, value, slopes, sinks)

    def _of_lane(self, place: int | None, lane: int) -> Tensor | None:
        value = None if place is None else self.prepared[place]
        if isinstance(value, WeightSpec):
            return self.read_lane(value, lane)
        return value[lane] if isinstance(value, Lanes) else value


def attend(
    one: EngineAttention, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Attention as the papers have it, over sequences that lie behind each other."""
    check_sizes(one, query, key, value)
    place = torch.cat([torch.arange(length) for length in LENGTHS])
    owner = torch.cat([torch.full((length,), at) for at, length in enumerate(LENGTHS)])
    distance = place[:, None] - place
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < (one.window or math.inf))
    group = one.heads // one.kv_heads
    keys, values = (part[0].double().repeat_interleave(group, dim=0) for part in (key, value))
    scores = query[0].double() @ keys.transpose(1, 2) * one.scale
    if one.softcap:
        scores = torch.tanh(scores / one.softcap) * one.softcap
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(place), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(place)]
    return (weights @ values).to(value.dtype)[None]


def check_sizes(one: EngineAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    tokens = sum(LENGTHS)
    assert query.shape == (1, one.heads, tokens, one.head_size)
    assert key.shape == (1, one.kv_heads, tokens, one.head_size)
    assert value.shape == (1, one.kv_heads, tokens, one.value_size)


def run(graph: fx.Graph, program: LaneProgram, read: SourceReader, feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A graph on all lanes in one process; what differs between lanes cannot come from outside."""
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    weights = {name: program.weights[name] for name in names if name in program.weights}
    inputs = tuple(InputSpec(name, name, "int64", ()) for name in names if name not in weights)
    part = program.at(Program, module=fx.GraphModule({}, graph), weights=weights, inputs=inputs)
    return StreamingProgram(part, read_from_source(part, read)).run_flat([feeds[spec.name] for spec in inputs])


def logits_in_one_row(flat: FlatProgram, program: LaneProgram, read: SourceReader, rows: list[Tensor]) -> Tensor:
    """Logits of all tokens, [tokens, vocabulary]."""
    capacity = torch.zeros(1, max(LENGTHS) + 3, dtype=torch.int64)
    (ids_of_prepare,) = [
        node.name for node in flat.prepare.find_nodes(op="placeholder") if node.name not in program.weights
    ]
    prepared = list(run(flat.prepare, program, read, {ids_of_prepare: capacity}))
    stub = Attend(flat, prepared, read_from_source(program, read))
    for node in flat.body.nodes:
        if node.target is ENGINE_ATTENTION:
            node.target = stub.attend
    feeds = {
        IDS: torch.cat(rows)[None],
        POSITIONS: torch.cat([torch.arange(length) for length in LENGTHS])[None],
        **{f"{TABLE}{number}": table for number, table in enumerate(prepared)},
    }
    (hidden,) = run(flat.body, program, read, feeds)
    assert hidden.shape == (1, sum(LENGTHS), flat.record.hidden_size)
    (logits,) = run(flat.head, program, read, {**feeds, HIDDEN: hidden})
    return logits[0]


@EVERY_FAMILY
def test_sequences_in_one_row_are_what_they_are_alone(name: str) -> None:
    if SUPPORTED[name].no_cache:
        assert lane_program(name, 2, "kraken").cached is None
        return
    read = recognized(name).read
    for form in ("standard", "kraken"):
        program = lane_program(name, 2, form)
        assert program.cached is not None
        flat = flattened(program.cached, program.weights)
        assert isinstance(flat, FlatProgram), str(flat)
        windows = measure_windows(flat.body, program.plan)
        assert [bool(window.gemms) for window in windows] == [bool(window.gemms) for window in program.windows]
        ids = random_tokens(SUPPORTED[name].vocab, len(LENGTHS), max(LENGTHS))
        rows = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
        have = logits_in_one_row(flat, program, read, rows)
        want = torch.cat([full_logits(program, read, row[None])[0] for row in rows])
        assert have.shape == want.shape == (sum(LENGTHS), flat.record.vocabulary)
        error = ((have - want).abs().max() / want.abs().max()).item()
        assert error <= 1e-5, f"{form} differs by {error:.1e}"
