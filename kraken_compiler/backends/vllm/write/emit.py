"""Writes the vLLM backend's part of an artifact: three graphs, what the attentions are, and the weights if need be."""

from __future__ import annotations

from pathlib import Path

from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
from kraken_compiler.backends.lane_graph.graph_file import save_graph
from kraken_compiler.backends.vllm.format import BODY_FILE, HEAD_FILE, PREPARE_FILE, RECORD_FILE
from kraken_compiler.backends.vllm.write.flat_program import flattened
from kraken_compiler.errors import Rejection, UsageError, naming
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.text import json_text
from kraken_compiler.weights.write_shards import lane_files_with


def write_engine_files(
    program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
) -> tuple[Window, ...]:
    """Write a lane program for vLLM; see `Backend.write`.

    Raises:
        UsageError: vLLM cannot run it, e.g. because it has no program with a KV cache.
    """
    if program.cached is None:
        reason = f": {program.no_cache}" if program.no_cache else ""
        raise UsageError(f"--backend vllm needs a program with a KV cache, which this model does not have{reason}")
    flat = flattened(program.cached, program.weights)
    if isinstance(flat, Rejection):
        raise UsageError(f"--backend vllm: {flat}")
    body = save_graph(flat.body, directory / Path(BODY_FILE).name)
    save_graph(flat.head, directory / Path(HEAD_FILE).name)
    save_graph(flat.prepare, directory / Path(PREPARE_FILE).name)
    path = directory / Path(RECORD_FILE).name
    with naming(path):
        path.write_text(json_text(flat.record.model_dump()), encoding="utf-8")
    windows = check_schedule(body, program.plan)
    lane_files_with(program, read, directory, progress)
    return windows
