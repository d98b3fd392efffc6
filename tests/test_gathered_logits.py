"""Gathered logits are the same bytes on all ranks: who promises it, and where ranks need not agree on tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx

from kraken_compiler.backends.onnx_ort.format import DOMAIN, GATHER, LOGITS
from kraken_compiler.backends.onnx_ort.run import gathered_outputs as of_devices
from kraken_compiler.backends.torch_dist.run.gathered_outputs import is_gathered
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.generate.decoder import RecomputingDecoder, SeparateRows
from kraken_compiler.generate.engine import Engine
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks
from tests.generation_functions import NEW_TOKENS
from tests.test_families import lane_program, recognized
from tests.zoo.builder import token_batch
from tests.zoo.families import modern

aten = torch.ops.aten
ALL_GATHER = (torch.ops.kraken.all_gather.default, -1, 2)
CUT = (aten.slice.Tensor, -1, 0, 97)

GREEDY, DRAWN = Sampling(), Sampling(1.0, seed=3)
HERE, APART, UNKNOWN = Place(0, 2, 0, 2), Place(0, 2, 0, 1), Place(0, 2, 0, 2, knows_machine=False)


# which outputs are gathered ------------------------------------------------------------------------------------------


def graph_of(*calls: tuple[Any, ...]) -> fx.Graph:
    """A graph with two outputs: its input, and what the calls make of it, each of the result of the one before."""
    graph = fx.Graph()
    given = value = graph.placeholder("x")
    for target, *arguments in calls:
        names = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        value = graph.call_function(target, (value, *arguments), names)
    graph.output((given, value))
    return graph


@pytest.mark.parametrize(
    "calls",
    [
        [ALL_GATHER],
        [ALL_GATHER, CUT],
        [(aten.tanh.default,), ALL_GATHER, CUT, (aten.to.dtype, torch.float32)],
        [ALL_GATHER, (aten._to_copy.default, {"dtype": torch.float32})],
        [ALL_GATHER, (aten.view.default, [2, 5, 97]), (aten.transpose.int, 0, 1), (aten.clone.default,)],
    ],
)
def test_what_is_only_moved_stays_gathered(calls: list[tuple[Any, ...]]) -> None:
    graph = graph_of(*calls)
    assert is_gathered(graph, 1)
    assert not is_gathered(graph, 0)


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [(aten.tanh.default,), CUT],
        [ALL_GATHER, (aten.mul.Tensor, 0.5)],
        [ALL_GATHER, (aten.tanh.default,), CUT],
        [ALL_GATHER, (aten.to.dtype, torch.bfloat16)],
        [ALL_GATHER, (torch.ops.kraken.all_reduce_start.default,), (torch.ops.kraken.wait.default,)],
    ],
)
def test_what_is_computed_behind_a_gather_is_not(calls: list[tuple[Any, ...]]) -> None:
    assert not is_gathered(graph_of(*calls), 1)


@pytest.mark.parametrize(("target", "gathered"), [(aten.sym_size.int, True), (aten.item.default, False)])
def test_a_size_must_not_follow_from_numbers(target: Any, gathered: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(target, (x, 0) if gathered else (x,))
    whole = graph.call_function(ALL_GATHER[0], (x, *ALL_GATHER[1:]))
    graph.output((graph.call_function(aten.slice.Tensor, (whole, -1, 0, size)),))
    assert is_gathered(graph) == gathered


@pytest.mark.parametrize(
    ("nodes", "gathered"),
    [
        ([GATHER], True),
        ([GATHER, "Slice", "Cast"], True),
        ([GATHER, "Identity"], True),
        ([GATHER, "Tanh"], False),
        (["Tanh", "Slice"], False),
        ([], False),
    ],
)
def test_outputs_of_devices(nodes: list[str], gathered: bool) -> None:
    inputs = {"Slice": ["starts", "ends"]}
    attributes: dict[str, dict[str, Any]] = {"Cast": {"to": TensorProto.FLOAT}, GATHER: {"axis": -1, "degree": 2}}
    made = []
    names = [*(f"value_{number}" for number in range(len(nodes))), LOGITS]
    for number, kind in enumerate(nodes):
        made.append(
            helper.make_node(
                kind,
                [names[number], *inputs.get(kind, [])],
                [names[number + 1]],
                domain=DOMAIN if kind == GATHER else "",
                **attributes.get(kind, {}),
            )
        )
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [0]) for name in inputs["Slice"]]
    graph = helper.make_graph(made, "device", [], [onnx.ValueInfoProto(name=LOGITS)], initializer=constants)
    assert of_devices.is_gathered(graph, LOGITS) == gathered
    assert not of_devices.is_gathered(graph, names[0] if nodes else "none")


class OneProcess(NoCommunication):
    """As good as one that communicates, to whoever asks what it promises."""

    gathers = True


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gathered"), [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere", False)])
def test_what_decoders_promise(name: str, gathered: bool) -> None:
    """A softcap or a scale behind the gather is computed by every rank for itself."""
    program = lane_program(name, 2, "standard", overlap="tokens")

    def rank(communicator: Communicator) -> RankProgram:
        return RankProgram.from_program(program, recognized(name).read, communicator=communicator)

    some, silent = rank(OneProcess(0, 2, "one")), rank(NoCommunication(0, 2, "silent"))
    assert some.gathers(program.call.logits) == some.decoder(1, 9).identical_on_all_ranks == gathered
    assert not some.decoder(1, 9, one_machine=True).identical_on_all_ranks or gathered
    some.communicator.identical_on_all_ranks = True
    assert some.decoder(1, 9, one_machine=True).identical_on_all_ranks
    assert some.decoder(1, 9).identical_on_all_ranks == gathered
    assert not silent.gathers(program.call.logits)
    assert not silent.decoder(1, 9, one_machine=True).identical_on_all_ranks
    some.communicator.close()
    silent.communicator.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gathered"), [("llama", True), ("cohere", False)])
def test_what_programs_promise_that_run_halves_of_rows(name: str, gathered: bool) -> None:
    program = lane_program(name, 2, "standard", overlap="rows")
    assert program.rows is not None
    communicator = OneProcess(0, 2, "one")
    rank = RankProgram.from_program(program, recognized(name).read, communicator=communicator)
    assert rank.can_cut_rows
    assert rank.gathers(program.call.logits) == gathered
    assert [is_gathered(program.rows.program.graph, half) for half in range(2)] == [gathered] * 2
    communicator.close()


def test_decoders_without_a_cache_promise_what_their_function_does() -> None:
    def decoder(**promise: bool) -> RecomputingDecoder:
        return RecomputingDecoder(lambda ids: ids, 1, 9, **promise)

    gathered = decoder(identical_on_all_ranks=True)
    assert gathered.identical_on_all_ranks
    assert not decoder().identical_on_all_ranks
    assert SeparateRows([gathered, gathered]).identical_on_all_ranks
    assert not SeparateRows([gathered, decoder()]).identical_on_all_ranks


# when ranks agree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "identical", "sampling", "agrees"),
    [
        (HERE, True, GREEDY, False),
        (HERE, True, DRAWN, False),
        (HERE, False, GREEDY, True),
        (APART, True, GREEDY, False),
        (APART, True, DRAWN, True),
        (APART, False, GREEDY, True),
        (UNKNOWN, True, GREEDY, False),
        (UNKNOWN, True, DRAWN, True),
        (UNKNOWN, False, GREEDY, True),
        (Place.alone(), False, DRAWN, False),
    ],
)
def test_ranks_agree_where_their_choices_may_differ(
    place: Place, identical: bool, sampling: Sampling, agrees: bool
) -> None:
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(inputs=()))
    exchange: Any = object() if place.degree > 1 else None
    engine = Engine(artifact, SimpleNamespace(), Ranks(place, StatusWriter(0, None), exchange))  # type: ignore[arg-type]
    decoder: Any = SimpleNamespace(identical_on_all_ranks=identical)
    assert (engine._agreement(decoder, sampling) is not None) == agrees


@pytest.mark.parametrize(("local_degree", "one_machine"), [("2", True), ("1", False), (None, False)])
def test_ranks_are_on_one_machine_if_that_is_said(
    local_degree: str | None, one_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", local_degree)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert Place.from_environment().one_machine == one_machine


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("vocabulary", "gathered"), [(97, True), (24, False)])
def test_ranks_apart_whose_machines_compute_otherwise(vocabulary: int, gathered: bool, tmp_path: Path) -> None:
    """The head of a small vocabulary is whole on every rank, so there another machine's logits are other ones."""
    model = modern("llama", "llama", vocab=vocabulary, kv_heads=2)()
    inputs = {"input_ids": token_batch(model, 2, 16)}
    options = {"degree": 2, "form": "standard", "backends": ["torch", "onnx"], "verify": False}
    compile_model(model, tmp_path / "made", example_inputs=inputs, **options)
    first, second = run_ranks("tests.generation_functions:ranks_apart", 2, {"artifact": str(tmp_path / "made")})
    for backend in ("torch", "onnx"):
        one, other = first[backend], second[backend]
        assert one["promise"] == other["promise"] == gathered
        assert one["tokens"] == other["tokens"]
        assert one["agreements"] == other["agreements"] == [0 if gathered else NEW_TOKENS, NEW_TOKENS]
    assert (first["torch"]["logits"] == second["torch"]["logits"]) == gathered
    assert first["onnx"]["logits"] == second["onnx"]["logits"]
