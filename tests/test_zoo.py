"""The zoo itself: its models run, are the same every time, and every parameter of theirs matters."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from tests.zoo import REJECTED, SUPPORTED, logits_of, token_batch


@pytest.mark.parametrize("name", SUPPORTED)
def test_model_runs_and_is_causal(name: str) -> None:
    build = SUPPORTED[name]
    model = build()
    ids = token_batch(model, batch=2, seq=9, seed=1)
    logits = logits_of(model, ids)
    assert logits.shape == (2, 9, build.vocab)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits_of(build(), ids)), "the same builder must give the same weights"
    if build.no_cache:
        return
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % build.vocab
    torch.testing.assert_close(logits_of(model, changed)[:, :-1], logits[:, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_parameter_matters(name: str) -> None:
    """Setting any one parameter to a neutral value must move the logits, or the compiler could lose it unseen."""
    model = SUPPORTED[name]()
    ids = token_batch(model, batch=2, seq=9, seed=1)
    logits = logits_of(model, ids)
    for parameter, value in model.named_parameters():
        # A key's bias adds the same score at every key position, so softmax does not see it (without rotation).
        neutral = torch.ones_like(value) if value.dim() == 1 and "bias" not in parameter else torch.zeros_like(value)
        with torch.no_grad():
            output = functional_call(model, {parameter: neutral}, (ids,))
        moved = output if isinstance(output, torch.Tensor) else output.logits
        change = (moved - logits).norm() / logits.norm()
        if not _is_key_bias(parameter):
            assert change > 1e-3, f"{parameter} changes the logits by only {change:.1e}"


def _is_key_bias(parameter: str) -> bool:
    return parameter.endswith(("k.bias", "k_proj.bias", "key.bias", "k_lin.bias"))


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_model_is_a_working_model(name: str) -> None:
    model = REJECTED[name]()
    with torch.no_grad():
        output = model(**REJECTED[name].example_inputs())
    logits = output if isinstance(output, torch.Tensor) else output.logits
    assert torch.isfinite(logits).all()
