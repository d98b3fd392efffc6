"""The captured model: its program, weight store, origin and tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kraken_compiler.artifact.tokenizer_files import (
    GENERATION_CONFIG,
    generation_config,
    read_tokenizer,
    read_without_templates,
    save_tokenizer,
)
from kraken_compiler.capture.gguf_headers import GgufHeaders
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.capture.run_source import OpenModel
from kraken_compiler.errors import InputFileError, naming
from kraken_compiler.ir.program import Program
from kraken_compiler.text import json_text
from kraken_compiler.weights.io.buffers import aligned_buffer
from kraken_compiler.weights.io.direct_io import LargeFile, would_flood_the_cache
from kraken_compiler.weights.io.safetensors_format import byte_view
from kraken_compiler.weights.store import WeightStore

_DIGEST_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenizerSource:
    """The location of the model's tokenizer.

    Attributes:
        directory: Directory of the tokenizer files, or of the GGUF file.
        gguf_file: Name of the GGUF file that holds the tokenizer, if one does.
        headers: What was read of that file.
    """

    directory: str
    gguf_file: str | None = None
    headers: GgufHeaders = field(default_factory=GgufHeaders, repr=False, compare=False)

    def load(self) -> Any:
        """The tokenizer, a `transformers.PreTrainedTokenizerBase`; without chat templates if they are damaged.

        Raises:
            InputFileError: The files are damaged, of a kind that the installed packages do not know, or need code that
                is not part of transformers.
            UsageError: The packages that read them are not installed.
        """
        return self._contents[0]

    def check(self) -> tuple[tuple[str, ...], Any]:
        """Check that the tokenizer can be read and saved, before anything that takes long.

        Returns:
            What a user should know, and the tokenizer.

        Raises:
            InputFileError: A file is damaged, see `load` and `save`.
            UsageError: The packages that read them are not installed.
        """
        tokenizer, notes = self._contents
        try:
            with TemporaryDirectory(prefix="kraken-tokenizer-") as name:
                return (*notes, *self._write(tokenizer, Path(name))), tokenizer
        except OSError as error:
            raise InputFileError(f"{self.directory}: the tokenizer cannot be saved: {error}") from error

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, and a generation config, which says what else ends a text.

        Raises:
            InputFileError: The source's files are damaged.
            OSError: The directory cannot be written.
        """
        self._write(self.load(), directory)

    @cached_property
    def _contents(self) -> tuple[Any, tuple[str, ...]]:
        """The tokenizer, which takes seconds to make of a GGUF file, and notes."""
        with quiet_transformers(), self.headers.shared() if self.gguf_file else nullcontext():
            try:
                return read_tokenizer(self.directory, self.gguf_file), ()
            except InputFileError as error:
                tokenizer = read_without_templates(Path(self.directory)) if self.gguf_file is None else None
                if tokenizer is None:
                    raise
                return tokenizer, (f"without a chat template, which is damaged: {error}",)
            finally:
                self.headers.forget()

    def _write(self, tokenizer: Any, directory: Path) -> tuple[str, ...]:
        notes = save_tokenizer(tokenizer, directory, self.directory)
        settings = generation_config(Path(self.directory), of_config=self.gguf_file is None)
        if settings is not None:
            path = directory / GENERATION_CONFIG
            with naming(path):
                path.write_text(json_text(settings), encoding="utf-8")
        return notes


@dataclass(frozen=True)
class Origin:
    """The origin of a program.

    Attributes:
        kind: "huggingface", "gguf", "export", "pickle" or "module".
        path: The file or directory; None for a live module.
        model_class: Qualified name of the source model's class, "" if the source does not say.
        tokenizer: Its tokenizer, if it came with one.
        digest: Computes `sha256`.
    """

    kind: str
    path: str | None
    model_class: str
    digest: Callable[[], str] = field(repr=False, compare=False)
    tokenizer: TokenizerSource | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of every byte of the source that matters; reads it all, so it is computed when first asked for."""
        return self.digest()


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        program: Degree 1, every weight whole.
        store: The values of the weights that are not in `program.constants`.
        origin: Where it came from.
        config: The source's `config.json`, for cross-checks and reports; None if it has none.
        notes: What a user should know, one sentence each (e.g. a dimension that turned out to be fixed).
        model: Opens the model itself, to compare with; None if there is none to run.
        frozen: Names of the weights that the source does not train.
        lanes: How many lanes the model itself has, of which the program is one; None for a model that has none yet.
        stop_tokens: The tokens that its configs name as those that end a text; its tokenizer may have others.
    """

    program: Program
    store: WeightStore
    origin: Origin
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    model: OpenModel | None = field(default=None, repr=False, compare=False)
    frozen: frozenset[str] = frozenset()
    lanes: int | None = None
    stop_tokens: tuple[int, ...] = ()

    @property
    def has_values(self) -> bool:
        """False for a module in memory whose weights have none (on the meta device)."""
        return self.model is not None or self.origin.path is not None


def digest_files(files: tuple[Path, ...]) -> str:
    """sha256 over the files' names and contents; a single file's own sha256 for one file.

    Raises:
        InputFileError: A file cannot be read.
    """
    try:
        direct = would_flood_the_cache(files)
        pieces = [memoryview(aligned_buffer(_DIGEST_BYTES)) for _ in range(2)]
        with ThreadPoolExecutor(1, "read-source") as pool:
            if len(files) == 1:
                return _file_digest(files[0], direct, pieces, pool)
            total = hashlib.sha256()
            for path in sorted(files):
                total.update(f"{_file_digest(path, direct, pieces, pool)}  {path.name}\n".encode())
            return total.hexdigest()
    except OSError as error:
        raise InputFileError(f"cannot read {error.filename}: {error.strerror or error}") from error


def files_digester(files: tuple[Path, ...], *, early: bool) -> Callable[[], str]:
    """A function that computes `digest_files`.

    Args:
        files: The files.
        early: Begin at once, in a thread: who captures a large model waits for one core, the disk and the others idle.
    """
    if not early:
        return lambda: digest_files(files)
    digest: Future[str] = Future()

    def compute() -> None:
        try:
            digest.set_result(digest_files(files))
        except BaseException as error:  # whoever asks for the hash gets it
            digest.set_exception(error)

    # A daemon: a capture that fails does not wait for the hash of what nobody will use.
    threading.Thread(target=compute, name="hash-source", daemon=True).start()
    return digest.result


def digest_tensors(store: WeightStore) -> str:
    """sha256 over names, element types, shapes and values of a store's tensors, read one at a time."""
    total = hashlib.sha256()
    for name in sorted(store.names()):
        tensor = store.read(name).contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(byte_view(tensor))
    return total.hexdigest()


def _file_digest(path: Path, direct: bool, pieces: list[memoryview], pool: ThreadPoolExecutor) -> str:
    # In large pieces: between two of them a thread waits for the interpreter, which may be busy capturing. One is read
    # while the one before it is hashed.
    total, starts = hashlib.sha256(), itertools.count(step=_DIGEST_BYTES)
    with LargeFile(path, direct=direct) as file:
        reading = pool.submit(file.read, pieces[0], next(starts))
        while count := reading.result():
            piece = pieces[0][:count]
            pieces.reverse()
            reading = pool.submit(file.read, pieces[0], next(starts))
            total.update(piece)
    return total.hexdigest()
