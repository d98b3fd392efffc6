"""A small lane program written by hand, for tests of what comes after the passes: two layers, attention beside FFN."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.program import CallSpec, InputSpec, LaneProgram
from kraken_compiler.ir.schedule import FormPlan, Read, Reduce
from kraken_compiler.ir.weight_table import DimShard, WeightSpec
from kraken_compiler.ops import collectives as ops  # noqa: F401  (defines the kraken ops)
from kraken_compiler.weights.store import MemoryStore

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS = 50, 24, 6, 48, 2


def _spec(name: str, shape: tuple[int, ...], degree: int, split: int | None = None, **more: Any) -> WeightSpec:
    shards: tuple[DimShard, ...] = ()
    if split is not None:
        step = -(-shape[split] // degree)
        bounds = [(lane * step, min((lane + 1) * step, shape[split])) for lane in range(degree)]
        shards = (DimShard(split, tuple((bound,) for bound in bounds)),)
    more = {"kind": "parameter", "dtype": "float32"} | more
    return WeightSpec(name.replace(".", "_"), name, shape, shards=shards, **more)


def toy_sources(seed: int = 0) -> dict[str, Tensor]:
    """The source tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for part in "qkv":
            shapes[f"{layer}.{part}"] = (WIDTH, WIDTH)
        shapes |= {
            f"{layer}.o": (WIDTH, WIDTH),
            f"{layer}.up": (HIDDEN, WIDTH),
            f"{layer}.down": (WIDTH, HIDDEN),
            f"{layer}.bias": (WIDTH,),
        }
    tensors = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return tensors | {"scale": torch.tensor(0.5)}


@lru_cache
def toy_program(degree: int) -> LaneProgram:
    """The lane program; `degree` divides the heads. The head's vocabulary is padded where it has to be.

    Made once a process; whoever changes its graph takes a copy.
    """
    table = [_spec("embedding", (VOCABULARY, WIDTH), degree)]
    for layer in range(LAYERS):
        table += [_spec(f"{layer}.{part}", (WIDTH, WIDTH), degree, 0) for part in "qkv"]
        table += [
            _spec(f"{layer}.o", (WIDTH, WIDTH), degree, 1),
            _spec(f"{layer}.up", (HIDDEN, WIDTH), degree, 0),
            _spec(f"{layer}.down", (WIDTH, HIDDEN), degree, 1),
            _spec(f"{layer}.bias", (WIDTH,), degree, scale=1 / degree),
        ]
    head = _spec("embedding", (VOCABULARY, WIDTH), degree, 0)
    table += [
        WeightSpec("head", "embedding", head.source_shape, "float32", "parameter", head.shards),
        _spec("scale", (), degree, kind="buffer"),
    ]
    table = [WeightSpec("w_" + spec.name, *_rest(spec)) for spec in table]

    def forward(*operands: Tensor) -> tuple[Tensor, Tensor]:
        *flat, ids = operands
        weights = iter(flat)
        batch, length = ids.shape
        x = F.embedding(ids, next(weights)) + torch.arange(length, device=ids.device).unsqueeze(-1) * 0.01
        for _ in range(LAYERS):
            q, k, v, o, up, down, bias = (next(weights) for _ in range(7))

            def heads(weight: Tensor, x: Tensor = x) -> Tensor:
                return F.linear(x, weight).view(batch, length, HEADS // degree, -1).transpose(1, 2)

            mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
            attention = torch.ops.kraken.all_reduce_start(F.linear(mixed, o))
            hidden = F.linear(F.gelu(F.linear(x, up)), down, bias)
            ffn = torch.ops.kraken.all_reduce_start(hidden)
            x = x + torch.ops.kraken.wait(attention) + torch.ops.kraken.wait(ffn)
        head, scale = next(weights), next(weights)
        gathered = torch.ops.kraken.all_gather(F.linear(x, head), -1, degree)
        return gathered[..., :VOCABULARY] * scale, x

    class Wrapper(torch.nn.Module):
        def forward(self, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
            return forward(*operands)

    example = [torch.zeros(spec.shape, dtype=spec.torch_dtype) for spec in table]
    dynamic = [*([None] * len(table)), {0: Dim("batch"), 1: Dim("length")}]
    ids = torch.zeros((2, 5), dtype=torch.int64)
    exported = torch.export.export(Wrapper(), ([*example, ids],), dynamic_shapes=(dynamic,), strict=False)
    graph = exported.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, [*(spec.name for spec in table), "input_ids"], strict=True):
        node.name = node.target = name
    exported.graph_module.recompile()
    call = CallSpec(
        parameters=("input_ids",),
        constants={},
        trees={"input_ids": pytree.treespec_dumps(pytree.tree_flatten(0)[1])},
        out_tree=pytree.treespec_dumps(pytree.tree_flatten({"logits": 0, "hidden": 1})[1]),
        out_names=("logits", "hidden"),
        model_class="Toy",
    )
    reduces = tuple(
        Reduce(2 * layer + part, 2 * layer + part + 1, 2 * layer + part + 1, None, (2 * layer + 2,) * (part == 0))
        for layer in range(LAYERS)
        for part in range(2)
    )
    plan = FormPlan(("parallel",) * LAYERS, tuple(Read(k, k - 1, k - 1) for k in range(1, 5)), reduces)
    return LaneProgram(
        module=exported.graph_module,
        weights={spec.name: spec for spec in table},
        inputs=(InputSpec("input_ids", "input_ids", "int64", ("batch", "length")),),
        call=call,
        degree=degree,
        layers=LayerTable("", (), "", "", ()),
        plan=plan,
        windows=(),
    )


def _rest(spec: WeightSpec) -> tuple[Any, ...]:
    return spec.source, spec.source_shape, spec.dtype, spec.kind, spec.shards, spec.scale


def write_toy(directory: Path, degree: int, **options: Any) -> Path:
    """The toy as an artifact of the torch backend."""
    from kraken_compiler.artifact.manifest import Source
    from kraken_compiler.backends.torch_dist.backend import TorchBackend
    from kraken_compiler.backends.write_artifact import write_artifact

    sources = toy_sources()
    source = Source(kind="module", name="Toy", model_class="Toy")
    options = {"report": {"note": "toy"}, "backends": [TorchBackend()]} | options
    return write_artifact(toy_program(degree), MemoryStore(sources).read, directory, source=source, **options)


def edit_manifest(directory: Path, **changes: Any) -> None:
    """Change keys of a manifest."""
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
