"""Capture of torch.export archives: decided by content, opened only if nothing in them can run code."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

from kraken_compiler.capture import Capture, capture
from kraken_compiler.capture.archive_safety import _is_arithmetic
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.calling import bind, unflatten_output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, ids: Tensor, half: Tensor | None = None, double: bool = False) -> Any:
        x = self.linear(self.embed(ids)) + self.shift
        return x * 2 if double else x


def export(model: nn.Module, path: Path, **kwargs: Any) -> Path:
    dims = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}, "double": None}
    shapes = {name: dims[name] for name in kwargs} if kwargs.pop("dynamic", True) else None
    torch.export.save(torch.export.export(model, (), kwargs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Model().eval()
    ids = torch.zeros(2, 16, dtype=torch.int64)
    return model, export(model, tmp_path_factory.mktemp("archive") / "m.pt2", ids=ids, double=True)


def run(captured: Capture, *args: Any, **kwargs: Any) -> Any:
    program = captured.program
    read = program.reader(captured.store.read)
    weights = [read(spec.source) for spec in program.weights.values()]
    with torch.no_grad():
        outputs = program.module(*weights, *bind(program.call, program.inputs, args, kwargs))
    return unflatten_output(program.call, outputs)


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], **added: bytes) -> Path:
    """Copy an archive entry by entry; a changed entry keeps its name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in added.items():
            new.writestr(old.namelist()[0].partition("/")[0] + "/" + name.replace("__", "/"), content)
    return target


def edit_json(part: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if part not in name:
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


@pytest.mark.parametrize("name", ["m.pt2", "model.pt", "model"])
def test_values_whatever_the_name(saved: tuple[nn.Module, Path], tmp_path: Path, name: str) -> None:
    model, source = saved
    path = tmp_path / name
    path.write_bytes(source.read_bytes())
    captured = capture(path)
    ids = torch.randint(0, 11, (3, 5))
    torch.testing.assert_close(run(captured, ids), model(ids, double=True).detach())
    assert captured.origin.kind == "export"
    assert captured.origin.model_class.endswith("test_capture_archive.Model")
    assert captured.program.inputs[0].shape == ("batch", "sequence")
    assert captured.program.call.constants == {"double": True}
    assert list(captured.program.constants) == ["shift"]
    assert captured.notes == ()


def test_static_archives_are_taken_and_said_to_be(tmp_path: Path) -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    captured = capture(export(Model(), tmp_path / "m.pt2", ids=ids, dynamic=False))
    assert captured.program.inputs[0].shape == (2, 16)
    assert [note[:43] for note in captured.notes] == [
        "the batch size of input 'ids' is fixed at 2",
        "the sequence size of input 'ids' is fixed a",
    ]
    with pytest.raises(UsageError, match=r"must have shape \[2, 16\], got \[3, 16\]"):
        run(captured, torch.zeros(3, 16, dtype=torch.int64))


def test_huggingface_outputs(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=96
    )
    model = transformers.LlamaForCausalLM(config).eval()
    dims = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.int64), "use_cache": False}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=dims), tmp_path / "m.pt2")
    captured = capture(tmp_path / "m.pt2")
    ids = torch.randint(0, 96, (3, 5))
    out = run(captured, input_ids=ids)
    assert type(out).__name__ == "CausalLMOutputWithPast"
    torch.testing.assert_close(out.logits, model(ids).logits.detach())


def test_inputs_were_fixed_at_export(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(UsageError, match="its inputs and element types were fixed at export"):
        capture(saved[1], input_specs=["ids=int64[2,16]"])


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def bomb(tmp_path: Path) -> bytes:
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "bomb.bin")
    return (tmp_path / "bomb.bin").read_bytes()


def use_pickle(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def opaque(config: Any) -> None:
    next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"


def evil_size(expression: str) -> Callable[[Any], None]:
    def edit(value: Any) -> None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(item, dict) and "expr_str" in item:
                item["expr_str"] = expression
            edit(item)

    return edit


def evil_structure(model: Any) -> None:
    enum = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "x"})
    spec = [1, {"type": "builtins.tuple", "context": enum, "children_spec": []}]
    model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)


def evil_name(model: Any) -> None:
    """A name that is an argument with a default value in the Python source that torch makes of the graph."""
    model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x=print('ran')"


