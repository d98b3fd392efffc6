"""`compile_model`: from a model to an artifact, checked before it is put in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.replaceable import resolved
from kraken_compiler.artifact.reservation import reserved
from kraken_compiler.artifact.write import write_artifact
from kraken_compiler.backends.base import Reference
from kraken_compiler.backends.registry import DEFAULT_BACKEND, chosen_backends, lanes_in
from kraken_compiler.backends.single.streaming import read_from_source
from kraken_compiler.capture import Capture, Model, capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.errors import UsageError, VerificationError
from kraken_compiler.ir.sample_inputs import text_input, token_input, vocabulary
from kraken_compiler.lowering import FormChoice, lower_split, split_source
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.budget import Budget, Choice, perplexity_increase
from kraken_compiler.quality.calibration.on_text import CALIBRATION_TOKENS, calibrate_on_text
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.forms_within import forms_within
from kraken_compiler.quality.measure import with_quality
from kraken_compiler.quality.texts import TextChoice, sample_text, token_ids
from kraken_compiler.report import Report, is_exact, make_report
from kraken_compiler.runtime.derived_inputs import reads_source
from kraken_compiler.runtime.environment import require_timeout
from kraken_compiler.surroundings import undisturbed
from kraken_compiler.text_files import require_text
from kraken_compiler.tokenizer_files import generation_config
from kraken_compiler.verify.against_model import compare_with_model, with_rules
from kraken_compiler.verify.compare import Comparison
from kraken_compiler.verify.verification import Verification, verify_programs

_POSITIONS_NAMES = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class CompileResult:
    """What a compile made.

    Attributes:
        report: What was recognised and scheduled.
        verification: What was checked; None if checking was switched off, or nothing was written.
        directory: The artifact; None if only a plan was asked for.
        notes: What a user should know about the capture, one sentence each.
        calibration: What calibration did; None if there was none.
        choice: How the forms were chosen; None if they were given.
    """

    report: Report
    verification: Verification | None = None
    directory: Path | None = None
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    choice: Choice | None = None


@undisturbed()
def compile_model(
    model: Model,
    directory: str | os.PathLike[str] | None,
    *,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    backends: Sequence[str] = (DEFAULT_BACKEND,),
    dtype: torch.dtype | None = None,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    text: str | os.PathLike[str] | None = None,
    text_tokens: int | None = None,
    calibrate: Sequence[str | os.PathLike[str]] = (),
    calibrate_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    verify: bool = True,
    trust_pickle: bool = False,
    force: bool = False,
    dump_directory: str | os.PathLike[str] | None = None,
    timeout: float = 120.0,
    progress: Progress | None = None,
    **backend_options: Any,
) -> CompileResult:
    """Compile a model into an artifact directory, checked before it is put in place.

    Args:
        model: A module, or a path: a Hugging Face directory, a `.gguf` file, a torch.export archive, a pickled module.
        directory: Where the artifact goes; None only plans: no weight is read and nothing is written.
        degree, form, layers, example_inputs: See `transform`.
        backends: Names of the backends that write programs.
        dtype: Element type of the compiled model; None keeps the source's.
        input_specs: Example inputs as text, e.g. `input_ids=int64[2,16]`.
        text: A text file to measure a changed form on; None means a small built-in sample.
        text_tokens: Most tokens of it to read; None means all.
        calibrate: Text files, or directories of them, to calibrate a changed form on (`quality/calibration`).
        calibrate_tokens: How many tokens of them.
        max_kl: Choose a form for every layer, so that the KL to the source stays at most this, in nats per token on
            unseen parts of the calibration texts, and as little communication as possible is waited for.
        max_perplexity_increase: The same for the growth of the perplexity, as a share of the source's: 0.02 is 2 %.
        verify: Check the programs and measure the quality.
        trust_pickle: Allow files that can run any code when they are opened.
        force: Replace an artifact that is there; other directories are replaced only when they are empty.
        dump_directory: Where to write the graph as text after every pass.
        timeout: Seconds without progress after which a rank counts as hanging.
        progress: Is told about long stages.
        backend_options: Options of these backends, by field name (`Backend.Options`), e.g. `onnx_weights="int8"`.

    Raises:
        UsageError, UnsupportedModelError, InputFileError: See `transform`.
        VerificationError: A program computes something else, lost its overlap, or the budget does not hold; nothing is
            written then.
        RankFailedError: A rank died or hung while the programs were checked; nothing is written then.
    """
    show = progress or Silent()
    require_timeout(timeout)
    emitters = chosen_backends(backends, {name: value for name, value in backend_options.items() if value is not None})
    unchecked = [backend.name for backend in emitters if not backend.gives_reference]
    if verify and unchecked:
        raise UsageError(
            f"nothing here can check what the backend '{unchecked[0]}' writes; pass --no-verify to write it unchecked"
        )
    if directory is None and (max_kl is not None or max_perplexity_increase is not None):
        asked = "--max-kl" if max_kl is not None else "--max-ppl-increase"
        raise UsageError(
            f"{asked} chooses forms by calibrating, which --plan does not: it reads no weight; leave one out"
        )
    paths = [Path(one) for one in calibrate]
    budget = _budget(max_kl, max_perplexity_increase, form, layers, paths)
    if directory is not None and dump_directory is not None:
        _require_apart(Path(directory), Path(dump_directory))
    if directory is not None and isinstance(model, str | os.PathLike):
        # Before the work: what an artifact notes of its source is text.
        require_text(os.path.abspath(model), "the path of MODEL, which the artifact notes")
    # From the beginning: a rival must hear of it before it has worked for hours.
    inputs = [Path(one) for one in (model, text, *paths) if isinstance(one, str | os.PathLike)]
    with reserved(Path(directory), force, inputs) if directory is not None else nullcontext() as reservation:
        with show.stage("capture"):
            captured = capture(
                model,
                example_inputs=example_inputs,
                input_specs=input_specs,
                trust_pickle=trust_pickle,
                dtype=dtype,
                require_weights=directory is not None,
                hash_early=directory is not None,
            )
            notes = (*captured.notes, *_tokenizer_notes(captured))
        with show.stage("split"):
            runner = PassRunner(Path(dump_directory) if dump_directory is not None else None)
            split = split_source(captured.program, degree, runner)
        chosen: Choice | None = None
        if budget is not None and directory is not None:
            cache = Path(f"{os.fspath(directory)}.sensitivity.json")
            chosen = forms_within(captured, split, paths, calibrate_tokens, budget, show, cache)
            form = _best(chosen)
        with show.stage("rewrite"):
            program = lower_split(split, form, layers, runner=runner)
        if program.no_cache and token_input(program) is not None:
            notes = (*notes, f"no KV cache, generation recomputes the prefix for every token: {program.no_cache}")
        notes = (*notes, *(backend.cannot_run for backend in emitters if backend.cannot_run))
        report = make_report(program, runner.history, notes)
        if directory is None:
            return CompileResult(report, notes=notes)

        comparisons: tuple[Comparison, ...] = ()
        skipped: tuple[str, ...] = ()
        standard = program
        if (verify or calibrate) and not is_exact(program):
            standard = lower_split(split, "standard", cached=False)
        if verify:
            with show.stage("compare with the source"):
                checked = compare_with_model(captured, standard)
            comparisons, skipped = checked.comparisons, checked.skipped
            Verification(comparisons).require_passed()
            program, notes = with_rules(program, checked.rules), (*notes, *checked.notes)
        measured_on, kept = TextChoice.of(text, text_tokens), report.to_dict()
        read = captured.store.read
        calibration: Calibration | None = None
        if calibrate:
            calibration = calibrate_on_text(captured, standard, program, paths, calibrate_tokens, measured_on, show)
            program, read = calibration.weights.in_program(program, read)
            kept["calibration"] = calibration.to_dict()
        if budget is not None and calibration is not None and chosen is not None:
            _require_within(budget, calibration)
            kept["choice"] = chosen.to_dict()

        verification: Verification | None = None
        in_memory = Reference(program, read_from_source(program, read))

        def check(partial: Path) -> dict[str, object]:
            """Runs on the complete artifact before it is put in place."""
            nonlocal verification
            captured.store.release()  # what comes now are other processes
            with show.stage("run on ranks"):
                found = verify_programs(partial, None, timeout, in_memory)
            verification = replace(found, comparisons=(*comparisons, *found.comparisons), skipped=skipped)
            verification.require_passed()
            artifact = open_artifact(partial, verify=False)
            lanes = lanes_in(artifact) or in_memory
            verification = with_quality(verification, artifact, lanes, captured, measured_on, show)
            return verification.to_dict()

        with show.steps("write and check" if verify else "write") as advance:
            written = write_artifact(
                program,
                program.reader(read),
                Path(directory),
                source=_source(captured, input_specs, dtype),
                backends=emitters,
                digest=(lambda: captured.origin.sha256) if captured.origin.path else None,
                tokenizer_saver=_tokenizer_saver(captured),
                report=kept,
                check=check if verify else None,
                resumable=calibration is None,
                reservation=reservation,
                progress=advance,
            )
        return CompileResult(report, verification, written, notes, calibration, chosen)


def _require_apart(directory: Path, dumps: Path) -> None:
    """Refuse graphs in the artifact's own directory: files that are none of its own would keep it from its place."""
    place = resolved(dumps)
    if resolved(directory) in (place, *place.parents):
        raise UsageError(f"--dump-graphs {dumps}: is or lies in the artifact's directory; choose another one")


