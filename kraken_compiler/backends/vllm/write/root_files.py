"""Writes what vLLM and its clients look for at a model's root: config, tokenizer, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.manifest import TOKENIZER_DIRECTORY, Source
from kraken_compiler.backends.vllm.format import ARCHITECTURE, CONFIG_FILE, MODEL_TYPE, EngineRecord
from kraken_compiler.errors import naming
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.text import json_text


def write_root_files(program: LaneProgram, record: EngineRecord, source: Source, directory: Path) -> None:
    """Write `config.json`, and copy the tokenizer's files.

    The config is of a model type of its own: by the source's vLLM would take the attention's window, the quantization
    and the like from the config, and transformers would fill in what is left out. Its head counts are those that vLLM
    has to divide by the degree to get a lane's.

    Args:
        program: The lane program, with a KV cache.
        record: What was written of it.
        source: Where the model came from.
        directory: The artifact's.

    Raises:
        OSError: A file cannot be written; names it.
    """
    path = directory / CONFIG_FILE
    with naming(path):
        path.write_text(json_text(_config(program, record, source)), encoding="utf-8")
    tokenizer = directory / TOKENIZER_DIRECTORY
    for file in sorted(tokenizer.iterdir()) if tokenizer.is_dir() else ():
        if file.is_file() and file.name != CONFIG_FILE:
            with naming(directory / file.name):
                shutil.copyfile(file, directory / file.name)


def _config(program: LaneProgram, record: EngineRecord, source: Source) -> dict[str, Any]:
    assert program.cached is not None
    plan = program.cached.plan
    limits = [limit for limit in (plan.limit, source.max_positions) if limit is not None]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": plan.caches[0].dtype,
        "hidden_size": record.hidden_size,
        "num_hidden_layers": len(record.attentions),
        "num_attention_heads": max(one.heads for one in record.attentions) * program.degree,
        "num_key_value_heads": max(one.kv_heads for one in record.attentions) * program.degree,
        "head_dim": max(one.head_size for one in record.attentions),
        "vocab_size": record.vocabulary,
        **({"max_position_embeddings": min(limits)} if limits else {}),
        "tie_word_embeddings": False,
        "kraken": {"degree": program.degree, "source": source.model_class},
    }
