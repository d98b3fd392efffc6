"""How much memory a compile takes beyond its imports: `make bench-memory`.

A Hugging Face directory with a random Llama of about 1 GB (fp32, sharded safetensors with an index) is written to a
temporary folder, one layer at a time, and compiled. From outside, every 20 ms, the memory of `kraken-compile` and of
every process it started is read:

    RSS   resident pages, added up over the processes; a page that two processes share counts twice
    PSS   the same, with every shared page divided by the number of processes that share it

What the imports take is measured, not guessed. The compile notes which modules it imported in the end; then one process
imports just these, and beside it as many processes as the compile had helpers import what a helper imports. Their RSS
and PSS are subtracted, process by process and never below zero, so a process that is still importing cannot pay for
another one. The headline is the larger of the two sums at their peaks. Weights that are mapped from a file count as
soon as a page of them is touched; the kernel's page cache does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

INTERVAL_S = 0.02
MB = 1e6
LAYER_WEIGHTS = 2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 2816 * 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

# The compile, in a process that leaves behind the names of the modules it imported.
COMPILE = """
import atexit, json, pathlib, sys
names = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: names.write_text(json.dumps(sorted(sys.modules))))
sys.argv[0] = "kraken-compile"
from kraken_compiler.cli.compile import main
main()
"""

# The same imports and nothing else; it lives until its standard input closes.
IMPORTS_ONLY = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception:
        # Some entries of sys.modules are made by code and have no file; ours all have one.
        if name.startswith("kraken_compiler."):
            raise
print("ready", flush=True)
sys.stdin.read()
"""

HELPER_MODULES = [
    "kraken_compiler.ranks.call_rank",
    "kraken_compiler.verify.execute",
    "kraken_compiler.backends.torch_dist.run.model",
]
"""What one rank of the verification imports."""


@dataclass(frozen=True)
class Memory:
    """Memory of every process at one moment, in bytes, the main process first."""

    rss: tuple[int, ...]
    pss: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """One row of the table; memory in MB."""

    run: str
    checkpoint_mb: float
    seconds: float
    processes: int
    import_rss_mb: float
    peak_rss_mb: float
    peak_pss_mb: float
    beyond_rss_mb: float
    beyond_pss_mb: float
    beyond_rss_by_process_mb: tuple[float, ...]
    limit_mb: float

    @property
    def headline_mb(self) -> float:
        return max(self.beyond_rss_mb, self.beyond_pss_mb)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint, at least")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--form", default="kraken")
    parser.add_argument("--limit-gb", type=float, default=1.5, help="fail above this, beyond the imports")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    results = []
    with tempfile.TemporaryDirectory(prefix="kraken-memory-") as folder:
        work = Path(folder)
        size = write_checkpoint(work / "model", options.gb * 1e9)
        for name, extra in (("compile and verify", ()), ("compile only", ("--no-verify",))):
            arguments = [str(work / "model"), "--degree", str(options.degree), "--form", options.form, *extra]
            arguments += ["-o", str(work / "out.kraken"), "--force"]
            results.append(measure(name, arguments, work / "modules.json", size, options.limit_gb * 1e9))
    report(results, options.json)
    return int(any(result.headline_mb > result.limit_mb for result in results))


