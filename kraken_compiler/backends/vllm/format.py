"""The vLLM backend's files inside an artifact. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY, SHARED_FILE, lane_file_name

BODY_FILE, HEAD_FILE, PREPARE_FILE, RECORD_FILE = (
    f"{LANES_DIRECTORY}/engine_{name}.json" for name in ("body", "head", "prepare", "record")
)
"""The graph from tokens to hidden states, that from hidden states to logits, that of what is computed once at load, and
what the attentions are."""

CONFIG_FILE = "config.json"
ARCHITECTURE, MODEL_TYPE = "KrakenForCausalLM", "kraken"
"""By which vLLM finds the model class, and transformers the class of its config."""

TABLE, IDS, POSITIONS, HIDDEN = "table_", "ids", "positions", "hidden"
"""Names of the graphs' inputs; of the tables the beginning."""

_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineAttention(_Record):
    """An attention of a lane.

    Attributes:
        heads, kv_heads: That the lane holds.
        head_size, value_size: Of queries and keys, and of values.
        scale: Factor on the scores.
        window: How many positions a query sees, itself included; 0 means all.
        softcap: Bound on the scores; 0 means none.
        slopes, sinks: The numbers of its ALiBi slopes and its sinks among the outputs of the prepare graph.
    """

    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_size: Annotated[int, Field(ge=1)]
    value_size: Annotated[int, Field(ge=1)]
    scale: float
    window: Annotated[int, Field(ge=0)] = 0
    softcap: float = 0.0
    slopes: Annotated[int, Field(ge=0)] | None = None
    sinks: Annotated[int, Field(ge=0)] | None = None


class EngineRecord(_Record):
    """A lane program as an engine runs it.

    Attributes:
        version: Of this layout.
        attentions: In graph order, which is that of their numbers.
        hidden_size: Of the hidden states.
        vocabulary: Number of logits.
        tables: How many of the prepare graph's outputs are inputs of the other graphs, called `table_0` and so on.
    """

    version: int = _VERSION
    attentions: tuple[EngineAttention, ...]
    hidden_size: Annotated[int, Field(ge=1)]
    vocabulary: Annotated[int, Field(ge=1)]
    tables: Annotated[int, Field(ge=0)]


def rank_files(artifact: Artifact, lane: int) -> tuple[str, ...]:
    """Paths inside an artifact of the files that a lane's process reads."""
    weights = (f"{LANES_DIRECTORY}/{name}" for name in (lane_file_name(lane), SHARED_FILE))
    return BODY_FILE, HEAD_FILE, PREPARE_FILE, RECORD_FILE, *weights


def read_record(path: Path) -> EngineRecord:
    """Read what the attentions are.

    Raises:
        InputFileError: The file is missing, damaged or of another version.
    """
    try:
        record = EngineRecord.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValidationError, ValueError) as error:
        raise InputFileError(f"{path}: damaged, or of another version; compile the model again") from error
    if record.version != _VERSION:
        raise InputFileError(
            f"{path}: version {record.version}, this version reads {_VERSION}; compile the model again"
        )
    return record