def evil_target(target: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edit


def test_archives_that_run_code_are_refused(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    evil = f"__import__('os').mkdir('{tmp_path / 'ran'}')"
    pickled = bomb(tmp_path)
    cases = {
        "its sample inputs are a pickle that runs code": (
            lambda name, content: pickled if "sample_inputs" in name else content,
            {},
        ),
        "some of its tensors or objects are pickled": (edit_json("weights_config", use_pickle), {}),
        "some of its tensors or objects are pickled (": (edit_json("constants_config", opaque), {}),
        "it holds a pickled object": (lambda name, content: content, {"data__weights__model.pt": pickled}),
        "it holds machine code": (lambda name, content: content, {"data__aotinductor__model__x.so": b"code"}),
        "a size in it is no arithmetic": (edit_json("models/", evil_size(evil)), {}),
        "a value in it has a name that is none": (edit_json("models/", evil_name), {}),
        "it calls 'torch.os.system'": (edit_json("models/", evil_target("torch.os.system")), {}),
        "it calls 'torch.ops.load_library'": (edit_json("models/", evil_target("torch.ops.load_library")), {}),
        "it calls 'torch.ops.aten.from_file.default'": (
            edit_json("models/", evil_target("torch.ops.aten.from_file.default")),
            {},
        ),
        "it imports the module 'antigravity'": (edit_json("models/", evil_structure), {}),
    }
    for number, (message, (change, added)) in enumerate(cases.items()):
        path = rewrite(saved[1], tmp_path / f"{number}.pt2", change, **added)
        with pytest.raises(InputFileError) as caught:
            capture(path)
        assert "cannot be opened safely" in str(caught.value)
        assert message in str(caught.value)
        assert "--trust-pickle" in str(caught.value)
        assert not (tmp_path / "ran").exists()


def test_the_attack_of_the_last_test_is_real(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    pickled = bomb(tmp_path)
    path = rewrite(saved[1], tmp_path / "m.pt2", lambda name, old: pickled if "sample_inputs" in name else old)
    with pytest.raises(InputFileError, match=r"cannot be read as a torch\.export archive"):
        capture(path, trust_pickle=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "Symbol('s23', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s0'))",
        "Max(1, s0 // 2) + 3",
        "2*s0",
    ],
)
def test_sizes_that_are_arithmetic(text: str) -> None:
    assert _is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "exec(s0)",
        "s0.__class__",
        "s0 . real",
        "(eval)(s0)",
        "\uff45val(s0)",
        "Symbol('a').name",
        "Symbol('a\\n')",
        "[s0]",
        "Symbol('s0')('x')",
        "lambda: 0",
    ],
)
def test_sizes_that_are_not(text: str) -> None:
    assert not _is_arithmetic(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-40], "is truncated or damaged: PytorchStreamReader failed"),
        (
            lambda content: content[: len(content) // 2],
            "is truncated or damaged: it begins like an archive but has no end",
        ),
        (lambda content: content[:20], "is truncated or damaged"),
        (lambda content: b"", "is empty"),
        (lambda content: b"hello, world, this is text", "is not a model file: expected a Hugging Face directory"),
    ],
    ids=["end cut", "truncated", "head only", "empty", "text"],
)
def test_damaged_archives(
    saved: tuple[nn.Module, Path], tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(damage(saved[1].read_bytes()))
    with pytest.raises(InputFileError, match=message) as caught:
        capture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_archives_of_ops_that_are_not_here(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.linear.default", b"torch.ops.mine.linear.default")

    with pytest.raises(InputFileError, match=r"cannot be read as a torch\.export archive: .*torch\.ops\.mine\.linear"):
        capture(rewrite(saved[1], tmp_path / "m.pt2", change))


def test_other_archives(tmp_path: Path) -> None:
    def archive(*names: str) -> Path:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"{}")
        return path

    with pytest.raises(InputFileError, match=r"of torch 2\.7 or older"):
        capture(archive("serialized_exported_program.json", "version"))
    with pytest.raises(InputFileError, match="is a TorchScript archive"):
        capture(archive("m/constants.pkl", "m/data.pkl", "m/code/__torch__.py"))
    with pytest.raises(InputFileError, match="holds compiled code only"):
        capture(archive("m/archive_format", "m/data/aotinductor/model/x.so"))
    with pytest.raises(InputFileError, match="is a zip archive, but no model"):
        capture(archive("readme.txt"))
    with pytest.raises(InputFileError, match="nope does not exist"):
        capture(tmp_path / "nope")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes((2).to_bytes(8, "little") + b"{}" + b" " * 16)
    with pytest.raises(InputFileError, match=r"holds weights only .* the architecture is missing"):
        capture(weights)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputFileError, match="is only a config: give its directory"):
        capture(tmp_path / "config.json")
