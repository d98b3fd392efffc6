"""Reads the profile that ONNX Runtime writes of a session: a JSON list of events, with times in microseconds."""

from __future__ import annotations

import json
from pathlib import Path

from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import RanNode

_NODE = "_kernel_time"
_RUN = "model_run"


def last_run(path: Path) -> tuple[RanNode, ...]:
    """The nodes that the last run of a session executed, in that order; those of functions and loop bodies too.

    Raises:
        VerificationError: ONNX Runtime wrote no profile, or one that holds no run: it may have ended early.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        runs = [event for event in events if event["name"] == _RUN]
        start = max(run["ts"] for run in runs)
        nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith(_NODE)]
        last_nodes = sorted((node for node in nodes if node["ts"] >= start), key=lambda node: node["ts"])
        return tuple(
            RanNode(node["name"].removesuffix(_NODE), node["args"]["op_name"], float(node["dur"]))
            for node in last_nodes
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise VerificationError(f"ONNX Runtime's profile of the run cannot be read: {reason}") from error
