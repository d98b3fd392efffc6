"""What a changed form costs: the measurement against a direct formula, and the tokens it is made on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.texts.read import TextChoice, TokenText, evaluation_text, longest_row, token_batches
from tests.quick_tests import mostly_slow
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

    by_position = quality.by_position
    assert by_position.rows == (3, 3, 3, 3, 3, 2, 2, 2, 2)
    assert sum(kl * rows for kl, rows in zip(by_position.kl, by_position.rows)) / 23 == pytest.approx(quality.kl)
    assert len(by_position.perplexity) == 8
    first = torch.stack([ids[0] for batch in batches for ids in batch])
    log_p, log_q = (model(first).double().log_softmax(-1) for model in (source, rewritten))
    assert by_position.kl[0] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


def test_the_spread_over_rows_gives_the_error() -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (5, 40), generator=generator)
    whole = evaluate(table_model(0), table_model(1), [ids], "numbers")
    means = torch.tensor([evaluate(table_model(0), table_model(1), [row[None]], "").kl for row in ids])
    assert whole.kl_error == pytest.approx((means.std() / math.sqrt(5)).item(), rel=1e-4)
    assert f"+- {whole.kl_error:.1g} nats/token" in whole.lines()[0]
    assert [(first, last) for first, last, _ in whole.by_position.ranges()] == [(0, 15), (16, 39)]
    assert whole.lines()[1].startswith("KL at positions 0-15: ")


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


def test_tokens_that_neither_model_ever_gives_count_nothing() -> None:
    source, rewritten = table_model(0), table_model(1)
    never = torch.arange(VOCAB) >= VOCAB - 3
    ids = torch.arange(VOCAB - 3)[None]
    masked = evaluate(
        lambda ids: source(ids).masked_fill(never, -math.inf),
        lambda ids: rewritten(ids).masked_fill(never, -math.inf),
        [ids],
        "numbers",
    )
    without = evaluate(lambda ids: source(ids)[..., ~never], lambda ids: rewritten(ids)[..., ~never], [ids], "numbers")
    assert masked == without


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
        (7, [(1, 7)]),
        (15, [(1, 8)]),
        (16, [(2, 8)]),
        (17, [(2, 8)]),
        (23, [(2, 8)]),
        (24, [(2, 8), (1, 8)]),
        (40, [(2, 8), (2, 8), (1, 8)]),
    ],
)
def test_token_batches(length: int, shapes: list[tuple[int, int]]) -> None:
    batches = list(token_batches(iter(range(length)), sequence=8, rows=2))
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


def opened(captured: Capture, path: Path | None = None, limit: int | None = None) -> TokenText:
    text = evaluation_text(captured, TextChoice(path, limit))
    assert not isinstance(text, str)
    return text


@pytest.mark.parametrize(
    "name", mostly_slow(["plain_gpt", "plain_parallel", "plain_alibi", "llama", "gpt2"], ("plain_gpt", "llama"))
)
def test_a_model_without_a_tokenizer_gets_random_tokens_that_fit(name: str) -> None:
    text = opened(without_tokenizer(name))
    batches = list(text)
    assert text.name == "random tokens (the model has no tokenizer)"
    assert text.expected_tokens == sum(batch.numel() for batch in batches)
    assert all(int(batch.max()) < 97 for batch in batches)
    assert len(batches[0].unique()) > 40
    # All these models have 64 positions (plain_parallel: rows of its mask), but for the one whose biases need none.
    assert {batch.shape[1] for batch in batches} == {256 if name == "plain_alibi" else 64}


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer, so it cannot read text"):
        opened(without_tokenizer("plain_gpt"), tmp_path / "text")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return capture(save_model("llama", tmp_path_factory.mktemp("source") / "llama"))


def words(count: int, per_line: int) -> str:
    lines = [[f"w{index % 90 + 3}" for index in range(count)][at : at + per_line] for at in range(0, count, per_line)]
    return "\n".join(map(" ".join, lines))


def test_a_text_is_read_in_rows_that_fit(with_tokenizer: Capture, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(words(150, 150))
    text = opened(with_tokenizer, tmp_path / "text")
    batches = list(text)
    assert text.name == str(tmp_path / "text")
    assert [batch.shape for batch in batches] == [(2, 64)]
    assert batches[0].flatten()[:3].tolist() == [3, 4, 5]
    assert list(map(Tensor.tolist, text)) == list(map(Tensor.tolist, batches)), "it can be read again"


def test_a_long_text_is_read_piece_by_piece(
    with_tokenizer: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(words(3000, 10))
    whole = [batch.tolist() for batch in opened(with_tokenizer, tmp_path / "text")]
    monkeypatch.setattr("kraken_compiler.texts.read._PIECE_CHARACTERS", 100)
    text = opened(with_tokenizer, tmp_path / "text")
    reader = iter(text)
    first = next(reader).tolist()
    assert abs(text.expected_tokens - 3000) < 300, "known before the end"
    assert [first, *(batch.tolist() for batch in reader)] == whole
    assert text.expected_tokens == 3000


def test_a_limit_ends_the_reading(with_tokenizer: Capture, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(words(3000, 10))
    text = opened(with_tokenizer, tmp_path / "text", 200)
    assert text.expected_tokens == 200
    assert [batch.shape for batch in text] == [(3, 64)]
    assert [batch.shape for batch in opened(with_tokenizer, tmp_path / "text", 20)] == [(1, 20)]
    with pytest.raises(UsageError, match="--text-tokens 1: at least 2"):
        opened(with_tokenizer, tmp_path / "text", 1)


def test_the_built_in_sample(with_tokenizer: Capture) -> None:
    text = opened(with_tokenizer)
    assert text.name == "the built-in sample"
    assert sum(batch.numel() for batch in text) > 300


def test_texts_that_cannot_be_read(with_tokenizer: Capture, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"--text: cannot read .*absent: No such file"):
        opened(with_tokenizer, tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputFileError, match="is not UTF-8 text"):
        list(opened(with_tokenizer, tmp_path / "bytes"))
    (tmp_path / "short").write_text("w5")
    with pytest.raises(UsageError, match="is too short"):
        list(opened(with_tokenizer, tmp_path / "short"))


@pytest.mark.parametrize(("positions", "rows"), [(1024, 400), (300, 300)])
def test_rows_are_as_long_as_asked_where_the_model_takes_them(positions: int, rows: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )
    captured = capture(LlamaForCausalLM(config).eval())
    assert longest_row(captured, 400) == rows
    assert longest_row(captured) == 256
