"""`kraken-run`: the text and nothing else on standard output, and what is wrong in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kraken_compiler.api import compile_model
from kraken_compiler.cli.run import app
from kraken_compiler.runtime.generate import greedy
from tests.test_cli_compile import kill_a_rank, save_model
from tests.zoo import SUPPORTED, logits_of

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of words, in standard form for two ranks."""
    place = tmp_path_factory.mktemp("run")
    save_model("llama", place / "llama")
    compile_model(place / "llama", place / "llama.kraken", degree=2, form="standard", verify=False)
    return place / "llama.kraken"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a process: what ranks print does not pass through this one."""
    command = [sys.executable, "-m", "kraken_compiler.cli.run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def continuation(prompt: list[int], count: int) -> list[int]:
    """What the source model says."""
    model = SUPPORTED["llama"]()
    return list(greedy(lambda ids: logits_of(model, ids), prompt, count))


def test_text(artifact: Path) -> None:
    expected = continuation([5, 6, 40], 6)
    # Ids 0 to 2 are special, which text leaves out; the test must not depend on them.
    assert min(expected) > 2
    done = run(artifact, "--prompt", "w5 w6 w40", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == " ".join(f"w{token}" for token in expected) + "\n"
    assert done.stderr == ""


def test_token_ids_run_anywhere(artifact: Path, tmp_path: Path) -> None:
    """A moved artifact runs: it needs nothing of where it was compiled."""
    moved = shutil.copytree(artifact, tmp_path / "moved")
    done = run(moved, "--input-ids", "5,6,40", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ",".join(map(str, continuation([5, 6, 40], 4))) + "\n"
    assert done.stderr == ""


def test_wrong_options(artifact: Path) -> None:
    either = "give either --prompt TEXT or --input-ids 1,2,3"
    assert either in refused(2, artifact)
    assert either in refused(2, artifact, "--prompt", "w5", "--input-ids", "5")
    result = invoke(artifact, "--prompt", "w5", "--max-new-tokens", "0")
    assert result.exit_code == 2
    assert "--max-new-tokens" in result.stderr


def test_an_empty_prompt(artifact: Path) -> None:
    assert "the prompt has no tokens" in refused(2, artifact, "--prompt", "")


def test_a_prompt_without_a_tokenizer(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "gpt2", tokenizer=False)
    compile_model(tmp_path / "gpt2", tmp_path / "out", degree=2, verify=False)
    assert "has no tokenizer; give token ids with --input-ids" in refused(2, tmp_path / "out", "--prompt", "hello")


def test_what_is_no_artifact(artifact: Path, tmp_path: Path) -> None:
    assert "no artifact here" in refused(5, tmp_path, "--prompt", "w5")
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "torch" / "lane-1.safetensors").unlink()
    assert "lane-1.safetensors: missing" in refused(5, copy, "--prompt", "w5")


@pytest.mark.parametrize("name", ["torch/lane-1.safetensors", "torch/lane.pt2", "tokenizer/tokenizer.json"])
def test_a_tampered_file(artifact: Path, tmp_path: Path, name: str) -> None:
    """Found by the rank that reads it, before anything of it is used."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f"{name}: changed since it was written" in refused(5, copy, "--prompt", "w5")


def test_a_killed_rank(artifact: Path) -> None:
    killer = threading.Thread(target=kill_a_rank, args=("kraken_compiler.runtime.worker",))
    killer.start()
    result = invoke(artifact, "--input-ids", "5", "--max-new-tokens", "50")
    killer.join()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "was killed by SIGKILL" in result.stderr.splitlines()[0]


def test_a_failing_rank_shows_its_traceback(artifact: Path) -> None:
    """A token that the model does not have."""
    result = invoke(artifact, "--input-ids", "5,1000")
    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: rank ")
    assert "IndexError" in first
    assert rest[0].startswith("Traceback")
