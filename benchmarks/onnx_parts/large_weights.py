"""An ONNX device with more than 2 GB of weights: written, checked, opened and run, and compared with torch.

    python benchmarks/onnx_parts/large_weights.py

A random two-layer Llama in float32 with FFNs so wide that the last weights lie behind 2 GiB of the data file, where
offsets no longer fit into 32 signed bits. Its weights are made one at a time, by name, so they are never all in memory.
It takes 2.3 GB of disk in the temporary folder, and fails if any weight behind 2 GiB is read wrongly: the logits of all
tokens go through the last norm and the head, which lie there. Not a test because it takes minutes on a busy machine.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.capture import capture
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.tolerances import rank_tolerance

LIMIT = 2**31
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 360448,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def random_weights(program: Program, constants: SourceReader) -> SourceReader:
    """A reader of weights that are different for every name and the same at every call."""
    shapes = {spec.source: spec.source_shape for spec in program.weights.values() if spec.kind == "parameter"}

    def read(name: str) -> Tensor:
        if name not in shapes:
            return constants(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = torch.empty(shapes[name]).uniform_(-1, 1, generator=generator)
        return value.mul_(shapes[name][-1] ** -0.5) if value.dim() > 1 else value.add_(2)

    return SourceReader(read)


def behind_the_limit(model: DeviceModel) -> list[str]:
    """Names of the weights that begin behind 2 GiB."""
    return [
        tensor.name
        for tensor in model.proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset" and int(entry.value) >= LIMIT
    ]


def measure(directory: Path) -> dict[str, object]:
    """Write the device, run it, and compare."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    captured = capture(directory, require_weights=False)
    program, _ = lower(captured.program, 1, "standard")
    read = random_weights(program, captured.store.read)
    OnnxBackend().write(program, read, directory)
    path = directory / device_file(0)
    onnx.checker.check_model(str(path))
    model = DeviceModel.load(path)
    ids = np.arange(14, dtype=np.int64).reshape(2, 7)
    device = DeviceProgram(model, threads=1)
    have = torch.from_numpy(device.run(whole_feeds(model, {"input_ids": ids}))[LOGITS].copy())
    (want, *_) = StreamingProgram(program, read_from_source(program, read)).run_flat([torch.from_numpy(ids)])
    return {
        "bytes": max(path.stat().st_size for path in directory.iterdir()),
        "weights_behind_2_gib": behind_the_limit(model),
        "relative_error": errors(have, want)[1],
        "tolerance": rank_tolerance((want.dtype,), 0.0),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Print what was measured as JSON; the exit status is 1 if the numbers are wrong."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kraken-large-") as name:
        found = measure(Path(name))
    print(json.dumps({**found, "seconds": round(time.perf_counter() - began, 1)}, indent=2))
    if not (found["weights_behind_2_gib"] and found["relative_error"] <= found["tolerance"]):  # type: ignore[operator]
        sys.exit("error: the device computes something else, or no weight lies behind 2 GiB")


if __name__ == "__main__":
    main()
