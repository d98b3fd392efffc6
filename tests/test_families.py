"""Every family the compiler promises, all lanes in one process: exact where the form is, and refused where it must be.

Whatever goes through all families does so with `EVERY_FAMILY`: pytest then runs one family's tests of all files one
after the other, and the model is captured once. All but a few are marked `slow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.ir.program import LaneProgram, Program, Recognized, Split
from kraken_compiler.ir.shards import Assignment
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower, lower_split
from kraken_compiler.passes.stages import recognize, split
from kraken_compiler.quality.assignment.on_model import LaneChoice
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.overlap import require_overlap
from kraken_compiler.verify.report import is_exact
from tests.lane_assignments import random_lanes
from tests.quick_tests import mostly_slow
from tests.table_notes import note
from tests.zoo import REJECTED, SUPPORTED, logits_of, random_tokens, token_batch

DEGREES = (2, 4)
SIZES = ((1, 7), (3, 13))
"""Batch and sequence; models are captured with 2 x 16."""

EVERY_FAMILY = pytest.mark.parametrize("name", mostly_slow(SUPPORTED, ("llama", "plain_post_norm")), scope="session")

CHANGED = 1e-3
"""A form that changes the function of a zoo model moves its logits by more than this; rounding is far below."""

REASONS = {
    # A norm of the sum of routed and shared experts.
    "afmoe": ("mixture of experts", "model.layers.1.post_mlp_layernorm"),
    "soft_moe": ("mixture of experts", "blocks.0"),
    # Its decoder reads the encoder's tokens, shifted, so no input tells the two streams apart.
    "bart_one_input": ("inputs of their own", "model.encoder.layers.0"),
    "recurrent_gemma": ("it mixes the columns that would be divided", "model.layers.0.temporal_block.rg_lru"),
    "jetmoe": ("no residual stream was found", "model.layers.0.self_attention"),
    "diffllama": ("a branch holds more than one attention", "model.layers.0.self_attn"),
    "mamba": ("no branch of the residual stream holds an attention", "backbone.layers.0"),
    "no_attention": ("no branch of the residual stream holds an attention", "blocks.0"),
    # The concatenation is in the model's own forward, which has no path.
    "unet_skip": ("not only added to", ""),
}


@dataclass(frozen=True)
class Recognizable:
    """A zoo model and its program after recognition; neither may be changed."""

    model: nn.Module
    captured: Program
    program: Recognized
    read: SourceReader


# Not all of them: hundreds of kept graphs would make every garbage collection slow.
@lru_cache(maxsize=6)
def recognized(name: str) -> Recognizable:
    model = SUPPORTED[name]()
    captured = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    return Recognizable(model, captured.program, recognize(captured.program), captured.store.read)


@lru_cache(maxsize=2)
def split_model(name: str, degree: int) -> Split:
    """A split program, which is the same for every form; it may not be changed."""
    return split(recognized(name).program, degree)


def lane_program(name: str, degree: int, form: str, *, cache: bool = True, overlap: str = "none") -> LaneProgram:
    """What `lower` makes, without recognising and splitting the model for every form again; with a KV cache or not."""
    return lower_split(split_model(name, degree), form, cached=cache, overlap=overlap)


def relative_error(have: Tensor, want: Tensor) -> float:
    assert torch.isfinite(want).all()
    return errors(have, want)[1]


@EVERY_FAMILY
def test_forms_equal_the_source_or_change_it_as_they_say(name: str) -> None:
    model = recognized(name).model
    batches = [token_batch(model, *size, seed) for seed, size in enumerate(SIZES)]
    wanted = [logits_of(model, ids) for ids in batches]
    wrong, standard = [], []
    for degree in DEGREES:
        for form in FORMS:
            program = lane_program(name, degree, form, cache=False)
            lanes = LaneModule.from_program(program, recognized(name).read)
            found = [relative_error(logits_of(lanes, ids), want) for ids, want in zip(batches, wanted)]
            right = all(error < 1e-4 for error in found) if is_exact(program) else min(found) > CHANGED
            assert is_exact(program) or form != "standard"
            if not right:
                wrong.append(f"degree {degree}, {form}: relative errors {found}, exact: {is_exact(program)}")
            require_overlap(program.windows)
            standard += found * (form == "standard")
    note("lanes", name, error=max(standard), forms=list(FORMS))
    assert not wrong, "\n".join(wrong)


@EVERY_FAMILY
def test_any_lanes_are_the_source(name: str) -> None:
    """Whichever lanes have the heads and columns: those of an odd degree at random, those that affinity chooses."""
    source = recognized(name)
    ids = token_batch(source.model, 3, 13)
    wanted = logits_of(source.model, ids)
    assigned = []

    def shuffled(planned: Split) -> Assignment:
        assigned.append(random_lanes(planned))
        return assigned[-1]

    def chosen(planned: Split) -> Assignment:
        choice = LaneChoice(
            capture(source.model, example_inputs={"input_ids": token_batch(source.model, 2, 16)}), "kraken"
        )
        return choice(planned)

    for degree, assign in ((3, shuffled), (2, shuffled), (2, chosen)):
        program = lower_split(split(source.program, degree, assign=assign), "standard", cached=False)
        found = logits_of(LaneModule.from_program(program, source.read), ids)
        assert relative_error(found, wanted) < 1e-4, f"degree {degree}"
    assert any(assigned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degree", "form"),
    [("falcon", 2, "kraken"), ("gpt2", 4, "ladder"), ("plain_fused_llama", 4, "parallel"), ("qwen3", 2, "standard")],
)
def test_lower_makes_the_same_program(name: str, degree: int, form: str) -> None:
    """The shortcut that the tests above take shows in nothing that comes out but the nodes' numbers."""
    program, _ = lower(recognized(name).captured, degree, form)
    shortcut = lane_program(name, degree, form)
    orders = [
        [node.name if node.op == "placeholder" else node.target for node in made.graph.nodes]
        for made in (program, shortcut)
    ]
    assert orders[0] == orders[1]
    assert program.weights == shortcut.weights
    assert program.plan == shortcut.plan
    ids = token_batch(recognized(name).model, 3, 13)
    outputs = [logits_of(LaneModule.from_program(made, recognized(name).read), ids) for made in (program, shortcut)]
    assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["falcon", "gpt2", "plain_fused_llama", "plain_parallel", "plain_post_norm", "plain_parallel_sandwich", "gemma3"],
)
def test_one_lane_is_the_source_model(name: str) -> None:
    """With one lane there are no peers, so a form whose own lag is 1 reads what the source model reads."""
    model = recognized(name).model
    ids = token_batch(model, 3, 13)
    for form in ("standard", "kraken", "sync-drop"):
        lanes = LaneModule.from_program(lane_program(name, 1, form, cache=False), recognized(name).read)
        assert is_exact(lanes.program)
        assert relative_error(logits_of(lanes, ids), logits_of(model, ids)) < 1e-5


