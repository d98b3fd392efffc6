"""What the package does, in two functions: `transform` for a module in memory, `compile_model` for an artifact."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.artifact.write import check_target, write_artifact
from kraken_compiler.backends.base import Backend
from kraken_compiler.backends.onnx_ort.emit import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import COLLECTIVE_KINDS, ORT_NCCL, OWN, WEIGHT_KINDS
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.backends.single.streaming import ReadLane, StreamingProgram, read_from_source
from kraken_compiler.capture import Capture, capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import token_input
from kraken_compiler.lowering import FormChoice, lower
from kraken_compiler.progress import Advance, Progress, Silent
from kraken_compiler.quality.calibration.on_text import CALIBRATION_TOKENS, calibrate_on_text
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.evaluate import LogitsOf, Quality, evaluate
from kraken_compiler.quality.texts import TextChoice, evaluation_text
from kraken_compiler.report import Report, is_exact, make_report
from kraken_compiler.runtime.logits import logits_function
from kraken_compiler.verify.against_devices import compare_with_devices
from kraken_compiler.verify.against_source import compare_with_source
from kraken_compiler.verify.verification import SIZES, Reference, Verification, lanes_in, verify_programs
from kraken_compiler.weights.lane_tensors import has_lane_tensors

Model = nn.Module | str | os.PathLike[str]


def transform(
    model: Model,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    example_inputs: ExampleInputs | None = None,
) -> LaneModule:
    """Rewrite a model into N parallel lanes that run in one process.

    Args:
        model: A module, or the path of anything `kraken-compile` takes. Its weights are copied one tensor at a time.
        degree: Number of lanes; None means the number of visible accelerators if there are several, else the smallest
            valid degree above 1.
        form: A row of the forms table: "standard", "kraken", "ladder", "sync-drop", "parallel", or a `Form`; or one of
            these for every layer.
        layers: The layers that take the form, e.g. "15-29" or [0, -1]; the others stay standard. None means all.
        example_inputs: Arguments to trace with, a tuple or a dict of tensors whose sizes are at least 2; inferred for
            Hugging Face models.

    Returns:
        A module with the model's call signature and output structure. It trains, moves between devices and saves.
        `.program` is the lane program, `.report` what was recognised and scheduled.

    Raises:
        UsageError: Unknown form, wrong degree or layers, missing example inputs.
        UnsupportedModelError: A part of the model cannot be rewritten; names module, node and reason.
        InputFileError: A model file is missing or damaged.
    """
    captured = capture(model, example_inputs=example_inputs)
    program, history = lower(captured.program, degree, form, layers)
    module = LaneModule.from_program(program, captured.store.read)
    module.report = make_report(program, history)
    return module


@dataclass(frozen=True)
class CompileResult:
    """What a compile made.

    Attributes:
        report: What was recognised and scheduled.
        verification: What was checked; None if checking was switched off, or nothing was written.
        directory: The artifact; None if only a plan was asked for.
        notes: What a user should know about the capture, one sentence each.
        calibration: What calibration did; None if there was none.
    """

    report: Report
    verification: Verification | None = None
    directory: Path | None = None
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None


def compile_model(
    model: Model,
    directory: str | os.PathLike[str] | None,
    *,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    backends: Sequence[str] = ("torch",),
    collectives: str = OWN,
    onnx_weights: str | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    text: str | os.PathLike[str] | None = None,
    text_tokens: int | None = None,
    calibrate: Sequence[str | os.PathLike[str]] = (),
    calibrate_tokens: int = CALIBRATION_TOKENS,
    verify: bool = True,
    trust_pickle: bool = False,
    force: bool = False,
    dump_directory: str | os.PathLike[str] | None = None,
    timeout: float = 120.0,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a model into an artifact directory, checked before it is put in place.

    Args:
        model: A module, or a path: a Hugging Face directory, a `.gguf` file, a torch.export archive, a pickled module.
        directory: Where the artifact goes; None only plans: no weight is read and nothing is written.
        degree, form, layers, example_inputs: See `transform`.
        backends: Names of the backends that write programs.
        collectives: Whose collectives ONNX devices hold, "kraken" or "ort-nccl"; the latter can only be written here.
        onnx_weights: What the weights of ONNX devices' matrix products are quantized to, "int8" or "int4"; None leaves
            them as they are.
        dtype: Element type of the compiled model; None keeps the source's.
        input_specs: Example inputs as text, e.g. `input_ids=int64[2,16]`.
        text: A text file to measure a changed form on; None means a small built-in sample.
        text_tokens: Most tokens of it to read; None means all.
        calibrate: Text files, or directories of them, to calibrate a changed form on (`quality/calibration`).
        calibrate_tokens: How many tokens of them.
        verify: Check the programs and measure the quality.
        trust_pickle: Allow files that can run any code when they are opened.
        force: Replace a directory that is not empty.
        dump_directory: Where to write the graph as text after every pass.
        timeout: Seconds without progress after which a rank counts as hanging.
        progress: Is told about long stages.

    Raises:
        UsageError, UnsupportedModelError, InputFileError: See `transform`.
        VerificationError: A program computes something else, or lost its overlap; nothing is written then.
        RankFailedError: A rank died or hung while the programs were checked; nothing is written then.
    """
    show = progress or Silent()
    emitters = [_configured(backend_named(name), collectives, onnx_weights) for name in dict.fromkeys(backends)]
    if onnx_weights is not None and "onnx" not in backends:
        raise UsageError(f"--onnx-weights {onnx_weights} is for ONNX devices; add --backend onnx")
    if directory is not None:
        check_target(Path(directory), force)
    with show.stage("capture"):
        captured = capture(
            model,
            example_inputs=example_inputs,
            input_specs=input_specs,
            trust_pickle=trust_pickle,
            dtype=dtype,
            require_weights=directory is not None,
        )
    with show.stage("rewrite"):
        dumps = Path(dump_directory) if dump_directory is not None else None
        program, history = lower(captured.program, degree, form, layers, dump_directory=dumps)
    report = make_report(program, history)
    notes = captured.notes
    if program.no_cache and token_input(program) is not None:
        notes = (*notes, f"no KV cache, generation recomputes the prefix for every token: {program.no_cache}")
    if collectives == ORT_NCCL and "onnx" in backends:
        unrun = "the ONNX devices hold collectives of ONNX Runtime builds with NCCL: checked against schemas, not run"
        notes = (*notes, unrun)
    if directory is None:
        return CompileResult(report, notes=notes)

    comparisons = []
    standard = program
    if (verify or calibrate) and not is_exact(program):
        standard, _ = lower(captured.program, program.degree, "standard")
    if verify:
        with show.stage("compare with the source"):
            comparisons = compare_with_source(captured.program, standard, captured.store.read, SIZES)
        Verification(tuple(comparisons)).require_passed()
    choice, kept = _choice(text, text_tokens), report.to_dict()
    read: Callable[[str], torch.Tensor] = captured.store.read
    calibration: Calibration | None = None
    if calibrate:
        paths = [Path(one) for one in calibrate]
        calibration = calibrate_on_text(captured, standard, program, paths, calibrate_tokens, choice, show)
        program, read = calibration.weights.in_program(program, read)
        kept["calibration"] = calibration.to_dict()

    verification: Verification | None = None
    in_memory = Reference(program, read_from_source(program, read))

    def check(partial: Path) -> dict[str, object]:
        """Runs on the complete artifact before it is put in place."""
        nonlocal verification
        with show.stage("run on ranks"):
            found = verify_programs(partial, SIZES, timeout, in_memory)
        verification = replace(found, comparisons=(*comparisons, *found.comparisons))
        verification.require_passed()
        lanes = lanes_in(open_artifact(partial, verify=False)) or in_memory
        verification = _with_quality(verification, lanes, captured, choice, show)
        return verification.to_dict()

    with show.steps("write and check" if verify else "write") as advance:
        written = write_artifact(
            program,
            program.reader(read),
            Path(directory),
            source=_source(captured, input_specs, dtype),
            backends=emitters,
            tokenizer_saver=_tokenizer_saver(captured),
            report=kept,
            check=check if verify else None,
            force=force,
            progress=advance,
        )
    return CompileResult(report, verification, written, notes, calibration)


