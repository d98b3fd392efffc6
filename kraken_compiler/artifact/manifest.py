"""The schema of `manifest.json`. Unknown keys are errors: a manifest that is not understood is not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_serializer,
    model_validator,
)

from kraken_compiler.artifact.consistency import check_call, check_dtypes, check_rows, check_weights
from kraken_compiler.artifact.packed_sets import packed
from kraken_compiler.ir.cache import CachePlan
from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.index_set import IndexSet, from_indices, to_indices
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ir.shards import LaneUnits
from kraken_compiler.ir.weight_table import WeightSpec

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
TOKENIZER_DIRECTORY = "tokenizer"


def _inner_path(name: str) -> str:
    """Accept a plain relative path only: whatever a manifest says, nothing outside its directory is opened."""
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts and name != "."
    if not is_plain or "\\" in name or "\0" in name or ":" in name:
        raise ValueError(f"'{name}' is not a path inside the artifact")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """Hash and size of a file as it was written."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Source(_Record):
    """The origin of the model.

    Attributes:
        kind: E.g. "huggingface", "gguf", "export", "pickle", "module".
        name: Last part of the path, or the class name.
        path: Where the source was when it was compiled, so that a later verification finds it; "" for a live module.
        sha256: Hash of the source files, "" for a module in memory.
        input_specs: The example inputs that were given as text.
        dtype: The element type that was asked for, "" for the source's own.
        model_class: The source model's class.
        answer_begins: The tokens that an encoder-decoder's answer begins with; none for other models, or if its config
            does not say.
        max_positions: The longest sequence that its config says it was made for; None if it does not say.
        stop_tokens: The tokens that end a text, by the model's configs and its tokenizer; None in an artifact of an
            older version, which noted none.
    """

    kind: str
    name: str
    path: str = ""
    sha256: str = ""
    input_specs: tuple[str, ...] = ()
    dtype: str = ""
    model_class: str = ""
    answer_begins: tuple[int, ...] = ()
    max_positions: Annotated[int, Field(ge=1)] | None = None
    stop_tokens: tuple[int, ...] | None = None


class SplitRecord(_Record):
    """The step graph on two halves of the tokens.

    Attributes:
        inputs: The inputs that it has besides the step graph's.
        plan: The reduces of both halves.
        once: Numbers of the step graph's reduces that the halves have together, and not one each.
    """

    inputs: tuple[InputSpec, ...]
    plan: FormPlan
    once: tuple[int, ...] = ()


class CacheRecord(_Record):
    """The program with a KV cache.

    Attributes:
        plan: Its caches and tables.
        inputs: The inputs of its step graph.
        split: The step graph on two halves of the tokens; None if there is none.
        no_split: Why there is none, "" if there is one or nobody has asked.
    """

    plan: CachePlan
    inputs: tuple[InputSpec, ...]
    split: SplitRecord | None = None
    no_split: str = ""


class RowsRecord(_Record):
    """The lane graph on two halves of a batch's rows.

    Attributes:
        dims: Where the rows lie in the inputs and outputs.
        plan: The reduces of both halves.
    """

    dims: RowDims
    plan: FormPlan


class AssignmentRecord(_Record):
    """The heads or columns of one branch that lanes were given otherwise than in the order of the files.

    Attributes:
        branch: Number of the branch.
        units: How many there are to give: FFN columns, KV heads with their query heads.
        lanes: Those of every lane.
    """

    branch: Annotated[int, Field(ge=1)]
    units: Annotated[int, Field(ge=1, le=1 << 24)]
    lanes: tuple[IndexSet, ...]

    @classmethod
    def of(cls, branch: int, lanes: LaneUnits) -> Self:
        """The record of a branch's units."""
        return cls(branch=branch, units=sum(map(len, lanes)), lanes=tuple(map(from_indices, lanes)))

    @property
    def lane_units(self) -> LaneUnits:
        """The units of every lane."""
        return tuple(tuple(to_indices(lane)) for lane in self.lanes)

    @model_validator(mode="after")
    def _is_partition(self) -> Self:
        bounds = [bound for lane in self.lanes for interval in lane for bound in interval]
        if max(bounds, default=0) > self.units:
            raise ValueError(f"a lane has more than the {self.units} units of branch {self.branch}")
        if sorted(unit for lane in self.lane_units for unit in lane) != list(range(self.units)):
            raise ValueError(f"the lanes do not share the {self.units} units of branch {self.branch}")
        return self

    @field_serializer("lanes")
    def _pack(self, lanes: tuple[IndexSet, ...]) -> list[IndexSet | str]:
        return [packed(lane, self.units) for lane in lanes]


