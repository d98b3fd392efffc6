"""Compiled lanes: they compute what eager ones do, and keep the compute that hides their reduces, or say why not."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from kraken_compiler.backends.torch_dist.check.check_emitted import emitted_windows, require_emitted_overlap
from kraken_compiler.backends.torch_dist.run.compile_lanes import CompiledGraph
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ranks.communicators import packed
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.weights.store import MemoryStore
from tests.test_families import lane_program, recognized
from tests.toy_lane_program import toy_program, toy_sources, write_toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CODE = """
def call(self, args):
        # Topologically Sorted Source Nodes: [linear], Original ATen: [aten.mm]
        extern_kernels.mm(reinterpret_tensor(buf0, (8, 24), (24, 1), 0), arg1_1, out=buf1)
        # Topologically Sorted Source Nodes: [linear, start], Original ATen: [kraken_rank.start]
        buf2 = torch.ops.kraken_rank.start.default(reinterpret_tensor(buf1, (2, 4, 24), (96, 24, 1), 0), 'any')
        buf3 = buf2
        del buf2
        # Topologically Sorted Source Nodes: [linear_1], Original ATen: [kraken_rank.linear]
        buf4 = torch.ops.kraken_rank.linear.default(buf0, 'linear 0', 32, bias=None)
        # Topologically Sorted Source Nodes: [add], Original ATen: [aten.add]
        buf5 = buf4; del buf4  # reuse
        cpp_fused_add_0(buf5, 8)
        # Topologically Sorted Source Nodes: [wait], Original ATen: [kraken_rank.wait]
        buf6 = torch.ops.kraken_rank.wait.default(buf3, 'any')
        # Topologically Sorted Source Nodes: [linear_2], Original ATen: [aten.mm]
        extern_kernels.addmm(arg2_1, buf6, arg3_1, alpha=1, beta=1, out=buf7)
        return (buf7, )
"""
EXPECTED = (Window(0, "start", "wait", ("linear_1",), (2,)),)


@pytest.fixture
def communicator() -> Iterator[NoCommunication]:
    made = NoCommunication(0, 2, "of a test")
    yield made
    made.close()


class AwaitAtOnce(CustomGraphPass):
    """What a compiler pass that is keen on freeing memory does."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.kraken_rank.wait.default):
            part, name, *after = node.args
            if after:
                node.args = (part, name, part)
            part.append(node)

    def uuid(self) -> None:
        return None  # not to be cached


def moved(code: str, call: str, before: str) -> str:
    """The code with one call, and the comment above it, moved before another one's comment."""
    blocks = re.split(r"(?=        # Topo)", code)
    block = next(block for block in blocks if call in block)
    blocks.remove(block)
    place = next(place for place, other in enumerate(blocks) if before in other)
    return "".join([*blocks[:place], block, *blocks[place:]])


def test_windows_are_read_from_generated_code() -> None:
    assert emitted_windows(CODE, EXPECTED) == EXPECTED
    assert require_emitted_overlap(CODE, EXPECTED) == EXPECTED


@pytest.mark.parametrize("call", ["kraken.expert_linear", "kraken.cached_attention", "aten._scaled_dot_product_flash"])
def test_products_of_experts_and_attentions_are_in_windows(call: str) -> None:
    code = CODE.replace("kraken_rank.linear.default(buf0, 'linear 0', 32, bias=None)", f"{call}.default(buf0)")
    assert call in code
    assert emitted_windows(code, EXPECTED) == EXPECTED


def test_a_wait_that_was_moved_up_is_named() -> None:
    with pytest.raises(VerificationError, match="reduce 0: its wait wait was moved up before linear_1"):
        require_emitted_overlap(moved(CODE, "kraken_rank.wait.default", "[linear_1]"), EXPECTED)


def test_a_start_that_was_moved_down_is_named() -> None:
    with pytest.raises(VerificationError, match="reduce 0: its start start was moved down behind linear_1"):
        require_emitted_overlap(moved(CODE, "kraken_rank.start.default", "[wait]"), EXPECTED)


