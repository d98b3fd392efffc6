"""Contract 1, first half, with nothing in between: in standard form the lanes compute what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from kraken_compiler.capture import Capture
from kraken_compiler.capture.run_source import RunModel
from kraken_compiler.errors import VerificationError, typed_line
from kraken_compiler.ir.program import LaneProgram, Program, Stage
from kraken_compiler.ir.size_rules import in_words
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.sample_inputs import all_sizes
from kraken_compiler.verify.against_source import ModelFailedError, compare_with_source
from kraken_compiler.verify.choose_sizes import check_sizes
from kraken_compiler.verify.compare import Comparison

_FEW = range(2, 7)
"""Sizes beside a size of 1."""

Run = Callable[[list[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ModelCheck:
    """Result of a comparison with the model.

    Attributes:
        comparisons: One for every size.
        rules: Rules for sizes that the capture did not give although the program is not the model's without them: torch
            takes every size for at least 2 and keeps no record of a model that asks for 1.
        skipped: Sizes at which the model itself fails, each with its reason; and why there was no model to run.
    """

    comparisons: tuple[Comparison, ...]
    rules: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The rules in words."""
        return tuple(
            f"{in_words(rule)}: the model computes something else {'at 1' if rule.endswith(' 2') else 'for fewer'}"
            for rule in self.rules
        )


def compare_with_model(
    captured: Capture, standard: LaneProgram, *, run: Run | None = None, find_rules: bool = True
) -> ModelCheck:
    """Run the model itself and a lane program that must equal it.

    Args:
        captured: The model.
        standard: A lane program of it in an exact form.
        run: Runs the lane program; None streams it, one weight at a time.
        find_rules: Take a difference at a size of 1 for a rule; else it is a failure like any other.

    Raises:
        VerificationError: The model fails at every size, so that nothing can be compared.
    """
    lanes = run or _streaming(standard, captured)
    skipped: list[str] = []
    with _open_model(captured, skipped) as model:
        comparisons, rules = _Check(captured, standard, model, lanes, skipped).at_all_sizes(find_rules)
        if not comparisons and model is not None and captured.origin.kind == "huggingface":
            # Some kinds of weights transformers multiplies on GPUs alone; what was captured of them are plain numbers.
            skipped.append("the lanes were compared with what was captured of the model instead")
            comparisons, rules = _Check(captured, standard, None, lanes, skipped).at_all_sizes(find_rules)
    if not comparisons:
        raise VerificationError(f"nothing could be compared with the model: {'; '.join(skipped)}")
    return ModelCheck(comparisons, rules, tuple(skipped))


def with_rules(program: Stage, rules: Sequence[str]) -> Stage:
    """The program with more rules for its sizes."""
    if not rules:
        return program
    return replace(program, call=replace(program.call, sizes=(*program.call.sizes, *rules)))


def _sizes(program: Program) -> list[tuple[int, int]]:
    """The sizes to compare at: two other than the example's, one token by itself, and one token in several rows."""
    sizes = list(check_sizes(program))
    several = next(((batch, 1) for batch in (2, 3, 4) if all_sizes(program, batch, 1) is not None), None)
    single = (1, 1) if all_sizes(program, 1, 1) is not None else None
    varies = any("sequence" in spec.shape for spec in program.inputs)
    return [*dict.fromkeys([*sizes, *(size for size in (single, several) if size is not None and varies)])]


class _Check:
    """The model and the lanes side by side."""

    def __init__(
        self, captured: Capture, standard: LaneProgram, model: RunModel | None, lanes: Run, failures: list[str]
    ) -> None:
        self._captured, self._standard, self._model, self._lanes = captured, standard, model, lanes
        self._failures = failures

    def at_all_sizes(self, find_rules: bool) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
        """The comparisons, and the rules that were found."""
        rules: tuple[str, ...] = ()
        comparisons: dict[tuple[int, int], Comparison | None] = {}
        # A rule that is found takes sizes away, and others come in their place.
        while remaining := [size for size in _sizes(with_rules(self._standard, rules)) if size not in comparisons]:
            size = remaining[0]
            comparison = comparisons[size] = self.at(size)
            if find_rules and comparison is not None and not comparison.passed and (more := self.rules_of(size)):
                comparisons[size] = None
                rules = (*rules, *more)
        return tuple(each for each in comparisons.values() if each is not None), rules

    def at(self, size: tuple[int, int]) -> Comparison | None:
        """The comparison at a size; None if the model itself fails there."""
        try:
            return compare_with_source(
                self._captured.program,
                self._standard,
                self._captured.store.read,
                (size,),
                model=self._model,
                lanes=self._lanes,
                padded=size[0] > 1,
            )[0]
        except ModelFailedError as error:
            self._failures.append(f"no comparison at batch {size[0]} x {size[1]}: {error}")
            return None

    def rules_of(self, size: tuple[int, int]) -> tuple[str, ...]:
        """The rules that a difference at a size of 1 comes to; none if larger sizes differ as well."""
        if size == (1, 1):
            return self.rules_of_one_token()
        for place, name in enumerate(("batch", "sequence")):
            others = [(value, size[1]) if place == 0 else (size[0], value) for value in _FEW]
            nearest = [other for other in others if self.allows(other)][:1]
            if size[place] == 1 and self.first_equal(nearest) is not None:
                return (f"{name} >= 2",)
        return ()

    def rules_of_one_token(self) -> tuple[str, ...]:
        """The rules of a model that is another one for a single token: for one row, one position or few tokens."""
        long, wide = ([(1, size) for size in _FEW], [(size, 1) for size in _FEW])
        row, column = self.first_equal(long), self.first_equal(wide)
        least = max((one[0] * one[1] for one in (row, column) if one is not None), default=0)
        few = (f"batch * sequence >= {least}",) if least > 2 or (row and column) else ()
        return (
            *(("batch >= 2",) if row is None and column is not None else ()),
            *(("sequence >= 2",) if column is None and row is not None else ()),
            *few,
        )

    def first_equal(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """The first of some sizes at which the lanes compute what the model computes."""
        for size in sizes:
            comparison = self.at(size) if self.allows(size) else None
            if comparison is not None and comparison.passed:
                return size
        return None

    def allows(self, size: tuple[int, int]) -> bool:
        """True if no rule that is known already forbids a size."""
        return all_sizes(self._standard, *size) is not None


def _streaming(program: Program, captured: Capture) -> Run:
    streaming = StreamingProgram(program, read_from_source(program, captured.store.read))
    return lambda inputs: streaming.run_flat(inputs)


@contextmanager
def _open_model(captured: Capture, skipped: list[str]) -> Iterator[RunModel | None]:
    """Open the model to run it; without one, its captured program stands for it, and `skipped` says so."""
    if captured.model is None:
        skipped.append("no comparison with the model itself: there is none to run, only what was captured of it")
        yield None
        return
    with ExitStack() as stack:
        try:
            run: RunModel | None = stack.enter_context(captured.model())
        except (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            # Libraries load a model in code of their own, which raises what it likes.
            skipped.append(
                f"no comparison with the model itself, which its own library cannot load: {typed_line(error)}"
            )
            run = None
        yield run
