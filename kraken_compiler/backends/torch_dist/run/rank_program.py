"""One rank's program: the lane graph with real asynchronous collectives, and that lane's weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.insert_collectives import bind_collectives, copy_graph
from kraken_compiler.backends.lane_graph.lane_files import GRAPH_FILE, load_lane_weights, rank_files
from kraken_compiler.backends.open_model import rank_claims
from kraken_compiler.backends.torch_dist.cached_graphs import CachedGraphs
from kraken_compiler.backends.torch_dist.row_graph import RowGraph
from kraken_compiler.backends.torch_dist.run.cached_decoder import CachedDecoder, RunStep
from kraken_compiler.backends.torch_dist.run.gathered_outputs import is_gathered
from kraken_compiler.backends.torch_dist.run.lane_of_rank import check_lane, checked_group, lane_of_rank
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.cache import SIZES
from kraken_compiler.ir.program import CallSpec, InputSpec, LaneProgram
from kraken_compiler.ir.schedule import FormPlan
from kraken_compiler.ir.size_checks import require_lengths, require_sizes, token_rules
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec, lane_weights
from kraken_compiler.lanes.calling import bind, unflatten_output
from kraken_compiler.ops.devices import retarget
from kraken_compiler.ranks.communicators.agreement import Claims, require_agreement
from kraken_compiler.ranks.communicators.choose import default_communicator
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.ranks.communicators.rank_info import exchange_info
from kraken_compiler.ranks.halves_timing import is_faster, time_both

if TYPE_CHECKING:
    from kraken_compiler.artifact.read import Artifact
    from kraken_compiler.backends.torch_dist.run.compile_lanes import CompiledGraph


class RankProgram(nn.Module):
    """The program of one rank of a process group; every rank of the group must call it together.

    It has the source model's call signature and output structure, and every rank returns the whole output. It is for
    inference: its parameters take no gradients.

    Attributes:
        lane: Number of the lane this rank runs.
        degree: Number of lanes.
        communicator: What adds up the lanes' parts.
        compiled: What runs instead of the graph after `compile`.
        graph: The graph with real collectives; placeholders are the weights, then the inputs.
        rows_from: The fewest rows of a batch that run as two halves, each of whose reduces flies while the other half
            computes; None if none do. See `measure_halves`.
        weights: Holds this lane's parameters and buffers, by weight-table name.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        table: Mapping[str, WeightSpec],
        inputs: tuple[InputSpec, ...],
        call: CallSpec,
        weights: Mapping[str, Tensor],
        *,
        degree: int,
        lane: int,
        group: dist.ProcessGroup | None = None,
        communicator: Communicator | str | None = None,
        reduce_dtype: torch.dtype | None = None,
        plan: FormPlan | None = None,
    ) -> None:
        """Bind a lane graph to a group and weights.

        Args:
            graph: The lane graph, with `kraken::` collectives; it is not changed.
            table: The weight table.
            inputs: The graph's tensor inputs.
            call: The source model's calling convention.
            weights: This lane's tensors by weight-table name, each of the table's local shape.
            degree: Number of lanes.
            lane: Number of this rank's lane; it must be the rank in the group.
            group: The ranks that run the lanes; None means all. Not asked for if `communicator` is an object.
            communicator: What adds up the lanes' parts: an object, a kind of `communicators.choose.KINDS`, or None
                for the default of the device that the weights are on.
            reduce_dtype: To which each lane's part is rounded before it is sent; None leaves it.
            plan: Which windows compiling must keep; None asks for none.

        Raises:
            UsageError: There is no process group, its size is not the degree, the lane is not this rank's, or there is
                no such communicator.
        """
        super().__init__()
        self.lane = lane
        self.degree = degree
        self.plan = plan
        self.inputs = inputs
        self.call = call
        if isinstance(communicator, Communicator):
            check_lane(lane, degree, rank=communicator.rank, ranks=communicator.degree)
            self._choose: Callable[[torch.device], Communicator] = lambda device: communicator
        else:
            process_group = checked_group(lane, degree, group)
            self._choose = lambda device: default_communicator(device, process_group, reduce_dtype, communicator)
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        assert names == [*table, *(spec.name for spec in inputs)], "placeholders are the weights, then the inputs"
        self._weight_names = tuple(table)
        self._cached_graphs: Callable[[], CachedGraphs] | None = None
        self._graphs: CachedGraphs | None = None
        self._row_graph: Callable[[], RowGraph] | None = None
        self._halves: RowGraph | None = None
        self.rows_from: int | None = None
        self._steps: dict[Any, RunStep] = {}
        self._agree: Callable[[], None] | None = None
        self._lane_graph = copy_graph(graph.graph)
        self._options: dict[str, Any] = {}
        self.compiled: CompiledGraph | None = None
        self.weights = nn.Module()
        for name, spec in table.items():
            value = weights[name]
            assert tuple(value.shape) == spec.shape, f"weight {name}: {tuple(value.shape)} is not {spec.shape}"
            if spec.kind == "parameter" and value.is_floating_point():
                self.weights.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.weights.register_buffer(name, value)
        self._bind()

    @classmethod
    def from_program(
        cls,
        program: LaneProgram,
        read: SourceReader,
        lane: int | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        communicator: Communicator | str | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> Self:
        """Build one rank's program from a lane program in memory.

        Args:
            program: The lane program; it is not changed.
            read: Gives a whole source tensor by name; `program.constants` are read from the program.
            lane: Number of the lane; None means this rank's.
            group: The ranks that run the lanes; None means all.
            communicator, reduce_dtype: As for the class.

        Raises:
            UsageError: There is no process group, its size is not the degree, or the lane is not this rank's.
        """
        lane = lane_of_rank(lane, program.degree, group, communicator)
        weights = lane_weights(program.weights, lane, program.reader(read))
        rank_program = cls(
            program.module,
            program.weights,
            program.inputs,
            program.call,
            weights,
            degree=program.degree,
            lane=lane,
            group=group,
            communicator=communicator,
            reduce_dtype=reduce_dtype,
            plan=program.plan,
        )
        if program.cached is not None:
            rank_program._cached_graphs = partial(CachedGraphs.of, program.cached)
        if program.rows is not None:
            rank_program._row_graph = partial(RowGraph.of, program.rows)
        return rank_program

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        lane: int | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
        communicator: Communicator | str | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> Self:
        """Build one rank's program from an artifact. Reads only the graphs and this lane's weights.

        At their first run together the ranks of a group make sure that all of them have the same artifact, and raise an
        InputFileError if not.

        Args:
            artifact: An open artifact.
            lane: Number of the lane; None means this rank's.
            group: The ranks that run the lanes; None means all.
            device: Where the weights go.
            verify: Check the hashes of the files that are read.
            communicator, reduce_dtype: As for the class.

        Raises:
            UsageError: There is no process group, its size is not the degree, or the lane is not this rank's.
            InputFileError: A file is missing, truncated or tampered with.
        """
        manifest = artifact.manifest
        lane = lane_of_rank(lane, manifest.degree, group, communicator)
        if verify:
            artifact.verify(*rank_files(artifact, lane))
        table = manifest.weight_table
        weights = load_lane_weights(artifact, lane, table)
        program = cls(
            load_graph(artifact.path(GRAPH_FILE)),
            table,
            manifest.inputs,
            manifest.call,
            weights,
            degree=manifest.degree,
            lane=lane,
            group=group,
            communicator=communicator,
            reduce_dtype=reduce_dtype,
            plan=manifest.plan,
        )
        if manifest.cache is not None:
            program._cached_graphs = partial(CachedGraphs.load, artifact)
        if manifest.rows is not None:
            program._row_graph = partial(RowGraph.load, artifact)
        if not isinstance(communicator, Communicator) and communicator != NoCommunication.kind:
            claims = Claims(rank_claims(artifact, "torch", reduce_dtype))
            process_group = checked_group(lane, manifest.degree, group)
            program._agree = lambda: require_agreement(claims, lambda info: exchange_info(info, process_group))
        return program.to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank's part; the call signature is the source model's."""
        return unflatten_output(self.call, self.run_flat(bind(self.call, self.inputs, args, kwargs)))

    def run_flat(self, inputs: list[Tensor], cut: int | None = None) -> tuple[Tensor, ...]:
        """Run on the graph's inputs, in the order of `inputs`; returns the graph's outputs.

        Args:
            inputs: One tensor for each.
            cut: How many rows the first of two halves has, 0 to run them at once; None lets `rows_from` decide.
        """
        if cut is None and self.rows_from is not None:
            dims = self._rows().dims
            rows = dims.count(inputs)
            is_cut = rows >= max(self.rows_from, 2) and dims.suits(self.call, self.inputs, inputs, rows // 2)
            cut = rows // 2 if is_cut else 0
        if cut:
            return self._run_halves(inputs, cut)
        self._agree_once()
        if self.compiled is not None:
            return self.compiled(*inputs)
        outputs: tuple[Tensor, ...] = self.graph(*self._operands(), *inputs)
        return outputs

    def _run_halves(self, inputs: list[Tensor], cut: int) -> tuple[Tensor, ...]:
        halves = self._rows()
        rows = halves.dims.count(inputs)
        assert 0 < cut < rows, f"cut {rows} rows behind row {cut}"
        parts = halves.dims.halves(inputs, cut)
        for part in parts:
            require_sizes(self.call, self.inputs, [tensor.shape for tensor in part])
        flat = halves.dims.flat(parts)
        run = self._agreeing(self._step(halves.module, halves.inputs, halves.plan, self.compiled is not None))
        outputs = run(*self._operands(), *flat)
        count = len(outputs) // 2
        return halves.dims.joined(outputs[:count], outputs[count:], torch.cat)

    @property
    def can_cut_rows(self) -> bool:
        """True if batches can run as two halves."""
        return self._row_graph is not None

    def _rows(self) -> RowGraph:
        if self._row_graph is None:
            raise UsageError("the program has no graph on two halves of a batch's rows; compile it with --overlap rows")
        if self._halves is None:
            self._halves = self._row_graph()
        return self._halves

    def gathers(self, output: int) -> bool:
        """True if an output is the same on all ranks to the last bit, whatever machines they are on.

        Args:
            output: Its number among the graph's outputs.
        """
        graphs = [(self._lane_graph, output)]
        if self.can_cut_rows:
            halves = self._rows()
            graphs += [(halves.module.graph, half * len(halves.dims.outputs) + output) for half in range(2)]
        return self.communicator.gathers and all(is_gathered(graph, place) for graph, place in graphs)

    def measure_halves(self, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """Measure whether a batch runs faster as two halves of its rows; if so, batches of as many rows do so from now.

        All ranks must call it together, and get the same answer.

        Args:
            args, kwargs: A call, as of the source model, with the batch; of two rows or more.

        Returns:
            Median seconds of the whole batch, and as halves; means over the ranks.

        Raises:
            UsageError: There is nothing that runs halves, or the batch has one row.
        """
        inputs = bind(self.call, self.inputs, args, kwargs)
        rows = self._rows().dims.count(inputs)
        if rows < 2:
            raise UsageError("a batch of one row cannot be cut into halves of rows")

        def seconds(in_halves: bool) -> float:
            self._sum(torch.zeros(2))  # all begin together
            start_time = time.perf_counter()
            # What is read of a result must have been computed, on an accelerator too.
            self.run_flat(inputs, rows // 2 if in_halves else 0)[0].flatten()[:1].cpu()
            return time.perf_counter() - start_time

        whole, halves = (self._sum(torch.tensor(time_both(seconds))) / self.degree).tolist()
        self.rows_from = rows if is_faster(whole, halves) else None
        return whole, halves

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of some numbers."""
        communicator = self.communicator
        return communicator.wait(communicator.start(values.to(self._device()))).cpu()

    def _agree_once(self) -> None:
        """Make sure at the first run that the ranks run the same program."""
        if self._agree is not None:
            self._agree()
            self._agree = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run through torch.compile from now on.

        It compiles at the first call, which takes seconds to minutes, and then checks that every reduce kept the
        compute that hides it.

        Args:
            args: None.
            kwargs: Settings of Inductor.
        """
        assert not args, "torch.compile's own arguments are chosen here"
        self._options = kwargs
        self.compiled = self._compiled_graph(self._lane_graph, self.inputs, self.plan)

    def _compiled_graph(
        self,
        graph: fx.Graph,
        inputs: tuple[InputSpec, ...],
        plan: FormPlan | None,
        opaque: Mapping[str, Sequence[int]] | None = None,
    ) -> CompiledGraph:
        # Imported here because it costs seconds and megabytes that no eager rank needs.
        from kraken_compiler.backends.torch_dist.run.compile_lanes import CompiledGraph

        opaque = opaque or {}
        sizes = {spec.name: [dim for dim, size in enumerate(spec.shape) if isinstance(size, str)] for spec in inputs}
        return CompiledGraph(
            fx.GraphModule({}, copy_graph(graph)),
            dict(zip(self._weight_names, self._operands(), strict=True)),
            self.communicator,
            plan,
            dynamic={name: [dim for dim in dims if dim not in opaque.get(name, ())] for name, dims in sizes.items()},
            opaque=opaque,
            options=self._options,
        )

    @property
    def has_cache(self) -> bool:
        """True if `decoder` can give one."""
        return self._cached_graphs is not None

    def decoder(self, batch: int, capacity: int, *, compiled: bool = False, one_machine: bool = False) -> CachedDecoder:
        """A decoder for a batch of sequences with a KV cache.

        Args:
            batch: Number of sequences.
            capacity: Most tokens of a sequence, prompt and new ones together.
            compiled: Run the steps through torch.compile.
            one_machine: Whether all ranks are known to be on one machine, where equal sums make equal logits.

        Raises:
            UsageError: The program has no cache, or its positions end before the capacity.
        """
        if self._cached_graphs is None:
            raise UsageError("the program has no KV cache")
        if self._graphs is None:
            self._graphs = self._cached_graphs()
        graphs = self._graphs
        steps = [self._step(graphs.step, graphs.inputs, self.plan, compiled)]
        if graphs.split is not None:
            inputs = (*graphs.inputs, *graphs.split_inputs)
            steps.append(self._step(graphs.split, inputs, graphs.split_plan, compiled))
        communicator, programs = self.communicator, (graphs.step, graphs.split)
        gathers = communicator.gathers and all(is_gathered(one.graph) for one in programs if one is not None)
        return CachedDecoder(
            list(map(self._agreeing, steps)),
            graphs,
            self._operands(),
            batch=batch,
            capacity=capacity,
            device=self._device(),
            # Elsewhere other kernels may run, which make other logits of equal sums.
            identical_on_all_ranks=gathers or (one_machine and communicator.identical_on_all_ranks),
            require_lengths=partial(require_lengths, self.call, token_rules(self.call, self.inputs), batch),
        )

    def _agreeing(self, step: RunStep) -> RunStep:
        """A step before which the ranks make sure that they run the same program."""

        def run(*operands: Tensor) -> tuple[Tensor, ...]:
            self._agree_once()
            return step(*operands)

        return run

    def _step(
        self, module: fx.GraphModule, inputs: tuple[InputSpec, ...], plan: FormPlan | None, compiled: bool
    ) -> RunStep:
        """A step graph with this rank's collectives, made once."""
        key = (module, self.communicator.name, self._device(), compiled)
        if key not in self._steps and compiled:
            opaque = {spec.name: (0,) for spec in inputs if spec.name in SIZES}
            step_of = self._compiled_graph(module.graph, inputs, plan, opaque)
            self._steps[key] = lambda *operands: step_of(*operands[len(self._weight_names) :])
        elif key not in self._steps:
            step = bind_collectives(fx.GraphModule({}, copy_graph(module.graph)), self.communicator)
            retarget(step, self._device())
            self._steps[key] = step
        return self._steps[key]

    def _operands(self) -> list[Tensor]:
        """The first operands of every graph: this lane's weights."""
        return [getattr(self.weights, name) for name in self._weight_names]

    def _device(self) -> torch.device:
        tensor = next(self.weights.parameters(), next(self.weights.buffers(), None))
        return torch.device("cpu") if tensor is None else tensor.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._bind()
        return self

    def _bind(self) -> None:
        """Make the graph that runs on the weights' device."""
        device = self._device()
        communicator = self._choose(device)
        if getattr(self, "communicator", None) is not communicator:
            self.communicator = communicator
            self.graph = bind_collectives(fx.GraphModule({}, copy_graph(self._lane_graph)), communicator)
        retarget(self.graph, device)
        if self.compiled is not None:
            self.compiled = self._compiled_graph(self._lane_graph, self.inputs, self.plan)
