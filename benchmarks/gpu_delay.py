"""How long may a reduce take before it shows? One lane of two on one GPU, with a delay in the place of every reduce.

    python benchmarks/gpu_delay.py                       needs one CUDA device, torch and transformers; five minutes
    python benchmarks/gpu_delay.py --check               ends with 1 unless `kraken` stays within 3 %, see below

A reduce is a kernel on a stream of its own that occupies some multiprocessors for d microseconds, as a real one would,
and adds nothing up. The time of a prefill against d is measured for `standard`, which waits for every reduce, and for
`kraken`, which hides it behind the next attention:

    eager       the lane of the torch backend, its kernels launched one by one
    graph       the same, replayed as one CUDA graph
    vllm        the lane of the vLLM backend, with the operators it has there, compiled by Inductor and replayed as one
                CUDA graph; vLLM itself need not be installed

Until d fills the window, `kraken` must stay within 3 % of its time with d = 0: then overlap is real, and survives
compilers and capture. Before anything is timed, the sums of a long delay are filled with NaN until it is over, so a
reader that does not wait for them is found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kraken_compiler.backends.lane_graph.run_graph import KEEP_THE_ORDER
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.backends.vllm.format import IDS, POSITIONS
from kraken_compiler.backends.vllm.lane import EngineLane
from kraken_compiler.backends.vllm.run import side_stream
from kraken_compiler.backends.vllm.write.flat_program import FlatProgram, flattened
from kraken_compiler.capture import capture
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import lane_weights
from kraken_compiler.ops.devices import retarget
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION
from kraken_compiler.passes.lower import lower
from kraken_compiler.ranks.communicators.communicator import Communicator

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
"""Layers of Llama-3-8B: of two lanes, one holds half of each."""

FORMS = ("standard", "kraken")
WAYS = ("eager", "graph", "vllm")
DEGREE, ALLOWED, ALLOWED_DELAY = 2, 1.03, 40
DELAYS = (0, 10, 20, 40, 60, 80, 120, 160, 240, 320)

_SPIN = """
extern "C" __global__ void spin(int microseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < 1000ull * microseconds);
}
"""
_SPIN_THREADS, _SPIN_SHARED_BYTES = 512, 128 * 1024
"""More than half of a multiprocessor's shared memory, so that no matrix product computes on the same one meanwhile."""


class Delay:
    """Occupies multiprocessors on the current stream, for as long as it is told.

    Attributes:
        microseconds: How long; 0 launches nothing.
        multiprocessors: How many.
    """

    def __init__(self, multiprocessors: int) -> None:
        self.microseconds, self.multiprocessors = 0, multiprocessors
        self._kernel = torch.cuda._compile_kernel(_SPIN, "spin")
        self._kernel.set_shared_memory_config(_SPIN_SHARED_BYTES)

    def __call__(self) -> None:
        """Launch it."""
        if self.microseconds:
            grid, block = (self.multiprocessors, 1, 1), (_SPIN_THREADS, 1, 1)
            self._kernel(grid, block, [self.microseconds], shared_mem=_SPIN_SHARED_BYTES)


class DelayCommunicator(Communicator):
    """A "sum" is a copy of the part, made on a side stream after a delay. WRONG RESULTS on purpose."""

    kind: ClassVar[str] = "delay"
    gathers: ClassVar[bool] = False

    def __init__(self, delay: Delay, priority: int) -> None:
        super().__init__(0, DEGREE, "delay", identical_on_all_ranks=False)
        self._delay, self._side = delay, torch.cuda.Stream(priority=priority)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        out, done = torch.empty_like(x), torch.cuda.Event()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._delay()
            out.copy_(x)
            done.record()
        return out, x, done

    def wait(self, handle: tuple[Tensor, Tensor, torch.cuda.Event]) -> Tensor:
        out, _, done = handle
        torch.cuda.current_stream().wait_event(done)
        return out

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x] * self.degree, dim=dim)


