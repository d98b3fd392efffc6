"""What a model's branches read of each other, unit by unit: from this follows which of them should share a lane.

A lane that reads late still reads its own parts fresh. For a reading branch k and a source branch j whose peers' parts
a form withholds from k,

    energy[v, u] = mean over tokens of  sum over rows r of v of  m_r (w_r . a g (D_u h_u))^2

is what unit v (an FFN column, a KV head with its queries) reads of unit u: h_u is what u feeds the output projection of
j, D_u its columns of that, a (per token) and g (per channel) are how what lies between, norms as a rule, scales a small
change, w_r is a row of k's input projections, and m_r how much a change behind that row changes what k adds to the
stream, in units of the stream: the mean square of the gradient of sums with random signs (Hutchinson's estimator).

Legend: T tokens, C channels of the stream, D inputs of an output projection, U source units, V reading units.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Split
from kraken_compiler.ir.schedule import FormPlan
from kraken_compiler.lanes.reference import ReadLane
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.graph_tools import ancestors, args_of, descendants
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import Projections, find_projections
from kraken_compiler.passes.shapes import same_shape
from kraken_compiler.passes.shard.assign_lanes import Layout, Units
from kraken_compiler.progress import Advance
from kraken_compiler.quality.calibration.branch_fit import rows
from kraken_compiler.quality.calibration.lockstep import Lockstep, Values

_PROBES = 64
"""Random sums that stand for a unit's rows, where it has more; the least that stand for all tokens."""
_SUMS_OF_TOKENS = 1536
"""Of all source units together."""
_STEP = 1e-2
_ATTENTION_SHARE = 0.3
"""What an attention's reads count beside an FFN's. Taken one by one its errors seem larger than they are together: what
changes all keys of a row alike changes nothing. On SmolLM2-135M 0.1 and 1 are worse (docs/calibration.md)."""
_MEMORY = 2 << 30


@dataclass(frozen=True)
class Reads:
    """What one branch reads of another, by units.

    Attributes:
        reader, source: Numbers of the branches.
        energy: float64 [V, U].
    """

    reader: int
    source: int
    energy: Tensor


def withheld(plan: FormPlan) -> dict[int, tuple[int, ...]]:
    """For every branch those of which a lane reads its own part but not yet its peers'."""
    return {read.branch: tuple(range(read.peers + 1, read.own + 1)) for read in plan.reads if read.own > read.peers}


def measure_reads(
    program: Split,
    units: Mapping[int, Units],
    wanted: Mapping[int, Sequence[int]],
    read_lane: ReadLane,
    batches: Sequence[list[Tensor]],
    advance: Advance | None = None,
) -> list[Reads]:
    """Run the source on some batches and measure what branches read of each other.

    Args:
        program: The source, planned but not yet cut to a lane.
        units: The units of the branches that may be assigned; others are passed over.
        wanted: For reading branches the source branches to measure.
        read_lane: Gives the program's weights.
        batches: Its flat inputs, one list per batch.
        advance: Is told how many branches are done.
    """
    branches = {branch.index: branch for branch in program.layers.branches}
    found = {number: _linears(program, branch) for number, branch in branches.items() if number in units}
    linears = {number: one for number, one in found.items() if one is not None}
    pairs = [
        _Pair(program, linears[source], operand, source, reader)
        for reader, sources in sorted(wanted.items())
        for source in sources
        if reader in linears and source in linears
        for operand in linears[reader].operands_like(linears[source].end)
    ]
    reads: list[Reads] = []
    with tempfile.TemporaryDirectory(prefix="kraken-reads-") as folder, torch.no_grad():
        run = _Run(program, read_lane, batches, Values(Path(folder), _MEMORY), pairs)
        readers = sorted({pair.reader for pair in pairs})
        for done, reader in enumerate(readers, start=1):
            own = [pair for pair in pairs if pair.reader == reader]
            reads += _measure(run, branches[reader], linears[reader], own, units)
            if advance is not None:
                advance(done, len(readers), "branches")
    return reads


