"""What only a GPU can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

import kraken_compiler
from tests.zoo import SUPPORTED, logits_of, token_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "plain_alibi"])
def test_all_lanes_run_on_a_gpu_as_they_do_on_the_cpu(name):
    model = SUPPORTED[name]()
    ids = token_batch(model, 2, 9)
    lanes = kraken_compiler.transform(model, 2, example_inputs={"input_ids": token_batch(model, 2, 16)})
    want = logits_of(lanes, ids)
    have = logits_of(lanes.to("cuda"), ids.to("cuda")).cpu()
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)


def test_ranks_use_nccl(tmp_path):
    """As many lanes as there are devices, one process each."""
    devices = torch.cuda.device_count()
    if devices < 2:
        pytest.skip("needs two CUDA devices")
    from kraken_compiler.runtime.execute import run_ranks

    backends = run_ranks("tests.runtime_functions:backend_name", 2)
    assert backends == ["nccl", "nccl"]
