"""`kraken-compile`: what it writes and prints; what is wrong ends in one line and leaves no half artifact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import kraken_compiler
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.cli.compile import app
from kraken_compiler.errors import UsageError
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.verify.compare import Comparison, errors
from kraken_compiler.verify.verification import Verification
from tests.once import CaptureOnce, RanksOnce
from tests.zoo import REJECTED, SUPPORTED, logits_of, token_batch

pytestmark = pytest.mark.slow

LOSSLESS = ("--degree", "2", "--form", "standard")


def save_tokenizer(path: Path, *, template: str = "$A") -> None:
    """A tokenizer of 97 words: w3 w4 ... w96; `template` says what stands around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, 97))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special_tokens = [(word, words.index(word)) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)


def save_model(name: str, path: Path, *, tokenizer: bool = True, **options: Any) -> Path:
    """Save a Hugging Face model of the zoo."""
    model: Any = (SUPPORTED | REJECTED)[name]()
    model.save_pretrained(path, **options)
    if tokenizer:
        save_tokenizer(path)
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> Result:
    """Run the command, which must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def files_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def refused(code: int, *arguments: str | Path, watched: Path | None = None) -> str:
    """Run the command, which must fail with one line and write nothing; returns that line."""
    before = files_in(watched) if watched is not None else []
    result = invoke(*arguments, "--quiet")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert watched is None or files_in(watched) == before
    return result.stderr


@pytest.fixture(scope="module", autouse=True)
def capture_once() -> Iterator[None]:
    """The models that several tests compile are captured once."""
    with CaptureOnce().in_place():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a tokenizer."""
    return save_model("gpt2", tmp_path_factory.mktemp("source") / "gpt2", tokenizer=False)


@pytest.fixture(scope="module")
def ranks() -> RanksOnce:
    """The ranks of `compiled`."""
    return RanksOnce()


