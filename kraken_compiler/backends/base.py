"""The interface of backends, which write the programs of a lane program, one per rank, open them, and show their runs.

Imports neither torch nor any backend's packages: ranks import it, and some have nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast, get_type_hints

import numpy.typing as npt

if TYPE_CHECKING:
    from kraken_compiler.artifact.manifest import Source
    from kraken_compiler.artifact.read import Artifact
    from kraken_compiler.generate.decoder import Decoder
    from kraken_compiler.generate.engine import GenerationRequest
    from kraken_compiler.ir.program import LaneProgram
    from kraken_compiler.ir.schedule import RanWindow, Window
    from kraken_compiler.ir.source_reader import SourceReader
    from kraken_compiler.lanes.reference import ReadLane
    from kraken_compiler.latency.predict import RunGraphs
    from kraken_compiler.progress import Advance
    from kraken_compiler.ranks.session import Ranks

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """The options of a backend. A field is an option of the command line; its annotation is its help.

    A field with `AT_RUN` in its annotation is an option of a run, any other one of a compile, which the manifest notes.
    """

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: One is none that the option takes.
        """


AT_RUN = "at run"
"""The mark in the annotation of an option that is chosen when a program is run."""


def annotations_of(options: type[BackendOptions], *, at_run: bool) -> dict[str, Any]:
    """The annotations of a backend's options, by field name: those of a run, or those of a compile."""
    hints = get_type_hints(options, include_extras=True)
    return {name: hint for name, hint in hints.items() if (AT_RUN in getattr(hint, "__metadata__", ())) == at_run}


OptionsKind = TypeVar("OptionsKind", bound=BackendOptions)


@dataclass(frozen=True)
class Reference:
    """The reference for a backend's programs: a lane program and the lanes' weights."""

    program: LaneProgram
    read_lane: ReadLane


@dataclass(frozen=True)
class Observation:
    """The results of a rank's run, and its record.

    Attributes:
        outputs: The graph's outputs, in order; of a program with a KV cache perhaps the logits alone.
        sums: Finished sums by the name of their wait, if the program tells.
        record: What the program did, as plain values that its backend understands (`Backend.ran`).
    """

    outputs: Sequence[Array]
    sums: Mapping[str, Array] = field(default_factory=dict)
    record: Any = None