def engine_collectives(delay: Delay, priority: int) -> ModuleType:
    """The collectives of the vLLM backend, over a tensor-parallel group that only delays."""
    library = torch.library.Library("gpu_delay", "DEF")
    library.define("all_reduce(Tensor part) -> Tensor")

    def all_reduce(part: Tensor) -> Tensor:
        delay()
        return part.clone()

    library.impl("all_reduce", all_reduce, "CUDA")
    torch.library.register_fake("gpu_delay::all_reduce", torch.empty_like, lib=library)
    vllm, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    distributed.library = library  # it lives as long as its operators
    distributed.get_tp_group = None
    distributed.tensor_model_parallel_all_reduce = torch.ops.gpu_delay.all_reduce.default
    distributed.tensor_model_parallel_all_gather = lambda part, dim: torch.cat([part] * DEGREE, dim=dim)
    sys.modules |= {"vllm": vllm, "vllm.distributed": distributed}
    from kraken_compiler.backends.vllm.run import collectives

    side_stream.reduce, side_stream._SIDE.stream = all_reduce, torch.cuda.Stream(priority=priority)
    return collectives


@dataclass(frozen=True)
class Lane:
    """One lane of a form on the GPU.

    Attributes:
        eager: Runs the torch backend's on token ids [1, T].
        compiled: Runs the vLLM backend's, compiled, on the same.
    """

    eager: Callable[[Tensor], Tensor]
    compiled: Callable[[Tensor], Tensor]


