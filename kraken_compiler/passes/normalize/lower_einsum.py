"""Write a two-operand einsum as a linear (with a weight) or a matmul (of two activations).

%q = einsum("bsd,hdk->bhsk", [%x, %w])     ->     %y = linear(%x, reshape(permute(%w, h k d), [h*k, d]))
                                                  %q = permute(reshape(%y, [b, s, h, k]), b h s k)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, calls, replace
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.shapes import shape_of


@dataclass(frozen=True)
class LowerEinsum(Pass[Program]):
    name: ClassVar[str] = "lower-einsum"

    def run(self, program: Program) -> PassResult:
        weights = weight_derived(program)
        matches = 0
        for node in calls(program.graph, aten.einsum.default):
            equation, tensors = args_of(node)[0].replace(" ", ""), args_of(node)[1]
            if len(tensors) != 2 or "->" not in equation or "." in equation:
                continue
            (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
            if any(len(set(letters)) != len(letters) for letters in (left, right, out)):
                continue
            x, other = tensors
            if x in weights:
                (x, left), (other, right) = (other, right), (x, left)
            with program.graph.inserting_before(node):
                builder = _Builder(program.graph, dict(zip(left, x_sizes(x))) | dict(zip(right, x_sizes(other))))
                build = builder.linear if other in weights else builder.matmul
                new = build(x, left, other, right, out)
            if new is not None:
                replace(node, new)
                matches += 1
        return PassResult(matches)


def x_sizes(node: fx.Node) -> list[Any]:
    """A size for every dim of `node`: a number, or where to read it in the graph as (node, dim)."""
    return [size if isinstance(size, int) else (node, dim) for dim, size in enumerate(shape_of(node))]


@dataclass
class _Builder:
    graph: fx.Graph
    sizes: dict[str, Any]

    def linear(self, x: fx.Node, left: str, weight: fx.Node, right: str, out: str) -> fx.Node | None:
        """Write x and a weight that share only contracted letters as a linear."""
        contracted = [letter for letter in left if letter in right]
        free_left = [letter for letter in left if letter not in right]
        free_right = [letter for letter in right if letter not in left]
        if any(letter in out for letter in contracted) or set(free_left + free_right) != set(out):
            return None
        x = self._reshape(self._permute(x, left, free_left + contracted), [*free_left, tuple(contracted)])
        matrix = self._reshape(
            self._permute(weight, right, free_right + contracted), [tuple(free_right), tuple(contracted)]
        )
        product = self.graph.call_function(LINEAR, (x, matrix))
        return self._permute(self._reshape(product, free_left + free_right), "".join(free_left + free_right), list(out))

    def matmul(self, x: fx.Node, left: str, other: fx.Node, right: str, out: str) -> fx.Node | None:
        """Write two activations with shared batch letters, one contracted and one free letter each as a matmul."""
        shared = [letter for letter in left if letter in right and letter in out]
        contracted = [letter for letter in left if letter in right and letter not in out]
        rows = [letter for letter in left if letter not in right]
        columns = [letter for letter in right if letter not in left]
        if not len(contracted) == len(rows) == len(columns) == 1 or set(shared + rows + columns) != set(out):
            return None
        product = self.graph.call_function(
            aten.matmul.default,
            (
                self._permute(x, left, shared + rows + contracted),
                self._permute(other, right, shared + contracted + columns),
            ),
        )
        return self._permute(product, "".join(shared + rows + columns), list(out))

    def _permute(self, node: fx.Node, source: str, target: list[str]) -> fx.Node:
        order = [source.index(letter) for letter in target]
        return self.graph.call_function(aten.permute.default, (node, order))

    def _reshape(self, node: fx.Node, dims: list[Any]) -> fx.Node:
        return self.graph.call_function(aten.reshape.default, (node, [self._size(dim) for dim in dims]))

    def _size(self, dim: Any) -> Any:
        if isinstance(dim, tuple):
            return math.prod(self.sizes[letter] for letter in dim)
        size = self.sizes[dim]
        return self.graph.call_function(aten.sym_size.int, size) if isinstance(size, tuple) else size