@dataclass(frozen=True)
class _Linears:
    """The projections of a branch, all of them plain linears.

    Attributes:
        projections: They.
        end: The node whose value is what the branch gives.
    """

    projections: Projections
    end: fx.Node

    @property
    def features(self) -> fx.Node:
        """What the output projection multiplies."""
        return _operand(self.projections.output)

    def operands_like(self, stream: fx.Node) -> list[fx.Node]:
        """What input projections multiply, if it has the stream's shape: what lies between scales channels then.

        The others read something narrower that was computed from it, or the result of an encoder.
        """
        operands = dict.fromkeys(map(_operand, self.projections.inputs))
        return [operand for operand in operands if same_shape(operand, stream)]


def _linears(program: Split, branch: Branch) -> _Linears | None:
    nodes = {node.name: node for node in program.graph.nodes}
    inside = [nodes[name] for name in branch.nodes]
    projections = find_projections(nodes[branch.output], inside, weight_derived(program))
    if not isinstance(projections, Projections):
        return None
    plain = all(node.target is LINEAR for node in (*projections.inputs, projections.output))
    return _Linears(projections, nodes[branch.output]) if plain else None


class _Pair:
    """A source branch and one that reads it, and what lies between them."""

    def __init__(self, program: Split, source_linears: _Linears, stop: fx.Node, source: int, reader: int) -> None:
        self.source, self.reader = source, reader
        self.source_linears = source_linears
        self.start, self.stop = source_linears.end, stop
        nodes = {node.name: node for node in program.graph.nodes}
        others = {nodes[branch.output] for branch in program.layers.branches}
        between = (ancestors(self.stop, others) | {self.stop}) & descendants([self.start])
        self.chain = [node for node in program.graph.nodes if node in between]
        outside = {operand for node in self.chain for operand in node.all_input_nodes} - between
        self.reads = {node for node in outside if node.op != "placeholder"} | {self.start, source_linears.features}


class _Run:
    """The source under way, with what later branches will want of it."""

    def __init__(
        self,
        program: Split,
        read_lane: ReadLane,
        batches: Sequence[list[Tensor]],
        values: Values,
        pairs: Sequence[_Pair],
    ) -> None:
        self.program, self.read_lane = program, read_lane
        self._lockstep = Lockstep(program, read_lane, batches, values, "source")
        self._values, self._count = values, len(batches)
        self._last = {node: pair.reader for pair in pairs for node in pair.reads}
        self._there: set[fx.Node] = set()
        self._inputs = [node for node in program.graph.nodes if node.op == "placeholder"][len(program.weights) :]
        self._batches = batches

    def batches(self, reader: int, targets: Iterable[fx.Node]) -> Iterator[dict[fx.Node, Any]]:
        """For every batch the values of nodes, of those that were kept for this reader, and of the program's inputs."""
        targets = [node for node in targets if node.op != "placeholder"]
        computed = set(targets).union(*(ancestors(node) for node in targets))
        new = [
            node for node, last in self._last.items() if last >= reader and node in computed and node not in self._there
        ]
        old = list(self._there)
        for number, values in enumerate(self._lockstep.advance([*targets, *new])):
            for node in new:
                self._values.put(f"kept-{number}-{node.name}", values[node])
            kept = {node: self._values.get(f"kept-{number}-{node.name}") for node in old}
            yield {**dict(zip(self._inputs, self._batches[number], strict=True)), **kept, **values}
        self._there.update(new)
        for node in [node for node in self._there if self._last[node] <= reader]:
            self._there.discard(node)
            for number in range(self._count):
                self._values.drop(f"kept-{number}-{node.name}")

    def weight(self, node: fx.Node) -> Tensor:
        """A weight, or what is computed of weights alone, in float32."""
        behind = ancestors(node) | {node}
        nodes = [node for node in self.program.graph.nodes if node in behind]
        values = {
            node: self.read_lane(self.program.weights[node.name], 0) for node in nodes if node.op == "placeholder"
        }
        value = _evaluate([node for node in nodes if node not in values], values)[node]
        assert isinstance(value, Tensor)
        return value.float()