def _configured(backend: Backend, collectives: str, weights: str | None) -> Backend:
    if collectives not in COLLECTIVE_KINDS:
        raise UsageError(f"--collectives {collectives}: choose from {', '.join(COLLECTIVE_KINDS)}")
    if weights is not None and weights not in WEIGHT_KINDS:
        raise UsageError(f"--onnx-weights {weights}: choose from {', '.join(WEIGHT_KINDS)}")
    if not isinstance(backend, OnnxBackend):
        return backend
    return replace(backend, collectives=collectives, weights=weights)


def verify_artifact(
    directory: str | os.PathLike[str],
    *,
    source: Model | None = None,
    example_inputs: ExampleInputs | None = None,
    text: str | os.PathLike[str] | None = None,
    text_tokens: int | None = None,
    trust_pickle: bool = False,
    timeout: float = 120.0,
    progress: Progress | None = None,
) -> Verification:
    """Check an artifact again, as its compile did.

    Args:
        directory: The artifact.
        source: The source model; None means where it was when the artifact was compiled.
        example_inputs, text, text_tokens, trust_pickle, timeout, progress: See `compile_model`.

    Raises:
        InputFileError: The artifact or the source is damaged, or the source is not the one that was compiled.
        UsageError: `text` was given, but there is no source to compare with.
        VerificationError, RankFailedError: See `compile_model`.
    """
    show = progress or Silent()
    path = Path(directory)
    with show.stage("check hashes"):
        artifact = open_artifact(path)
    with show.stage("run on ranks"):
        result = verify_programs(path, SIZES, timeout)
    result.require_passed()
    comparisons = list(result.comparisons)
    lanes = lanes_in(artifact)
    recorded = artifact.manifest.source
    where = source if source is not None else recorded.path
    # Only a source that nobody named may be missing; a named one that is not there is an error, found by capture.
    if source is None and not (recorded.path and Path(recorded.path).exists()):
        missing = (
            f"no comparison with the source: it is not at '{where}'; name it with --source"
            if where
            else ("no comparison with the source: it was a module in memory; name a file of it with --source")
        )
        if text is not None:
            raise UsageError(missing)
        if lanes is None:
            missing = f"no comparison of the ONNX devices with the lanes, and {missing}"
        return replace(result, skipped=(missing,))
    with show.stage("capture"):
        captured = capture(
            where,
            example_inputs=example_inputs,
            input_specs=recorded.input_specs if example_inputs is None else (),
            trust_pickle=trust_pickle,
            dtype=_dtype(recorded.dtype),
        )
    comparable = recorded.sha256 and captured.origin.kind == recorded.kind
    if comparable and captured.origin.sha256 != recorded.sha256:
        raise InputFileError(f"{where}: is not the model that {path} was compiled from (its hash differs)")
    with show.stage("compare with the source"):
        standard, _ = lower(captured.program, artifact.manifest.degree, "standard")
        comparisons += compare_with_source(captured.program, standard, captured.store.read, SIZES)
    if lanes is None and has_lane_tensors(artifact.manifest.weights):
        lost = "no comparison of the ONNX devices with the lanes: only the devices hold their calibrated weights"
        return replace(result, comparisons=tuple(comparisons), skipped=(lost,))
    if lanes is None:
        lanes = _lanes_of(captured, artifact)
        if result.devices is not None and result.devices.runnable:
            with show.stage("run on devices"):
                found, devices = compare_with_devices(result.devices, lanes.program, lanes.read_lane, SIZES, timeout)
            comparisons += found
            result = replace(result, devices=devices)
    result = replace(result, comparisons=tuple(comparisons))
    result.require_passed()
    return _with_quality(result, lanes, captured, _choice(text, text_tokens), show)


