"""The script that the launcher starts as every rank: `python -P THIS_FILE MODULE ARGUMENTS...`.

The launcher's process id comes in an environment variable. Run as a file, since `python -m` would look for our package
in the working directory. Before anything that takes long to
import, the rank is tied to the launcher: however that one ends, and whenever, the rank ends with it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

LAUNCHER = "KRAKEN_LAUNCHER"
"""Environment variable: the launcher's process id."""

_SET_PARENT_DEATH_SIGNAL = 1
_LOOK_SECONDS = 0.5


def end_with_launcher(launcher: int) -> None:
    """Let this process end when the launcher does, which started it; at once if that has ended already."""
    if not _request_death_signal():
        threading.Thread(target=_watch, args=(launcher,), name="kraken-launcher", daemon=True).start()
    # Behind the request: a launcher that ended before it sends no signal any more.
    if os.getppid() != launcher:
        os._exit(1)


def _request_death_signal() -> bool:
    """Ask for SIGKILL at the parent's end (Linux, prctl(2)); False where there is no such thing."""
    if sys.platform != "linux":
        return False
    request = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    return request is not None and request(_SET_PARENT_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) == 0


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _import_own_package() -> None:
    """Import the package that this file belongs to, also where another one is installed, or none."""
    package = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec(package.name, [str(package.parent)])
    assert spec is not None, f"{package} is a package"
    assert spec.loader is not None, f"{package} is a package"
    module = sys.modules[package.name] = module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    """Entry point."""
    end_with_launcher(int(os.environ.pop(LAUNCHER)))
    _import_own_package()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
