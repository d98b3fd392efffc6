"""A Kraken model behind transformers' interface: saved, loaded, generated from, trained and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.native.directory import load_native
from kraken_compiler.native.huggingface import KrakenForCausalLM, KrakenHubConfig

CONFIG: dict[str, Any] = {"layers": 2, "width": 48, "heads": 4, "degree": 2, "vocab_size": 100}


@pytest.fixture
def model() -> KrakenForCausalLM:
    torch.manual_seed(0)
    return KrakenForCausalLM(KrakenHubConfig(**CONFIG, max_position_embeddings=64)).eval()


def test_names_of_both_kinds_mean_the_same() -> None:
    hub = KrakenHubConfig(**CONFIG, max_position_embeddings=64)
    ours = KrakenHubConfig(layers=2, width=48, heads=4, degree=2, vocabulary=100, context=64)
    assert hub.kraken() == ours.kraken()
    assert (hub.num_hidden_layers, hub.hidden_size, ours.vocab_size) == (2, 48, 100)


def test_what_is_saved_is_loaded_and_captured(model: KrakenForCausalLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(100, (2, 9))
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(load_native(tmp_path / "model")(ids), model(ids).logits)
    assert capture(tmp_path / "model").lanes == 2
    lanes = kraken_compiler.transform(model)
    torch.testing.assert_close(lanes(ids), model(ids).logits, rtol=1e-4, atol=1e-5)


class _Doubled(torch.nn.Module):
    """Has a model inside, and does more than to call it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 2 * self.model(input_ids)


def test_what_only_has_a_model_inside_is_not_taken_for_it(model: KrakenForCausalLM) -> None:
    with pytest.raises(UnsupportedModelError):
        kraken_compiler.transform(
            _Doubled(model.model), degree=2, example_inputs=(torch.ones(2, 8, dtype=torch.int64),)
        )


def test_it_generates_its_most_likely_tokens(model: KrakenForCausalLM) -> None:
    ids = torch.randint(100, (2, 5))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


def test_labels_that_are_left_out_cost_nothing(model: KrakenForCausalLM) -> None:
    ids = torch.randint(100, (1, 8))
    labels = ids.clone()
    labels[:, 4:] = -100
    logits = model(ids).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, :3], ids[0, 1:4])
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted)


def test_losses_of_parts_of_a_batch_add_up(model: KrakenForCausalLM) -> None:
    ids = torch.randint(100, (4, 8))
    whole = model(ids, labels=ids).loss
    count = ids[:, 1:].numel()
    parts = [model(half, labels=half, num_items_in_batch=count).loss for half in ids.split(2)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_padding_is_on_the_right_or_refused(model: KrakenForCausalLM) -> None:
    ids = torch.randint(100, (2, 6))
    everywhere = torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=everywhere, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False))
    right, left = everywhere.clone(), everywhere.clone()
    right[0, 4:] = left[0, :2] = 0
    assert torch.equal(model(ids, attention_mask=right).logits[0, :4], model(ids).logits[0, :4])
    with pytest.raises(UsageError, match="padded on the left"):
        model(ids, attention_mask=left)
    for mask in (left, right):
        with pytest.raises(UsageError, match="one by one"):
            model.generate(ids, attention_mask=mask, max_new_tokens=3)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(100, (8, 16))]

    def first_norm(batch: int, accumulated: int) -> float:
        torch.manual_seed(0)
        model = KrakenForCausalLM(KrakenHubConfig(**CONFIG, max_position_embeddings=64))
        options = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=options, train_dataset=rows)
        trainer.train()
        return next(float(record["grad_norm"]) for record in trainer.state.log_history if "grad_norm" in record)

    assert first_norm(2, 4) == pytest.approx(first_norm(8, 1), rel=1e-3)


@pytest.mark.slow
def test_the_trainer_trains_it(model: KrakenForCausalLM, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.arange(16).repeat(16, 2)]
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    before = model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.item()
    Trainer(model=model, args=options, train_dataset=rows).train()
    after = model.eval()(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.item()
    assert after < before / 2
