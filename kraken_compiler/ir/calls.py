"""The calling convention of a program: its inputs, and the source model's signature around them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

INPUT_IDS, DECODER_IDS = "input_ids", "decoder_input_ids"
"""Names in transformers for the tokens that a model reads, and for those of an encoder-decoder's decoder."""


@dataclass(frozen=True)
class InputSpec:
    """One tensor input of the graph.

    Attributes:
        name: Placeholder name.
        parameter: The argument of the source model's `forward` that it belongs to.
        dtype: torch dtype name, e.g. "int64".
        shape: Sizes; a dynamic one is the name of its symbol, e.g. "batch".
    """

    name: str
    parameter: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CallSpec:
    """The source model's call signature and output structure.

    Attributes:
        parameters: Names of `forward`'s parameters, in positional order.
        constants: Arguments that were fixed at capture, with the value they had.
        trees: For each captured argument, the serialized pytree of its leaves (`torch.utils._pytree`).
        out_tree: The serialized pytree of the output.
        out_names: A name for every output leaf, for when the output class is not importable.
        model_class: The source model's class, for messages.
        defaults: Values of arguments that a call leaves out, where they are single values; none if they are not known.
        implied: Arguments that were fixed at capture though nobody gave them: a call need not, either.
        none_inputs: For a captured argument, which of its leaves were None; the others are tensors.
        none_outputs: Which leaves of the output were None; the others are the graph's outputs, in order.
        sizes: What the sizes of the inputs must keep to for the program to be the model's, see `ir/size_rules.py`.
    """

    parameters: tuple[str, ...]
    constants: dict[str, bool | int | float | str | None]
    trees: dict[str, str]
    out_tree: str
    out_names: tuple[str, ...]
    model_class: str = ""
    defaults: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    none_inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    none_outputs: tuple[int, ...] = ()
    sizes: tuple[str, ...] = ()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return tuple(name for leaf, name in enumerate(self.out_names) if leaf not in self.none_outputs)

    @property
    def logits(self) -> int:
        """Index of a language model's logits among the graph's outputs; 0 if none is called so."""
        return next((index for index, name in enumerate(self.output_names) if name.endswith("logits")), 0)
