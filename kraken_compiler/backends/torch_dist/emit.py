"""Writes the torch backend's part of an artifact: the lane graph once, and every lane's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from kraken_compiler.backends.base import Backend
from kraken_compiler.backends.torch_dist.check_schedule import check_schedule
from kraken_compiler.backends.torch_dist.graph_file import load_graph, save_graph
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import Window
from kraken_compiler.progress import Advance
from kraken_compiler.weights.shards import write_lane_shards


class TorchBackend(Backend):
    """`lane.pt2`, with a KV cache also `step.pt2` and `tables.pt2`, and `lane-0.safetensors` to `lane-(N-1)`."""

    name: ClassVar[str] = "torch"

    def write(
        self,
        program: Program,
        read: Callable[[str], Tensor],
        directory: Path,
        progress: Advance | None = None,
    ) -> tuple[Window, ...]:
        graph_file = directory / "lane.pt2"
        save_graph(program, graph_file)
        windows = check_schedule(load_graph(graph_file), program.plan)
        if program.cached is not None:
            save_graph(program.cached.step, directory / "step.pt2")
            check_schedule(load_graph(directory / "step.pt2"), program.plan)
            save_graph(program.cached.tables, directory / "tables.pt2")
        write_lane_shards(program, read, directory, progress)
        return windows
