"""What only a GPU can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

import kraken_compiler
from tests.zoo import SUPPORTED, logits_of, token_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
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


@pytest.mark.parametrize("form", ["standard", "kraken"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert"])
def test_a_model_on_a_gpu_is_compiled_as_one_on_the_cpu(name, form):
    model = SUPPORTED[name]()
    ids = token_batch(model, 2, 9)
    want = logits_of(kraken_compiler.transform(model, 2, form), ids)
    lanes = kraken_compiler.transform(model.to("cuda"), 2, form)
    assert {weight.device.type for weight in lanes.parameters()} == {"cuda"}
    torch.testing.assert_close(logits_of(lanes, ids.to("cuda")).cpu(), want, rtol=1e-3, atol=1e-3)


def test_a_model_on_a_gpu_becomes_an_artifact(tmp_path):
    model = SUPPORTED["llama"]().to("cuda")
    ids = token_batch(model, 2, 9)
    kraken_compiler.compile(model, tmp_path / "a.kraken", degree=2, form="standard", example_inputs={"input_ids": ids})
    lanes = kraken_compiler.load_lanes(tmp_path / "a.kraken")
    have = logits_of(lanes, ids)
    torch.testing.assert_close(have, logits_of(model, ids.to("cuda")).cpu(), rtol=1e-3, atol=1e-3)


def test_ranks_use_nccl(tmp_path):
    """As many lanes as there are devices, one process each."""
    devices = torch.cuda.device_count()
    if devices < 2:
        pytest.skip("needs two CUDA devices")
    from kraken_compiler.ranks.run_ranks import run_ranks

    backends = run_ranks("tests.runtime_functions:backend_name", 2)
    assert backends == ["nccl", "nccl"]


def test_a_compiled_rank_runs_as_an_eager_one():
    """One lane of two, nothing sent: what torch.compile and the schedule check do on a GPU."""
    from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
    from kraken_compiler.ranks.communicators.group import GroupCommunicator
    from kraken_compiler.weights.store import MemoryStore
    from tests.toy_lane_program import toy_program, toy_sources

    torch.distributed.init_process_group("nccl", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        communicator = GroupCommunicator(torch.distributed.group.WORLD)
        read = MemoryStore(toy_sources()).read
        eager, compiled = (
            RankProgram.from_program(toy_program(1), read, communicator=communicator).to("cuda") for _ in range(2)
        )
        compiled.compile()
        for shape in ((2, 5), (3, 7), (2, 1), (1, 1), (1, 1), (1, 1)):
            ids = torch.randint(0, 50, shape, device="cuda")
            have, want = compiled.run_flat([ids]), eager.run_flat([ids])
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)
        assert [len(window.gemms) for window in compiled.compiled.windows] == [2, 0, 2, 0]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_runs_on_a_gpu_as_it_does_on_the_cpu(name, compiled):
    """Rows of one length, which see their past without a mask, and rows of several; compiled for any length at once."""
    import numpy as np

    from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
    from kraken_compiler.ranks.communicators.group import GroupCommunicator
    from kraken_compiler.ranks.communicators.none import NoCommunication
    from tests.test_families import lane_program, recognized

    program, read = lane_program(name, 1, "standard"), recognized(name).read
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        alone, group = NoCommunication(0, 1), GroupCommunicator(torch.distributed.group.WORLD)
        cpu, gpu = (RankProgram.from_program(program, read, communicator=one) for one in (alone, group))
        decoders = cpu.decoder(2, 20), gpu.to("cuda").decoder(2, 20, compiled=compiled)
        ids = token_batch(SUPPORTED[name](), 2, 6).numpy()
        for lengths in ([6, 6], [6, 3]):
            want, have = ([one.prefill(ids, np.array(lengths))] for one in decoders)
            for step in range(8):
                want.append(decoders[0].step(ids[:, step % 6]))
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    have.append(decoders[1].step(ids[:, step % 6]))
            np.testing.assert_allclose(np.stack(have), np.stack(want), rtol=1e-3, atol=1e-3)
            for one in decoders:
                one.reset()
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_ranks_use_nccl(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from kraken_compiler.ranks.run_ranks import run_ranks
    from tests.toy_lane_program import write_toy

    payload = {
        "artifact": str(write_toy(tmp_path / "two.kraken", 2)),
        "ids": [[1, 2, 3], [4, 5, 6]],
        "kinds": ["group"],
    }
    for result in run_ranks("tests.communicator_functions:run_compiled", 2, payload, timeout=300):
        assert max(result["differences"].values()) < 1e-3
        assert result["windows"] == {"group": [2, 0, 2, 0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("tokens", [1, 6])
def test_tokens_behind_a_past_see_it_without_a_mask(dtype, kv_heads, tokens):
    from tests.attention_cases import behind_a_past

    have, want = behind_a_past(kv_heads, tokens=tokens, dtype=dtype, device="cuda")
    torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_late_sum_on_a_side_stream_is_waited_for(is_compiled, monkeypatch):
    """In a CUDA graph, too: neither what reads the sum comes early, nor is the part's memory used again."""
    from kraken_compiler.backends.lane_graph.run_graph import KEEP_THE_ORDER
    from kraken_compiler.backends.vllm.run import side_stream
    from tests.test_vllm_side_stream import layer, operands

    cycles = [0]

    def late(part):
        torch.cuda._sleep(cycles[0])
        return part * 2

    monkeypatch.setattr(side_stream, "reduce", late)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    x, weights = operands("cuda")
    run = torch.compile(layer, fullgraph=True, options=KEEP_THE_ORDER) if is_compiled else layer
    want = run(x, weights)
    cycles[0] = 10_000_000
    torch.testing.assert_close(run(x, weights), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = run(x, weights)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(have, want)
