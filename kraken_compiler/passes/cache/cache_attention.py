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

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import CachedProgram, LaneProgram, Program
from kraken_compiler.ir.size_checks import SEQUENCE, token_rules
from kraken_compiler.ir.size_rules import all_in_words, broken_rule, names_in
from kraken_compiler.passes.cache.step_builder import StepBuilder
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.sample_inputs import token_input
from kraken_compiler.passes.shapes import shape_of

_LENGTHS, _RUN = 1 << 12, 4
"""Number of lengths that are tried, and of successive ones that a text must be able to have."""


@dataclass(frozen=True)
class CacheAttention(Pass[LaneProgram]):
    name: ClassVar[str] = "cache-attention"
    requires: ClassVar[type[Program]] = LaneProgram

    def run(self, program: LaneProgram) -> PassResult:
        if program.cached is not None:
            return PassResult()
        outcome = _growth_obstacle(program) or _derive(program)
        if isinstance(outcome, CachedProgram):
            return PassResult(len(outcome.plan.caches), program=replace(program, cached=outcome))
        return PassResult(program=replace(program, no_cache=str(outcome)))


def _growth_obstacle(program: Program) -> str:
    """The reason why a program's texts cannot grow token by token, as a KV cache needs; "" if they can."""
    rules = [rule for rule in token_rules(program.call, program.inputs) if names_in(rule) == {SEQUENCE}]
    if not rules:
        return ""
    is_allowed = [broken_rule(rules, {SEQUENCE: length}) is None for length in range(1, _LENGTHS)]
    runs = (all(is_allowed[start : start + _RUN]) for start in range(len(is_allowed) - _RUN + 1))
    return "" if any(runs) else f"a text cannot grow token by token ({'; '.join(all_in_words(rules))})"


def _derive(program: LaneProgram) -> CachedProgram | Rejection:
    token = token_input(program)
    if len(program.inputs) != 1:
        return Rejection("it takes more than token ids")
    if token is None:
        return Rejection("its input is not token ids [batch, sequence] that an embedding looks up as they are")
    logits = _logits(program)
    if logits is None:
        return Rejection("it has no logits")
    tokens = next(node for node in program.graph.nodes if node.name == token.name)
    return StepBuilder(program, tokens, logits).build()


def _logits(program: Program) -> fx.Node | None:
    """The output that the vocabulary projection makes, [batch, sequence, vocabulary]."""
    (results,) = program.graph.output_node().args
    assert isinstance(results, tuple)
    result = results[program.call.logits]
    return result if isinstance(result, fx.Node) and len(shape_of(result)) == 3 else None
