"""Small Hugging Face directories that tests change, and the model that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.cli.compile import app
from kraken_compiler.verify.compare import errors

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""The relative error that a layer may make."""


def make(kind: str = "llama", **sizes: Any) -> Any:
    """A decoder with seeded weights that all count."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **sizes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save(directory: Path, kind: str = "llama", **sizes: Any) -> Path:
    """The directory, with such a model in it."""
    make(kind, **sizes).save_pretrained(directory)
    return directory


def tensors_of(directory: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """What a weight file holds."""
    return dict(load_file(directory / name))


def write_tensors(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    """Write a weight file."""
    contiguous = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(contiguous, directory / name, metadata={"format": "pt"})


def write_index(directory: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Write shards, and an index that names them."""
    for name, tensors in files.items():
        write_tensors(directory, tensors, name)
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def configure(directory: Path, **fields: Any) -> None:
    """Change fields of `config.json`; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def tokens() -> Tensor:
    """Token ids [2, 9]."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def error(have: Any, want: Any) -> float:
    """Largest difference of two models' logits, over the largest logit."""
    with torch.no_grad():
        return errors(have(tokens()).logits.float(), want(tokens()).logits.float())[1]


def assert_reads(directory: Path, architecture: Any = transformers.AutoModelForCausalLM) -> list[str]:
    """Compare all that a capture reads with what transformers loads from the same directory, and give its notes."""
    captured = capture(directory)
    loaded = architecture.from_pretrained(directory).state_dict(keep_vars=True)
    read = {spec.source for spec in captured.program.weights.values() if spec.kind == "parameter"}
    for name in read:
        torch.testing.assert_close(captured.store.read(name), loaded[name].detach(), rtol=0, atol=0)
    own = {id(loaded[name]) for name in read}
    assert len(own) == len(read), "a tensor that transformers has once is read twice"
    return [note for note in captured.notes if "size must be" not in note]


def assert_as_loaded(directory: Path) -> list[str]:
    """Compare the lanes with what transformers loads from the same directory, and give the report's notes."""
    lanes = kraken_compiler.transform(directory, degree=2, form="standard")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert error(lanes, model) < TOLERANCE[model.dtype]
    return [line.removeprefix("note").strip() for line in lanes.report.lines() if line.startswith("note ")]


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `kraken-compile`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output
