"""`heal_artifact`: train an artifact's lanes to give the logits of its source, and write them as an artifact."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.manifest import MANIFEST_FILE, HealingRecord
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.artifact.replaceable import resolved
from kraken_compiler.artifact.reservation import Reservation, check_target, reserved
from kraken_compiler.backends.registry import backends_of, require_lanes
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import Capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.commands.source import embedding_choice, lowered_as, source_of
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.reference import read_from_lane_files
from kraken_compiler.ops.op_sets import DEQUANTIZE
from kraken_compiler.options.heal import HealOptions
from kraken_compiler.passes.lower import lower
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.healing.build import trainer_of_all_lanes
from kraken_compiler.quality.healing.data import read_texts
from kraken_compiler.quality.healing.lora import merge_lora
from kraken_compiler.quality.healing.ranks import heal_on_ranks
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import fast_products
from kraken_compiler.training.devices import training_device, with_precision
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.loop import Outcome, train
from kraken_compiler.training.parameters import is_trained
from kraken_compiler.training.results import write_results
from kraken_compiler.training.rows import TrainingText
from kraken_compiler.training.state import Lock, RunState, open_state, remove_run
from kraken_compiler.training.watch import Watch, require_curves_apart, watching
from kraken_compiler.verify.verification import Verification, verify_programs
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name
from kraken_compiler.weights.lane_tensors import lane_tensor_reader, with_lane_tensors

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class HealResult:
    """Result of a healing run.

    Attributes:
        directory: The new artifact.
        record: What its manifest says of the healing.
        outcome: What the held-out part of the texts showed.
        resumed_from: Steps that an earlier part of the run had done.
        verification: The program contract of the new artifact.
        notes: What people should know.
    """

    directory: Path
    record: HealingRecord
    outcome: Outcome
    resumed_from: int
    verification: Verification
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "artifact": str(self.directory),
            "healed": self.record.model_dump(mode="json"),
            "resumed_from": self.resumed_from,
            "notes": list(self.notes),
            "before": self.outcome.before,
            "after": self.outcome.after,
            "held_out": [{"step": step, "kl": kl} for step, kl in self.outcome.held_out],
            "verification": self.verification.to_dict(),
        }


def heal_artifact(
    directory: FilePath,
    settings: HealSettings,
    options: HealOptions | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    **keywords: Any,
) -> HealResult:
    """Train an artifact by self-distillation: its source is the teacher, KL(source || lanes) of the logits the loss.

    The state of the run lies in a folder beside the output, `OUTPUT.heal`; whenever it was ended, the same call goes on
    from its last checkpoint.

    Args:
        directory: The artifact; it is not changed. It must hold the lane program itself.
        settings: How to train.
        options: What is asked for; None takes the keywords.
        example_inputs: To capture the source, see `compile_model`.
        progress: Is told about long stages.
        watch: Is told about every step.
        keywords: Options by name, e.g. `texts` (UTF-8 files; the last part of each is held out) or `tokens` (files of
            token ids, see `read_texts`; for models without a tokenizer).

    Raises:
        UsageError: Wrong settings, too little text, no source, an unfinished run with other settings, or the training
            diverged; then the last checkpoint is kept.
        InputFileError: A file is damaged, is not what it was, or cannot be read or written.
        VerificationError, RankFailedError: See `compile_model`.
    """
    options = options if options is not None else HealOptions.of(keywords)
    texts, tokens, output, source = options.texts, options.tokens, options.output, options.source
    trust_pickle, force, timeout = options.trust_pickle, options.force, options.timeout
    tensorboard, restart = options.tensorboard, options.restart
    show = progress or Silent()
    settings.check()
    require_timeout(timeout)
    path = Path(directory)
    target = Path(output) if output is not None else _beside(path)
    with show.stage("check hashes"):
        artifact = open_artifact(path)
    require_lanes(artifact)
    where = source if source is not None else artifact.manifest.source.path
    inputs = [Path(one) for one in (path, *texts, *tokens, where) if one and isinstance(one, str | os.PathLike)]
    _check_output(path, target, force, inputs)
    folder = target.absolute().with_name(f"{target.name}.heal")
    curves = Path(tensorboard) if tensorboard is not None else None
    require_curves_apart(curves, target, folder)
    settings = with_precision(settings, artifact.manifest.degree if settings.ranks else 1)
    with show.stage("capture"):
        captured = source_of(artifact, source, example_inputs=example_inputs, trust_pickle=trust_pickle)
    if captured.lanes is not None:
        raise UsageError(f"{path}: a Kraken model computes what it was trained to; there is nothing to heal")
    _require_trainable(path, captured.program)
    with show.stage("read the texts"):
        text = read_texts(captured, [Path(name) for name in texts], [Path(name) for name in tokens], settings)
    state = open_state(folder, _identity(artifact, captured, text, settings), restart)
    with Lock(folder):
        with watching(watch, curves, Distillation.name, state.step) as watches:
            outcome = _train(artifact, captured, text, settings, folder, state, watches, timeout)
        record = HealingRecord(
            steps=settings.steps,
            tokens=settings.steps * settings.batch * text.train.shape[1],
            texts=text.hashes,
            kl_before=outcome.before["kl"] if math.isfinite(outcome.before["kl"]) else None,
            kl_after=outcome.after["kl"],
            settings=settings.identity(),
        )
        with reserved(target, force, inputs) as reservation:
            result = _write(artifact, captured, folder, reservation, record, outcome, state.step, timeout, show)
    remove_run(folder)
    return replace(result, notes=text.notes)


def _train(
    artifact: Artifact,
    captured: Capture,
    text: TrainingText,
    settings: HealSettings,
    folder: Path,
    state: RunState,
    watch: Watch,
    timeout: float,
) -> Outcome:
    degree = artifact.manifest.degree if settings.ranks else 1
    embedding = embedding_choice(artifact.manifest)
    source, _ = lower(captured.program, degree, "standard", embedding=embedding, cached=False)
    read = captured.store.read
    if settings.ranks:
        return heal_on_ranks(artifact, source, read, text, settings, folder, watch, timeout)
    trainer = trainer_of_all_lanes(artifact, source, read, settings, training_device())
    with fast_products():
        outcome = train(trainer, text.train, text.held_out, folder, state, watch)
    merge_lora(trainer.parameters)
    write_results(trainer, folder, artifact.manifest.degree)
    return outcome


def _write(
    artifact: Artifact,
    captured: Capture,
    folder: Path,
    reservation: Reservation,
    record: HealingRecord,
    outcome: Outcome,
    resumed_from: int,
    timeout: float,
    show: Progress,
) -> HealResult:
    """Write the lanes that lie in the folder as an artifact, checked before it is put in place."""
    manifest = artifact.manifest
    program = lowered_as(captured, manifest)
    program = with_lane_tensors(program, [name for name, spec in program.weights.items() if is_trained(spec)])
    read_lane = read_from_lane_files(
        [folder / lane_file_name(lane) for lane in range(program.degree)], folder / SHARED_FILE
    )
    read = lane_tensor_reader(program.weights, program.degree, read_lane, captured.store.read)
    verification: Verification | None = None

    def check(partial: Path) -> dict[str, object]:
        nonlocal verification
        with show.stage("run on ranks"):
            verification = verify_programs(partial, None, timeout)
        verification.require_passed()
        return verification.to_dict()

    report = {**artifact.report(), "healing": {"before": outcome.before, "after": outcome.after}}
    with show.steps("write and check") as advance:
        artifact_directory = write_artifact(
            program,
            program.reader(read),
            reservation.target,
            source=manifest.source,
            backends=backends_of(artifact),
            tokenizer_saver=_tokenizer_copier(artifact),
            report=report,
            healed=(*manifest.healed, record),
            options=manifest.options,
            check=check,
            reservation=reservation,
            progress=advance,
        )
    assert verification is not None
    return HealResult(artifact_directory, record, outcome, resumed_from, verification)


def _require_trainable(path: Path, program: Program) -> None:
    """Refuse a source whose integers stay what they are: to train the rest would heal nothing."""
    count = sum(node.target is DEQUANTIZE for node in program.graph.nodes)
    if count:
        raise UsageError(
            f"{path}: {count} of its source's weights are quantised, and integers cannot be trained; "
            "heal the model with plain weights, and quantise what comes of it (ONNX devices: --onnx-weights)"
        )


def _identity(artifact: Artifact, captured: Capture, text: TrainingText, settings: HealSettings) -> dict[str, Any]:
    manifest = (artifact.directory / MANIFEST_FILE).read_bytes()

    return {
        "artifact": hashlib.sha256(manifest).hexdigest(),
        "source": captured.origin.sha256,
        "texts": text.hashes,
        "rows": text.digest(),
        **settings.identity(),
    }


def _beside(path: Path) -> Path:
    return path.absolute().with_name(f"{path.absolute().name.removesuffix('.kraken')}.healed.kraken")


def _check_output(path: Path, target: Path, force: bool, inputs: Sequence[Path]) -> None:
    place = resolved(target)
    if any(above.exists() and above.samefile(path) for above in (place, *place.parents)):
        raise UsageError(
            f"--output {target}: is the artifact that is healed, or lies inside it; choose another directory"
        )
    check_target(target, force, inputs)


def _tokenizer_copier(artifact: Artifact) -> Callable[[Path], None] | None:
    tokenizer = artifact.tokenizer
    if tokenizer is None:
        return None

    def copy(directory: Path) -> None:
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True)

    return copy
