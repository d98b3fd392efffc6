"""Options of a run: one list, for `kraken-run` and for the worker under torchrun.

Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import typer

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Backend
from kraken_compiler.backends.registry import (
    BACKEND_NAMES,
    backend_named,
    backend_of,
    backend_rows,
    options_of,
    require_backend,
)
from kraken_compiler.errors import InputFileError, UsageError, os_errors_as
from kraken_compiler.options.command_line import CommandLine, command
from kraken_compiler.options.command_options import COMMAND_LINE_ONLY, CommandOptions
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.text import bytes_not_utf8, decoded, require_text

NEW_TOKENS = 32
CHAT_TOKENS = 512
CONTEXT = 2048
_MOST_PROMPT_BYTES = 256 << 20
_MOST_TOKENS = 1 << 24
"""Of a row: more than any model reads."""
_MOST_THREADS = 1 << 12
_MOST_TOKEN_ID = (1 << 63) - 1
_EXCERPT_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommandOptions):
    """A run's options; every field is one, and its annotation is its help."""

    AT_RUN: ClassVar[bool] = True

    artifact: Annotated[
        Path, COMMAND_LINE_ONLY, typer.Argument(metavar="DIR", help="An artifact that kraken-compile wrote.")
    ]
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several make a batch.")] = field(
        default_factory=list
    )
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 text file with a prompt in every line; line feeds end lines.")
    ] = None
    input_ids: Annotated[
        list[str],
        typer.Option(help="Token ids to continue, e.g. 1,2,3, for a model without a tokenizer; several make a batch."),
    ] = field(default_factory=list)
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_TOKENS,
            help=f"How many tokens to generate at most. (default: {NEW_TOKENS}, {CHAT_TOKENS} with a chat template)",
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; higher draws with more variety.")
    ] = 0.0
    top_k: Annotated[int | None, typer.Option(help="Draw from the K most likely tokens only.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens that make up the probability P only.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the drawing, for the same text again. (default: another every time)")
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into the tokenizer's chat template. "
            "(default: if it has one, when lines are read from standard input; off for --prompt)",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which of the tokenizer's chat templates, if it has several. (default: default)"
        ),
    ] = None
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None
    reduce_dtype: Annotated[
        str | None,
        typer.Option(
            help="Round what ranks send each other to this type: bfloat16 or float16. Halves the bytes of a float32 "
            "model and changes its numbers a little. (default: send it as it is)"
        ),
    ] = None
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            "--capacity",
            min=1,
            max=_MOST_TOKENS,
            help=f"Most tokens a row can have, prompt and new ones together. (default: what is asked for; {CONTEXT} "
            "when lines are read from standard input)",
        ),
    ] = None
    json: Annotated[
        bool,
        COMMAND_LINE_ONLY,
        typer.Option("--json", help="Print one JSON document: ids, text, why it ended, timings."),
    ] = False
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the token that ends a text.")] = False
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"Whose programs to run: {BACKEND_NAMES}. (default: the first of these that the artifact has)"
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_THREADS, help="Threads that every rank computes with. (default: its share of the cores)"
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what every rank computes and has on its way, for chrome://tracing or ui.perfetto.dev (.json)."
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a rank counts as hanging that gets nothing done, while no rank computes. "
            "(default: 60)"
        ),
    ] = None
    verbose: Annotated[
        bool, COMMAND_LINE_ONLY, typer.Option("--verbose", "-v", help="Show what the launcher does.")
    ] = False
    terminal: Annotated[bool, COMMAND_LINE_ONLY, typer.Option("--terminal", hidden=True)] = False
    """Set by kraken-run: a person types the lines, and gets a sign when it is their turn."""
    backend_options: dict[str, Any] = field(default_factory=dict)
    """Options of backends that were given, by field name."""

    @property
    def interactive(self) -> bool:
        """True if lines of standard input are the prompts."""
        return not (self.prompt or self.prompt_file or self.input_ids)

    def check(self) -> None:
        """Check the options as far as that needs no program.

        Raises:
            UsageError: Options contradict each other or are out of their range.
        """
        from kraken_compiler.generate.sampling import Sampling

        if self.input_ids and (self.prompt or self.prompt_file):
            raise UsageError("give either --prompt TEXT or --input-ids 1,2,3, not both")
        if self.input_ids and (self.chat or self.system):
            raise UsageError("--chat and --system are for text; --input-ids are taken as they are")
        if self.system and self.chat is not True and not (self.interactive and self.chat is None):
            raise UsageError("--system needs --chat")
        if self.chat_template and (self.input_ids or self.chat is False or not (self.chat or self.interactive)):
            raise UsageError("--chat-template needs --chat")
        if self.json and self.interactive:
            raise UsageError("--json needs --prompt TEXT, --prompt-file FILE or --input-ids 1,2,3")
        for name in backend_rows() if self.backend is None else [self.backend]:
            own = options_of(name, at_run=True)
            backend_named(name, {key: value for key, value in self.backend_options.items() if key in own})
        if self.reduce_dtype not in (None, "bfloat16", "float16"):
            raise UsageError(f"--reduce-dtype {self.reduce_dtype}: choose bfloat16 or float16")
        if self.timeout is not None:
            require_timeout(self.timeout)
        if self.trace is not None and not self.trace.absolute().parent.is_dir():
            raise UsageError(f"--trace {self.trace}: there is no such directory")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError("--top-k and --top-p need a --temperature above 0; 0 takes the most likely token")
        Sampling(self.temperature, self.top_k, self.top_p, self.seed or 0)
        self.ids()
        for number, prompt in enumerate(self.prompt, start=1):
            require_text(prompt, f"--prompt (number {number})" if len(self.prompt) > 1 else "--prompt")
        require_text(self.system or "", "--system")

    def backend_of(self, artifact: Artifact) -> Backend[Any]:
        """The backend that was asked for, or else the first one that the artifact has, with its options.

        Raises:
            UsageError: The artifact does not have it, or an option is another backend's.
        """
        there = artifact.manifest.backends
        name = self.backend or next((name for name in backend_rows() if name in there), None)
        if name is None:
            raise UsageError(
                f"{artifact.directory} was compiled for no backend that is here (it has: {', '.join(there)})"
            )
        require_backend(artifact, name)
        for option in self.backend_options:
            if option not in options_of(name, at_run=True):
                owners = [other for other in backend_rows() if option in options_of(other, at_run=True)]
                raise UsageError(
                    f"--{option} does not go with the {name} backend: it is an option of {' and '.join(owners)}"
                )
        return backend_of(artifact, name, self.backend_options)

    def prompts(self) -> list[str]:
        """The prompts that are text.

        Raises:
            InputFileError: The prompt file cannot be read.
            UsageError: It has no prompts.
        """
        if self.prompt_file is None:
            return self.prompt
        # Only line feeds end a line: what else Unicode calls the end of one may stand within a prompt.
        lines = (line.removesuffix("\r") for line in _read_prompts(self.prompt_file).split("\n"))
        prompts = [*self.prompt, *(line for line in lines if line.strip())]
        if not prompts:
            raise UsageError(f"--prompt-file: {self.prompt_file} has no prompts")
        return prompts

    def ids(self) -> list[list[int]]:
        """The prompts that are token ids.

        Raises:
            UsageError: One is no list of numbers.
        """
        return [_ids(text) for text in self.input_ids]

    def to_json(self) -> str:
        """The options as JSON for `from_json`, in another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The options that `to_json` wrote."""
        values = json.loads(text)
        for name in ("artifact", "prompt_file", "trace"):
            values[name] = Path(values[name]) if values[name] is not None else None
        return cls(**values)


