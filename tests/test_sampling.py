"""Sampling: what is left by the filters, how often it is drawn, and what the random numbers depend on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from kraken_compiler.errors import UsageError
from kraken_compiler.generate.sampling import Sampling, softmax, uniform


def likely(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """Tokens that may be drawn and their probabilities: a plain reference with Python numbers."""
    scores = {token: logit / temperature for token, logit in enumerate(row)}
    if top_k is not None:
        least = sorted(scores.values(), reverse=True)[: len(scores)][min(top_k, len(scores)) - 1]
        scores = {token: score for token, score in scores.items() if score >= least}
    best = max(scores.values())
    weights = {token: math.exp(score - best) for token, score in scores.items()}
    kept: dict[int, float] = {}
    mass = 0.0
    for token in sorted(weights, key=lambda token: -weights[token]):
        if top_p not in (None, 1.0) and mass >= top_p:
            break
        kept[token] = weights[token]
        mass += weights[token] / sum(weights.values())
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def logits(batch: int, vocabulary: int = 50, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=3, size=(batch, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.93, 1.0])
def test_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    given = logits(8)
    found = softmax(Sampling(temperature, top_k, top_p).filtered(given))
    for row, probabilities in zip(given.tolist(), found.tolist()):
        expected = likely(row, temperature, top_k, top_p)
        assert {token for token, value in enumerate(probabilities) if value > 0} == set(expected)
        assert all(abs(probabilities[token] - value) < 1e-5 for token, value in expected.items())


def test_filters_are_those_of_transformers() -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    given = logits(16, 300)
    scores = TemperatureLogitsWarper(0.7)(None, torch.from_numpy(given))
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(40)(None, scores)).softmax(dim=-1)
    np.testing.assert_allclose(softmax(Sampling(0.7, 40, 0.8).filtered(given)), expected.numpy(), rtol=1e-5)


def test_top_k_keeps_ties_and_top_p_the_token_that_crosses() -> None:
    tied = np.array([[5.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(Sampling(1.0, top_k=2).filtered(tied)).tolist() == [[True, True, True, False]]
    half = np.log([[0.5, 0.25, 0.125, 0.125]])
    assert np.isfinite(Sampling(1.0, top_p=0.4).filtered(half)).sum() == 1
    assert np.isfinite(Sampling(1.0, top_p=0.6).filtered(half)).sum() == 2
    assert np.isfinite(Sampling(1.0, top_p=0.8).filtered(half)).sum() == 3


def test_greedy_takes_the_most_likely() -> None:
    """And of several the first."""
    assert Sampling().choose(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), 0).tolist() == [1, 0]
    given = logits(5)
    assert np.array_equal(Sampling(seed=9).choose(given, 3), given.argmax(axis=-1))
    assert np.array_equal(Sampling(1.0, top_k=1).choose(given, 3), given.argmax(axis=-1))
    assert np.array_equal(Sampling(1.0, top_p=1e-9).choose(given, 3), given.argmax(axis=-1))


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform() -> None:
    given = logits(4)
    assert np.array_equal(Sampling(1e-30).choose(given, 0), given.argmax(axis=-1))
    assert softmax(Sampling(1e30).filtered(given)).std() < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_tokens_are_drawn_as_often_as_they_are_likely(dtype: type) -> None:
    row = np.array([1.0, 0.0, -1.0, 2.0, 0.5, float("-inf")], dtype)
    rows = 20_000
    drawn = Sampling(0.9, top_p=0.95, seed=1).choose(np.tile(row, (rows, 1)), 0)
    expected = likely(row.tolist()[:5], 0.9, None, 0.95)
    assert 2 not in expected
    counts = np.bincount(drawn, minlength=6).tolist()
    for token, count in enumerate(counts):
        share = expected.get(token, 0.0)
        # Five standard deviations; with a fixed seed this does not change from run to run.
        assert abs(count / rows - share) <= 5 * math.sqrt(share * (1 - share) / rows), counts


def test_random_numbers() -> None:
    numbers = [uniform(seed, row, step) for seed in range(10) for row in range(30) for step in range(30)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
    # Written down: a change of these would change every text that somebody has a seed for.
    assert [round(uniform(0, 0, step), 6) for step in range(3)] == [0.156743, 0.627, 0.727714]


def test_a_row_depends_on_seed_row_and_step_only() -> None:
    given = logits(6)
    sampling = Sampling(1.5, seed=7)
    together = sampling.choose(given, 4)
    for count in range(1, 6):
        assert np.array_equal(sampling.choose(given[:count], 4), together[:count])
    changed = given.copy()
    changed[1:] = logits(5, seed=1)
    assert sampling.choose(changed, 4)[0] == together[0]
    assert np.array_equal(sampling.choose(given, 4), together)

    same = np.tile(given[:1], (64, 1))
    texts = [Sampling(1.5, seed=seed).choose(same, step).tolist() for seed in range(2) for step in range(2)]
    assert len({tuple(text) for text in texts}) == 4
    assert len(set(texts[0])) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: give 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": 0}, "top-k 0: give at least 1"),
        ({"top_p": 0.0}, "top-p 0: give a number above 0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"top_p": float("nan")}, "top-p nan"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_values_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
