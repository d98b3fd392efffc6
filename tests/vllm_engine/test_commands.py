"""The commands that start vLLM by themselves: a run of some prompts, and a verification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli_command import run_process
from tests.vllm_engine.conftest import greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [[5, 6, 7, 8, 9], [11], [100, 50, 25]]


def test_a_run_prints_what_other_backends_print(compiled: Callable[..., Path]) -> None:
    artifact = compiled("llama", 2, "kraken")
    want = greedy(artifact, PROMPTS, 8)
    ids = [part for prompt in PROMPTS for part in ("--input-ids", ",".join(map(str, prompt)))]
    done = run_process("run", artifact, *ids, "--max-new-tokens", "8", "--json", "--backend", "vllm")
    answer = json.loads(done.stdout)
    assert [result["ids"] for result in answer["results"]] == want
    assert {result["finish_reason"] for result in answer["results"]} == {"length"}
    assert answer["timings"]["time_to_first_token_s"] > 0


def test_a_verification_compares_what_vllm_computes(compiled: Callable[..., Path]) -> None:
    artifact = compiled("gemma3", 2, "kraken")
    answer = json.loads(run_process("verify", artifact, "--backend", "vllm", "--json").stdout)
    by_vllm = [
        one for one in answer["program"]["comparisons"] if "by vllm" in one["what"] or "that vllm" in one["what"]
    ]
    assert len(by_vllm) == 2
    assert all(one["passed"] and one["max_rel_error"] < 1e-4 for one in by_vllm)
    assert not [reason for reason in answer["skipped"] if "vllm" in reason]