def options_app(act: Callable[[RunOptions], None], description: str, epilog: str | None = None) -> typer.Typer:
    """A command line whose options are the fields of `RunOptions`, and those of the backends that are for runs.

    Args:
        act: Called with what was given.
        description, epilog: First and last words of `--help`.
    """

    def run(command_line: CommandLine) -> None:
        (options,) = command_line.options(RunOptions)
        act(options)

    return command(run, RunOptions, description=description, epilog=epilog, has_output_options=False)


def _read_prompts(path: Path) -> str:
    with os_errors_as(f"--prompt-file: cannot read {path}"), path.open("rb") as file:
        content = file.read(_MOST_PROMPT_BYTES + 1)
    if len(content) > _MOST_PROMPT_BYTES:
        raise InputFileError(
            f"--prompt-file: {path} has more than {_MOST_PROMPT_BYTES >> 20} MB; no prompts are so long"
        )
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        raise bytes_not_utf8(content, path, "--prompt-file") from error


def _ids(text: str) -> list[int]:
    excerpt = text if len(text) <= _EXCERPT_CHARACTERS else text[:_EXCERPT_CHARACTERS] + "..."
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--input-ids '{excerpt}' is no list of token ids like 1,2,3") from None
    if not all(0 <= token <= _MOST_TOKEN_ID for token in ids):
        raise UsageError(f"--input-ids '{excerpt}': token ids are numbers from 0")
    return ids
