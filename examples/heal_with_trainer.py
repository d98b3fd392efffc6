"""Distils a model into its own Kraken form with the Hugging Face Trainer: the rewritten model is an ordinary module.

python examples/heal_with_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kraken_compiler

VOCABULARY, SEQUENCE, STEPS = 128, 32, 60


class RandomRows(Dataset[dict[str, Tensor]]):
    """Rows of token ids; a real run takes a text."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (count, SEQUENCE), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


class Distiller(Trainer):
    """Trains towards what a teacher says."""

    def __init__(self, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        output = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"]).logits
        loss = kl(output.logits, wanted)
        return (loss, output) if return_outputs else loss


def kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(teacher || student) in nats per token."""
    student, teacher = (F.log_softmax(each.float().flatten(0, 1), dim=-1) for each in (logits, wanted))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=VOCABULARY, initializer_range=0.15)
    teacher = LlamaForCausalLM(config).eval()
    student = kraken_compiler.transform(teacher, degree=3)

    held_out = RandomRows(8, seed=1).ids

    def cost() -> float:
        with torch.no_grad():
            return kl(student(input_ids=held_out).logits, teacher(input_ids=held_out).logits).item()

    before = cost()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        Distiller(teacher, model=student, args=arguments, train_dataset=RandomRows(512, seed=2)).train()
    print(f"KL to the source on rows it has not seen: {before:.3f} -> {cost():.3f} nats/token")


if __name__ == "__main__":
    main()
