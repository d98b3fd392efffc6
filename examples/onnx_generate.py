"""Continues a prompt with an artifact's ONNX device files, one process per device, and prints the token ids.

    kraken-compile MODEL --degree 2 --backend onnx -o DIR
    python examples/onnx_generate.py DIR/lanes --ids 5,6,7 --tokens 20

Our only import is `open_device`. What it gives is used like an `onnxruntime.InferenceSession`: arrays by name go in,
arrays by name come out. Inside, ONNX Runtime runs what lies between the collectives. The processes may as well be
started by hand, on several hosts, each with RANK, WORLD_SIZE and KRAKEN_MEET=HOST:PORT of rank 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from kraken_compiler.backends.onnx_ort.run.model import open_device


def generate(path: Path, provider: str, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens after a prompt; every device's process comes to the same ones."""
    generated: list[int] = []
    with open_device(path, provider=provider) as device:
        past = {name: empty(value) for name, value in device.inputs.items() if name.startswith("past_key_values.")}
        ids, seen = np.array([prompt]), 0
        while len(generated) < count:
            fed, seen = seen, seen + ids.shape[1]
            feeds = {
                "input_ids": ids,
                "position_ids": np.arange(fed, seen)[None],
                "attention_mask": np.ones((1, seen), np.int64),
                "logit_positions": np.array([[ids.shape[1] - 1]]),
                **past,
            }
            outputs = device.run({name: feeds[name] for name in device.inputs})
            # The next run may overwrite what this one returned.
            past = {name: outputs[name.replace("past_key_values", "present")].copy() for name in past}
            generated.append(int(outputs["logits"][0, 0].argmax()))
            ids = np.array([generated[-1:]])
    return generated


def empty(value: onnx.ValueInfoProto) -> np.ndarray:
    """A past without tokens, [batch, heads, tokens, head size]."""
    _, heads, _, size = value.type.tensor_type.shape.dim
    return np.zeros((1, heads.dim_value, 0, size.dim_value), np.float32)


def be_device(rank: int, degree: int, port: int, arguments: argparse.Namespace) -> None:
    """One process: the device with that number."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(degree), "KRAKEN_MEET": f"127.0.0.1:{port}"}
    path = arguments.directory / f"device-{rank}.onnx"
    tokens = generate(path, arguments.provider, [int(token) for token in arguments.ids.split(",")], arguments.tokens)
    if rank == 0:
        print(",".join(map(str, tokens)))


def main() -> None:
    """Start a process per device file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the artifact's onnx folder")
    parser.add_argument("--ids", default="1", help="token ids of the prompt, e.g. 5,6,7")
    parser.add_argument("--tokens", type=int, default=16, help="how many to generate")
    parser.add_argument("--provider", default="CPUExecutionProvider", choices=onnxruntime.get_available_providers())
    arguments = parser.parse_args()
    degree = len(list(arguments.directory.glob("device-*.onnx")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=be_device, args=(rank, degree, port, arguments)) for rank in range(degree)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise SystemExit(max((abs(process.exitcode or 0) for process in processes), default="no device files there"))


if __name__ == "__main__":
    main()