class HealingRecord(_Record):
    """A training of the lanes by self-distillation.

    Attributes:
        steps: Number of optimizer steps.
        tokens: Number of tokens they saw, repetitions counted.
        texts: sha256 of every file that was trained on, by its name.
        kl_before, kl_after: KL(source || lanes) on the held-out parts of the texts, in nats per token; `kl_before` is
            None if it was no finite number.
        settings: How it was trained.
    """

    steps: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    texts: Mapping[str, str]
    kl_before: float | None
    kl_after: float
    settings: Mapping[str, bool | int | float | str | None]


class Manifest(_Record):
    """The description of an artifact: everything but the numbers.

    Attributes:
        format_version: Version of this layout.
        kraken_compiler, torch: Versions that wrote it.
        source: Where the model came from.
        degree: Number of lanes.
        forms: Form of every layer.
        dtype: The dtype most parameters have.
        inputs, call: How the program is called.
        weights: The weight table, in the order of the graph's placeholders.
        assignment: Which heads and columns lanes have, where that is not the order of the files.
        layers, plan, windows: What the passes found; windows are those of the emitted program.
        cache: The program with a KV cache; None if there is none.
        no_cache: Why there is none.
        rows: The program on two halves of a batch's rows; None if there is none.
        no_rows: Why there is none, "" if there is one or nobody has asked.
        backends: The backends that wrote a program, by name, with the options that they were given.
        options: What the compile was asked for, by the names of `CompileOptions`; what nobody chose is left out.
        has_tokenizer: True if there is a tokenizer directory.
        healed: How the lanes were trained since the compile, first training first.
        files: Every file but the manifest, by path inside the artifact.
    """

    format_version: int
    kraken_compiler: str
    torch: str
    source: Source
    degree: Annotated[int, Field(ge=1)]
    forms: tuple[str, ...]
    dtype: str
    inputs: tuple[InputSpec, ...]
    call: CallSpec
    weights: tuple[WeightSpec, ...]
    assignment: tuple[AssignmentRecord, ...] = ()
    layers: LayerTable
    plan: FormPlan
    windows: tuple[Window, ...]
    cache: CacheRecord | None = None
    no_cache: str = ""
    rows: RowsRecord | None = None
    no_rows: str = ""
    backends: Mapping[str, Mapping[str, bool | int | float | str | None]]
    options: Mapping[str, JsonValue] = {}
    has_tokenizer: bool
    healed: tuple[HealingRecord, ...] = ()
    files: Mapping[Annotated[str, AfterValidator(_inner_path)], FileRecord]

    @field_serializer("weights")
    def _pack(self, weights: tuple[WeightSpec, ...]) -> list[dict[str, Any]]:
        return [
            {
                **asdict(spec),
                "shards": [
                    {"dim": shard.dim, "lanes": [packed(lane, spec.source_shape[shard.dim]) for lane in shard.lanes]}
                    for shard in spec.shards
                ],
            }
            for spec in weights
        ]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        caches = self.cache.plan.caches if self.cache is not None else ()
        inputs = (*self.inputs, *(self.cache.inputs if self.cache is not None else ()))
        check_dtypes(part.dtype for parts in (self.weights, inputs, caches) for part in parts)
        check_weights(self.weights, self.degree)
        if any(len(record.lanes) != self.degree for record in self.assignment):
            raise ValueError(f"a branch is not assigned to {self.degree} lanes")
        check_call(self.call, self.inputs)
        if self.rows is not None:
            check_rows(self.rows.dims, self.inputs, self.call)
        return self

    @property
    def weight_table(self) -> dict[str, WeightSpec]:
        """The weight table by placeholder name."""
        return {spec.name: spec for spec in self.weights}
