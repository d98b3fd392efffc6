"""Time what a server of vLLM's answers with: its own model class beside ours, in one run.

    python benchmarks/serving.py                         in the environment of `make test-vllm`
    python benchmarks/serving.py --rates 1,2,4 --rounds 2 --json OUT.json
    python benchmarks/serving.py --only own,standard     some of the servers, for more rounds in the same time
    python benchmarks/serving.py --hosts 2 --links 1     every rank on a host of its own (root; network namespaces)

A Llama-shaped model of random weights is served by vLLM's own class and by compiled artifacts, at the same tensor
parallel size, one server after the other and all of them again in the opposite order (`--rounds`). The load is vLLM's
own benchmark client: prompts of random tokens, as many requests a second as `--rates` says, and one at a time. On CPUs
every worker is bound to its share of the cores, vLLM's own class, too; on GPUs nothing has to be changed.

`kraken` is served once more with other collectives: vLLM's own all-reduce in place of ours, and none at all, which
computes wrong numbers in the time that no communication could beat. How long a server takes from its start to its first
answer is measured, too: in the first round nothing of it is compiled yet.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ttft_parts.network import UNLIMITED, Network, network

from kraken_compiler.backends.vllm.run.environment import server as vllm_server

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
START = "seconds to the first answer"
_CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())\n"
)
_FIRST_ANSWER = (
    "import json, sys, time, urllib.request\n"
    "body = json.dumps({'model': 'm', 'prompt': 'Hello', 'max_tokens': 1}).encode()\n"
    "request = urllib.request.Request(sys.argv[1], body, {'Content-Type': 'application/json'})\n"
    "while True:\n"
    "    try:\n"
    "        urllib.request.urlopen(request, timeout=60).read()\n"
    "        break\n"
    "    except OSError:\n"
    "        time.sleep(0.1)\n"
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
    collectives: str = "auto"

    def command(self, model: Path, degree: int) -> list[str]:
        """The command line of its server, as far as it is its own."""
        if self.form is None:
            return [*vllm_server(str(model)), "--tensor-parallel-size", str(degree)]
        extra = {"kraken": {"collectives": self.collectives}}
        serve = [sys.executable, "-m", "kraken_compiler.cli.serve", str(model)]
        return [*serve, "--additional-config", json.dumps(extra)]


CONTENDERS = {
    "own": Contender("vLLM's own class"),
    "standard": Contender("standard", "standard"),
    "kraken": Contender("kraken", "kraken"),
    "engine": Contender("kraken, vLLM's all-reduce", "kraken", "engine"),
    "none": Contender("no communication", "kraken", "none"),
}
"""By the names of `--only`."""

Results = dict[str, dict[str, list[dict[str, float]]]]
"""Of every contender and load, one measurement a round."""


def main() -> int:
    arguments = _arguments()
    results: Results = {}
    contenders = [CONTENDERS[name] for name in arguments.only]
    hosts = network(arguments.hosts, "namespaces") if arguments.hosts > 1 else network(1, "loopback")
    with tempfile.TemporaryDirectory(prefix="kraken-serving-") as place, hosts as net:
        models = write_models(Path(place), contenders, arguments.degree, arguments.dtype)
        for number in range(arguments.rounds):
            order = contenders if number % 2 == 0 else contenders[::-1]
            for contender in order:
                net.set_link(UNLIMITED)
                with server(contender, models[contender.form], net, arguments, Path(place)) as (address, seconds):
                    of_contender = results.setdefault(contender.name, {})
                    of_contender.setdefault(START, []).append({START: round(seconds, 1)})
                    tell(f"round {number + 1}: {contender.name}, {seconds:.1f} s to the first answer")
                    for link in arguments.links:
                        net.set_link(link)
                        for rate in (ALONE, *arguments.rates):
                            found = load(address, models[None], rate, net, arguments, Path(place))
                            of_contender.setdefault(_title(rate, link, net), []).append(found)
                            tell(f"round {number + 1}: {contender.name}, {_title(rate, link, net)}: {found}")
            if arguments.json is not None:
                settings = {name: str(value) for name, value in vars(arguments).items()}
                whole = {"settings": settings, "results": results}
                arguments.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print("\n".join(report(results)))
    return 0


def _title(rate: str, link: str, net: Network) -> str:
    load = "one request at a time" if rate == ALONE else f"{rate} requests a second"
    if net.kind == "loopback":
        return load
    return f"{load}, {'unlimited link' if link == UNLIMITED else f'{link} Gbit/s'}"


def write_models(place: Path, contenders: Sequence[Contender], degree: int, dtype: str) -> dict[str | None, Path]:
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
    for form in dict.fromkeys(contender.form for contender in contenders if contender.form is not None):
        models[form] = place / form
        options = ("--degree", str(degree), "--form", form, "--backend", "vllm", "-o", str(place / form), "--quiet")
        subprocess.run(
            [sys.executable, "-m", "kraken_compiler.cli.compile", str(place / "source"), *options], check=True
        )
    return models


@contextmanager
def server(
    contender: Contender, model: Path, net: Network, arguments: argparse.Namespace, place: Path
) -> Iterator[tuple[str, float]]:
    """A running server's address, and how many seconds it took to its first answer."""
    port, master_port = _free_ports(2)
    address = f"http://{net.address}:{port}"
    command = [*contender.command(model, arguments.degree), "--served-model-name", "m"]
    command += ["--dtype", arguments.dtype, "--no-enable-prefix-caching", "--max-model-len", "2048"]
    command += arguments.server_options.split()
    logs = [place / f"server{rank}.log" for rank in range(arguments.hosts)]
    begin = time.perf_counter()
    processes = []
    try:
        for rank, log in enumerate(logs):
            nodes = ["--nnodes", str(arguments.hosts), "--node-rank", str(rank), "--master-addr", net.address]
            nodes += ["--master-port", str(master_port)]
            own = ["--headless"] if rank else ["--host", net.address, "--port", str(port)]
            whole = net.command(rank, [*command, *own, *(nodes if arguments.hosts > 1 else [])])
            environment = {**_settings(net, rank, arguments, place), **os.environ}
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        whole, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
                    )
                )
        _wait(processes, net.command(0, [sys.executable, "-c", _FIRST_ANSWER, f"{address}/v1/completions"]), logs)
        yield address, time.perf_counter() - begin
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait(120)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _settings(net: Network, rank: int, arguments: argparse.Namespace, place: Path) -> dict[str, str]:
    """What is compiled is kept for this run alone, and on CPUs every worker has cores of its own, wherever it is."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // arguments.degree, 1)
    lanes = [cores[lane * share : (lane + 1) * share] or cores for lane in range(arguments.degree)]
    bound = [",".join(map(str, lane)) for lane in lanes]
    settings = {
        "VLLM_CACHE_ROOT": str(place / f"cache{rank}"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / f"inductor{rank}"),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(bound) if arguments.hosts == 1 else bound[rank],
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    if net.kind != "loopback":
        # No name server knows these hosts.
        first, _, number = net.address.rpartition(".")
        settings |= {"VLLM_HOST_IP": f"{first}.{int(number) + rank}", "GLOO_SOCKET_IFNAME": net.interface}
    return settings


def _wait(processes: Sequence[subprocess.Popen[bytes]], question: list[str], logs: Sequence[Path]) -> None:
    """Ask until there is an answer."""
    end = time.monotonic() + START_SECONDS
    asking = subprocess.Popen(question)
    try:
        while asking.poll() is None and time.monotonic() < end and all(one.poll() is None for one in processes):
            time.sleep(0.05)
    finally:
        asking.kill()
    if asking.wait() != 0:
        raise SystemExit("no server:\n" + "\n".join(log.read_text()[-3000:] for log in logs))


def load(
    address: str, tokenizer: Path, rate: str, net: Network, arguments: argparse.Namespace, place: Path
) -> dict[str, float]:
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
    done = subprocess.run(net.command(0, command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the client failed:\n{done.stderr[-3000:]}")
    found = json.loads((place / "result.json").read_text())
    assert found["completed"] == count, f"{found['completed']} of {count} requests were answered"
    times = {f"{metric} p{p}": found[f"p{p}_{metric}_ms"] for metric in METRICS for p in (50, 99)}
    return {name: round(value, 2) for name, value in (times | {"tokens/s": found["output_throughput"]}).items()}


def report(results: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> list[str]:
    """Medians over the rounds, ratios to the first server, and the share of the communication that each one hides."""
    names = [contender.name for contender in CONTENDERS.values() if contender.name in results]
    standard, bound = CONTENDERS["standard"].name, CONTENDERS["none"].name
    hidden = [CONTENDERS[key].name for key in ("kraken", "engine") if {standard, bound} <= set(names)]
    lines = []
    for title in next(iter(results.values())):
        of_load = {name: _medians(results[name][title]) for name in names}
        metrics = list(next(iter(of_load.values())))
        unit = "" if title == START else f" (ms; over {names[0]})"
        lines += ["", f"{title}{unit}"]
        if title != START:
            lines.append("".ljust(28) + "".join(one.rjust(20) for one in metrics))
        for name in names:
            cells = [f"{of_load[name][one]:.1f} ({of_load[name][one] / of_load[names[0]][one]:.2f})" for one in metrics]
            lines.append(name.ljust(28) + "".join(cell.rjust(20) for cell in cells))
        for metric in (f"{metric} p50" for metric in METRICS if title != START):
            for name in (name for name in hidden if name in names):
                slowest = of_load[standard][metric]
                saved, lost = slowest - of_load[name][metric], slowest - of_load[bound][metric]
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
    parser.add_argument("--hosts", type=int, default=1, help="1, or the tensor parallel size (default: 1)")
    parser.add_argument(
        "--links",
        type=lambda text: text.split(","),
        default=[UNLIMITED],
        help="Gbit/s between hosts (default: unlimited)",
    )
    parser.add_argument(
        "--rates", type=lambda text: text.split(",") if text else [], default=["1", "2", "4"], help="requests a second"
    )
    parser.add_argument("--requests", type=int, default=24, help="requests for every rate (default: 24)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=2, help="how often all servers are started (default: 2)")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(CONTENDERS),
        metavar="NAMES",
        help=f"which servers, of {','.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument("--server-options", default="", help="more options of vLLM's server, in one text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    arguments = parser.parse_args()
    if arguments.hosts not in (1, arguments.degree):
        parser.error(f"--hosts {arguments.hosts}: choose 1 or {arguments.degree}, a host for every rank")
    unknown = [name for name in arguments.only if name not in CONTENDERS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose among {','.join(CONTENDERS)}")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
