"""Checks of sizes against a program's rules, where it is called and before it generates. Imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.size_rules import broken_rule, clearest, in_words, names_in, parse_rule

BATCH, SEQUENCE = "batch", "sequence"
"""Names of the sizes of token ids, [batch, sequence]."""


def sizes_of(call: CallSpec, inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The sizes that a program's named dims have in a call.

    Args:
        call: Names the model.
        inputs: The program's inputs.
        shapes: A shape for each of them, of as many dims.

    Raises:
        UsageError: One dim's size is not that of another of the same name, or is 0.
    """
    sizes: dict[str, int] = {}
    parameters: dict[str, str] = {}
    for spec, shape in zip(inputs, shapes, strict=True):
        for name, size in zip(spec.shape, shape):
            if not isinstance(name, str):
                continue
            if size < 1:
                raise UsageError(f"argument '{spec.parameter}' of {_model(call)} is empty: its {name} size is {size}")
            if sizes.setdefault(name, size) != size:
                raise UsageError(
                    f"the {name} size of {_model(call)} is {sizes[name]} in argument '{parameters[name]}' and {size} "
                    f"in '{spec.parameter}'; both must be the same"
                )
            parameters.setdefault(name, spec.parameter)
    return sizes


def require_sizes(call: CallSpec, inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> None:
    """Make sure that a call's sizes keep to the program's rules.

    Raises:
        UsageError: They do not; names the rule.
    """
    sizes = sizes_of(call, inputs, shapes)
    rule = broken_rule(call.sizes, sizes)
    if rule is not None:
        clear_rule = broken_rule(clearest(call.sizes), sizes) or rule
        raise UsageError(refusal(_model(call), sizes, clear_rule))


def suits(call: CallSpec, inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> bool:
    """True if a call's sizes keep to the program's rules; see `require_sizes`."""
    return broken_rule(call.sizes, sizes_of(call, inputs, shapes)) is None


def refusal(model: str, sizes: Mapping[str, int], rule: str) -> str:
    """The reason for which a call is refused, in one line."""
    names = names_in(rule)
    sizes_in_words = ", ".join(f"{name} {size}" for name, size in sizes.items() if name in names)
    return (
        f"{model} was compiled for other sizes than {sizes_in_words}: {in_words(rule)}, because its code computes "
        "otherwise, or asks for it, at other sizes; compile it again with example inputs of such sizes"
    )


def token_rules(call: CallSpec, inputs: Sequence[InputSpec]) -> tuple[str, ...]:
    """A program's rules for a batch of token ids, over the names `batch` and `sequence` alone.

    Sizes of further inputs that are not those of the ids are not known before a call, and compared there.
    """
    ids = next((spec for spec in inputs if len(spec.shape) == 2), None)
    if ids is None:
        return ()
    token_names = {name: new for name, new in zip(ids.shape, (BATCH, SEQUENCE)) if isinstance(name, str)}
    fixed_sizes = [f"{new} == {size}" for size, new in zip(ids.shape, (BATCH, SEQUENCE)) if isinstance(size, int)]
    rules_of_ids = {rule for rule in call.sizes if names_in(rule) <= token_names.keys()}
    renamed_rules = [_rename_sizes(rule, token_names) for rule in call.sizes if rule in rules_of_ids]
    return tuple(dict.fromkeys((*fixed_sizes, *renamed_rules)))


def require_lengths(call: CallSpec, rules: Sequence[str], batch: int, lengths: Iterable[int]) -> None:
    """Make sure that a batch of token ids keeps to rules at every length that it will have.

    Args:
        call: Names the model.
        rules: See `token_rules`.
        batch: Number of sequences.
        lengths: Tokens of a sequence; none asks for the batch alone.

    Raises:
        UsageError: It does not; names the rule and the first length that breaks it.
    """
    if not rules:
        return
    candidates = chain([{BATCH: batch}], ({BATCH: batch, SEQUENCE: length} for length in lengths))
    sizes = next((sizes for sizes in candidates if broken_rule(rules, sizes) is not None), None)
    if sizes is None:
        return
    rule = broken_rule(clearest(rules), sizes) or broken_rule(rules, sizes)
    assert rule is not None
    amount = f"{sizes[SEQUENCE]} tokens" if SEQUENCE in names_in(rule) else f"{batch} sequence{'s' * (batch != 1)}"
    suffix = f" in {batch} sequences" if BATCH in names_in(rule) and SEQUENCE in names_in(rule) else ""
    raise UsageError(
        f"cannot generate: {_model(call)} would read {amount}{suffix}, and {in_words(rule)}, because its code computes "
        "otherwise, or asks for it, at other sizes; change the prompts or the number of new tokens "
        "(--max-new-tokens), or compile it again with example inputs of such sizes"
    )


def require_generation(
    call: CallSpec, inputs: Sequence[InputSpec], batch: int, prompts: Iterable[int], new_tokens: int
) -> None:
    """Make sure, before anything runs, that a batch of prompts can be continued by that many tokens.

    Args:
        call, inputs: How the program is called.
        batch: Number of prompts.
        prompts: Their lengths; none if they are not known yet.
        new_tokens: How many are generated at most.

    Raises:
        UsageError: It cannot; names the rule.
    """
    require_lengths(call, token_rules(call, inputs), batch, lengths_read(prompts, new_tokens))


def lengths_read(prompts: Iterable[int], new_tokens: int) -> Iterator[int]:
    """Numbers of tokens that a model reads at once, over all steps of generating: the last new one is not read.

    Args:
        prompts: Length of every prompt.
        new_tokens: How many are generated at most; it may be far more than anybody waits for.

    Yields:
        Each length once, in order.
    """
    previous_end = 0
    for prompt in sorted(set(prompts)):
        end = prompt + max(new_tokens, 1)
        yield from range(max(prompt, previous_end), end)
        previous_end = end


def longest_allowed(rules: Sequence[str], most: int) -> int:
    """The longest sequence of at most `most` tokens that rules allow; `most` itself if they allow none."""
    bounds = [rule for rule in rules if names_in(rule) == {SEQUENCE}]
    return next((length for length in range(most, 0, -1) if broken_rule(bounds, {SEQUENCE: length}) is None), most)


def _rename_sizes(rule: str, names: Mapping[str, str]) -> str:
    if not any(names.get(name, name) != name for name in names_in(rule)):
        return rule
    tree = ast.parse(ast.unparse(parse_rule(rule)), mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.unparse(tree)


def _model(call: CallSpec) -> str:
    return call.model_class or "the model"
