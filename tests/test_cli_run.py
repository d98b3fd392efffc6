"""`kraken-run`: the text and nothing else on standard output, and what is wrong in one line."""

from __future__ import annotations

import itertools
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kraken_compiler.cli.run import app
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import RecomputingDecoder
from kraken_compiler.generate.loop import generate
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.generate.sampling import Sampling
from tests.generation_functions import continuation as continued
from tests.test_cli_compile import kill_a_rank, save_model
from tests.zoo import SUPPORTED, logits_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

TEMPLATE = (
    "{% for message in messages %}<s> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of words and a chat template, in standard form for two ranks."""
    place = tmp_path_factory.mktemp("run")
    save_model("llama", place / "llama")
    (place / "llama" / "chat_template.jinja").write_text(TEMPLATE)
    compile_model(place / "llama", place / "llama.kraken", degree=2, form="standard", verify=False)
    return place / "llama.kraken"


def run(*arguments: str | Path, lines: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a process: what ranks print does not pass through this one."""
    command = [sys.executable, "-m", "kraken_compiler.cli.run", *map(str, arguments)]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False, timeout=150)


def printed(*arguments: str | Path, lines: str | None = None) -> str:
    done = run(*arguments, lines=lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


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
    """What the source model says, without special tokens, which text leaves out."""
    model = SUPPORTED["llama"]()
    tokens = continued(lambda ids: logits_of(model, ids), prompt, count)
    assert min(tokens) > END, "the test must not depend on special tokens"
    return tokens


def words(tokens: list[int]) -> str:
    return "".join(f" w{token}" for token in tokens)


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


# prompts that are given ----------------------------------------------------------------------------------------------


def test_text(artifact: Path) -> None:
    assert printed(artifact, "--prompt", "w5 w6 w40", "--max-new-tokens", "6") == (
        words(continuation([5, 6, 40], 6)) + "\n"
    )


def test_token_ids_run_anywhere(artifact: Path, tmp_path: Path) -> None:
    """A moved artifact runs: it needs nothing of where it was compiled."""
    moved = shutil.copytree(artifact, tmp_path / "moved")
    out = printed(moved, "--input-ids", "5,6,40", "--max-new-tokens", "4")
    assert out == ids(continuation([5, 6, 40], 4)) + "\n"


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_trace_of_what_ranks_do(artifact: Path, tmp_path: Path, backend: str) -> None:
    file, one = tmp_path / "trace.json", tmp_path / "llama.kraken"
    compile_model(artifact.parent / "llama", one, degree=2, form="kraken", backends=(backend,), verify=False)
    printed(one, "--input-ids", "5,6,7,8", "--max-new-tokens", "3", "--trace", file)
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    for rank in (0, 1):
        streams: dict[str, list[dict[str, float]]] = {}
        for span in spans:
            if span["pid"] == rank:
                streams.setdefault(names[rank, span["tid"]], []).append(span)
        assert [span["name"] for span in streams["runs"]] == ["prefill", "step", "step"]
        reduces = [span for span in streams["link"] if str(span["name"]).startswith("reduce")]
        assert reduces
        assert len(reduces) % 3 == 0, "every run has as many"
        compute = streams["compute"]
        for earlier, later in itertools.pairwise(compute):
            assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1e-3
        for run in streams["runs"]:
            inside = [one for one in compute if run["ts"] <= one["ts"] < run["ts"] + run["dur"]]
            # All of a run is computing, beginning sums, or waiting.
            assert sum(one["dur"] for one in inside) == pytest.approx(run["dur"], rel=1e-3, abs=50)
    assert "no such directory" in refused(2, artifact, "--input-ids", "5", "--trace", tmp_path / "absent" / "t.json")


def test_several_prompts(artifact: Path, tmp_path: Path) -> None:
    """A batch of prompts of different lengths gives what each gives alone."""
    file = tmp_path / "prompts.txt"
    file.write_text("\nw9\n\n")
    out = printed(artifact, "--prompt", "w5 w6 w40", "--prompt-file", file, "--max-new-tokens", "5")
    first, second = continuation([5, 6, 40], 5), continuation([9], 5)
    assert out == f"--- 1: w5 w6 w40\n{words(first)}\n\n--- 2: w9\n{words(second)}\n"


def test_json(artifact: Path) -> None:
    ending, before = prompt_that_ends()
    prompts = ("--prompt", f"w{ending}", "--prompt", "w5 w6")
    told = json.loads(printed(artifact, *prompts, "--max-new-tokens", "9", "--json"))
    first, second = told["results"]
    assert first == {
        "prompt": f"w{ending}",
        "prompt_ids": [ending],
        "ids": before,
        "text": words(before),
        "finish_reason": "eos",
    }
    assert second["ids"] == continuation([5, 6], 9)
    assert second["finish_reason"] == "length"
    assert told["seed"] is None
    assert set(told["timings"]) == {"time_to_first_token_s", "tokens_per_second", "total_s"}
    ignoring = json.loads(printed(artifact, *prompts, "--max-new-tokens", "9", "--json", "--ignore-eos"))
    assert ignoring["results"][0]["ids"][: len(before) + 1] == [*before, END]
    assert [result["finish_reason"] for result in ignoring["results"]] == ["length"] * 2


def prompt_that_ends() -> tuple[int, list[int]]:
    """A token after which the model ends the text soon, and what it says before."""
    model = SUPPORTED["llama"]()
    for token in range(3, 97):
        tokens = continued(lambda ids: logits_of(model, ids), [token], 8)
        end = tokens.index(END) if END in tokens else 0
        if end and min(tokens[:end]) > END:
            return token, tokens[:end]
    raise AssertionError("this model never ends a text")


def test_the_same_seed_is_the_same_text(artifact: Path) -> None:
    """In another process, on other ranks, alone or in a batch."""
    sampled = ("--max-new-tokens", "8", "--temperature", "2", "--top-p", "0.99", "--seed", "3", "--json")
    told = json.loads(printed(artifact, "--input-ids", "5,6", "--input-ids", "5,6", *sampled))
    assert told["seed"] == 3
    first, second = (result["ids"] for result in told["results"])
    assert first != second, "two rows are two drawings"
    model = SUPPORTED["llama"]()
    decoder = RecomputingDecoder(lambda ids: logits_of(model, torch.from_numpy(ids)).detach().numpy(), 1, 20)
    alone = generate(decoder, [[5, 6]], 8, sampling=Sampling(2.0, top_p=0.99, seed=3))
    assert [token for (token,) in alone] == first


def test_what_ranks_send_can_be_rounded(artifact: Path) -> None:
    """The first token's logits survive it here; a type that cannot be sent is refused."""
    rounded = printed(artifact, "--input-ids", "5,6", "--max-new-tokens", "1", "--reduce-dtype", "bfloat16")
    assert rounded == printed(artifact, "--input-ids", "5,6", "--max-new-tokens", "1")
    with pytest.raises(UsageError, match="--reduce-dtype int8"):
        RunOptions(artifact=artifact, reduce_dtype="int8").check()


def test_a_chat_template_for_a_prompt(artifact: Path) -> None:
    out = printed(artifact, "--prompt", "w5 w6", "--chat", "--system", "w8", "--max-new-tokens", "4")
    answer = continuation([BEGIN, 8, END, BEGIN, 5, 6, END, BEGIN], 4)
    assert out == words(answer).strip() + "\n"


def test_a_reader_that_has_enough_is_no_failure(artifact: Path) -> None:
    command = f"{sys.executable} -m kraken_compiler.cli.run {artifact} --input-ids 5 --max-new-tokens 40"
    script = f"set -o pipefail; {command} | head -c 3"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert done.stderr == ""
    assert len(done.stdout) == 3
    assert done.returncode == 0


# lines of standard input ---------------------------------------------------------------------------------------------


def test_a_conversation(artifact: Path) -> None:
    """Every turn sees those before it, until /reset."""
    out = printed(artifact, "--max-new-tokens", "3", lines="w5 w6\n\nw7\n/reset\nw7\n/exit\nw8\n")
    question = [BEGIN, 5, 6, END, BEGIN]
    first = continuation(question, 3)
    second = continuation([*question, *first, END, BEGIN, 7, END, BEGIN], 3)
    third = continuation([BEGIN, 7, END, BEGIN], 3)
    assert second != third
    assert out.splitlines() == [words(answer).strip() for answer in (first, second, third)]


def test_lines_without_a_template_stand_alone(artifact: Path) -> None:
    out = printed(artifact, "--no-chat", "--max-new-tokens", "3", lines="w5 w6\nw7")
    assert out == words(continuation([5, 6], 3)) + "\n" + words(continuation([7], 3)) + "\n"


def test_who_thinks_longer_than_the_timeout(artifact: Path) -> None:
    """Ranks that wait for a person do not hang."""
    command = [sys.executable, "-m", "kraken_compiler.cli.run", str(artifact), "--timeout", "3", "--no-chat"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for pause in (5, 0):
            process.stdin.write("w5\n")
            process.stdin.flush()
            assert process.stdout.readline() == words(continuation([5], 2)) + "\n"
            time.sleep(pause)
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(60) == 0


def test_a_terminal(artifact: Path) -> None:
    """A person sees a sign, is told what is wrong and can go on; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kraken_compiler.cli.run", str(artifact), "--max-new-tokens", "3"]
    with subprocess.Popen([*command, "--max-context", "9"], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""

        def until(sign: bytes, count: int) -> None:
            nonlocal seen
            while seen.count(sign) < count:
                seen += os.read(ours, 1 << 12)

        for turn, line in enumerate((b"w5 w6\n", b"w5 w5 w5 w5\n", b"/reset\n", b"\x04"), start=1):
            until(b"> ", turn)
            os.write(ours, line)
        assert process.wait(100) == 0
    os.close(ours)
    shown = seen.decode().replace("\r\n", "\n")
    answer = words(continuation([BEGIN, 5, 6, END, BEGIN], 3)).strip()
    assert f"> w5 w6\n{answer}\n> w5 w5 w5 w5\nerror: this needs 16 tokens and there is room for 9; /reset" in shown


# what is wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give --prompt TEXT, --input-ids 1,2,3, or lines on standard input"),
        ("--prompt w5 --input-ids 5", "give either --prompt TEXT or --input-ids 1,2,3, not both"),
        ("--input-ids 5,x", "--input-ids '5,x' is no list of token ids like 1,2,3"),
        ("--input-ids 5 --chat", "--chat and --system are for text"),
        ("--prompt w5 --system w6", "--system needs --chat"),
        ("--prompt w5 --top-k 3", "--top-k and --top-p need a --temperature above 0"),
        ("--prompt w5 --temperature -1", "temperature -1: give 0"),
        ("--prompt w5 --temperature 1 --top-p 2", "top-p 2: give a number above 0"),
        ("--prompt w5 --device tpu", "--device tpu: choose cpu or cuda"),
        ("--prompt w5 --timeout 0", "--timeout 0: give a number of seconds above 0"),
    ],
)
def test_wrong_options(artifact: Path, options: str, message: str) -> None:
    assert message in refused(2, artifact, *options.split())


def test_wrong_numbers(artifact: Path) -> None:
    for option in ("--max-new-tokens", "--max-context"):
        result = invoke(artifact, "--prompt", "w5", option, "0")
        assert result.exit_code == 2
        assert option in result.stderr


def test_no_input_at_all(artifact: Path) -> None:
    done = run(artifact, lines="\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: give --prompt TEXT, --input-ids 1,2,3, or lines on standard input\n"


def test_a_prompt_file_that_is_none(artifact: Path, tmp_path: Path) -> None:
    assert "cannot read" in refused(5, artifact, "--prompt-file", tmp_path / "none")
    (tmp_path / "empty").write_text("\n\n")
    assert "has no prompts" in refused(2, artifact, "--prompt-file", tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in refused(5, artifact, "--prompt-file", tmp_path / "bytes")


def test_a_token_that_the_model_does_not_have(artifact: Path) -> None:
    line = refused(2, artifact, "--input-ids", "5,1000")
    assert line == "error: there is no token 1000; the model has the tokens 0 to 96\n"


def test_more_tokens_than_fit(artifact: Path) -> None:
    line = refused(2, artifact, "--input-ids", "5,6", "--max-new-tokens", "9", "--max-context", "10")
    assert "need room for 11 tokens, there is room for 10; shorten the prompt" in line


def test_errors_as_json(artifact: Path) -> None:
    result = invoke(artifact, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert told["error"] == "UsageError"
    assert told["message"].startswith("--json needs --prompt TEXT")


def test_an_empty_prompt(artifact: Path) -> None:
    assert "the prompt has no tokens" in refused(2, artifact, "--prompt", "")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "gpt2", tokenizer=False)
    compile_model(tmp_path / "gpt2", tmp_path / "out", degree=2, verify=False)
    assert "has no tokenizer; give token ids with --input-ids" in refused(2, tmp_path / "out", "--prompt", "hello")
    too_many = refused(2, tmp_path / "out", "--input-ids", "5", "--max-new-tokens", "64")
    assert "prompt and new tokens need 65 positions, the model has 64" in too_many


def test_what_is_no_artifact(artifact: Path, tmp_path: Path) -> None:
    assert "no artifact here" in refused(5, tmp_path, "--prompt", "w5")
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "lanes" / "lane-1.safetensors").unlink()
    assert "lane-1.safetensors: missing" in refused(5, copy, "--prompt", "w5")


@pytest.mark.parametrize("name", ["lanes/lane-1.safetensors", "lanes/lane.json", "tokenizer/tokenizer.json"])
def test_a_tampered_file(artifact: Path, tmp_path: Path, name: str) -> None:
    """Found by the rank that reads it, before anything of it is used."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f"{name}: changed since it was written" in refused(5, copy, "--prompt", "w5")


def test_a_killed_rank(artifact: Path) -> None:
    killer = threading.Thread(target=kill_a_rank, args=("kraken_compiler.generate.worker",))
    killer.start()
    result = invoke(artifact, "--input-ids", "5", "--max-new-tokens", "50")
    killer.join()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "was killed by SIGKILL" in result.stderr.splitlines()[0]
