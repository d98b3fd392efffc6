"""The kind of source that a path holds, by content and not by name."""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.weights.checkpoint_files import ADAPTER_CONFIG

_ZIP_MAGIC = b"PK\x03\x04"
_ACCEPTED_SOURCES = (
    "a Hugging Face directory, a GGUF file, a torch.export archive "
    "or (with --trust-pickle) a module saved by torch.save"
)


class SourceKind(Enum):
    """The kinds of sources that can be captured from a path."""

    HUGGINGFACE = "huggingface"
    GGUF = "gguf"
    EXPORT = "export"
    PICKLE = "pickle"


def detect(path: Path) -> SourceKind:
    """The kind of source that `path` holds.

    Raises:
        InputFileError: Nothing that can be captured; the message says what to give instead.
    """
    with os_errors_as(f"cannot read {path}"):
        if not path.exists():
            raise InputFileError(f"{path} does not exist")
        if path.is_dir():
            return _detect_directory(path)
        with path.open("rb") as file:
            head = file.read(16)
    if not head:
        raise InputFileError(f"{path} is empty")
    if head[:4] == b"GGUF":
        return SourceKind.GGUF
    if head[:4] == _ZIP_MAGIC:
        return _detect_zip(path)
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return SourceKind.PICKLE
    if len(head) > 8 and head[8:9] == b"{":
        raise InputFileError(
            f"{path} holds weights only (safetensors), the architecture is missing: "
            "give the directory that also holds its config.json"
        )
    if path.name == "config.json":
        raise InputFileError(f"{path} is only a config: give its directory, {path.parent}")
    raise InputFileError(f"{path} is not a model file: expected {_ACCEPTED_SOURCES}")


def _detect_directory(path: Path) -> SourceKind:
    if (path / "config.json").is_file():
        return SourceKind.HUGGINGFACE
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise InputFileError(f"{path} has no config.json but a GGUF file: give the file itself, {gguf[0]}")
    if (path / ADAPTER_CONFIG).is_file():
        return SourceKind.HUGGINGFACE
    raise InputFileError(
        f"{path} has no config.json, so it is no Hugging Face model directory; expected {_ACCEPTED_SOURCES}"
    )


def _detect_zip(path: Path) -> SourceKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputFileError(f"{path} is truncated or damaged: it begins like an archive but has no end") from error
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner and any(name.startswith("models/") for name in inner):
        return SourceKind.EXPORT
    if "serialized_exported_program.json" in names:
        raise InputFileError(
            f"{path} was written by torch.export.save of torch 2.7 or older: export the model again with this torch"
        )
    if any(name.startswith("data/aotinductor/") for name in inner):
        raise InputFileError(f"{path} holds compiled code only (AOTInductor): save the model with torch.export.save")
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        raise InputFileError(f"{path} is a TorchScript archive: save the model with torch.export.save instead")
    if "data.pkl" in inner:
        return SourceKind.PICKLE
    raise InputFileError(f"{path} is a zip archive, but no model: expected {_ACCEPTED_SOURCES}")
