"""Calls a function on local ranks and brings the results back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kraken_compiler.ranks.environment import DEFAULT_TIMEOUT
from kraken_compiler.ranks.import_path import folder_of
from kraken_compiler.ranks.launch import launch


def run_ranks(
    function_path: str,
    degree: int,
    payload: Mapping[str, Any] | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[Any]:
    """Call a function on `degree` local ranks that have met.

    Args:
        function_path: "package.module:function"; called as `function(payload, ranks)` on every rank.
        degree: Number of ranks.
        payload: JSON; large data goes through files that it names.
        timeout: Seconds without progress (`ranks.status.progress`) after which a rank counts as hanging.

    Returns:
        What each rank returned (JSON), rank 0 first.

    Raises:
        RankFailedError: A rank died or hung; its own traceback comes first.
        InputFileError, UsageError: A rank raised one.
    """
    with tempfile.TemporaryDirectory(prefix="kraken-ranks-") as name:
        directory = Path(name)
        (directory / "payload.json").write_text(json.dumps(payload or {}))
        launch(
            degree,
            [function_path, name, folder_of(function_path.partition(".")[0])],
            module="kraken_compiler.ranks.call_rank",
            timeout=timeout,
            show_output=False,
        )
        return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(degree)]
