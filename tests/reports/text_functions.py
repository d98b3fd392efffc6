"""An artifact with a tokenizer, and an engine that says what it is told: text without ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.generate.engine import GenerationRequest
from kraken_compiler.generate.frontend import serve
from kraken_compiler.generate.request import RunOptions
from tests.test_runtime_text import tokenizer
from tests.toy_lane_program import edit_manifest, write_toy

END = 256
"""The end of a text in `tokenizer`, whose other tokens below it are bytes."""


@dataclass
class SayingEngine:
    """Answers every request with the same tokens, as far as they go and are no stop tokens.

    Attributes:
        requests: What was asked for.
        notes: What a user is told.
    """

    artifact: Artifact
    tokens: Sequence[int]
    reads_source: bool = False
    positions: int = 1 << 20
    requests: list[GenerationRequest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, request: GenerationRequest) -> Iterator[list[int | None]]:
        self.requests.append(request)
        for token in self.tokens[: request.max_new_tokens]:
            if token in request.eos:
                return
            yield [token] * len(request.prompts)

    def idle(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str) -> None:
        pass


def with_tokenizer(directory: Path, saver: Callable[[Path], object] | None = None, **source: Any) -> Artifact:
    """An artifact of a toy model with a tokenizer.

    Args:
        directory: Where to write it.
        saver: Writes the tokenizer's files; None takes `tokenizer`.
        source: What the manifest's source says beyond what it must.
    """
    path = write_toy(directory, 2, tokenizer_saver=saver or tokenizer().save_pretrained)
    manifest = json.loads((path / "manifest.json").read_text())
    edit_manifest(path, source=manifest["source"] | source)
    return open_artifact(path)


def said(artifact: Artifact, tokens: Sequence[int], **options: Any) -> SayingEngine:
    """Have what a run's options ask for printed."""
    chosen = RunOptions(artifact=artifact.directory, **options)
    chosen.check()
    engine = SayingEngine(artifact, tokens)
    serve(engine, chosen)  # type: ignore[arg-type]
    return engine
