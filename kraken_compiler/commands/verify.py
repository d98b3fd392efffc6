"""`verify_artifact`: an artifact checked again, as its compile did."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.base import EngineSettings, Reference
from kraken_compiler.backends.registry import backend_of, lanes_in
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.commands.source import as_compiled, assignment_of, embedding_choice, lowered_as, source_of
from kraken_compiler.errors import UsageError
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.options.verify import VerifyOptions
from kraken_compiler.passes.lower import find_form, lower_native, lower_split, split_source
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.measure import sensitivity_of, with_accuracies, with_quality
from kraken_compiler.quality.multiple_choice import read_questions
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import fast_products
from kraken_compiler.texts.read import TextChoice
from kraken_compiler.verify.against_engine import LENGTHS, compare_with_engine
from kraken_compiler.verify.against_model import compare_with_model
from kraken_compiler.verify.verification import Verification, verify_programs
from kraken_compiler.weights.lane_tensors import has_lane_tensors


# As the compile multiplies, so that the same artifact gets the same figures.
@fast_products()
def verify_artifact(
    directory: str | os.PathLike[str],
    options: VerifyOptions | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> Verification:
    """Check an artifact again, as its compile did.

    Args:
        directory: The artifact.
        options: What is asked for; None takes the keywords.
        example_inputs, progress: See `compile_model`.
        keywords: Options by name, e.g. `source`: the source model, where it is not where it was when it was compiled.
            What `by_layer` has measured is remembered in `DIRECTORY.by-layer.json`.

    Raises:
        InputFileError: The artifact or the source is damaged, or the source is not the one that was compiled.
        UsageError: `text` or `choices` was given, but there is no source to compare with.
        VerificationError, RankFailedError: See `compile_model`.
    """
    options = options if options is not None else VerifyOptions.of(keywords)
    source, text, text_tokens = options.source, options.text, options.text_tokens
    by_layer = options.by_layer or bool(options.forms)
    trust_pickle, timeout = options.trust_pickle, options.timeout
    show = progress or Silent()
    require_timeout(timeout)
    forms = [find_form(name).name for name in options.forms]
    question_sets = [(Path(file).name, read_questions(Path(file))) for file in options.choices]
    path = Path(directory)
    with show.stage("check hashes"):
        artifact = open_artifact(path)
    with show.stage("run on ranks"):
        result = verify_programs(path, None, timeout, None, options.backend)
    result.require_passed()
    lanes = lanes_in(artifact)
    if lanes is not None:
        result = _with_engine(result, artifact, lanes, options.backend, show)
    who = " and ".join(check.backend.ranks_are for check in result.checks)
    source_record = artifact.manifest.source
    where = source if source is not None else source_record.path
    # Only a source that nobody named may be missing; a named one that is not there is an error, found by capture.
    if source is None and not (source_record.path and Path(source_record.path).exists()):
        reason = (
            f"no comparison with the source: it is not at '{where}'; name it with --source"
            if where
            else ("no comparison with the source: it was a module in memory; name a file of it with --source")
        )
        if text is not None or by_layer or question_sets:
            raise UsageError(reason)
        if lanes is None:
            reason = f"no comparison of the {who} with the lanes, and {reason}"
        return replace(result, skipped=(reason,))
    with show.stage("capture"):
        captured = source_of(artifact, source, example_inputs=example_inputs, trust_pickle=trust_pickle)
    with show.stage("compare with the source"):
        split = (
            None
            if captured.lanes is not None
            else split_source(
                captured.program,
                artifact.manifest.degree,
                embedding=embedding_choice(artifact.manifest),
                assign=lambda planned: assignment_of(artifact.manifest),
            )
        )
        if split is None:
            assert captured.lanes is not None, "it has no split"
            exact = lower_native(captured.program, captured.lanes, artifact.manifest.degree, cached=False)
        else:
            exact = lower_split(split, "standard", cached=False)
        standard = as_compiled(exact, artifact.manifest)
        model_check = compare_with_model(captured, standard, find_rules=False)
    skipped, comparisons = tuple(model_check.skipped), tuple(model_check.comparisons)
    if lanes is None and has_lane_tensors(artifact.manifest.weights):
        no_comparison = f"no comparison of the {who} with the lanes: only they hold their calibrated weights"
        result = replace(result, comparisons=(*result.comparisons, *comparisons), skipped=(*skipped, no_comparison))
        result.require_passed()
        return result
    if lanes is None:
        program = lowered_as(captured, artifact.manifest)
        lanes = Reference(program, read_from_source(program, captured.store.read))
        with show.stage("run on ranks"):
            result = verify_programs(path, None, timeout, lanes, options.backend)
        result = _with_engine(result, artifact, lanes, options.backend, show)
    result = replace(result, comparisons=(*result.comparisons, *comparisons), skipped=(*result.skipped, *skipped))
    result.require_passed()
    choice = TextChoice.of(text, text_tokens)
    result = with_quality(result, artifact, lanes, captured, choice, show)
    result = with_accuracies(result, lanes, captured, question_sets, show)
    if by_layer and split is None:
        reason = "no costs by layer: a Kraken model runs in the form that it was trained in"
        return replace(result, skipped=(*result.skipped, reason))
    if by_layer and split is not None:
        cache, own = Path(f"{path}.by-layer.json"), artifact.manifest.forms
        costs = sensitivity_of(captured, split, forms or own, len(own), choice, cache, show)
        if isinstance(costs, str):
            return replace(result, skipped=(*result.skipped, costs))
        result = replace(result, sensitivity=costs)
    return result


def _with_engine(
    result: Verification, artifact: Artifact, lanes: Reference, backend: str | None, show: Progress
) -> Verification:
    """A verification with the comparison of the backend's own engine, where that was asked for and has one."""
    if backend is None:
        return result
    one = backend_of(artifact, backend)
    try:
        starting = one.engine(artifact, EngineSettings(rows=len(LENGTHS), checking=True))
    except UsageError as error:
        return replace(result, skipped=(*result.skipped, f"no run in the engine of the {backend} backend: {error}"))
    if starting is None:
        return result
    with show.stage(f"run {backend}"), starting as engine:
        comparisons = compare_with_engine(engine, lanes, backend)
    result = replace(result, comparisons=(*result.comparisons, *comparisons))
    result.require_passed()
    return result
