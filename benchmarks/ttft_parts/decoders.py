"""What a contender looks like to the clock, and how each of them is made. Runs inside a rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ttft_parts.contenders import BOUND, DTENSOR, TP_PLAN, Contender


class Decoder(Protocol):
    """A model with a KV cache for one sequence; shapes as in `kraken_compiler`'s own decoders."""

    def reset(self) -> None:
        """Forget the sequence."""

    def prefill(self, ids: Tensor) -> Tensor:
        """`int64 [1, prompt]` to the last token's logits, `[1, vocabulary]`."""

    def step(self, token: Tensor) -> Tensor:
        """`int64 [1]` to its logits, `[1, vocabulary]`."""


class Factory:
    """Makes decoders, loading every model once however many shapes and modes ask for it.

    Args:
        model: Directory of the source model.
        artifacts: Our compiled models by form.
        dtype: Element type.
        degree: Number of ranks.
    """

    def __init__(self, model: Path, artifacts: dict[str, Path], dtype: torch.dtype, degree: int) -> None:
        self.model = model
        self.artifacts = artifacts
        self.dtype = dtype
        self.degree = degree
        self._loaded: dict[str, Any] = {}

    def make(self, contender: Contender, capacity: int) -> Decoder:
        compiled = contender.mode == "compiled"
        if contender.family in (TP_PLAN, DTENSOR):
            load = self._load_tp_plan if contender.family == TP_PLAN else self._load_dtensor
            return TransformersDecoder(self._once(contender.family, load), capacity, compiled)
        communicator = {BOUND: "none"}.get(contender.family, "group" if contender.mode == "gloo" else None)
        key = f"{contender.family} {communicator}"
        program = self._once(key, lambda: self._load_ours(contender, communicator))
        decoder = program.decoder(batch=1, capacity=capacity, compiled=compiled)
        decoder.split_from = 2 if contender.split else None
        return OurDecoder(decoder)

    def _once(self, key: str, load: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]

    def _load_tp_plan(self) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            from transformers.distributed import DistributedConfig

            plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
        except (ImportError, TypeError):
            plan = {"tp_plan": "auto"}  # before transformers had that class
        options = {"dtype": self.dtype, "attn_implementation": "sdpa", **plan}
        return AutoModelForCausalLM.from_pretrained(self.model, **options).eval()

    def _load_dtensor(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        from transformers import AutoModelForCausalLM

        options = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(self.model, **options).eval().requires_grad_(False)
        # Each rank looks tokens up in a whole embedding: a split one would cost one more all-reduce.
        plan: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.*.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.*.{name}"] = RowwiseParallel()
        return parallelize_module(model, init_device_mesh("cpu", (self.degree,)), plan)

    def _load_ours(self, contender: Contender, communicator: str | None) -> Any:
        from kraken_compiler.artifact.read import open_artifact
        from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram

        assert contender.form is not None
        artifact = open_artifact(self.artifacts[contender.form], verify=False)
        return RankProgram.load(artifact, communicator=communicator)


class OurDecoder:
    """One of our decoders."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def reset(self) -> None:
        self.decoder.reset()

    def prefill(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.decoder.prefill(ids.numpy(), np.array([ids.shape[1]])))

    def step(self, token: Tensor) -> Tensor:
        return torch.from_numpy(self.decoder.step(token.numpy()))


class TransformersDecoder:
    """A transformers model with its own cache, called as its `generate` would call it, without what surrounds that.

    Eager with a DynamicCache: on CPUs it is faster there than a StaticCache, whose attention covers the whole capacity
    behind a mask. Compiled with a StaticCache, since the other one's shapes change with every token.
    """

    def __init__(self, model: Any, capacity: int, compiled: bool) -> None:
        self.model = model
        self.capacity = capacity
        self.compiled = compiled
        self.cache: Any = None
        self._prefill = torch.compile(model.forward, dynamic=False) if compiled else model.forward
        self._step = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def reset(self) -> None:
        from transformers import DynamicCache, StaticCache

        with self._mode():
            if not self.compiled:
                self.cache = DynamicCache(config=self.model.config)
            elif self.cache is None:
                self.cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
            else:
                self.cache.reset()

    def prefill(self, ids: Tensor) -> Tensor:
        return self._call(self._prefill, ids)

    def step(self, token: Tensor) -> Tensor:
        return self._call(self._step, token[:, None])

    def _call(self, forward: Callable[..., Any], ids: Tensor) -> Tensor:
        with self._mode():
            output = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            logits: Tensor = output.logits[:, -1]
            return logits

    def _mode(self) -> Any:
        # A compiled function writes into its cache, which an inference tensor would not let it do in every release.
        return torch.no_grad() if self.compiled else torch.inference_mode()
