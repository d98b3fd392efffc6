"""`train_model`: a Kraken model from its first weights on (`kraken-train`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.artifact.tokenizer_files import read_tokenizer
from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, UsageError, VerificationError, os_errors_as
from kraken_compiler.native.config import KrakenConfig
from kraken_compiler.native.directory import load_native, save_native
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.options.train import TrainOptions
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import fast_products
from kraken_compiler.texts.read import load_tokenizer, text_files
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
from kraken_compiler.training.watch import TensorBoard, ToAll, Watch

RECORD_FILE = "training.json"
_ROWS_SEEN = 64
"""Of a text, to find out what is in the stream of a standard model."""
_AGREEMENT = 0.01
"""By how much the written model's loss may differ from that of the trained lanes, relative: rounding differs."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        directory: The model.
        config: Its sizes and kinds.
        outcome: What the held-out part of the texts showed.
        settings: How it was trained.
        tokens: How many tokens were trained on, and how many there are.
        resumed_from: Steps that an earlier part of the run had done.
    """

    directory: Path
    config: KrakenConfig
    outcome: Outcome
    settings: TrainSettings
    tokens: tuple[int, int]
    resumed_from: int

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
            "before": self.outcome.before,
            "after": self.outcome.after,
            "held_out": [{"step": step, "loss": loss} for step, loss in self.outcome.held_out],
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
    target = Path(options.output).absolute()
    _require_free(target)
    if not options.texts and not options.tokens:
        raise UsageError("name something to train on: --text FILE or DIR, or --tokens FILE")
    settings = with_precision(settings, settings.processes)
    texts = [file for path in options.texts for file in text_files(Path(path), "--text")]
    begin, teacher = _standard_models(config, options, show)
    with show.stage("read the texts"):
        tokenizer = _tokenizer(config, options.tokenizer, begin or teacher, texts, settings)
        tokens = [Path(path) for path in options.tokens]
        text = read_rows(texts, tokens, tokenizer, config.vocabulary, config.context, settings)
    folder = target.with_name(f"{target.name}.train")
    with show.stage("first weights"):
        model = new_model(config, settings.seed) if begin is None else upcycled(config, begin, text.train[:_ROWS_SEEN])
    origins = {
        name: None if one is None else one.origin.sha256 for name, one in (("from", begin), ("teacher", teacher))
    }
    state = open_state(folder, {**_identity(config, text, tokenizer, settings), **origins}, options.restart)
    objective = NextToken.name if teacher is None else Distillation.name
    board = TensorBoard(Path(options.tensorboard), objective, state.step) if options.tensorboard else None
    watches = [one for one in (watch, board) if one is not None]
    with Lock(folder):
        try:
            outcome = _train(model, teacher, text, settings, options, folder, state, ToAll(*watches))
        finally:
            if board is not None:
                board.close()
        trained = settings.steps * settings.batch * text.train.shape[1]
        result = TrainResult(target, config, outcome, settings, (trained, text.train.numel()), state.step)
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
        if path is not None and str(path) not in found:
            with show.stage("capture"):
                captured = found[str(path)] = capture(path)
            count = vocabulary(captured.program)
            if captured.lanes is not None:
                raise UsageError(f"{option} {path}: is a Kraken model; name a standard one")
            if count != config.vocabulary:
                raise UsageError(f"{option} {path}: has {count} tokens, the model that is trained {config.vocabulary}")
    begin, teacher = (None if path is None else found[str(path)] for path in (options.begin, options.teacher))
    return begin, teacher


def _write(result: TrainResult, text: TrainingText, tokenizer: Any, folder: Path) -> None:
    """Write the model whose lanes lie in the folder, and see that it is what was trained, before it is put in place."""
    target = result.directory
    model = new_model(result.config, result.settings.seed)
    fill_from_lanes(model, trained_program(model)[0], folder)
    partial = target.with_name(f".{target.name}.partial")
    with os_errors_as(f"cannot write {target}"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_native(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / RECORD_FILE).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
            _require_trained(partial, result, text)
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _require_trained(directory: Path, result: TrainResult, text: TrainingText) -> None:
    """Read the model back and measure it on the held-out text, where the lanes were measured."""
    model = load_native(directory)
    bfloat16 = result.settings.precision == BFLOAT16
    with torch.no_grad(), fast_products(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = NextToken().measure(model, torch.split(text.held_out, result.settings.batch)).loss
    trained = math.log(result.outcome.after["perplexity"])
    if not math.isclose(loss, trained, rel_tol=_AGREEMENT):
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
    if not texts:
        return None
    if standard is not None:
        return load_tokenizer(standard, "--text", "give token ids with --tokens FILE")
    return train_tokenizer((parts_of_text(path, settings.hold_out)[0] for path in texts), config.vocabulary)


def _identity(config: KrakenConfig, text: TrainingText, tokenizer: Any, settings: TrainSettings) -> dict[str, Any]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if tokenizer is not None else ""
    return {
        "model": config.to_dict(),
        "tokenizer": hashlib.sha256(os.fsencode(vocabulary)).hexdigest(),
        "texts": text.hashes,
        **settings.identity(),
    }


def _require_free(target: Path) -> None:
    with os_errors_as(f"--output {target}"):
        if not target.parent.is_dir():
            raise UsageError(f"--output {target}: there is no directory {target.parent}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"--output {target}: is there and not empty; choose another, or remove it")
