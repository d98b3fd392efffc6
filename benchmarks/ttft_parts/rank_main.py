"""One rank: joins the group, then does what the parent says, one command after the other."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ttft_parts.contenders import named
from ttft_parts.decoders import Decoder, Factory
from ttft_parts.workloads import prompt_ids

COLLECTIVE_TIMEOUT = timedelta(seconds=600)


class Rank:
    """Holds the decoders of one prompt size, and times them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.rank: int = settings["rank"]
        self.vocabulary: int = settings["vocabulary"]
        artifacts = {form: Path(path) for form, path in settings["artifacts"].items()}
        dtype = getattr(torch, settings["dtype"])
        self.factory = Factory(Path(settings["model"]), artifacts, dtype, settings["degree"])
        self.decoders: dict[str, Decoder] = {}
        self.ids = torch.empty(0)

    def hello(self) -> None:
        """Only to be answered: the group is complete."""

    def start_prompt(self, size: int) -> None:
        """Forget the decoders of other sizes, and take prompts of this one."""
        self.decoders.clear()
        torch.compiler.reset()
        # Several contenders' prefills and steps share transformers' code objects, each a specialisation of its own.
        torch._dynamo.config.recompile_limit = 64
        self.ids = prompt_ids(self.vocabulary, size)
        gc.unfreeze()
        gc.collect()

    def prepare(self, contender: str, new_tokens: int, logits_file: str) -> dict[str, Any]:
        """Make a decoder and generate with it once, compiling on the way; the logits of all tokens go to a file."""
        began = time.perf_counter()
        size = self.ids.shape[1]
        decoder = self.factory.make(named(contender), size + new_tokens)
        dist.barrier()
        decoder.reset()
        logits = [decoder.prefill(self.ids)]
        tokens = [_best(logits[0])]
        for _ in range(new_tokens - 1):
            logits.append(decoder.step(torch.tensor([tokens[-1]])))
            tokens.append(_best(logits[-1]))
        if self.rank == 0:
            torch.save(torch.cat([row.detach().float().clone() for row in logits]), logits_file)
        self.decoders[contender] = decoder
        # A used cache may be another specialisation than a new one.
        self.generate(contender, min(3, new_tokens))
        return {"tokens": tokens, "seconds": time.perf_counter() - began}

    def settle(self) -> None:
        """What exists now is not looked at by the garbage collector again."""
        gc.collect()
        gc.freeze()

    def generate(self, contender: str, new_tokens: int) -> dict[str, Any]:
        """One timed generation; TPOT is the mean over the tokens after the first, None if there are none."""
        decoder = self.decoders[contender]
        decoder.reset()
        gc.collect()
        gc.disable()
        try:
            dist.barrier()
            began = time.perf_counter()
            tokens = [_best(decoder.prefill(self.ids))]
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                tokens.append(_best(decoder.step(torch.tensor([tokens[-1]]))))
            last = time.perf_counter()
        finally:
            gc.enable()
        following = new_tokens - 1
        return {"tokens": tokens, "ttft": first - began, "tpot": (last - first) / following if following else None}

    def measure_link(self, send_bytes: int, reduce_bytes: list[int]) -> dict[str, Any]:
        """Rate of one large message, and the time of all-reduces, as gloo reaches them between warm connections."""
        message = torch.zeros(send_bytes, dtype=torch.uint8)
        token = torch.zeros(1)
        rates = []
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            if self.rank == 0:
                dist.send(message, 1)
                dist.recv(token, 1)
            elif self.rank == 1:
                dist.recv(message, 0)
                dist.send(token, 0)
            rates.append(send_bytes * 8 / (time.perf_counter() - began) / 1e9)
        return {"gbits": sorted(rates)[1], "all_reduce": {str(size): _reduce_seconds(size) for size in reduce_bytes}}


def _best(logits: Tensor) -> int:
    return int(logits[0].argmax())


def _reduce_seconds(size: int) -> float:
    values = torch.zeros(max(1, size // 4))
    seconds = []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[3]


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank, degree = settings["rank"], settings["degree"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= degree:
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    store = dist.FileStore(settings["store"], degree)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degree, timeout=COLLECTIVE_TIMEOUT)
    this = Rank(settings)
    with os.fdopen(settings["reply_to"], "w") as reply:
        for line in sys.stdin:
            arguments = json.loads(line)
            try:
                answer = {"result": getattr(this, arguments.pop("do"))(**arguments)}
            except Exception as error:
                traceback.print_exc()
                text = str(error).strip().splitlines() or [""]
                answer = {"error": f"{type(error).__name__}: {text[0][:300]}"}
            reply.write(json.dumps(answer) + "\n")
            reply.flush()
    # Peers may be gone already, and nothing is left to wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
