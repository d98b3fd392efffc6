"""What a changed form costs: the measurement against a direct formula, and the tokens it is made on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.quality.evaluate import evaluate, token_batches
from kraken_compiler.quality.texts import batches_for
from tests.test_cli_compile import save_model
from tests.zoo import SUPPORTED, token_batch

VOCAB = 11


def table_model(seed: int) -> Callable[[Tensor], Tensor]:
    """A language model that knows only the last token."""
    table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def test_evaluate_is_the_formula() -> None:
    source, rewritten = table_model(0), table_model(1)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(VOCAB, shape, generator=generator) for shape in ((2, 9), (1, 5))]
    counted: list[int] = []
    quality = evaluate(source, rewritten, batches, "numbers", counted.append)

    kl, same, loss, source_loss, positions, predicted = 0.0, 0, 0.0, 0.0, 0, 0
    for ids in batches:
        for row in ids.tolist():
            for place, token in enumerate(row):
                p, q = (model(torch.tensor(token)).double().softmax(-1).tolist() for model in (source, rewritten))
                kl += sum(a * math.log(a / b) for a, b in zip(p, q))
                same += p.index(max(p)) == q.index(max(q))
                positions += 1
                if place + 1 < len(row):
                    following = row[place + 1]
                    source_loss -= math.log(p[following])
                    loss -= math.log(q[following])
                    predicted += 1
    assert quality.tokens == positions == 23
    assert counted == [18, 5]
    assert quality.kl == pytest.approx(kl / positions, rel=1e-4)
    assert quality.top1_agreement == pytest.approx(same / positions)
    assert quality.source_perplexity == pytest.approx(math.exp(source_loss / predicted), rel=1e-4)
    assert quality.perplexity == pytest.approx(math.exp(loss / predicted), rel=1e-4)
    assert {"kl", "top1_agreement", "perplexity", "source_perplexity"} <= quality.to_dict().keys()
    assert "on 23 tokens of numbers: KL to the source" in quality.lines()[0]


def test_a_model_compared_with_itself() -> None:
    model = table_model(0)
    quality = evaluate(model, model, [torch.arange(VOCAB)[None]], "numbers")
    assert quality.kl == pytest.approx(0, abs=1e-7)
    assert quality.top1_agreement == 1
    assert quality.perplexity == quality.source_perplexity


def test_a_hopeless_model_is_infinitely_surprised() -> None:
    certain = 2000 * torch.eye(VOCAB)
    quality = evaluate(table_model(0), lambda ids: certain[ids], [torch.arange(VOCAB)[None]], "numbers")
    assert quality.perplexity == math.inf
    assert quality.kl > 100
    assert "perplexity infinite (source " in quality.lines()[0]


def test_a_model_that_computes_no_numbers() -> None:
    broken = torch.full((VOCAB, VOCAB), math.nan)
    quality = evaluate(table_model(0), lambda ids: broken[ids], [torch.arange(VOCAB)[None]], "numbers")
    assert math.isnan(quality.perplexity)
    assert "KL to the source not a number nats/token" in quality.lines()[0]


def test_half_precision_logits_are_compared_in_full() -> None:
    model = table_model(0)
    quality = evaluate(model, lambda ids: model(ids).bfloat16(), [torch.arange(VOCAB)[None]], "numbers")
    assert 0 < quality.kl < 1e-3


@pytest.mark.parametrize(
    ("length", "shapes"),
    [
        (0, []),
        (1, []),
        (2, [(1, 2)]),
        (15, [(1, 15)]),
        (16, [(2, 8)]),
        (23, [(2, 8)]),
        (24, [(2, 8), (1, 8)]),
        (40, [(2, 8), (2, 8), (1, 8)]),
    ],
)
def test_token_batches(length: int, shapes: list[tuple[int, int]]) -> None:
    batches = token_batches(list(range(length)), sequence=8, batch=2)
    assert [tuple(batch.shape) for batch in batches] == shapes
    read = [token for batch in batches for token in batch.flatten().tolist()]
    assert read == list(range(len(read)))


# which tokens --------------------------------------------------------------------------------------------------------


def test_the_largest_proven_size() -> None:
    program = without_tokenizer("plain_parallel").program
    batch, sequence = next(node for node in program.graph.nodes if node.name == "input_ids").meta["val"].shape
    assert [largest_size(size) for size in (batch, sequence, sequence + 1, 7)] == [None, 64, 65, 7]


@cache
def without_tokenizer(name: str) -> Capture:
    model = SUPPORTED[name]()
    return capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})


@pytest.mark.parametrize("name", ["plain_gpt", "plain_parallel", "plain_alibi", "llama", "gpt2"])
def test_a_model_without_a_tokenizer_gets_random_tokens_that_fit(name: str) -> None:
    answer = batches_for(without_tokenizer(name), None)
    assert not isinstance(answer, str)
    batches, text = answer
    assert text == "random tokens (the model has no tokenizer)"
    assert all(int(batch.max()) < 97 for batch in batches)
    assert len(batches[0].unique()) > 40
    # All these models have 64 positions (plain_parallel: rows of its mask), but for the one whose biases need none.
    assert {batch.shape[1] for batch in batches} == {256 if name == "plain_alibi" else 64}


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer, so it cannot read text"):
        batches_for(without_tokenizer("plain_gpt"), tmp_path / "text")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return capture(save_model("llama", tmp_path_factory.mktemp("source") / "llama"))


def test_a_text_is_read_in_rows_that_fit(with_tokenizer: Capture, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{index % 90 + 3}" for index in range(150)))
    answer = batches_for(with_tokenizer, tmp_path / "text")
    assert not isinstance(answer, str)
    batches, text = answer
    assert text == str(tmp_path / "text")
    assert [batch.shape for batch in batches] == [(2, 64)]
    assert batches[0].flatten()[:3].tolist() == [3, 4, 5]


def test_the_built_in_sample(with_tokenizer: Capture) -> None:
    answer = batches_for(with_tokenizer, None)
    assert not isinstance(answer, str)
    batches, text = answer
    assert text == "the built-in sample"
    assert sum(batch.numel() for batch in batches) > 300


def test_texts_that_cannot_be_read(with_tokenizer: Capture, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"--text: cannot read .*absent: No such file"):
        batches_for(with_tokenizer, tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputFileError, match="is not UTF-8 text"):
        batches_for(with_tokenizer, tmp_path / "bytes")
    (tmp_path / "short").write_text("w5")
    with pytest.raises(UsageError, match="is too short"):
        batches_for(with_tokenizer, tmp_path / "short")
