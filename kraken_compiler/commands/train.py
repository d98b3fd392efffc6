"""`train_model`: a Kraken model from its first weights on (`kraken-train`)."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.artifact.replaceable import resolved
from kraken_compiler.artifact.tokenizer_files import read_tokenizer
from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, KrakenError, UsageError, VerificationError, os_errors_as
from kraken_compiler.native.config import LEARNED, KrakenConfig
from kraken_compiler.native.directory import load_native, save_native
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.options.train import TrainOptions
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import fast_products
from kraken_compiler.text import json_text
from kraken_compiler.texts.read import load_tokenizer, longest_row, require_one_text, text_files
from kraken_compiler.texts.token_files import spread
from kraken_compiler.training.devices import training_device, with_precision
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.from_scratch.build import (
    fill_from_lanes,
    new_model,
    objective_from,
    trained_program,
    trainer_of,
)
from kraken_compiler.training.from_scratch.ranks import train_native_on_ranks
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.from_scratch.tokenizer import train_tokenizer
from kraken_compiler.training.from_scratch.upcycle import upcycled
from kraken_compiler.training.loop import Outcome, train
from kraken_compiler.training.objective import NextToken
from kraken_compiler.training.results import write_results
from kraken_compiler.training.rows import TrainingText, parts_of_text, read_rows
from kraken_compiler.training.settings import BFLOAT16
from kraken_compiler.training.state import Lock, RunState, open_state, remove_run
from kraken_compiler.training.watch import Watch, require_curves_apart, watching

RECORD_FILE = "training.json"
_ROWS_SEEN = 64
"""Of a text, to find out what is in the stream of a standard model."""
_ROWS_AT_ONCE = 4
_AGREEMENT = 0.01
"""Nats, or the share, by which the written model's loss may differ from that of the trained lanes: rounding differs."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        directory: The model.
        config: Its sizes and kinds.
        objective: What was made small: "loss", or with a teacher "kl".
        outcome: What the held-out part of the texts showed.
        settings: How it was trained.
        tokens: How many tokens were trained on, and how many there are.
        resumed_from: Steps that an earlier part of the run had done.
        notes: What a user should know, one sentence each.
    """

    directory: Path
    config: KrakenConfig
    objective: str
    outcome: Outcome
    settings: TrainSettings
    tokens: tuple[int, int]
    resumed_from: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "model": str(self.directory),
            "config": self.config.to_dict(),
            "parameters": self.config.parameters,
            "settings": self.settings.to_dict(),
            "trained_on_tokens": self.tokens[0],
            "tokens_of_the_texts": self.tokens[1],
            "resumed_from": self.resumed_from,
            "notes": list(self.notes),
            "before": self.outcome.before,
            "after": self.outcome.after,
            "held_out": [{"step": step, self.objective: value} for step, value in self.outcome.held_out],
        }


def train_model(
    config: KrakenConfig,
    settings: TrainSettings,
    options: TrainOptions | None = None,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
    **keywords: Any,
) -> TrainResult:
    """Train a Kraken model from scratch, and write it with its tokenizer as a directory that `compile` reads.

    The state of the run lies in a folder beside the output, `OUTPUT.train`; whenever it was ended, the same call goes
    on from its last checkpoint.

    Args:
        config: The model's sizes and kinds. Where a tokenizer is learnt from the texts, it has `vocabulary` tokens.
        settings: How to train.
        options: What is asked for; None takes the keywords.
        progress: Is told about long stages.
        watch: Is told about every step.
        keywords: Options by name, e.g. `texts` (UTF-8 files or directories; the last part of each is held out) and
            `output`.

    Raises:
        UsageError: Wrong settings, too little text, an unfinished run with other settings, or the training diverged;
            then the last checkpoint is kept.
        InputFileError: A file cannot be read or written.
        RankFailedError: A rank died or hung.
        VerificationError: The model that was written does not compute what was trained.
    """
    options = options if options is not None else TrainOptions.of(keywords)
    show = progress or Silent()
    settings.check()
    require_timeout(options.timeout)
    if options.output is None:
        raise UsageError("say where the model goes: -o DIR")
    if not options.texts and not options.tokens:
        raise UsageError("name something to train on: --text FILE or DIR, or --tokens FILE")
    if settings.ranks not in (None, config.degree) and settings.batch < settings.processes:
        raise UsageError(f"--batch {settings.batch}: {settings.processes} processes need a row each")
    target = resolved(options.output)
    if not target.name:
        raise UsageError(f"--output {options.output}: name a directory in it")
    folder = target.with_name(f"{target.name}.train")
    curves = Path(options.tensorboard) if options.tensorboard is not None else None
    _require_free(target, curves, options.texts)
    require_curves_apart(curves, target, folder)
    settings = with_precision(settings, settings.processes)
    texts = [file for path in options.texts for file in text_files(Path(path), "--text")]
    begin, teacher = _standard_models(config, options, show)
    with show.stage("read the texts"):
        tokenizer = _tokenizer(config, options.tokenizer, begin or teacher, texts, settings)
        tokens = [Path(path) for path in options.tokens]
        longest = min([config.context, *(longest_row(one, config.context) for one in (begin, teacher) if one)])
        text = read_rows(texts, tokens, tokenizer, config.vocabulary, longest, settings, joined=True)
    state = open_state(folder, _identity(config, text, settings, begin, teacher), options.restart)
    with Lock(folder):
        model = _first_model(config, begin if state.step == 0 else None, text, settings, folder, show)
        with watching(watch, curves, _objective_name(teacher), state.step) as watches:
            outcome = _train(model, teacher, text, settings, options, folder, state, watches)
        counts = (settings.steps * settings.batch * text.train.shape[1], text.train.numel())
        result = TrainResult(
            target,
            config,
            _objective_name(teacher),
            outcome,
            settings,
            counts,
            state.step,
            _notes(config, text),
        )
        with show.stage("write and check"):
            _write(result, text, tokenizer, folder)
    remove_run(folder)
    return result


def _train(
    model: KrakenLM,
    teacher: Capture | None,
    text: TrainingText,
    settings: TrainSettings,
    options: TrainOptions,
    folder: Path,
    state: RunState,
    watch: Watch,
) -> Outcome:
    if settings.ranks is not None:
        path = None if teacher is None else Path(options.teacher)
        return train_native_on_ranks(model, path, text, settings, folder, watch, options.timeout)
    device = training_device()
    with fast_products():
        trainer = trainer_of(model, objective_from(teacher, device), settings, device)
        outcome = train(trainer, text.train, text.held_out, folder, state, watch)
    write_results(trainer, folder, model.config.degree)
    return outcome


def _standard_models(
    config: KrakenConfig, options: TrainOptions, show: Progress
) -> tuple[Capture | None, Capture | None]:
    """The model that the first weights are taken from, and the teacher."""
    found: dict[str, Capture] = {}
    for option, path in (("--from", options.begin), ("--teacher", options.teacher)):
        if path is None or str(path) in found:
            continue
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"{option}: name the model's file or directory; ranks open it themselves")
        with show.stage("capture"):
            captured = found[str(path)] = capture(path, dtype=torch.float32)
        if captured.lanes is not None:
            raise UsageError(f"{option} {path}: is a Kraken model; name a standard one")
        require_one_text(captured.program, f"{option} {path}")
        count = vocabulary(captured.program)
        if count != config.vocabulary:
            raise UsageError(f"{option} {path}: has {count} tokens, the model that is trained {config.vocabulary}")
    begin, teacher = (None if path is None else found[str(path)] for path in (options.begin, options.teacher))
    return begin, teacher


def _first_model(
    config: KrakenConfig,
    begin: Capture | None,
    text: TrainingText,
    settings: TrainSettings,
    folder: Path,
    show: Progress,
) -> KrakenLM:
    """The model before the first step; where there is a checkpoint, its weights take the place of any others."""
    if begin is None:
        return new_model(config, settings.seed)
    try:
        with show.stage("take first weights"):
            return upcycled(config, begin, spread(text.train, _ROWS_SEEN))
    except KrakenError:
        remove_run(folder)  # there is nothing to go on with
        raise


def _objective_name(teacher: Capture | None) -> str:
    return NextToken.name if teacher is None else Distillation.name


def _notes(config: KrakenConfig, text: TrainingText) -> tuple[str, ...]:
    row = text.train.shape[1]
    if config.positions == LEARNED and row < config.context:
        drawn = f"rows have {row} tokens: positions {row} to {config.context - 1} are as they were drawn"
        return (*text.notes, drawn)
    return text.notes


def _write(result: TrainResult, text: TrainingText, tokenizer: Any, folder: Path) -> None:
    """Write the model whose lanes lie in the folder, and see that it is what was trained, before it is put in place."""
    target = result.directory
    model = new_model(result.config, result.settings.seed)
    fill_from_lanes(model, trained_program(model)[0], folder)
    partial = folder / "model"
    with os_errors_as(f"cannot write {target}"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_native(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / RECORD_FILE).write_text(json_text(result.to_dict()) + "\n", encoding="utf-8")
            _require_trained(partial, result, text)
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _require_trained(directory: Path, result: TrainResult, text: TrainingText) -> None:
    """Read the model back and measure it on the held-out text, where the lanes were measured."""
    device = training_device()
    model = load_native(directory).to(device)
    bfloat16 = result.settings.precision == BFLOAT16
    rows = torch.split(text.held_out.to(device), _ROWS_AT_ONCE)
    with torch.no_grad(), fast_products(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        loss = NextToken().measure(model, rows).loss
    trained = math.log(result.outcome.after["perplexity"])
    if not math.isclose(loss, trained, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT):
        raise VerificationError(f"the model's loss is {loss:.5g} where that of the trained lanes is {trained:.5g}")


def _tokenizer(
    config: KrakenConfig, given: Any, standard: Capture | None, texts: Sequence[Path], settings: TrainSettings
) -> Any:
    """What reads the texts: the given tokenizer, a standard model's, or one that is learnt; None without texts."""
    if given is not None:
        directory = Path(given)
        if not directory.is_dir():
            raise InputFileError(f"--tokenizer: there is no directory {directory}")
        tokenizer = read_tokenizer(directory)
        if len(tokenizer) > config.vocabulary:
            raise UsageError(
                f"--tokenizer {directory}: it has {len(tokenizer)} tokens, the model {config.vocabulary}; "
                "set the model's vocabulary to as many"
            )
        return tokenizer
    if standard is not None and (texts or standard.origin.tokenizer is not None):
        return load_tokenizer(standard, "--text", "give token ids with --tokens FILE")
    if not texts:
        return None
    return train_tokenizer((parts_of_text(path, settings.hold_out)[0] for path in texts), config.vocabulary)


def _identity(
    config: KrakenConfig,
    text: TrainingText,
    settings: TrainSettings,
    begin: Capture | None,
    teacher: Capture | None,
) -> dict[str, Any]:
    return {
        "model": config.to_dict(),
        "texts": text.hashes,
        "rows": text.digest(),
        "from": None if begin is None else begin.origin.sha256,
        "teacher": None if teacher is None else teacher.origin.sha256,
        **settings.identity(),
    }


def _require_free(target: Path, curves: Path | None, texts: Sequence[Any]) -> None:
    """Make sure that a model can be written, and that nothing that is written is a text of the next run."""
    with os_errors_as(f"--output {target}"):
        if not target.parent.is_dir():
            raise UsageError(f"--output {target}: there is no directory {target.parent}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"--output {target}: is there and not empty; choose another, or remove it")
    written = [target] if curves is None else [target, resolved(curves)]
    for text in map(resolved, texts):
        inside = next((path for path in written if path.is_relative_to(text)), None)
        if inside is not None:
            raise UsageError(f"{inside} lies inside --text {text}, which is read whole; write elsewhere")