@pytest.fixture(scope="module")
def compiled(llama: Path, ranks: RanksOnce, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A compile with everything on: the artifact and what `--json` said."""
    target = tmp_path_factory.mktemp("out") / "llama.kraken"
    with ranks.in_place():
        result = done(llama, "--degree", "2", "-o", target, "--json")
    assert result.stderr == ""
    return target, json.loads(result.stdout)


@pytest.fixture
def known_ranks(compiled: tuple[Path, dict[str, Any]], ranks: RanksOnce) -> Iterator[None]:
    """No rank is started."""
    with ranks.in_place():
        yield


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs root."""
    place = tmp_path / "mount"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not permitted here: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


# what comes out ------------------------------------------------------------------------------------------------------


def test_the_artifact(compiled: tuple[Path, dict[str, Any]]) -> None:
    artifact, said = compiled
    weights = [f"lanes/{name}.safetensors" for name in ("lane-0", "lane-1", "shared")]
    graphs = [f"lanes/{name}.json" for name in ("lane", "step", "split_step", "tables")]
    names = ("generation_config", "tokenizer", "tokenizer_config")
    tokenizer = [f"tokenizer/{name}.json" for name in names]
    assert files_in(artifact) == sorted(["manifest.json", "report.json", *graphs, *weights, *tokenizer])
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    assert said["artifact"] == str(artifact)
    manifest = open_artifact(artifact).manifest
    assert (manifest.degree, manifest.forms, manifest.source.kind) == (2, ("kraken",) * 3, "huggingface")
    report = open_artifact(artifact).report()
    assert report["verification"] == said["verification"]
    assert report["layers"] == said["report"]["layers"]


def test_the_artifact_is_what_transform_makes(llama: Path, compiled: tuple[Path, dict[str, Any]]) -> None:
    ids = token_batch(SUPPORTED["llama"](), 3, 11)
    loaded = kraken_compiler.load(compiled[0])
    in_memory = kraken_compiler.transform(llama, 2)
    assert torch.equal(logits_of(loaded, ids), logits_of(in_memory, ids))


def test_json(compiled: tuple[Path, dict[str, Any]]) -> None:
    verification = compiled[1]["verification"]
    program, quality = verification["program"], verification["quality"]
    assert 0 <= program["max_rel_error"] < 1e-4
    assert 0 <= program["max_abs_error"] < 1e-2
    whats = [entry["what"] for entry in program["comparisons"]]
    assert any("against the source" in what for what in whats)
    assert any("2 ranks against the lanes" in what for what in whats)
    assert all(entry["passed"] and not entry["first_diverging"] for entry in program["comparisons"])
    assert quality["kl"] > 0.01
    assert 0 <= quality["top1_agreement"] < 1
    assert quality["perplexity"] > 0
    assert quality["source_perplexity"] > 0
    promised = [window for window in verification["schedule"] if window["promised"]]
    assert len(promised) == 2
    assert all(window["gemms"] for window in promised)
    assert verification["skipped"] == []


@pytest.mark.usefixtures("known_ranks")
def test_standard_form_without_a_tokenizer(gpt2: Path, tmp_path: Path) -> None:
    result = done(gpt2, *LOSSLESS, "-o", tmp_path / "out")
    assert "computes what the source model computes" in result.stdout
    assert "random tokens (the model has no tokenizer)" in result.stdout
    assert "KL to the source" in result.stdout
    assert "same top token 100.0%" in result.stdout
    assert f"wrote {tmp_path / 'out'}" in result.stdout
    assert "tokenizer" not in {path.name for path in (tmp_path / "out").iterdir()}
    ids = token_batch(SUPPORTED["gpt2"](), 3, 11)
    have, want = (logits_of(model, ids) for model in (kraken_compiler.load(tmp_path / "out"), SUPPORTED["gpt2"]()))
    assert errors(have, want)[1] < 1e-4


@pytest.mark.usefixtures("known_ranks")
def test_text(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{index % 90 + 3}" for index in range(300)))
    result = done(llama, "--degree", "2", "--text", tmp_path / "text", "-o", tmp_path / "out", "--json")
    quality = json.loads(result.stdout)["verification"]["quality"]
    assert quality["text"] == str(tmp_path / "text")
    assert quality["tokens"] == 256


def test_without_verification(llama: Path, tmp_path: Path) -> None:
    result = done(llama, *LOSSLESS, "--no-verify", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["verification"] is None
    assert "verification" not in open_artifact(tmp_path / "out").report()


def test_the_default_output_is_named_after_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory's name is kept whole: the dot in 'Llama-3.2-1B' begins no suffix."""
    monkeypatch.chdir(tmp_path)
    torch.save(SUPPORTED["plain_gpt"](), "model.pt")
    (tmp_path / "Llama-3.2-tiny").symlink_to(llama)
    done("Llama-3.2-tiny", *LOSSLESS, "--no-verify", "-q")
    done("model.pt", "--trust-pickle", "--input", "input_ids=int64[2,16]", *LOSSLESS, "--no-verify", "-q")
    made = {path.name for path in tmp_path.iterdir() if path.suffix == ".kraken"}
    assert made == {"Llama-3.2-tiny.kraken", "model.kraken"}


# what is shown -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_only(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights: whoever reads one fails."""
    place = tmp_path_factory.mktemp("config-only")
    shutil.copy(llama / "config.json", place)
    return place


def planned(*arguments: str | Path) -> dict[str, Any]:
    answer = json.loads(done(*arguments, "--plan", "--json").stdout)
    assert answer["artifact"] is None
    assert answer["verification"] is None
    report: dict[str, Any] = answer["report"]
    return report


def test_plan_reads_no_weight_and_writes_no_file(
    config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(config_only, "--degree", "2", "--plan")
    assert files_in(tmp_path) == []
    assert files_in(config_only) == ["config.json"]
    for words in ("3 layers, degree 2, changes the function", "lane", "KV heads", "window", "kraken", "model.layers.0"):
        assert words in result.stdout
    assert "wrote" not in result.stdout
    assert planned(config_only, "--degree", "4")["degree"] == 4
    assert "has no weight files" in refused(5, config_only, "--degree", "2", watched=tmp_path)


def test_layers(config_only: Path) -> None:
    report = planned(config_only, "--degree", "2", "--form", "ladder", "--layers", "-2--1")
    assert [layer["form"] for layer in report["layers"]] == ["standard", "ladder", "ladder"]
    assert "there is no layer 9" in refused(2, config_only, "--layers", "9", "--plan")


def test_config_file(config_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'model = "{config_only}"\ndegree = 4\nform = "ladder"\nlayers = "1"\nplan = true\ntimeout = 9\n')
    report = planned("--config", file)
    assert report["degree"] == 4
    assert [layer["form"] for layer in report["layers"]] == ["standard", "ladder", "standard"]
    report = planned("--config", file, "--degree", "2", "--layers", "0")
    assert report["degree"] == 2
    assert [layer["form"] for layer in report["layers"]] == ["ladder", "standard", "standard"]
    file.write_text("dump-graphs = 'graphs'\ntrust-pickle = false\ninput = ['input_ids=int64[3,5]']\nverify = false\n")
    assert planned(config_only, "--config", file, "--dump-graphs", tmp_path / "graphs")["degree"] == 2
    assert (tmp_path / "graphs").is_dir()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("degre = 2", 2, "there is no key 'degre'; did you mean 'degree'?"),
        ("dump_graph = 'x'", 2, "there is no key 'dump_graph'; did you mean 'dump-graphs'?"),
        ("degree = 'two'", 2, "degree"),
        ("degree = 0", 2, "degree"),
        ("timeout = -1", 2, "timeout"),
        ("timeout = 'soon'", 2, "timeout"),
        ("degree =", 5, "is no TOML"),
    ],
)
def test_bad_config_files(config_only: Path, tmp_path: Path, content: str, code: int, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    line = refused(code, config_only, "--config", file, "--plan")
    assert message in line
    assert str(file) in line
    assert "cannot read" in refused(5, config_only, "--config", tmp_path / "absent.toml")


def test_dumped_graphs(config_only: Path, tmp_path: Path) -> None:
    done(config_only, "--degree", "2", "--plan", "-q", "--dump-graphs", tmp_path / "graphs")
    names = files_in(tmp_path / "graphs")
    assert names[0].startswith("00-")
    assert [name[:2] for name in names] == [f"{number:02d}" for number in range(len(names))]
    assert names[-2].endswith("-cache-attention.txt")
    assert names[-1].endswith("-split-tokens.txt")
    texts = [(tmp_path / "graphs" / name).read_text() for name in names[-2:]]
    starts = [text.count("kraken.all_reduce_start") for text in texts]
    assert 0 < starts[0] < starts[1]


def test_no_overlap_is_no_graph_of_halves(llama: Path, tmp_path: Path) -> None:
    result = done(llama, *LOSSLESS, "--overlap", "none", "-o", tmp_path / "out")
    assert "lanes/split_step.json" not in files_in(tmp_path / "out")
    assert "halves" not in result.output
    assert "--overlap sometimes: choose from none, tokens, rows, auto" in refused(
        2, llama, "--overlap", "sometimes", "-o", tmp_path / "other", watched=tmp_path
    )


def test_quiet_and_verbose(config_only: Path) -> None:
    quiet = done(config_only, "--degree", "2", "--plan", "--quiet")
    assert quiet.output == ""
    plain, verbose = (done(config_only, "--degree", "2", "--plan", *more) for more in ((), ("-v",)))
    assert plain.stdout == verbose.stdout
    assert "find-layers" not in plain.stderr
    assert "find-layers" in verbose.stderr
    assert "capture: " in plain.stderr


def test_help_is_fast_and_names_the_exit_codes() -> None:
    code = "import sys\nfrom kraken_compiler.cli import compile, run, verify\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    text = " ".join(done("--help").stdout.split())
    assert "torch, onnx or vllm; several" in " ".join(text.replace("│", " ").split())
    for words in ("--degree", "--form", "3 unsupported model", "4 verification failed"):
        assert words in text


# what is refused -----------------------------------------------------------------------------------------------------


def test_wrong_options(llama: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert "valid degrees: 1 to 8" in refused(2, llama, "--degree", "9", *out, watched=tmp_path)
    assert "did you mean 'kraken'?" in refused(2, llama, "--form", "karken", *out, watched=tmp_path)
    assert "unknown backend 'torhc'" in refused(2, llama, "--backend", "torhc", *out, watched=tmp_path)
    assert "choose one of float32" in refused(2, llama, "--dtype", "int8", *out, watched=tmp_path)
    assert "input_ids=int64[2,16]" in refused(2, llama, "--input", "ids", *out, watched=tmp_path)
    assert "name the MODEL" in refused(2, "--degree", "2")
    # What the option parser refuses itself.
    for wrong in (("--degree", "two"), ("--degree", "0"), ("--nonesuch",)):
        result = invoke(llama, *wrong)
        assert result.exit_code == 2
        assert wrong[0] in result.stderr


def test_backends_are_listed_or_repeated(config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def compile_nothing(model: str, directory: Path, options: CompileOptions, **_: Any) -> None:
        asked.append(list(options.backends))
        raise UsageError("enough")

    (tmp_path / "text.toml").write_text('backend = "torch,onnx"')
    (tmp_path / "list.toml").write_text('backend = ["torch", "onnx"]')
    with monkeypatch.context() as patched:
        patched.setattr("kraken_compiler.commands.compile.compile_model", compile_nothing)
        for options in (
            ("--backend", "torch,onnx"),
            ("--backend", "torch", "--backend", "onnx"),
            ("--backend", " torch , onnx"),
            ("--config", tmp_path / "text.toml"),
            ("--config", tmp_path / "list.toml"),
        ):
            assert "enough" in refused(2, config_only, *options)
    assert asked == [["torch", "onnx"]] * 5
    assert "unknown backend 'onxn'" in refused(2, config_only, "--backend", "torch,onxn")
    assert "unknown backend ''" in refused(2, config_only, "--backend", "torch,")
    (tmp_path / "none.toml").write_text("backend = []")
    assert "no backend is named that writes programs" in refused(2, config_only, "--config", tmp_path / "none.toml")


def test_two_backends(llama: Path, tmp_path: Path) -> None:
    done(llama, *LOSSLESS, "--backend", "onnx", "--backend", "torch,onnx", "--no-verify", "-o", tmp_path / "out", "-q")
    assert open_artifact(tmp_path / "out").manifest.backends == {"onnx": {}, "torch": {}}
    assert {"lanes/device-1.onnx", "lanes/lane-1.safetensors"} <= set(files_in(tmp_path / "out"))


def test_an_unsupported_block_is_named(tmp_path: Path) -> None:
    rejected, source = REJECTED["soft_moe"], tmp_path / "soft_moe.pt2"
    torch.export.save(torch.export.export(rejected(), (), rejected.example_inputs()), source)
    line = refused(3, source, "--degree", "2", "-o", tmp_path / "out", watched=tmp_path)
    assert "module 'blocks.0' (node " in line
    assert "mixture of experts" in line


def test_json_errors(llama: Path, tmp_path: Path) -> None:
    result = invoke(llama, "--degree", "9", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert (told["error"], told["exit_code"]) == ("UsageError", 2)
    assert f"error: {told['message']}\n" == result.stderr


def test_pickles_need_trust(tmp_path: Path) -> None:
    torch.save(SUPPORTED["plain_gpt"](), tmp_path / "model.pt")
    options = ("--input", "input_ids=int64[2,16]", *LOSSLESS, "--no-verify", "-o", tmp_path / "out")
    arguments = (tmp_path / "model.pt", *options)
    line = refused(5, *arguments, watched=tmp_path)
    assert "--trust-pickle" in line
    assert "can run any code" in line
    done(*arguments, "--trust-pickle", "-q")
    ids = token_batch(SUPPORTED["plain_gpt"](), 3, 11)
    want = logits_of(SUPPORTED["plain_gpt"](), ids)
    assert errors(logits_of(kraken_compiler.load(tmp_path / "out"), ids), want)[1] < 1e-4


def test_a_state_dict_is_no_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    line = refused(5, tmp_path / "model.pt", "-o", tmp_path / "out", watched=tmp_path)
    assert "is a bare state dict (2 tensors): the architecture is missing" in line


def test_truncated_weights(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "llama"))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(5, source, "--degree", "2", "-o", tmp_path / "out", watched=tmp_path)
    assert "model.safetensors is truncated" in line


def test_a_missing_shard(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "llama", max_shard_size="40KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    line = refused(5, source, "--degree", "2", "-o", tmp_path / "out", watched=tmp_path)
    assert f"1 of {len(shards)} weight files are missing ({shards[1].name})" in line


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model at all")
    assert "is not a model file" in refused(5, tmp_path / "notes.txt", watched=tmp_path)
    assert "does not exist" in refused(5, tmp_path / "absent", watched=tmp_path)
    assert "has no config.json" in refused(5, tmp_path, watched=tmp_path)


def test_an_output_in_use(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("")
    arguments = (llama, *LOSSLESS, "--no-verify", "-o", target)
    for force in ((), ("--force",)):
        line = refused(2, *arguments, *force, watched=tmp_path)
        assert "is not empty and holds precious, which no compile wrote; choose another directory" in line
    (target / "precious").unlink()
    done(*arguments, "-q")
    assert "is not empty; choose another directory, or replace it with --force" in refused(
        2, *arguments, watched=tmp_path
    )
    done(*arguments, "--force", "-q")
    assert open_artifact(target).manifest.degree == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_read_only_output(llama: Path, tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    line = refused(5, llama, *LOSSLESS, "--no-verify", "-o", tmpfs / "out", watched=tmpfs)
    assert "cannot be written: Read-only file system" in line


def test_a_full_output(llama: Path, tmpfs: Path) -> None:
    (tmpfs / "ballast").write_bytes(bytes(900 * 1024))
    line = refused(5, llama, *LOSSLESS, "--no-verify", "-o", tmpfs / "out", watched=tmpfs)
    assert "No space left on device" in line


def test_a_program_that_fails_its_verification(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the artifact was written."""
    wrong = Comparison("2 ranks against the lanes", (1, 7), 1.0, 1.0, 1e-5)
    for place, patch, words in (
        ("verify.against_source.source_tolerance", lambda *_: -1.0, "standard form against the source"),
        ("commands.compile.verify_programs", lambda *_: Verification((wrong,)), "2 ranks against the lanes"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"kraken_compiler.{place}", patch)
            line = refused(4, llama, *LOSSLESS, "-o", tmp_path / "out", watched=tmp_path)
        assert "the program computes something else" in line
        assert words in line


def test_a_killed_rank(llama: Path, tmp_path: Path) -> None:
    killer = threading.Thread(target=kill_a_rank)
    killer.start()
    result = invoke(llama, *LOSSLESS, "-o", tmp_path / "out", "--quiet")
    killer.join()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "was killed by SIGKILL" in result.stderr.splitlines()[0]
    assert "closed by peer" not in result.stderr.splitlines()[0]
    assert files_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def kill_a_rank(module: str = "call_rank") -> None:
    """Kill a rank that this process started, as soon as there is one."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for child in psutil.Process().children(recursive=True):
            try:
                if module in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)


def test_as_a_process(llama: Path, tmp_path: Path) -> None:
    """The installed command, in a terminal's place: no traceback, the exit code, no half artifact."""
    command = [str(Path(sys.executable).with_name("kraken-compile")), str(llama), "--degree", "9", "-o", "out"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: the model cannot be divided among 9 lanes")
    assert list(tmp_path.iterdir()) == []