def write_checkpoint(folder: Path, at_least: float) -> int:
    """Write a random Llama, never holding more than one layer of it.

    Returns:
        Size of the weights in bytes.
    """
    width, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
    assert isinstance(width, int)
    assert isinstance(vocab, int)
    layers = max(2, -int(-(at_least / 4 - 2 * vocab * width) // LAYER_WEIGHTS))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=1))

    shards = [{"model.embed_tokens.weight": (vocab, width)}]
    shards += [layer_shapes(f"model.layers.{index}", width) for index in range(layers)]
    shards += [{"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}]
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    size = 0
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else 0.03 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    listing = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    return size


def layer_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.self_attn.q_proj.weight": (1024, width),
        f"{prefix}.self_attn.k_proj.weight": (256, width),
        f"{prefix}.self_attn.v_proj.weight": (256, width),
        f"{prefix}.self_attn.o_proj.weight": (width, 1024),
        f"{prefix}.post_attention_layernorm.weight": (width,),
        f"{prefix}.mlp.gate_proj.weight": (2816, width),
        f"{prefix}.mlp.up_proj.weight": (2816, width),
        f"{prefix}.mlp.down_proj.weight": (width, 2816),
    }


def measure(name: str, arguments: list[str], modules: Path, size: int, limit: float) -> Result:
    """Run one compile under observation, then its imports alone."""
    print(f"{name}: kraken-compile {' '.join(arguments)}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", COMPILE, str(modules), *arguments], stdout=subprocess.DEVNULL
    )
    samples = list(observe(process))
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{name}: kraken-compile ended with exit code {process.returncode}")

    helpers = max(len(sample.rss) for sample in samples) - 1
    with importers(json.loads(modules.read_text()), helpers) as tree:
        imports = snapshot(tree)
    worst = max(samples, key=lambda sample: sum(beyond(sample.rss, imports.rss)))
    return Result(
        run=name,
        checkpoint_mb=size / MB,
        seconds=round(seconds, 1),
        processes=1 + helpers,
        import_rss_mb=imports.rss[0] / MB,
        peak_rss_mb=max(sum(sample.rss) for sample in samples) / MB,
        peak_pss_mb=max(sum(sample.pss) for sample in samples) / MB,
        beyond_rss_mb=sum(beyond(worst.rss, imports.rss)) / MB,
        beyond_pss_mb=max(sum(beyond(sample.pss, imports.pss)) for sample in samples) / MB,
        beyond_rss_by_process_mb=tuple(size / MB for size in beyond(worst.rss, imports.rss)),
        limit_mb=limit / MB,
    )


def beyond(processes: tuple[int, ...], imports: tuple[int, ...]) -> tuple[int, ...]:
    """What each process holds more than its imports; `imports` is the main process's and then a helper's."""
    helper = imports[1] if len(imports) > 1 else 0
    return (max(0, processes[0] - imports[0]), *(max(0, size - helper) for size in processes[1:]))


def observe(process: subprocess.Popen[bytes]) -> Iterator[Memory]:
    """Samples until the process ends."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            yield snapshot([root, *root.children(recursive=True)])
        except psutil.Error:
            continue  # The main process ended between the poll and the reading.
        time.sleep(INTERVAL_S)


def snapshot(tree: list[psutil.Process]) -> Memory:
    """Memory of every process of the tree, the first one being the main one."""
    found = [tree[0].memory_full_info()]
    for process in tree[1:]:
        try:
            found.append(process.memory_full_info())
        except psutil.Error:
            continue  # A helper that has just ended has no memory.
    return Memory(tuple(info.rss for info in found), tuple(info.pss for info in found))


@contextmanager
def importers(modules: list[str], helpers: int) -> Iterator[list[psutil.Process]]:
    """Processes that have imported what the compile and its helpers import, and do nothing else."""
    wanted = [modules, *[HELPER_MODULES] * helpers]
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", IMPORTS_ONLY, json.dumps(names)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for names in wanted
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            process.communicate(timeout=60)


def report(results: list[Result], path: Path | None) -> None:
    """A table for people and, at its end, one line of JSON."""
    print(f"\ncheckpoint {results[0].checkpoint_mb:.0f} MB; memory in MB, over all processes")
    print(
        f"{'run':20}{'time':>8}{'proc':>6}{'imports':>9}{'RSS':>8}{'PSS':>8}{'beyond RSS':>12}{'beyond PSS':>12}  limit"
    )
    for row in results:
        verdict = "ok" if row.headline_mb <= row.limit_mb else "TOO MUCH"
        print(
            f"{row.run:20}{row.seconds:>7.0f}s{row.processes:>6}{row.import_rss_mb:>9.0f}{row.peak_rss_mb:>8.0f}"
            f"{row.peak_pss_mb:>8.0f}{row.beyond_rss_mb:>12.0f}{row.beyond_pss_mb:>12.0f}"
            f"  {row.limit_mb:.0f} {verdict}"
        )
        print(
            f"  at the RSS peak, process by process: {' + '.join(f'{mb:.0f}' for mb in row.beyond_rss_by_process_mb)}"
        )
    document = json.dumps([{**asdict(row), "headline_mb": row.headline_mb} for row in results])
    print(document)
    if path is not None:
        path.write_text(document + "\n")


if __name__ == "__main__":
    sys.exit(main())
