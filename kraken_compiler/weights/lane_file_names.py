"""Names of the files that hold the lanes' weights, for all backends; imports nothing, for ranks without torch."""

from __future__ import annotations

LANES_DIRECTORY = "lanes"
"""The folder of an artifact that holds the lanes' weights, and the programs that read them."""

SHARED_FILE = "shared.safetensors"
"""Name of the file with the weights that all lanes hold whole."""


def lane_file_name(lane: int) -> str:
    """Name of the file with the weights that are a lane's own."""
    return f"lane-{lane}.safetensors"
