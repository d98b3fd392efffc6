"""Checks that the parts of a manifest fit each other, beyond its fields' types. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.size_checks import BATCH
from kraken_compiler.ir.size_rules import names_in
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ops.structure_safety import require_safe_structure

_DTYPES = frozenset(
    [
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
    ]
)


def check_dtypes(dtypes: Iterable[str]) -> None:
    """Make sure that names are those of element types.

    Raises:
        ValueError: One is not.
    """
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise ValueError(f"{dtype!r} is no element type of weights or inputs")


def check_weights(weights: Iterable[WeightSpec], degree: int) -> None:
    """Make sure that every lane's part of every weight lies inside the source tensor.

    Raises:
        ValueError: One does not, or a name comes twice.
    """
    names: set[str] = set()
    for spec in weights:
        if spec.name in names:
            raise ValueError(f"weight {spec.name!r} comes twice")
        names.add(spec.name)
        if any(size < 0 for size in spec.source_shape):
            raise ValueError(f"weight {spec.name!r} has a negative size")
        for shard in spec.shards:
            if not 0 <= shard.dim < len(spec.source_shape) or len(shard.lanes) != degree:
                raise ValueError(f"weight {spec.name!r} is not split over {degree} lanes along one of its dims")
            if not any(stop > start for intervals in shard.lanes for start, stop in intervals):
                raise ValueError(f"no lane has a part of weight {spec.name!r}")
            size = spec.source_shape[shard.dim]
            if not all(0 <= start <= stop <= size for intervals in shard.lanes for start, stop in intervals):
                raise ValueError(f"a lane's part of weight {spec.name!r} lies outside of it")


def check_call(call: CallSpec, inputs: Iterable[InputSpec]) -> None:
    """Make sure that inputs are arguments, that their structures can be restored without running anything, and that
    rules for sizes speak of the inputs' sizes.

    Raises:
        ValueError: They are not.
    """
    sizes: set[str] = set()
    for spec in inputs:
        if spec.parameter not in call.trees:
            raise ValueError(f"input {spec.name!r} belongs to no argument")
        sizes.update(size for size in spec.shape if isinstance(size, str))
    for rule in call.sizes:
        if not names_in(rule) <= sizes:
            raise ValueError(f"the rule {rule!r} is about sizes that no input has")
    for text in (call.out_tree, *call.trees.values()):
        require_safe_structure(text)


def check_rows(dims: RowDims, inputs: Sequence[InputSpec], call: CallSpec) -> None:
    """Make sure that the rows lie in dims of the inputs that are a batch's, and that every output is spoken of.

    Raises:
        ValueError: They do not, or one is not.
    """
    is_batch = [
        dim is None or (0 <= dim < len(spec.shape) and spec.shape[dim] == BATCH)
        for dim, spec in zip(dims.inputs, inputs)
    ]
    if len(dims.inputs) != len(inputs) or not all(is_batch) or set(dims.inputs) <= {None}:
        raise ValueError("its rows lie in no dims of its inputs")
    outputs = call.output_names
    if len(dims.outputs) != len(outputs) or any(dim is not None and dim < 0 for dim in dims.outputs):
        raise ValueError("its rows lie in no dims of its outputs")
