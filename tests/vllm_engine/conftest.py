"""Compiled models for vLLM. Without vLLM there is nothing here to collect: `make test-vllm` has it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.cli_command import run_process

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []

VOCABULARY = 320
_SIZES = {"hidden_size": 192, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32, "intermediate_size": 288}


def save_model(kind: str, directory: Path) -> None:
    """A small random model whose tokens differ clearly: 6 heads of size 32, for two and three lanes."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=192, n_layer=3, n_head=6, vocab_size=VOCABULARY, n_positions=512)
    elif kind == "bloom":
        config = transformers.BloomConfig(
            hidden_size=192, n_layer=3, n_head=6, vocab_size=VOCABULARY, tie_word_embeddings=False
        )
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **_SIZES,
            **_HEADS,
            sliding_window=24,
            tie_word_embeddings=False,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    else:
        name = {"llama": "LlamaConfig", "qwen3": "Qwen3Config"}[kind]
        config = getattr(transformers, name)(**_SIZES, **_HEADS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # So that the most likely token is so by more than rounding, and, with a tied head, not the last one again.
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(6.0)
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], Path]:
    """Compile a kind of model for a degree in a form; once each."""

    @lru_cache
    def model(kind: str) -> Path:
        directory = tmp_path_factory.mktemp(kind)
        save_model(kind, directory)
        return directory

    @lru_cache
    def artifact(kind: str, degree: int, form: str) -> Path:
        out = tmp_path_factory.mktemp("artifacts") / f"{kind}-{degree}-{form}"
        options = ("--degree", str(degree), "--form", form, "--backend", "torch,vllm", "-o", str(out), "--quiet")
        run_process("compile", model(kind), *options)
        return out

    return artifact


def greedy(artifact: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens of `kraken-run` on ranks of our own."""
    ids = [part for prompt in prompts for part in ("--input-ids", ",".join(map(str, prompt)))]
    options = ("--max-new-tokens", str(new_tokens), "--ignore-eos", "--json", "--backend", "torch")
    answer = json.loads(run_process("run", artifact, *ids, *options).stdout)
    return [result["ids"] for result in answer["results"]]
