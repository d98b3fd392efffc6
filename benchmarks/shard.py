"""What cutting a large checkpoint into lanes costs, against copying it: `make bench-shard`.

A Llama-shaped bf16 checkpoint with random weights (8B parameters, 16 GB, sharded safetensors with an index) is written
beside where the artifact will be. Then, with the checkpoint (not the programs) dropped from the page cache before each,

    cp          copies its files, as the measure of the disk; the copy is removed
    cp + sync   the same until the copy is on the disk, which `kraken-compile` always waits for
    compile     `kraken-compile --no-verify`: a model of this size is checked where its lanes run

are run by turns, several times, because the pace of a disk that others share changes from minute to minute; the ratio
is that of the best times, so that a slow copy flatters nobody. The peak of the resident memory is added up over the
compile's processes, read every 50 ms. The space needed is twice the checkpoint's; `--layers` makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
LAYERS = 32
GB = 1e9
IMPORTS = "import kraken_compiler.commands.compile, transformers.models.llama.modeling_llama, torch.export"
COMPILE = "from kraken_compiler.cli.compile import main; main()"
SPARE_BYTES = 2e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"number of layers ({LAYERS} make 8B parameters)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run, by turns; the best times count")
    parser.add_argument("--folder", type=Path, help="where to work: the disk that is measured")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="fail above this resident memory")
    parser.add_argument("--limit-ratio", type=float, default=1.5, help="fail above this multiple of the time of cp")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="kraken-shard-", dir=options.folder) as folder:
        work = Path(folder)
        needed = 2 * checkpoint_bytes(options.layers, options.vocabulary) + SPARE_BYTES
        free = shutil.disk_usage(work).free
        if free < needed:
            sys.exit(f"{work}: {free / GB:.0f} GB are free, {needed / GB:.0f} GB are needed; try fewer --layers")
        size = write_checkpoint(work / "model", options.layers, options.vocabulary)
        # The programs' own files are in the cache, as those of cp are.
        subprocess.run([sys.executable, "-P", "-c", IMPORTS], check=True, stderr=subprocess.DEVNULL)
        runs: list[dict[str, float]] = []
        for number in range(1, options.repeats + 1):
            copied, synced = copy_seconds(work / "model", work / "copy")
            artifact = work / "out.kraken"
            seconds, cpu, peak = compile_seconds(work / "model", artifact, options.degree)
            written = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
            shutil.rmtree(artifact)
            run = {"cp_s": copied, "cp_and_sync_s": synced, "compile_s": seconds, "compile_cpu_s": cpu}
            runs.append({**run, "ratio_to_cp": seconds / copied, "peak_rss_gb": peak / GB})
            print(f"run {number}: " + ", ".join(f"{name} {value:.2f}" for name, value in runs[-1].items()), flush=True)
    best = {name: min(run[name] for run in runs) for name in ("cp_s", "cp_and_sync_s", "compile_s", "compile_cpu_s")}
    result: dict[str, Any] = {
        "checkpoint_gb": size / GB,
        "artifact_gb": written / GB,
        **best,
        "ratio_to_cp": best["compile_s"] / best["cp_s"],
        "ratio_to_cp_and_sync": best["compile_s"] / best["cp_and_sync_s"],
        "peak_rss_gb": max(run["peak_rss_gb"] for run in runs),
    }
    for name, value in result.items():
        print(f"{name:22}{value:10.2f}")
    result["runs"] = runs
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n")
    return int(result["peak_rss_gb"] > options.limit_gb or result["ratio_to_cp"] > options.limit_ratio)


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    prefix, kv = f"model.layers.{index}", WIDTH // HEADS * KV_HEADS
    return {
        f"{prefix}.input_layernorm.weight": (WIDTH,),
        f"{prefix}.self_attn.q_proj.weight": (WIDTH, WIDTH),
        f"{prefix}.self_attn.k_proj.weight": (kv, WIDTH),
        f"{prefix}.self_attn.v_proj.weight": (kv, WIDTH),
        f"{prefix}.self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{prefix}.post_attention_layernorm.weight": (WIDTH,),
        f"{prefix}.mlp.gate_proj.weight": (HIDDEN, WIDTH),
        f"{prefix}.mlp.up_proj.weight": (HIDDEN, WIDTH),
        f"{prefix}.mlp.down_proj.weight": (WIDTH, HIDDEN),
    }


def file_shapes(layers: int, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of every file."""
    head = {"model.norm.weight": (WIDTH,), "lm_head.weight": (vocabulary, WIDTH)}
    return [{"model.embed_tokens.weight": (vocabulary, WIDTH)}, *map(layer_shapes, range(layers)), head]


def checkpoint_bytes(layers: int, vocabulary: int) -> int:
    return sum(2 * torch.Size(shape).numel() for file in file_shapes(layers, vocabulary) for shape in file.values())


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> int:
    """Write a random Llama, one file at a time; returns the size of its weights in bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(0)
    # Weights are cut out of one block at different places: as incompressible, and made in a fraction of the time.
    block = (0.02 * torch.randn(1 << 24, generator=generator)).bfloat16()
    files = file_shapes(layers, vocabulary)
    index: dict[str, str] = {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {key: filled(block, shape, len(index) + place) for place, (key, shape) in enumerate(shapes.items())}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    size = checkpoint_bytes(layers, vocabulary)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return size


def filled(block: torch.Tensor, shape: tuple[int, ...], number: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    shifted = block.roll(4099 * number)
    return shifted.repeat(-(-count // len(block)))[:count].view(shape).clone()


def drop_from_cache(folder: Path) -> None:
    """Have the files read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> tuple[float, float]:
    """How long `cp` takes, and how long until its copy is on the disk."""
    drop_from_cache(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - began
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    synced = time.perf_counter() - began
    shutil.rmtree(target)
    return copied, synced


def compile_seconds(source: Path, target: Path, degree: int) -> tuple[float, float, float]:
    """Wall and processor time of a compile, and its peak of resident memory in bytes."""
    drop_from_cache(source)
    command = [
        sys.executable,
        "-P",
        "-c",
        COMPILE,
        str(source),
        "--degree",
        str(degree),
        "--no-verify",
        "-o",
        str(target),
    ]
    began = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak, cpu = 0.0, 0.0
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in tree))
            cpu = max(cpu, sum(sum(member.cpu_times()[:2]) for member in tree))
        except psutil.Error:
            continue  # one of them ended between the listing and the reading
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"kraken-compile ended with exit code {process.returncode}")
    return time.perf_counter() - began, cpu, peak


if __name__ == "__main__":
    sys.exit(main())