def _budget(
    max_kl: float | None,
    max_perplexity_increase: float | None,
    form: FormChoice,
    layers: str | Sequence[int] | None,
    paths: Sequence[Path],
) -> Budget | None:
    if max_kl is None and max_perplexity_increase is None:
        return None
    if form != "kraken" or layers is not None:
        raise UsageError("a budget chooses the forms itself; leave --form and --layers out")
    if not paths:
        raise UsageError("a budget needs --calibrate TEXT: layers are chosen by what they cost when calibrated")
    return Budget(max_kl, max_perplexity_increase)


def _best(choice: Choice) -> tuple[str, ...]:
    if choice.best is None:
        least = min(choice.frontier, key=lambda candidate: candidate.used)
        raise VerificationError(
            f"no layer can change its form within the budget ({choice.budget}); the least that was tried costs KL "
            f"{least.kl:.3g}, perplexity {least.perplexity_increase:+.1%}: raise the budget or calibrate on more text"
        )
    return choice.best.forms


def _require_within(budget: Budget, calibration: Calibration) -> None:
    """The result, measured anew on text that neither the search nor the calibration has seen."""
    _, quality = calibration.qualities[0]
    if not budget.holds(quality):
        raise VerificationError(
            f"the result does not keep to the budget ({budget}): on {quality.tokens:,} tokens of {quality.text} its KL "
            f"is {quality.kl:.3g}, its perplexity {perplexity_increase(quality):+.1%}; lower the budget, or calibrate "
            "on more text"
        )