def test_a_reduce_that_is_gone_is_an_error() -> None:
    with pytest.raises(VerificationError, match="starts 1 reduces and awaits 1; the graph has 2"):
        emitted_windows(CODE, [*EXPECTED, Window(1, "start_1", "wait_1", (), ())])


def test_one_process_compiled(communicator: NoCommunication) -> None:
    """Any batch and length with one compilation, but for those that are 1; and a setting that loses the overlap."""
    program, read = toy_program(2), MemoryStore(toy_sources()).read
    eager, compiled, lost = (RankProgram.from_program(program, read, communicator=communicator) for _ in range(3))
    compiled.compile()
    for number, shape in enumerate(((2, 5), (3, 7), (2, 2), (1, 4), (1, 9))):
        ids = torch.randint(0, 50, shape)
        with torch.inference_mode(number % 2 == 0):
            torch.testing.assert_close(compiled.run_flat([ids]), eager.run_flat([ids]), rtol=1e-5, atol=1e-5)
    assert isinstance(compiled.compiled, CompiledGraph)
    assert compiled.compiled.compilations == 2
    assert [len(window.gemms) for window in compiled.compiled.windows] == [2, 0, 2, 0]
    assert list(compiled(torch.randint(0, 50, (2, 3)))) == ["logits", "hidden"]

    lost.compile(post_grad_custom_post_pass=AwaitAtOnce())
    with pytest.raises(
        VerificationError, match=r"2 of 4 reduces lost their overlap when .* wait_default was moved up before linear_4"
    ):
        lost.run_flat([torch.randint(0, 50, (2, 5))])


@pytest.mark.parametrize("form", ["kraken", "ladder"])
def test_decoding_compiled(form: str, communicator: NoCommunication) -> None:
    """Prefill and every later token, with one compilation each; the caches are written in place."""
    program = lane_program("llama", 2, form)
    rank = RankProgram.from_program(program, recognized("llama").read, communicator=communicator)
    eager, compiled = rank.decoder(2, 12), rank.decoder(2, 12, compiled=True)
    ids, lengths = torch.randint(0, 50, (2, 5)).numpy(), np.array([5, 5])
    np.testing.assert_allclose(compiled.prefill(ids, lengths), eager.prefill(ids, lengths), rtol=1e-4, atol=1e-4)
    for token in range(6):
        tokens = np.array([token, 7])
        # Behind the first one a step that is longer than the one before is nothing to compile anew.
        with torch._dynamo.config.patch(error_on_recompile=token > 0):
            have = compiled.step(tokens)
        np.testing.assert_allclose(have, eager.step(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_layer_is_a_linear_layer(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(300, 256).to(dtype), torch.randn(300).to(dtype)
    if not packed.can_pack(weight):
        pytest.skip(f"this CPU multiplies no packed {dtype}")
    name = packed.packed_name(weight)
    assert name == packed.packed_name(weight)
    for shape in ((1, 1, 256), (2, 7, 256), (5, 256)):
        x = torch.randn(shape).to(dtype)
        for given in (None, bias):
            have = torch.ops.kraken_rank.linear(x, name, 300, given)
            torch.testing.assert_close(
                have,
                torch.nn.functional.linear(x, weight, given),
                rtol=1e-2,
                atol=1e-2 if dtype == torch.bfloat16 else 1e-4,
            )
    del weight
    gc.collect()
    with pytest.raises(KeyError):
        torch.ops.kraken_rank.linear(x, name, 300, None)


def test_ranks_compiled(tmp_path: Path) -> None:
    """Two real ranks, with messages and with their process group."""
    directory = write_toy(tmp_path / "two.kraken", 2)
    payload = {"artifact": str(directory), "ids": [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], "kinds": ["message", "group"]}
    for result in run_ranks("tests.communicator_functions:run_compiled", 2, payload, timeout=300):
        assert max(result["differences"].values()) < 1e-5
        assert result["windows"] == {"message": [2, 0, 2, 0], "group": [2, 0, 2, 0]}