def measure_quality(
    captured: Capture,
    program: Program,
    text: TextChoice,
    *,
    read_lane: ReadLane | None = None,
    rewritten: LogitsOf | None = None,
    advance: Advance | None = None,
) -> Quality | str:
    """Measure what a lane program's form costs against its source.

    Args:
        captured: The source model.
        program: The lane program.
        text: What to measure on.
        read_lane: Where the lanes' weights come from; None means the source.
        rewritten: What is measured in place of the lane program, such as the devices that were written from it.
        advance: Is told how many tokens are done.

    Returns:
        The measurement, or the reason why the model cannot be measured.
    """
    tokens = evaluation_text(captured, text)
    if isinstance(tokens, str):
        return tokens
    done = 0

    def count(ids: int) -> None:
        nonlocal done
        done += ids
        if advance is not None:
            advance(done, max(done, tokens.expected), "tokens")

    read = captured.store.read
    source = StreamingProgram(captured.program, read_from_source(captured.program, read))
    if rewritten is None:
        rewritten = _logits_of(program, StreamingProgram(program, read_lane or read_from_source(program, read)))
    return evaluate(_logits_of(captured.program, source), rewritten, tokens, tokens.name, count)


def _lanes_of(captured: Capture, artifact: Artifact) -> Reference:
    """The lanes of an artifact that holds none, made again from its source."""
    manifest = artifact.manifest
    program, _ = lower(captured.program, manifest.degree, manifest.forms)
    return Reference(program, read_from_source(program, captured.store.read))