def _source(captured: Capture, input_specs: Sequence[str], dtype: torch.dtype | None) -> Source:
    origin = captured.origin
    path = Path(origin.path).absolute() if origin.path else None
    return Source(
        kind=origin.kind,
        name=path.name if path else origin.model_class,
        path=str(path) if path else "",
        model_class=origin.model_class,
        answer_begins=_answer_begins(captured),
        max_positions=_max_positions(captured.config),
        input_specs=tuple(input_specs),
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "",
    )


def _answer_begins(captured: Capture) -> tuple[int, ...]:
    """The tokens that an encoder-decoder's answer begins with, as transformers takes them when it generates."""
    config = captured.config
    if config is None or not reads_source(captured.program.inputs):
        return ()
    directory = Path(captured.origin.path or "")
    own = (generation_config(directory, of_config=False) if captured.origin.kind == "huggingface" else None) or {}
    settings = {**config, **{name: value for name, value in own.items() if value is not None}}
    start, forced = settings.get("decoder_start_token_id"), settings.get("forced_bos_token_id")
    start = settings.get("bos_token_id") if start is None else start
    return tuple(token for token in (start, forced) if type(token) is int) if type(start) is int else ()


def _max_positions(config: dict[str, Any] | None) -> int | None:
    """What the source's config, or the part of it that describes the language model, says of the longest sequence."""
    parts = [config, *(config.get(name) for name in ("text_config", "decoder"))] if config else []
    found = [part.get(name) for part in parts if isinstance(part, dict) for name in _POSITIONS_NAMES]
    return next((limit for limit in found if type(limit) is int and limit > 0), None)


def _tokenizer_notes(captured: Capture) -> tuple[str, ...]:
    """What a user should know of the source's tokenizer, which is refused here if it is damaged."""
    if captured.origin.tokenizer is None:
        return ()
    notes, tokenizer = captured.origin.tokenizer.check()
    known = vocabulary(captured.program) if text_input(captured.program) is not None else len(tokenizer)
    if len(tokenizer) <= known:
        return notes
    # Tokens that a few texts have are no reason to refuse a model; some models ship with them.
    token_ids(tokenizer, sample_text(), known, str(captured.origin.path))
    return (
        *notes,
        f"the tokenizer has {len(tokenizer)} tokens, the model knows {known}; text with the others is refused",
    )


def _tokenizer_saver(captured: Capture) -> Callable[[Path], None] | None:
    tokenizer = captured.origin.tokenizer
    return tokenizer.save if tokenizer is not None else None
