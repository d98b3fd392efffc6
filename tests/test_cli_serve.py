"""`kraken-serve` without vLLM: how it watches over a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

SERVER = """
import signal, sys, time
asked = []
def ask(number, frame):
    asked.append(number)
    if len(asked) > int(sys.argv[2]): sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, ask)
open(sys.argv[1], "w").close()
while True: time.sleep(0.01)
"""
SUPERVISE = """
import os, sys
from kraken_compiler.cli import serve
from kraken_compiler.cli.console import errors_as_exit_codes
serve._ASK_AGAIN_SECONDS = 1
with errors_as_exit_codes(): serve.supervise([sys.executable, *sys.argv[1:]], os.environ)
"""


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_loses_signals_is_asked_again(number: signal.Signals, lost: int, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", SUPERVISE, "-c", SERVER, str(ready), str(lost)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_a_server_that_ends_by_itself_is_an_error() -> None:
    command = [sys.executable, "-c", SUPERVISE, "-c", "import sys; sys.exit(7)"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: vLLM's server ended by itself (exit code 7)")
