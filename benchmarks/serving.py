"""Time what a server of vLLM's answers with: its own model class beside ours, in one run.

    python benchmarks/serving.py                         in the environment of `make test-vllm`
    python benchmarks/serving.py --rates 1,2,4 --rounds 2 --json OUT.json

A Llama-shaped model of random weights is served by vLLM's own class and by compiled artifacts, at the same tensor
parallel size, one server after the other and all of them again in the opposite order (`--rounds`). The load is vLLM's
own benchmark client: prompts of random tokens, as many requests a second as `--rates` says, and one at a time. On CPUs
every worker computes with its share of the cores; on GPUs nothing has to be changed.

`kraken` is served once more with other collectives: vLLM's own all-reduce in place of ours, and none at all, which
computes wrong numbers in the time that no communication could beat.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ALONE = "alone"
START_SECONDS = 600
_CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())\n"
)
METRICS = ("ttft", "tpot")


@dataclass(frozen=True)
class Contender:
    """A server.

    Attributes:
        name: Its name in tables.
        form: The form that is served; None is the source model, by vLLM's own class.
        collectives: What adds up the parts of lanes, see docs/serving.md.
    """

    name: str
    form: str | None = None
    collectives: str = "own"

    def options(self, degree: int) -> list[str]:
        """Options of `vllm serve`."""
        extra = {"kraken": {"collectives": self.collectives}}
        own = [] if self.form is None else ["--additional-config", json.dumps(extra)]
        return ["--tensor-parallel-size", str(degree), *own]


CONTENDERS = (
    Contender("vLLM's own class"),
    Contender("standard", "standard"),
    Contender("kraken", "kraken"),
    Contender("kraken, vLLM's all-reduce", "kraken", "engine"),
    Contender("no communication", "kraken", "none"),
)


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="kraken-serving-") as place:
        models = write_models(Path(place), arguments.degree, arguments.dtype)
        results: dict[str, dict[str, list[dict[str, float]]]] = {}
        for number in range(arguments.rounds):
            order = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
            for contender in order:
                with server(contender, models[contender.form], arguments, Path(place)) as address:
                    for rate in (ALONE, *arguments.rates):
                        found = load(address, models[None], rate, arguments, Path(place))
                        results.setdefault(contender.name, {}).setdefault(rate, []).append(found)
                        tell(f"round {number + 1}: {contender.name}, {rate}: {found}")
    print("\n".join(report(results)))
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1), encoding="utf-8")
    return 0


def write_models(place: Path, degree: int, dtype: str) -> dict[str | None, Path]:
    """Write the source model, with a tokenizer, and compile it into every form that is served."""
    import torch
    from packaged_model import packaged_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=len(tokenizer))).to(getattr(torch, dtype))
    model.save_pretrained(place / "source")
    tokenizer.save_pretrained(place / "source")
    models: dict[str | None, Path] = {None: place / "source"}
    for form in dict.fromkeys(contender.form for contender in CONTENDERS if contender.form is not None):
        models[form] = place / form
        options = ("--degree", str(degree), "--form", form, "--backend", "vllm", "-o", str(place / form), "--quiet")
        subprocess.run(
            [sys.executable, "-m", "kraken_compiler.cli.compile", str(place / "source"), *options], check=True
        )
    return models


@contextmanager
def server(contender: Contender, model: Path, arguments: argparse.Namespace, place: Path) -> Iterator[str]:
    """A running server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "m",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", arguments.dtype, "--no-enable-prefix-caching"]
    command += ["--max-model-len", "2048", *contender.options(arguments.degree), *arguments.server_options.split()]
    log = place / "server.log"
    begin = time.perf_counter()
    with log.open("wb") as output:
        environment = {**_cpu_settings(arguments.degree), **os.environ}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            tell(f"{contender.name}: ready after {time.perf_counter() - begin:.0f} s")
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(120)


def _cpu_settings(degree: int) -> dict[str, str]:
    """As compiled models share a host with too few NUMA nodes, for vLLM's own class, too: it would not start."""
    threads = max(len(os.sched_getaffinity(0)) // degree, 1)
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"}


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit(f"no server:\n{log.read_text()[-3000:]}")


def load(address: str, tokenizer: Path, rate: str, arguments: argparse.Namespace, place: Path) -> dict[str, float]:
    """Let vLLM's client send requests; returns its times in ms, and tokens per second."""
    count = arguments.requests
    options = {
        "--backend": "openai",
        "--base-url": address,
        "--model": "m",
        "--tokenizer": str(tokenizer),
        "--dataset-name": "random",
        "--random-input-len": str(arguments.prompt),
        "--random-output-len": str(arguments.new_tokens),
        "--num-prompts": str(count),
        "--request-rate": "inf" if rate == ALONE else rate,
        "--seed": "0",
        "--num-warmups": "2",
        "--percentile-metrics": ",".join(METRICS),
        "--metric-percentiles": "50,99",
        "--result-dir": str(place),
        "--result-filename": "result.json",
    }
    command = [sys.executable, "-c", _CLIENT, *(part for option in options.items() for part in option)]
    command += [
        "--ignore-eos",
        "--save-result",
        "--disable-tqdm",
        *(["--max-concurrency", "1"] if rate == ALONE else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the client failed:\n{done.stderr[-3000:]}")
    found = json.loads((place / "result.json").read_text())
    assert found["completed"] == count, f"{found['completed']} of {count} requests were answered"
    times = {f"{metric} p{p}": found[f"p{p}_{metric}_ms"] for metric in METRICS for p in (50, 99)}
    return {name: round(value, 2) for name, value in (times | {"tokens/s": found["output_throughput"]}).items()}


def report(results: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> list[str]:
    """Medians over the rounds, ratios to vLLM's own class, and the share of the communication that each one hides."""
    names = [contender.name for contender in CONTENDERS]
    lines = []
    for rate in next(iter(results.values())):
        of_rate = {name: _medians(results[name][rate]) for name in names}
        metrics = list(next(iter(of_rate.values())))
        title = "one request at a time" if rate == ALONE else f"{rate} requests a second"
        lines += ["", f"{title} (ms; over vLLM's own class)", "".ljust(28) + "".join(one.rjust(20) for one in metrics)]
        for name in names:
            cells = [f"{of_rate[name][one]:.1f} ({of_rate[name][one] / of_rate[names[0]][one]:.2f})" for one in metrics]
            lines.append(name.ljust(28) + "".join(cell.rjust(20) for cell in cells))
        for metric in (f"{metric} p50" for metric in METRICS):
            standard, bound = of_rate["standard"][metric], of_rate["no communication"][metric]
            for name in names[2:4]:
                saved, lost = standard - of_rate[name][metric], standard - bound
                share = f"{saved / lost:.0%} of {lost:.1f} ms" if lost > 0 else "nothing is lost"
                lines.append(f"{metric}: {name} hides {share}")
    return lines


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degree", type=int, default=2, help="tensor parallel size (default: 2)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["1", "2", "4"], help="requests a second")
    parser.add_argument("--requests", type=int, default=24, help="requests for every rate (default: 24)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=2, help="how often all servers are started (default: 2)")
    parser.add_argument("--server-options", default="", help="more options of vLLM's server, in one text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
