"""The program of every rank of `run_ranks`; its arguments are MODULE:FUNCTION DIRECTORY FOLDER."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from kraken_compiler.ranks.import_path import load_package
from kraken_compiler.ranks.session import joined


def main() -> None:
    """Call the function as this rank; arguments and result are JSON files in the directory.

    The folder is the one that the launcher imports the function's package from; it comes last on the import path.
    """
    function_path, name, folder = sys.argv[1:]
    directory = Path(name)
    sys.path.append(folder)
    load_package(function_path.partition(".")[0], folder)
    with joined() as ranks:
        module, _, function = function_path.partition(":")
        payload = json.loads((directory / "payload.json").read_text())
        ranks.status.progress(f"running {function_path}")
        result = getattr(importlib.import_module(module), function)(payload, ranks)
        (directory / f"result-{ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