class RankModel(ABC):
    """A rank's program, opened; all ranks must call it together. Arrays are numpy's; bfloat16 comes as float32.

    Attributes:
        vocabulary: Number of tokens a language model knows, None if its graph does not say.
        positions: The longest sequence that the model takes, as far as its graph says.
        can_cut_rows: True if `run_rows` runs batches as two halves.
        identical_on_all_ranks: True promises that `run` and `run_rows` give all ranks the same logits to the last bit,
            whatever machines they are on.
        first_seconds: How long it may take, beyond computing, before its first results are there.
        setting: What its times depend on: who computes, and how.
    """

    vocabulary: int | None
    positions: int
    can_cut_rows: bool = False
    identical_on_all_ranks: bool = False
    first_seconds: float = 0.0
    setting: str = ""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Run on whole inputs.

        Args:
            inputs: By the names of the manifest's inputs.

        Returns:
            The graph's outputs, in order, until the next call; of a program with a KV cache perhaps the logits alone.

        Raises:
            UsageError: An input is missing, or of a shape that was not compiled for.
        """

    def run_rows(self, inputs: Mapping[str, Array], cut: int) -> Sequence[Array]:
        """Run a batch as two halves of its rows, whose reduces fly while the other half computes.

        Args:
            inputs: See `run`.
            cut: How many rows the first half has; at least one, and the second has one too.

        Returns:
            See `run`.

        Raises:
            UsageError: See `run`.
        """
        raise NotImplementedError("not called unless can_cut_rows")

    def decoder(self, batch: int, capacity: int) -> Decoder | None:
        """A decoder for a batch of sequences with the KV cache; not called if the artifact has none.

        Args:
            batch: Number of sequences.
            capacity: Most tokens of a sequence, prompt and new ones together.

        Returns:
            None if the backend keeps no cache: then the prefix is computed again for every token.

        Raises:
            UsageError: The positions or the memory end before the capacity.
        """
        return None

    def observe(self, inputs: Mapping[str, Array], *, last: bool) -> Observation:
        """Run, and observe the run.

        Args:
            inputs: See `run`.
            last: Nothing more is observed after this.
        """
        return Observation(self.run(inputs))


class TextEngine(Protocol):
    """What continues texts, all lanes of an artifact together.

    Attributes:
        artifact: What is run.
        reads_source: True for an encoder-decoder, whose prompts are read by its encoder.
        positions: The longest sequence that the model takes.
    """

    artifact: Artifact
    reads_source: bool

    @property
    def positions(self) -> int: ...

    def run(self, request: GenerationRequest) -> Iterator[list[int | None]]:
        """Carry out a request.

        Yields:
            The new token of every row, None for one that has ended.

        Raises:
            UsageError: A token is none of the model's, or prompt and new tokens do not fit.
        """

    def idle(self) -> None:
        """Do what must be done while there is no request; to be called every now and then."""

    def note(self, text: str) -> None:
        """Say what a user should know."""

    def progress(self, stage: str) -> None:
        """Say that something got done, and what comes next."""


class OwnEngine(TextEngine, Protocol):
    """An engine of a backend's own, which can be compared with the lanes."""

    def first_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[Array]:
        """The logarithms of the probabilities of all tokens behind prompts, float32 [vocabulary] each.

        Args:
            prompts: Token ids; all are read at once.
        """


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine of a backend's own is asked for.

    Attributes:
        rows: How many sequences it has to hold at a time.
        capacity: Most tokens of a sequence; None leaves it to the engine.
        threads: Threads that every lane computes with; None leaves it to the engine.
        verbose: Show what it says while it works.
        checking: It will be compared with the lanes.
    """

    rows: int = 1
    capacity: int | None = None
    threads: int | None = None
    verbose: bool = False
    checking: bool = False


class Backend(ABC, Generic[OptionsKind]):
    """Turns a lane program into files, and files into what runs.

    Attributes:
        name: What `--backend` calls it.
        writes_all_weights: It puts all of a program's weights into the lane files (`weights.shards`), and is asked to
            before those that do not; these take what is there (`lane_files_with`), and write what is missing.
        Options: What can be chosen.
        ranks_are: What its ranks are called where they are compared, e.g. "ranks".
        computes_in: Parts of the paths of files in which a rank of it computes: one that hangs there waits for another.
        runs_lane_files: Its ranks run graphs and weights of the lanes' directory, and read nothing else.
        options: What was chosen.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BackendOptions]] = BackendOptions
    writes_all_weights: ClassVar[bool] = False
    ranks_are: ClassVar[str] = "ranks"
    computes_in: ClassVar[tuple[str, ...]] = ()
    runs_lane_files: ClassVar[bool] = False

    def __init__(self, options: OptionsKind | None = None) -> None:
        settings: Any = self.Options() if options is None else options
        if not isinstance(settings, self.Options):
            raise TypeError(f"{type(settings).__name__} are options of another backend")
        self.options: OptionsKind = cast(Any, settings)

    @abstractmethod
    def write(
        self, program: LaneProgram, read: SourceReader, directory: Path, progress: Advance | None = None
    ) -> tuple[Window, ...]:
        """Write one program per lane.

        Args:
            program: The lane program; it is not changed.
            read: Gives the source's tensors.
            directory: An existing directory, the same for all backends; empty but for what those before have written,
                or shards that a killed compile of the same model left with their journal.
            progress: Told about long stages.

        Returns:
            For every reduce, what lies between its start and its wait in the program that was written.

        Raises:
            VerificationError: The written program differs from the lane program.
            OSError: The directory cannot be written; names the file.
        """

    def complete(self, program: LaneProgram, source: Source, directory: Path) -> None:
        """Write what lies outside of the lanes' folder, when all programs and the tokenizer's files are written.

        Args:
            program: The lane program.
            source: Where the model came from.
            directory: The artifact's.

        Raises:
            OSError: It cannot be written; names the file.
        """

    @abstractmethod
    def rank_files(self, artifact: Artifact, rank: int) -> Sequence[str]:
        """Paths inside an artifact of the files that a rank reads; they are checked before it is opened."""

    @abstractmethod
    def open(self, artifact: Artifact, ranks: Ranks, *, checking: bool = False) -> RankModel:
        """Open this rank's program, in the rank's process; all ranks do so together.

        Args:
            artifact: An open artifact.
            ranks: This rank, and how it reaches the others. `ranks.status.computes_here` is set to False if an
                accelerator computes.
            checking: It is run to be compared with the lanes, so it must compute as exactly as it can.

        Raises:
            UsageError: The options ask for what cannot be done here.
            InputFileError: A file is damaged.
        """

    def engine(self, artifact: Artifact, settings: EngineSettings) -> AbstractContextManager[OwnEngine] | None:
        """An engine of the backend's own that runs all lanes, for requests from this process.

        Args:
            artifact: An open artifact.
            settings: What it is asked for.

        Returns:
            None if there is none: then every lane is run by a rank, which opens its program.

        Raises:
            UsageError: Its packages are not installed, or it cannot do what is asked for.
        """
        return None

    def reference(self, artifact: Artifact, lanes: Reference | None = None) -> Reference | None:
        """The lane program and its weights as this backend stores them, with which its ranks are compared.

        Args:
            artifact: An open artifact.
            lanes: Those that it was written from, if somebody has them.

        Returns:
            None if the artifact does not hold them and nobody has them.

        Raises:
            InputFileError: A file is damaged.
        """
        return None

    def run_graphs(self, artifact: Artifact) -> RunGraphs | None:
        """The graphs that its ranks execute with a KV cache, of which times can be predicted; None if it keeps none.

        Raises:
            InputFileError: A file is damaged.
        """
        return None

    @property
    def gives_reference(self) -> bool:
        """False if there is nothing to compare its ranks with."""
        return type(self).reference is not Backend.reference

    @abstractmethod
    def schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        """The windows between every reduce's start and its wait in the programs that will run, in launch order.

        Raises:
            InputFileError: A file is damaged, or the ranks' programs do not belong together.
            VerificationError: A reduce is never awaited, or there are more or fewer than planned.
        """

    def split_schedule(self, artifact: Artifact) -> tuple[Window, ...]:
        """The windows of the programs that run in two halves, in launch order; none if nothing does.

        Raises:
            InputFileError, VerificationError: See `schedule`.
        """
        return ()

    def ran(self, record: Any, windows: Sequence[Window]) -> tuple[RanWindow, ...]:
        """The windows as a rank ran them; nothing if it does not tell.

        Args:
            record: `Observation.record` of a rank.
            windows: The schedule of its program.

        Raises:
            VerificationError: It ran other reduces than the schedule has.
        """
        return ()

    @property
    def noted_options(self) -> dict[str, Any]:
        """The options chosen for a compile, by field name, for the manifest."""
        default = self.Options()
        values = {name: getattr(self.options, name) for name in annotations_of(self.Options, at_run=False)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    @property
    def cannot_run(self) -> str:
        """The reason that nothing here runs the programs, which are then not compared; "" if something does."""
        return ""

    @property
    def rounded_weights(self) -> str | None:
        """The type to which the stored weights are rounded, which costs quality; None if they are the lanes'."""
        return None
