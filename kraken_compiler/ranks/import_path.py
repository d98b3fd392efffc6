"""A rank's import path, without the working directory, which is the user's. Imports next to nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


def leave_working_directory_out() -> None:
    """Remove the working directory from the import path, where `python -m` puts it first.

    A script there may be called like a module that a rank imports, and would run in every rank.
    """
    if sys.flags.safe_path or not sys.path:
        return
    # PYTHONPATH comes behind, so what the user names there stays.
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


def load_package(name: str, folder: str) -> None:
    """Import a top-level module or package from a folder, whatever others of its name there are.

    Raises:
        ModuleNotFoundError: The folder has none.
    """
    if name in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec(name, [folder])
    if spec is None:
        raise ModuleNotFoundError(f"there is no module '{name}' in {folder}", name=name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)


def folder_of(name: str) -> str:
    """The folder from which this process imports a top-level module or package; for `load_package` in another one."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module '{name}'"
    places = list(spec.submodule_search_locations or [])
    return os.path.dirname(os.path.abspath(places[0] if places else spec.origin or ""))