@dataclass
class _Sums:
    """Sums over tokens for one pair.

    Attributes:
        features: Of a h with random signs, many times, [sums, D]; of (a h)^2, [1, D], if every unit has one input.
        gains_C: Of g.
        tokens: How many.
    """

    features: Tensor | float = 0.0
    gains_C: Tensor | float = 0.0
    tokens: int = 0


def _measure(
    run: _Run, branch: Branch, linears: _Linears, pairs: Sequence[_Pair], units: Mapping[int, Units]
) -> list[Reads]:
    """All reads of one branch."""
    generator = torch.Generator().manual_seed(branch.index)
    region = _Backward(run, branch, linears)
    sums = [_Sums() for _ in pairs]
    targets = dict.fromkeys([*region.targets, *(pair.stop for pair in pairs)])
    for values in run.batches(branch.index, targets):
        region.add(values, generator)
        for pair, of_pair in zip(pairs, sums, strict=True):
            _add(of_pair, pair, run, values, units[pair.source].columns, generator)
    strengths = region.strengths()
    share = _ATTENTION_SHARE if branch.kind == "attention" else 1.0
    reads = []
    for pair, of_pair in zip(pairs, sums, strict=True):
        matrices, unit_of_row = [], []
        for node in linears.projections.inputs:
            layout = _last_layout(units[branch.index], node)
            if layout is not None and _operand(node) is pair.stop:
                matrices.append(run.weight(args_of(node)[1]) * strengths[node].sqrt()[:, None])
                unit_of_row.append(_unit_of_position(layout))
        if not matrices:
            continue
        matrix_RC, reading_unit_R = _probed(torch.cat(matrices), torch.cat(unit_of_row), generator)
        matrix_CD = run.weight(args_of(pair.source_linears.projections.output)[1])
        columns_DC, source_unit_D = _parts(of_pair, matrix_CD, units[pair.source].columns)
        energy = torch.zeros(units[branch.index].count, len(columns_DC), dtype=torch.float64)
        energy.index_add_(0, reading_unit_R, (matrix_RC @ columns_DC.T).double().pow(2))
        of_units = torch.zeros(len(energy), units[pair.source].count, dtype=torch.float64)
        of_units.index_add_(1, source_unit_D, energy)
        reads.append(Reads(pair.reader, pair.source, share * of_units / of_pair.tokens))
    return reads