def lanes(layers: int, delay: Delay, priority: int) -> dict[str, Lane]:
    """One lane of every form on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).to(torch.bfloat16).eval()
    captured = capture(model, example_inputs={"input_ids": torch.zeros(2, 16, dtype=torch.int64, device="cuda")})
    communicator, collectives = DelayCommunicator(delay, priority), engine_collectives(delay, priority)
    found = {}
    for form in FORMS:
        # A sum at the start has nothing to hide behind.
        program, _ = lower(captured.program, DEGREE, form, embedding="whole")
        rank_program = RankProgram.from_program(program, captured.store.read, 0, communicator=communicator).to("cuda")
        compiled = engine_body(program, captured.store.read, collectives)
        found[form] = Lane(partial(_logits, rank_program), compiled)
        tell(f"{form}: lanes are on the device")
    return found


def _logits(program: RankProgram, ids: Tensor) -> Tensor:
    return program.run_flat([ids])[0]


def engine_body(program: LaneProgram, read: SourceReader, collectives: ModuleType) -> Callable[[Tensor], Tensor]:
    """The vLLM backend's graph from tokens to hidden states, with its operators, compiled."""
    assert program.cached is not None
    flat = flattened(program.cached, program.weights)
    assert isinstance(flat, FlatProgram), flat
    weights = lane_weights(program.weights, 0, program.reader(read))
    graphs = (fx.GraphModule({}, graph) for graph in (flat.body, flat.head, flat.prepare))
    lane = EngineLane(flat.record, *graphs, {name: weight.cuda() for name, weight in weights.items()})
    device, module = torch.device("cuda"), lane.body
    collectives.bind_engine_collectives(module, device, "own")
    for node in module.graph.find_nodes(op="call_function", target=ENGINE_ATTENTION):
        node.target, node.args = attend, (*node.args[:3], lane.record.attentions[node.args[3]].scale)
    module.recompile()
    retarget(module, device)
    capacity = SHAPE["max_position_embeddings"]
    feeds = {**lane.weights, **lane.tables(lane.prepared(capacity, lane.weights, device))}
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    run = torch.compile(module, fullgraph=True, options=KEEP_THE_ORDER)

    def body(ids: Tensor) -> Tensor:
        own = {IDS: ids, POSITIONS: torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)}
        return run(*(own[name] if name in own else feeds[name] for name in names))[0]

    return body


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one sequence, in the place of the engine's."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@torch.inference_mode()
def milliseconds(run: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Replay:
    """A call captured as a CUDA graph, side stream and all.

    Attributes:
        result: What the last replay computed.
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode():
            run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self.result = run()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self.result


def ways(lane: Lane, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to launch a lane, each with the delay that is set now."""
    eager = partial(lane.eager, ids)
    return {"eager": eager, "graph": Replay(eager), "vllm": Replay(partial(lane.compiled, ids))}


def require_waits(form: str, lane: Lane, ids: Tensor, delay: Delay) -> None:
    """Raise unless results are the same whether a reduce takes no time or long, with NaN where it writes until then."""

    def results(microseconds: int) -> dict[str, Tensor]:
        delay.microseconds = microseconds
        with torch.inference_mode():
            return {way: run().clone() for way, run in ways(lane, ids).items()}

    want = results(0)
    with mock.patch.object(torch, "empty_like", lambda like: torch.full_like(like, torch.nan)):
        have = results(5 * max(DELAYS))
    for way, value in have.items():
        try:
            torch.testing.assert_close(value, want[way], rtol=2e-2, atol=2e-2)
        except AssertionError as error:
            raise SystemExit(f"{form}, {way}: something reads a sum before it is there: {error}") from error
    tell(f"{form}: every reader waits for its sums")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every form, way of launching, number of tokens and delay."""
    delay = Delay(arguments.multiprocessors)
    rows = []
    for form, lane in lanes(arguments.layers, delay, arguments.priority).items():
        for tokens in arguments.tokens:
            ids = torch.randint(SHAPE["vocab_size"], (1, tokens), device="cuda")
            require_waits(form, lane, ids, delay)
            runs = {}
            for microseconds in DELAYS:
                delay.microseconds = microseconds
                runs[microseconds] = ways(lane, ids)
            times: dict[tuple[str, int], list[float]] = {}
            for _ in range(arguments.rounds):
                for microseconds in DELAYS:
                    delay.microseconds = microseconds
                    for way, run in runs[microseconds].items():
                        times.setdefault((way, microseconds), []).append(milliseconds(run, arguments.repetitions))
            for (way, microseconds), of_rounds in times.items():
                row = {"form": form, "way": way, "tokens": tokens, "delay_us": microseconds}
                rows.append(row | {"ms": statistics.median(of_rounds)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            del runs
            tell(f"{form}, {tokens} tokens: measured")
    return rows


Times = Mapping[tuple[str, str, int, int], float]


def report(of: Times, tokens: Sequence[int], layers: int) -> list[str]:
    """Curves, the largest delay that `kraken` hides, and what a reduce of it costs `standard`."""
    lines = []
    for count in tokens:
        lines += ["", f"{count} tokens, {layers} layers: ms by the microseconds that a reduce takes"]
        lines.append("".ljust(18) + "".join(f"{delay:>9}" for delay in DELAYS))
        for way in WAYS:
            for form in FORMS:
                cells = "".join(f"{of[form, way, count, delay]:>9.3f}" for delay in DELAYS)
                lines.append(f"{way}, {form}".ljust(18) + cells)
        for way in WAYS:
            most = hidden(of, way, count)
            slower = of["kraken", way, count, most] / of["kraken", way, count, 0]
            lines.append(f"{way}: kraken stays within 3 % up to {most} us a reduce ({slower:.3f})")
        for way in WAYS:
            lost = {form: [of[form, way, count, delay] - of[form, way, count, 0] for delay in DELAYS] for form in FORMS}
            shares = [1 - ours / theirs for ours, theirs in zip(lost["kraken"][1:], lost["standard"][1:])]
            lines.append(
                f"{way}, of what standard loses kraken hides".ljust(44) + "".join(f"{one:>7.0%}" for one in shares)
            )
    return lines


def hidden(of: Times, way: str, tokens: int) -> int:
    """The largest delay up to which `kraken` stays within 3 % of its time without."""
    slower = [delay for delay in DELAYS if of["kraken", way, tokens, delay] > ALLOWED * of["kraken", way, tokens, 0]]
    return max(delay for delay in DELAYS if not slower or delay < slower[0])


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the model (default: 32)")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1024],
        help="tokens of the prefill, several by commas (default: 1024)",
    )
    parser.add_argument("--multiprocessors", type=int, default=4, help="that a reduce occupies (default: 4)")
    parser.add_argument("--priority", type=int, default=0, help="of the stream that reduces; -1 is high (default: 0)")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help=f"end with 1 if kraken hides no {ALLOWED_DELAY} us")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    rows = measure(arguments)
    of = {(row["form"], row["way"], row["tokens"], row["delay_us"]): row["ms"] for row in rows}
    print("\n".join(report(of, arguments.tokens, arguments.layers)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    passed = all(hidden(of, way, arguments.tokens[0]) >= ALLOWED_DELAY for way in WAYS)
    return int(arguments.check and not passed)


if __name__ == "__main__":
    raise SystemExit(main())
