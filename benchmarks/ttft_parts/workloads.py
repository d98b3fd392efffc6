"""What is run: the models, written by transformers as a user would find them, and the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaged_model import HOW, packaged_model, smollm2
from torch import Tensor

from kraken_compiler.native import KrakenConfig, KrakenLM
from kraken_compiler.native.directory import save_native

LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TINY = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Workload:
    """A model at a degree, and what is asked of it.

    Attributes:
        contenders: Patterns of the contenders that take part unless others are asked for.
        has_aims: Its ratios are held against what was aimed at; the aims were set for one workload.
    """

    name: str
    degree: int
    dtypes: tuple[str, ...]
    links: tuple[str, ...]
    prompts: tuple[int, ...]
    new_tokens: int
    contenders: tuple[str, ...]
    has_aims: bool = False

    def write_native(self, standard: Path, directory: Path) -> None:
        """Write a Kraken model of as many layers, lanes and parameters as the workload's model has.

        Its embedding is its head. Where they are two in the other model, its embedding is not counted: nothing is
        multiplied with it.

        Args:
            standard: The workload's model, see `write`.
            directory: Where the Kraken model goes.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(standard)
        head = config.vocab_size * config.hidden_size
        attention = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        layer = config.hidden_size * (attention + 3 * config.intermediate_size)
        wanted = head + config.num_hidden_layers * layer
        heads, kv_heads = (
            max(1, count // self.degree) for count in (config.num_attention_heads, config.num_key_value_heads)
        )
        sizes = {
            "layers": config.num_hidden_layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "expansion": config.intermediate_size / config.hidden_size,
            "ffn": "swiglu",
            "norm": "rms",
            "positions": "rotary",
            "degree": self.degree,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
        }
        widths = range(2 * heads, config.hidden_size + 1, 2 * heads)
        models = [KrakenConfig(width=width, **sizes) for width in widths]
        torch.manual_seed(0)
        save_native(KrakenLM(min(models, key=lambda one: abs(one.parameters - wanted))), directory)

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the model as a Hugging Face directory; returns what the arithmetic needs to know of its shape."""
        from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.name == "smollm2":
            model = _packaged_smollm2()
        else:
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(TINY if self.name == "tiny" else LLAMA)))
        model.save_pretrained(directory)
        config = AutoConfig.from_pretrained(directory)
        return {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_width": config.head_dim,
            "ffn": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="llama",
            degree=2,
            dtypes=("float32", "bfloat16"),
            links=("unlimited", "10", "2", "1"),
            prompts=(128, 512),
            new_tokens=32,
            contenders=(
                *("tp_plan", "dtensor/compiled", "standard", "standard+split", "kraken", "kraken+split"),
                *("ladder", "delayed", "sync-drop", "sync-drop+split", "native", "bound"),
            ),
            has_aims=True,
        ),
        Workload(
            name="smollm2",
            degree=3,
            dtypes=("float32",),
            links=("unlimited", "1"),
            prompts=(128,),
            new_tokens=32,
            contenders=("tp_plan/eager", "standard/eager", "kraken/eager", "bound/eager"),
        ),
        Workload(
            name="tiny",
            degree=2,
            dtypes=("float32",),
            links=("unlimited",),
            prompts=(16,),
            new_tokens=4,
            contenders=("tp_plan/eager", "standard/eager", "kraken/eager", "bound/eager"),
        ),
    )
}


def native_beside(source: Path) -> Path:
    """Where the Kraken model of `Workload.write_native` lies, beside the workload's own."""
    return source.with_name(f"{source.name}-native")


def prompt_ids(vocabulary: int, size: int) -> Tensor:
    """A prompt, `int64 [1, size]`; the same on every rank and in every run."""
    return torch.randint(vocabulary, (1, size), generator=torch.Generator().manual_seed(size))


def packaged_smollm2_missing() -> str | None:
    return None if smollm2() else HOW


def _packaged_smollm2() -> Any:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    gguf = packaged_model()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    assert isinstance(loaded, LlamaForCausalLM)
    # A model that came from GGUF refuses to be saved, whatever its weights are by now.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(type(loaded.config)(**values))
    model.load_state_dict(loaded.state_dict())
    return model