def _probed(matrix: Tensor, unit_of_row: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most `_PROBES` rows a unit, whose products' squares have the same expected sum; and the unit of each."""
    counts = torch.bincount(unit_of_row)
    if int(counts.max()) <= _PROBES:
        return matrix, unit_of_row
    probes = [
        _signs((_PROBES, int(count)), generator) @ matrix[unit_of_row == unit] / _PROBES**0.5
        for unit, count in enumerate(counts)
    ]
    return torch.cat(probes), torch.arange(len(counts)).repeat_interleave(_PROBES)


class _Backward:
    """How much a change behind a branch's input projections changes what the branch adds to the stream."""

    def __init__(self, run: _Run, branch: Branch, linears: _Linears) -> None:
        nodes = {node.name: node for node in run.program.graph.nodes}
        self._run, self._end = run, linears.end
        self._leaves = linears.projections.inputs
        self._stream = nodes[branch.stream] if branch.post is None else None
        inside = ancestors(linears.end, set(self._leaves)) & {nodes[name] for name in branch.nodes} | {linears.end}
        reached = descendants(self._leaves) & inside
        self._nodes = [node for node in run.program.graph.nodes if node in reached]
        self._weights = {
            operand for node in self._nodes for operand in node.all_input_nodes if operand.name in run.program.weights
        }
        outside = {operand for node in self._nodes for operand in node.all_input_nodes} - reached - self._weights
        stream = [self._stream] if self._stream is not None else []
        self.targets = [*self._leaves, *(node for node in outside if node not in self._leaves), self._end, *stream]
        self._sums: dict[fx.Node, Tensor] = {}
        self._tokens = 0

    def add(self, values: Mapping[fx.Node, Any], generator: torch.Generator) -> None:
        """Add a batch."""
        environment = {node: value for node, value in values.items() if node not in self._nodes}
        environment |= {node: self._run.read_lane(self._run.program.weights[node.name], 0) for node in self._weights}
        leaves = [values[node].detach().requires_grad_() for node in self._leaves]
        environment |= dict(zip(self._leaves, leaves, strict=True))
        with torch.enable_grad():
            result = _evaluate(self._nodes, environment)[self._end]
            size = result.detach().float()
            if self._stream is not None and values[self._stream].shape == result.shape:
                size = size + values[self._stream].float()
            size = size.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
            signs = _signs(result.shape, generator)
            gradients = torch.autograd.grad((result.float() * signs / size).sum(), leaves, allow_unused=True)
        for node, leaf, gradient in zip(self._leaves, leaves, gradients, strict=True):
            square = torch.zeros(leaf.shape[-1]) if gradient is None else rows(gradient).pow(2).sum(0)
            self._sums[node] = self._sums.get(node, torch.zeros_like(square)) + square
        self._tokens += rows(result).shape[0]

    def strengths(self) -> dict[fx.Node, Tensor]:
        """For every input projection the mean square of the gradient behind every row."""
        return {node: total / self._tokens for node, total in self._sums.items()}


def _parts(sums: _Sums, matrix_CD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """What the units' parts come to behind the norms, [vectors, C], and the unit of each vector."""
    assert isinstance(sums.features, Tensor)
    assert isinstance(sums.gains_C, Tensor)
    matrix_DC = (matrix_CD * (sums.gains_C / sums.tokens)[:, None]).T
    if len(sums.features) == 1:
        return matrix_DC * sums.features.sqrt().T, _unit_of_position(layout)
    columns = [layout.positions([unit]) for unit in range(layout.units)]
    parts = [sums.features[:, own] @ matrix_DC[own] / len(sums.features) ** 0.5 for own in columns]
    return torch.cat(parts), torch.arange(layout.units).repeat_interleave(len(sums.features))


def _add(
    sums: _Sums,
    pair: _Pair,
    run: _Run,
    values: Mapping[fx.Node, Any],
    layout: Layout,
    generator: torch.Generator,
) -> None:
    """Add a batch to the sums of a pair."""
    weights = {operand for node in pair.chain for operand in node.all_input_nodes if operand.op == "placeholder"}
    weights = {node for node in weights if node.name in run.program.weights}
    environment = {node: value for node, value in values.items() if node not in pair.chain}
    environment |= {node: run.read_lane(run.program.weights[node.name], 0) for node in weights}
    before, start = values[pair.stop].float(), values[pair.start]
    signs = _signs(start.shape, generator)
    step = _STEP * start.float().pow(2).mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
    environment[pair.start] = (start.float() + step * signs).to(start.dtype)
    # What lies between scales every channel by itself, but for little: a change of random signs shows by how much.
    gains_TC = rows((_evaluate(pair.chain, environment)[pair.stop].float() - before) * signs / step)
    scales_T = gains_TC.pow(2).mean(-1).sqrt().clamp_min(1e-12)
    features_TD = rows(values[pair.source_linears.features]) * scales_T[:, None]
    if layout.outer * layout.inner == 1:
        sums.features = sums.features + features_TD.pow(2).sum(0, keepdim=True)
    else:
        number = max(_PROBES, _SUMS_OF_TOKENS // layout.units)
        sums.features = sums.features + _signs((number, len(features_TD)), generator) @ features_TD
    sums.gains_C = sums.gains_C + (gains_TC / scales_T[:, None]).sum(0)
    sums.tokens += len(features_TD)


def _last_layout(units: Units, node: fx.Node) -> Layout | None:
    """How the columns of what a projection gives belong to units; None if all lanes have all of them."""
    layouts = units.layouts.get(node.name)
    return layouts[-1] if layouts else None


def _unit_of_position(layout: Layout) -> Tensor:
    units = torch.arange(layout.units).repeat_interleave(layout.inner)
    return units.repeat(layout.outer)


def _operand(projection: fx.Node) -> fx.Node:
    operand = args_of(projection)[0]
    assert isinstance(operand, fx.Node)
    return operand


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1


def _evaluate(nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Run nodes, in graph order, on the values of all that they read."""
    for node in nodes:
        args, kwargs = fx.node.map_arg((args_of(node), node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values
