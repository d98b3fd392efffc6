"""How long may a reduce take before it shows? One lane of two on one GPU, with a delay in the place of every reduce.

    python benchmarks/gpu_delay.py                       needs one CUDA device, torch and Triton; about five minutes
    python benchmarks/gpu_delay.py --check               ends with 1 unless `kraken` stays within 3 %, see below

A reduce is a kernel on a stream of its own that occupies some multiprocessors for d microseconds, as a real one would,
and adds nothing up. The time of a prefill against d is measured for `standard`, which waits for every reduce, and for
`kraken`, which hides it behind the next attention, launched one by one (eager) and replayed as one CUDA graph. Until d
fills the window, `kraken` must stay within 3 % of its time with d = 0: then overlap is real, and survives the capture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.capture import capture
from kraken_compiler.passes.lower import lower
from kraken_compiler.ranks.communicators.communicator import Communicator

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
"""Layers of Llama-3-8B: of two lanes, one holds half of each."""

DEGREE, ALLOWED = 2, 1.03
DELAYS = (0, 10, 20, 40, 80, 160, 320, 640)


class DelayCommunicator(Communicator):
    """A "sum" is the part itself, after a delay on a side stream. WRONG RESULTS on purpose.

    Attributes:
        microseconds: Of the delay.
        multiprocessors: How many the delay occupies.
    """

    kind: ClassVar[str] = "delay"
    gathers: ClassVar[bool] = False

    def __init__(self, delay: Callable[[int, int], None], multiprocessors: int) -> None:
        super().__init__(0, DEGREE, "delay", identical_on_all_ranks=False)
        self.microseconds, self.multiprocessors = 0, multiprocessors
        self._delay = delay
        self._side = torch.cuda.Stream()

    def start(self, x: Tensor) -> tuple[Tensor, Any]:
        if not self.microseconds:
            return x, None
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._delay(self.microseconds, self.multiprocessors)
            done = torch.cuda.Event()
            done.record()
        return x, done

    def wait(self, handle: tuple[Tensor, Any]) -> Tensor:
        part, done = handle
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return part

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x] * self.degree, dim=dim)


def spinning_kernel() -> Callable[[int, int], None]:
    """A function that occupies multiprocessors on the current stream: (microseconds, how many)."""
    import triton
    import triton.language as language

    @triton.jit  # type: ignore[untyped-decorator]
    def spin(nanoseconds: language.int64) -> None:
        start = language.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=language.int64, is_pure=False, pack=1
        )
        now = start
        while now - start < nanoseconds:
            now = language.inline_asm_elementwise(
                "mov.u64 $0, %globaltimer;", "=l", [], dtype=language.int64, is_pure=False, pack=1
            )

    def delay(microseconds: int, multiprocessors: int) -> None:
        # Blocks of a full multiprocessor's threads, so that no two share one.
        spin[(multiprocessors,)](microseconds * 1000, num_warps=32)

    return delay


def programs(communicator: DelayCommunicator, dtype: torch.dtype) -> dict[str, RankProgram]:
    """One lane of every form on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
    captured = capture(model, example_inputs={"input_ids": torch.zeros(2, 16, dtype=torch.int64, device="cuda")})
    found = {}
    for form in ("standard", "kraken"):
        program, _ = lower(captured.program, DEGREE, form, cached=False)
        rank_program = RankProgram.from_program(program, captured.store.read, 0, communicator=communicator)
        found[form] = rank_program.to("cuda")
    return found


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


def graph_of(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A call captured as a CUDA graph, side stream and all."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        run()
    return graph


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every form, way of launching and delay."""
    communicator = DelayCommunicator(spinning_kernel(), arguments.multiprocessors)
    rows = []
    for form, program in programs(communicator, torch.bfloat16).items():
        ids = torch.randint(SHAPE["vocab_size"], (1, arguments.tokens), device="cuda")

        def eager(program: RankProgram = program, ids: Tensor = ids) -> None:
            program.run_flat([ids])

        for delay in DELAYS:
            communicator.microseconds = delay
            for _ in range(3):
                with torch.inference_mode():
                    eager()
            replay = graph_of(eager).replay
            for way, run in (("eager", eager), ("graph", replay)):
                row = {"form": form, "way": way, "delay_us": delay, "ms": milliseconds(run, arguments.repetitions)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every way the largest delay that `kraken` hides, and what `standard` pays for it."""
    lines = []
    for way in ("eager", "graph"):
        of = {(row["form"], row["delay_us"]): row["ms"] for row in rows if row["way"] == way}
        hidden = [delay for delay in DELAYS if of["kraken", delay] <= ALLOWED * of["kraken", 0]]
        most = max((delay for place, delay in enumerate(DELAYS) if hidden[: place + 1] == list(DELAYS[: place + 1])))
        lines.append(
            f"{way}: kraken hides {most} us a reduce ({of['kraken', most] / of['kraken', 0]:.3f} of its time without), "
            f"standard takes {of['standard', most] / of['standard', 0]:.3f} of its own"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prefill (default: 1024)")
    parser.add_argument("--multiprocessors", type=int, default=4, help="that a reduce occupies (default: 4)")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="end with 1 if kraken hides no delay of 40 us")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    rows = measure(arguments)
    print("\n".join(verdict(rows)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    of = {(row["form"], row["way"], row["delay_us"]): row["ms"] for row in rows}
    passed = all(of["kraken", way, 40] <= ALLOWED * of["kraken", way, 0] for way in ("eager", "graph"))
    return int(arguments.check and not passed)


if __name__ == "__main__":
    raise SystemExit(main())
