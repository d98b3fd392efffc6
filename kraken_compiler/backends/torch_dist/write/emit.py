"""Writes the torch backend's part of an artifact: the lane graph once, and every lane's weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
from kraken_compiler.backends.lane_graph.graph_file import save_graph
from kraken_compiler.backends.lane_graph.lane_files import GRAPH_FILE, ROWS_FILE, SPLIT_FILE, STEP_FILE, TABLES_FILE
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.weights.write_shards import write_lane_shards


def write_lanes(
    program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
) -> tuple[Window, ...]:
    """Write `lane.json`, with a KV cache also the graphs that it adds, and the weights; see `Backend.write`.

    A model of whose computation nothing follows from positions alone has no `tables.json`, and what is not run as two
    halves no `split_step.json` or `split_rows.json`.
    """
    # Graphs are a matter of the processor, weights of the disk.
    with ThreadPoolExecutor(1, "save-graphs") as pool:
        windows = pool.submit(_save_graphs, program, directory)

        def advance(done: int, total: int, unit: str) -> None:
            if windows.done():
                windows.result()  # a graph that is wrong need not wait for the weights
            if progress is not None:
                progress(done, total, unit)

        write_lane_shards(program, read, directory, advance)
        return windows.result()


def _save_graphs(program: LaneProgram, directory: Path) -> tuple[Window, ...]:
    windows = check_schedule(save_graph(program.graph, directory / Path(GRAPH_FILE).name), program.plan)
    if program.rows is not None:
        check_schedule(save_graph(program.rows.program.graph, directory / Path(ROWS_FILE).name), program.rows.plan)
    if program.cached is not None:
        check_schedule(save_graph(program.cached.step.graph, directory / Path(STEP_FILE).name), program.plan)
        split = program.cached.split
        if split is not None:
            check_schedule(save_graph(split.program.graph, directory / Path(SPLIT_FILE).name), split.plan)
        if program.cached.plan.tables:
            save_graph(program.cached.tables.graph, directory / Path(TABLES_FILE).name)
    return windows
