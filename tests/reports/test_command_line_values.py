"""Values that a command line or a config file gives: each that is wrong is named in one line; quiet means silence."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kraken_compiler.backends.sequences import require_memory
from kraken_compiler.capture.example_inputs import parse_input_spec, parse_input_specs
from kraken_compiler.cli.compile import CompileCommand
from kraken_compiler.cli.console import errors_as_exit_codes, quiet_libraries
from kraken_compiler.cli.heal import HealCommand
from kraken_compiler.cli.verify import app as verify_app
from kraken_compiler.errors import InputFileError, RankFailedError, UnsupportedModelError, UsageError
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.options.command_line import command_options
from kraken_compiler.options.command_options import merged
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.options.heal import HealOptions
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.launch import launch
from tests.cli_command import Command
from tests.test_cli_compile import invoke, refused, save_model

# --input -------------------------------------------------------------------------------------------------------------

OF_A_COMPILE = command_options(CompileCommand, CompileOptions)
OF_A_HEALING = command_options(HealCommand, HealOptions, HealSettings)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "input_ids=int64[2,99999999999]",
            "input_ids would have more than 268,435,456 numbers; an example",
        ),
        ("pixels=float32[2,3,99999,99999]", "pixels would have more than"),
        (f"mask=bool[{'9' * 5000}]", "mask would have more than"),
        ("a=int64[0]", "a would be empty; give sizes of at least 1"),
        ("b=float32[2,0,3]", "b would be empty"),
        ("c=int64[-1,2]", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=int64[two]", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=int64[2.5]", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=int65[2]", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=nn[2]", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=int64", "is no input: write NAME=DTYPE[SIZES]"),
        ("", "is no input: write NAME=DTYPE[SIZES]"),
        ("c=\nint65[2]", "is no input: write NAME=DTYPE[SIZES]"),
        ("d=quint8[2,2]", "d cannot be made as quint8: "),
    ],
)
def test_sizes_of_inputs(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input_spec(spec)
    assert str(caught.value).startswith("--input ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inputs_of_one_name() -> None:
    with pytest.raises(UsageError, match="there are two inputs called a"):
        parse_input_specs(["a=int64[2,3]", "b=int64[2,3]", "a=int64[2,4]"])
    assert list(parse_input_specs(["a=int64[2,3]", "b=float16[4]"])) == ["a", "b"]


def test_an_input_that_is_too_large_ends_the_command(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    given = (tmp_path / "m.pt", "--trust-pickle", "--degree", "2", "--input", "input=float32[2,99999999999]")
    assert "input would have more than" in refused(2, *given, "-o", tmp_path / "out")


# config files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('degree = "2"', 'degree: must be a whole number, not the text "2"'),
        ("degree = true", "degree: must be a whole number, not the truth value true"),
        ("degree = 2.0", "degree: must be a whole number, not the number 2.0"),
        ('degree = ["2"]', "degree: must be a whole number, not a list"),
        ("degree = 0", "degree: Input should be greater than or equal to 1"),
        ("[model]\npath = 1", "model: must be text in quotes, not a table"),
        ("[[calibrate]]\npath = 1", "calibrate (entry 1): must be text in quotes, not a table"),
        ('calibrate = "a.txt"', 'calibrate: must be a list of texts, not the text "a.txt"'),
        ('input = ["a=int64[2,3]", 3]', "input (entry 2): must be text in quotes, not the number 3"),
        ("backend = 3", "backend: must be a list of texts, not the number 3"),
        ('timeout = "soon"', 'timeout: must be a number, not the text "soon"'),
        ("timeout = [1]", "timeout: must be a number, not a list"),
        ("max-kl = false", "max-kl: must be a number, not the truth value false"),
        ('verify = "yes"', 'verify: must be true or false, not the text "yes"'),
        ("force = 1", "force: must be true or false, not the number 1"),
        ("model = 1979-05-27", "model: must be text in quotes, not a date 1979-05-27"),
        ("layers = 3", "layers: must be text in quotes, not the number 3"),
        ("text-tokens = 1", "text-tokens: Input should be greater than or equal to 2"),
        (f'degree = "{"9" * 500}"', "degree: must be a whole number, not the text"),
        ("timeout = inf", "timeout: Input should be less than or equal to 31536000"),
        ("timeout = 1e300", "timeout: Input should be less than or equal to 31536000"),
        ('output = "a\\u0000b"', "output: holds a NUL character, which no name has"),
        ('calibrate = ["a", "b\\u0000"]', "calibrate: holds a NUL character, which no name has"),
        ('dump-graphs = "\\u0000"', "dump-graphs: holds a NUL character, which no name has"),
        ("degre = 2", "there is no key 'degre'; did you mean 'degree'?"),
        ("compile.degree = 2", "there is no key 'compile'; did you mean 'prompt'?"),
        ('"a\\nb" = 1', r"there is no key 'a\nb'; did you mean 'calibrate'?"),
    ],
)
def test_values_of_a_compile(tmp_path: Path, text: str, message: str) -> None:
    assert wrong(OF_A_COMPILE, tmp_path / "c.toml", text) == f"{tmp_path / 'c.toml'}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('steps = "many"', 'steps: must be a whole number, not the text "many"'),
        ("steps = 1.5", "steps: must be a whole number, not the number 1.5"),
        ("learning-rate = true", "learning-rate: must be a number, not the truth value true"),
        ("hold-out = [0.1]", "hold-out: must be a number, not a list"),
        ("lora = false", "lora: must be a whole number, not the truth value false"),
        ('ranks = "x"', 'ranks: must be true or false, not the text "x"'),
        ('text = "a.txt"', 'text: must be a list of texts, not the text "a.txt"'),
        ("tokens = [1]", "tokens (entry 1): must be text in quotes, not the number 1"),
        ("learning_rate = 0.1", "there is no key 'learning_rate'; did you mean 'learning-rate'?"),
    ],
)
def test_values_of_a_healing(tmp_path: Path, text: str, message: str) -> None:
    assert wrong(OF_A_HEALING, tmp_path / "h.toml", text) == f"{tmp_path / 'h.toml'}: {message}"


def wrong(options: Any, path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        merged(options, path, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('timeout = 30\nmax-kl = 1\nbackend = "torch, onnx"\ninput = ["a=int64[2,3]"]')
    config = merged(OF_A_COMPILE, path, {"degree": 3})
    found = tuple(config[name] for name in ("timeout", "max_kl", "backends", "degree"))
    assert found == (30, 1, ["torch", "onnx"], 3)
    with pytest.raises(UsageError, match=r"^--degree: Input should be greater than or equal to 1$"):
        merged(OF_A_COMPILE, path, {"degree": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"degree = ", "is no TOML: Invalid value"),
        (b"# a\nmodel = '\xe9'", r"is not UTF-8 text \(line 2, byte 0xe9\)"),
        (b"x = " + b"[" * 3000, "is no TOML: it is nested too deeply"),
        (b"degree = 2\ndegree = 3", "is no TOML: Cannot overwrite a value"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(InputFileError, match=message) as caught:
        merged(OF_A_COMPILE, tmp_path / "c.toml", {})
    assert "\n" not in str(caught.value)


def test_a_command_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('degree = "2"')
    line = refused(2, tmp_path, "--config", tmp_path / "c.toml")
    assert line == f'error: {tmp_path / "c.toml"}: degree: must be a whole number, not the text "2"\n'


# numbers beyond reason ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300, 0.0, -1.0])
def test_timeouts_that_no_clock_has(seconds: float, tmp_path: Path) -> None:
    for act in (
        RunOptions(artifact=tmp_path, prompt=["a"], timeout=seconds).check,
        lambda: launch(2, [], timeout=seconds),
    ):
        with pytest.raises(UsageError, match=r"^--timeout .*: give a number of seconds above 0 and at most 31,536,000"):
            act()
    assert "--timeout" in Command(verify_app).refused(2, tmp_path, "--timeout", str(seconds))


@pytest.mark.parametrize("option", ["--max-new-tokens", "--max-context", "--threads"])
def test_more_than_there_can_be(option: str, tmp_path: Path) -> None:
    """At once: not after all lengths up to there were looked at."""
    from kraken_compiler.cli.run import app as run_app

    result = Command(run_app).invoke(tmp_path, "--input-ids", "1", option, "9" * 30)
    assert result.exit_code == 2
    assert option in result.stderr


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("9" * 30, f"--input-ids '{'9' * 30}': token ids are numbers from 0"),
        ("3,-1", "--input-ids '3,-1': token ids are numbers from 0"),
        ("9" * 5000, f"--input-ids '{'9' * 60}...' is no list of token ids like 1,2,3"),
    ],
)
def test_numbers_that_are_no_tokens(ids: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunOptions(artifact=Path("a"), input_ids=[ids]).check()
    assert str(caught.value) == message


def test_caches_that_no_memory_holds() -> None:
    require_memory(1 << 20, 8)
    require_memory(1000, 8, memory=1000)
    with pytest.raises(
        UsageError, match=r"room for 4,096 tokens takes 10,000,000,000\.0 GB on every rank, the device has"
    ):
        require_memory(10**19, 4096)


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, 10**30])
def test_seeds_of_too_many_bits(seed: int) -> None:
    HealSettings(steps=1, seed=-1).check()
    with pytest.raises(UsageError, match=f"^--seed {seed}: must have at most 64 bits$"):
        HealSettings(steps=1, seed=seed).check()


# names that no file has ----------------------------------------------------------------------------------------------


def test_a_model_whose_name_is_too_long() -> None:
    assert "File name too long" in refused(5, "m" * 300, "--degree", "2", "-o", "out")


# quiet ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quiet_compile_says_nothing(tmp_path: Path) -> None:
    """Nor do the libraries that it imports: a process of its own, as a library speaks when it is first imported."""
    model = save_model("llama", tmp_path / "llama")
    command = [sys.executable, "-m", "kraken_compiler.cli.compile", str(model), "--degree", "2", "--form", "standard"]
    done = run(*command, "--no-verify", "--quiet", "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(*command, "--quiet", "--plan", "--degree", "7000")
    assert done.returncode in (2, 3)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS", "TORCH"))}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_that_warn(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever they use for it, and as before when the command has ended."""
    import logging

    logger = logging.getLogger("torch.some.part")
    logger.addHandler(handler := logging.StreamHandler(sys.stderr))
    logger.propagate = False  # torch's own handlers, which it adds when something first uses them
    try:
        with quiet_libraries(verbose), warnings.catch_warnings(record=True) as given:
            logger.warning("beware")
            logger.error("broken")
            warnings.warn("deprecated", stacklevel=1)
        logger.warning("later")
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
    assert bool(given) == verbose
    assert capsys.readouterr().err.splitlines() == [*(["beware"] if verbose else []), "broken", "later"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RankFailedError("rank 1 failed: it broke\nTraceback\n  File x"),
            "rank 1 failed: it broke (2 more lines without",
        ),
        (UnsupportedModelError([]), ""),
        (UsageError("wrong"), "wrong\n"),
    ],
)
def test_a_quiet_failure_is_one_line(
    error: RankFailedError | UnsupportedModelError | UsageError, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, errors_as_exit_codes(quiet=True):
        raise error
    assert ended.value.code == error.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit), errors_as_exit_codes():
        raise error
    assert capsys.readouterr().err == f"error: {error}\n"


def test_help_still_helps() -> None:
    assert "--quiet" in invoke("--help").stdout