def _with_quality(
    verification: Verification,
    lanes: Reference,
    captured: Capture,
    text: TextChoice,
    show: Progress,
) -> Verification:
    """Measure an artifact's form, with the weights in its lane files if it has them, and its quantized weights."""
    with show.steps("quality") as advance:
        quality = measure_quality(captured, lanes.program, text, read_lane=lanes.read_lane, advance=advance)
    if isinstance(quality, str):
        return replace(verification, skipped=(*verification.skipped, quality))
    verification = replace(verification, quality=quality)
    devices = verification.devices
    if devices is None or devices.weights is None:
        return verification
    if not devices.runnable:
        unmeasured = f"no quality measurement of the {devices.weights} weights: this runtime does not run the devices"
        return replace(verification, skipped=(*verification.skipped, unmeasured))
    # Imported here: it takes onnx and ONNX Runtime, which most artifacts do without.
    from kraken_compiler.runtime.onnx_threads import logits_of_devices

    with show.steps(f"quality with {devices.weights} weights") as advance:
        rewritten = logits_of_devices(devices.directory)
        quantized = measure_quality(captured, lanes.program, text, rewritten=rewritten, advance=advance)
    assert not isinstance(quantized, str), "the same tokens were measured before"
    return replace(verification, quantized=quantized)


def _choice(text: str | os.PathLike[str] | None, tokens: int | None) -> TextChoice:
    return TextChoice(Path(text) if text is not None else None, tokens)


def _logits_of(program: Program, streaming: StreamingProgram) -> LogitsOf:
    return logits_function(program.inputs, program.call, streaming.run_flat)


def _source(captured: Capture, input_specs: Sequence[str], dtype: torch.dtype | None) -> Source:
    origin = captured.origin
    path = Path(origin.path).absolute() if origin.path else None
    return Source(
        kind=origin.kind,
        name=path.name if path else origin.model_class,
        path=str(path) if path else "",
        sha256=origin.sha256 if path else "",
        model_class=origin.model_class,
        input_specs=tuple(input_specs),
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "",
    )


def _tokenizer_saver(captured: Capture) -> Callable[[Path], None] | None:
    tokenizer = captured.origin.tokenizer
    return tokenizer.save if tokenizer is not None else None


def _dtype(name: str) -> torch.dtype | None:
    value = getattr(torch, name) if name else None
    assert value is None or isinstance(value, torch.dtype)
    return value
