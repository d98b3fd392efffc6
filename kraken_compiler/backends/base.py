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
        name: What `--backend` calls it; also the name of its directory in an artifact.
    """

    name: ClassVar[str]

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
            directory: An existing directory of the backend's own; empty but for shards that a killed compile of the
                same model left with their journal.
            progress: Told about long stages.

        Returns:
            For every reduce, what lies between its start and its wait in the program that was written.

        Raises:
            VerificationError: The written program differs from the lane program.
            OSError: The directory cannot be written; names the file.
        """
