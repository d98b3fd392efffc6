"""Measures what a lane program's form, and the quantized weights of its devices, cost against the source model."""

from __future__ import annotations

from dataclasses import replace

from kraken_compiler.backends.single.streaming import ReadLane, read_from_source
from kraken_compiler.capture import Capture
from kraken_compiler.ir.program import Program
from kraken_compiler.progress import Advance, Progress
from kraken_compiler.quality.evaluate import LogitsOf, Quality, evaluate
from kraken_compiler.quality.lane_logits import lane_logits
from kraken_compiler.quality.texts import TextChoice, evaluation_text
from kraken_compiler.verify.verification import Reference, Verification


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
    source = lane_logits(captured.program, read_from_source(captured.program, read))
    rewritten = rewritten or lane_logits(program, read_lane or read_from_source(program, read))
    return evaluate(source, rewritten, tokens, tokens.name, count)


def with_quality(
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
