"""The file of a lane graph: JSON (`graph_json.py`), written and read without torch's serializer.

`torch.export.save` rebuilds a symbolic shape for every value, in both directions, pickles, and its files are bound to
torch's schema. A rank must start fast and trust nothing, and of a graph it needs the calls alone.
"""

from __future__ import annotations

from pathlib import Path

from torch import fx

from kraken_compiler.backends.lane_graph.graph_json import UnknownGraphError, graph_from_json, graph_to_json
from kraken_compiler.errors import InputFileError, naming

MAX_GRAPH_BYTES = 256 << 20
"""Far more than any model's; reading stops before memory does."""


def save_graph(graph: fx.Graph, path: Path) -> fx.GraphModule:
    """Write a graph, without weights.

    Stack traces and module paths stay out: they name the user's files, and an artifact may be handed on.

    Returns:
        The graph as it was read back: the same calls on the same values in the same order.

    Raises:
        OSError: The file cannot be written; names it.
    """
    text = graph_to_json(graph)
    with naming(path):
        path.write_text(text, encoding="utf-8")
    module = load_graph(path)
    assert graph_to_json(module.graph) == text, f"{path}: reading changed the graph"
    return module


def load_graph(path: Path) -> fx.GraphModule:
    """Read a graph that `save_graph` wrote: same placeholders, same nodes in the same order, no metadata.

    Raises:
        InputFileError: The file is missing, damaged, holds anything but a graph, or calls an op no lane program calls.
    """
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise InputFileError(f"{path}: refused: no graph is that large")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: damaged, no graph ({error.reason})") from error
    try:
        return fx.GraphModule({}, graph_from_json(text))
    except UnknownGraphError as error:
        raise InputFileError(f"{path}: refused: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, RecursionError, SyntaxError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputFileError(f"{path}: damaged graph ({reason[:200]})") from error
