"""What a backend is: it writes the files that run a lane program, one program per device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance


class Backend(ABC):
    """Turns a lane program into files.

    Attributes:
        name: What `--backend` calls it.
        writes_all_weights: It puts all of a program's weights into the lane files (`weights.shards`), and is asked to
            before those that do not; these take what is there (`lane_files_with`), and write what is missing.
    """

    name: ClassVar[str]
    writes_all_weights: ClassVar[bool] = False

    @abstractmethod
    def write(
        self,
        program: Program,
        read: SourceReader,
        directory: Path,
        progress: Advance | None = None,
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
