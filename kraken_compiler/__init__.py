"""Rewrites standard Transformers into Kraken form for multi-device inference.

module = kraken_compiler.transform(model, degree=4)          # all lanes in this process
kraken_compiler.compile("model-directory", "model.kraken", degree=4)
program = kraken_compiler.load("model.kraken")               # one rank's inside a process group
module = kraken_compiler.load_lanes("model.kraken")          # all of an artifact's lanes in this process
"""

from __future__ import annotations

from importlib import import_module

# Not typing's: a rank decides where modules come from before it imports any that Python has not imported anyway.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from kraken_compiler.backends.load import load
    from kraken_compiler.commands.compile import CompileResult
    from kraken_compiler.commands.compile import compile_model as compile
    from kraken_compiler.commands.heal import HealResult, heal_artifact
    from kraken_compiler.commands.train import TrainResult, train_model
    from kraken_compiler.commands.transform import load_lanes, transform
    from kraken_compiler.commands.verify import verify_artifact
    from kraken_compiler.errors import KrakenError
    from kraken_compiler.native.config import KrakenConfig
    from kraken_compiler.quality.healing.settings import HealSettings
    from kraken_compiler.training.from_scratch.settings import TrainSettings

__all__ = [
    "CompileResult",
    "HealResult",
    "HealSettings",
    "KrakenConfig",
    "KrakenError",
    "TrainResult",
    "TrainSettings",
    "compile",
    "heal_artifact",
    "load",
    "load_lanes",
    "train_model",
    "transform",
    "verify_artifact",
]

_HOMES = {
    "CompileResult": ("kraken_compiler.commands.compile", "CompileResult"),
    "HealResult": ("kraken_compiler.commands.heal", "HealResult"),
    "HealSettings": ("kraken_compiler.quality.healing.settings", "HealSettings"),
    "KrakenConfig": ("kraken_compiler.native.config", "KrakenConfig"),
    "KrakenError": ("kraken_compiler.errors", "KrakenError"),
    "TrainResult": ("kraken_compiler.commands.train", "TrainResult"),
    "TrainSettings": ("kraken_compiler.training.from_scratch.settings", "TrainSettings"),
    "compile": ("kraken_compiler.commands.compile", "compile_model"),
    "heal_artifact": ("kraken_compiler.commands.heal", "heal_artifact"),
    "load": ("kraken_compiler.backends.load", "load"),
    "load_lanes": ("kraken_compiler.commands.transform", "load_lanes"),
    "train_model": ("kraken_compiler.commands.train", "train_model"),
    "transform": ("kraken_compiler.commands.transform", "transform"),
    "verify_artifact": ("kraken_compiler.commands.verify", "verify_artifact"),
}


def __getattr__(name: str) -> object:
    """Import what is asked for, so that the import of the package costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kraken_compiler' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
