"""Derive from a lane program the step program: the same computation on new tokens only, with a KV cache.

    lane program(ids [b, s])                     step program(ids [b, t], positions [b, t], caches, tables, ...)
    %y = scaled_dot_product_attention(           %y = kraken.cached_attention(%q, %k, %v,
             %q, %k, %v, %mask)                           %key_0, %value_0, %positions, ...)
    %q = mul(%x, %cos)                           %q = mul(%x, index(%cos_table, [%positions]))

What depends on positions alone (rotary and learned embeddings, prepared weights) moves to the tables program, which
runs once for a capacity. The lane program stays as it is. A model whose tokens meet anywhere but in causal attention
gets no step program, and `program.no_cache` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import CachedProgram, Program
from kraken_compiler.ir.sample_inputs import token_input
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.cache.step_builder import StepBuilder
from kraken_compiler.passes.shapes import shape_of


@dataclass(frozen=True)
class CacheAttention(Pass):
    name: ClassVar[str] = "cache-attention"
    requires: ClassVar[tuple[str, ...]] = ("layers", "windows")

    def run(self, program: Program) -> PassResult:
        if program.cached is not None:
            return PassResult()
        found = _derive(program)
        if isinstance(found, Rejection):
            program.no_cache = str(found)
            return PassResult()
        program.cached = found
        return PassResult(len(found.plan.caches))


def _derive(program: Program) -> CachedProgram | Rejection:
    token = token_input(program)
    if len(program.inputs) != 1:
        return Rejection("it takes more than token ids")
    if token is None:
        return Rejection("its input is not token ids [batch, sequence] that an embedding looks up as they are")
    logits = _logits(program)
    if logits is None or program.layers is None:
        return Rejection("it has no logits")
    tokens = next(node for node in program.graph.nodes if node.name == token.name)
    return StepBuilder(program, tokens, logits).build()


def _logits(program: Program) -> fx.Node | None:
    """The output that the vocabulary projection makes, [batch, sequence, vocabulary]."""
    (results,) = program.graph.output_node().args
    assert isinstance(results, tuple)
    result = results[program.call.logits]
    return result if isinstance(result, fx.Node) and len(shape_of(result)) == 3 else None
