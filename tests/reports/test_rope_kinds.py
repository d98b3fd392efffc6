"""Every kind of rotary positions is exact on both sides of its threshold, or refused in one line."""

from __future__ import annotations

import pytest
import torch
import transformers

from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.lanes.module import LaneModule
from tests.reports.cached_decoding import check_decode, lowered
from tests.reports.small_models import TOLERANCE, D, relative_error

pytestmark = pytest.mark.slow

NAMED = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
BASE = {"rope_theta": 10000.0}
LONG = {
    **BASE,
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [2.0 + 0.3 * place for place in range(8)],
    "factor": 4.0,
}
KINDS = {
    "linear": {**BASE, "rope_type": "linear", "factor": 2.0},
    "llama3": {
        **BASE,
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "proportional": {**BASE, "rope_type": "proportional", "partial_rotary_factor": 0.5},
}


def llama(kind: dict[str, object], family: str = "Llama") -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=dict(kind),
        original_max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_with_one_set_of_frequencies(kind: str) -> None:
    model = llama(KINDS[kind])
    program, read = lowered(model, example=NAMED)
    assert program.cached is not None, program.no_cache
    check_decode(model, program, read, prompt=29)
    assert relative_error(LaneModule.from_program(program, read), model, 2, 40) < TOLERANCE


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_long_and_short_factors(family: str) -> None:
    """A cache would keep keys that were rotated by the short factors when the long ones begin to count."""
    model = llama(LONG, family)
    program, read = lowered(llama(LONG, family), example=NAMED)
    assert program.cached is None
    assert "depends on the total length: with 33 tokens it is other than with 32" in program.no_cache
    assert "rotary_emb" in program.no_cache
    lanes = LaneModule.from_program(program, read)
    for length in (5, 31, 32, 33, 34, 90):
        assert relative_error(lanes, model, 2, length) < TOLERANCE, length


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_dynamic_frequencies_are_refused_in_one_line(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="rotary positions are of the kind 'dynamic'") as raised:
        capture(llama({**BASE, "rope_type": "dynamic", "factor": 2.0}, family), example_inputs=NAMED)
    assert "\n" not in str(raised.value)
    assert "model.rotary_emb" in str(raised.value)
    assert "def forward" not in capfd.readouterr().err


class Branching(torch.nn.Module):
    """A branch on numbers that nothing but its line names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(97, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if x.sum() > 0:
            x = x * 2
        return x


def test_other_branches_on_numbers_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"`if x.sum\(\) > 0:` \(test_rope_kinds.py, line \d+\)") as raised:
        capture(Branching(), example_inputs=(torch.zeros(2, 16, dtype=torch.int64),))
    assert "\n" not in str(raised.value)
    assert "def forward" not in capfd.readouterr().err