@pytest.mark.parametrize("name", mostly_slow(("falcon", "llama", "plain_alibi"), ("llama",)))
def test_degree_may_exceed_the_key_value_heads(name: str) -> None:
    degree = max(SUPPORTED[name].degrees)
    assert degree > SUPPORTED[name].kv_heads
    model = recognized(name).model
    lanes = LaneModule.from_program(lane_program(name, degree, "standard", cache=False), recognized(name).read)
    ids = token_batch(model, 3, 13)
    assert relative_error(logits_of(lanes, ids), logits_of(model, ids)) < 1e-4


def test_a_wrong_degree_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError) as caught:
        lower(recognized("llama").captured, 9)
    message = str(caught.value)
    assert "the model cannot be divided among 9 lanes (8 heads" in message
    assert message.endswith("valid degrees: 1 to 8, without padding: 1, 2, 4, 8")
    assert "\n" not in message


@pytest.mark.parametrize("name", mostly_slow(REJECTED, ("no_attention", "unet_skip")))
def test_what_is_not_supported_is_refused(name: str) -> None:
    rejected = REJECTED[name]
    reason, path = REASONS[name]
    assert rejected.reason.lower() in reason.lower()
    with pytest.raises(UnsupportedModelError) as caught:
        lower(capture(rejected(), example_inputs=rejected.example_inputs()).program, 2, "standard")
    first, message = caught.value.rejections[0], str(caught.value)
    assert reason in message
    assert first.path.startswith(path)
    assert f"module '{first.path}'" in message if path else "unsupported: the model" in message
    assert first.nodes
    assert f"(node {first.nodes[0]}" in message
    assert first.hint
    note("rejected", name, reason=first.reason)


def test_every_refused_model_has_its_reason_here() -> None:
    assert REASONS.keys() == REJECTED.keys()


def test_tokens_fit_every_model() -> None:
    """The tests on ranks give all models the same tokens."""
    smallest = min(build.vocab for build in SUPPORTED.values())
    assert int(random_tokens(smallest, 3, 13).max()) < smallest
