"""Predicted times: what a machine file may say, the shapes of a graph, and what lies on the two streams."""

from __future__ import annotations

import operator
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.latency.curve import between
from kraken_compiler.latency.machine import Machine, load_machine, machine_names
from kraken_compiler.latency.node_costs import node_costs
from kraken_compiler.latency.predict import Load, Predictor, RunGraphs
from kraken_compiler.latency.sized import Sized, Sizer
from kraken_compiler.latency.table import HALVES, SILENT, compared_lines, latency_table
from kraken_compiler.passes.lower import lower_split, split_source
from tests.zoo import SUPPORTED

TOML = """
name = "two of them"
[memory]
source = "made up"
bytes = [1e3]
rate = [1e10]
[launch]
source = "made up"
eager = 1e-5
compiled = 1e-6
step = 1e-4
[[products]]
source = "made up"
dtypes = ["float32"]
rows = [1, 100]
weights = [1e3, 1e5]
rate = [[1e9, 2e9], [1e10, 2e10]]
[[attention]]
source = "made up"
dtypes = ["float32"]
queries = [1]
rate = [1e10]
[[all_reduce]]
source = "made up"
ranks = 2
bytes = [100, 1e6]
seconds = [1e-4, 1e-3]
busy = [0, 1e-4]
"""


def machine(folder: Path, text: str = TOML) -> Machine:
    file = folder / "machine.toml"
    file.write_text(text)
    return load_machine(str(file))


@pytest.fixture(scope="module")
def lanes() -> dict[str, LaneProgram]:
    split = split_source(capture(SUPPORTED["llama"]()).program, 2)
    return {form: lower_split(split, form, overlap="tokens") for form in ("standard", "kraken", "delayed")}


@pytest.fixture(scope="module")
def programs(lanes: dict[str, LaneProgram]) -> dict[str, RunGraphs]:
    return {form: RunGraphs.of(program) for form, program in lanes.items()}


def test_values_between_points_lie_on_lines_in_logarithmic_scales() -> None:
    assert [between([1, 100], [1, 10], place) for place in (0.5, 1, 10, 100, 1e4)] == pytest.approx(
        [1, 1, 10**0.5, 10, 10]
    )


@pytest.mark.parametrize("name", machine_names())
def test_machines_that_are_there(name: str) -> None:
    found = load_machine(name)
    assert found.product_seconds(1, 2048, 8192, 1024, "bfloat16", 2) > 0
    assert {table.ranks for table in found.all_reduce} == ({2} if "hosts" in name else {2, 4, 8})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "two of them"', "", "name: Field required"),
        ('name = "two of them"', "name = ", "is no TOML"),
        ("bytes = [100, 1e6]", "bytes = [1e6, 100]", "must ascend"),
        ("seconds = [1e-4, 1e-3]", "seconds = [1e-4]", "seconds has 1 entries, bytes 2"),
        ("busy = [0, 1e-4]", "busy = [0, 1]", "busy is longer than seconds"),
        ("rate = [[1e9, 2e9], [1e10, 2e10]]", "rate = [[1e9], [1e10]]", "each row of rate has 1 entries, weights 2"),
        ("eager = 1e-5", "eagre = 1e-5", "launch.eager: Field required"),
        ("weights = [1e3, 1e5]", "", "by weights or by columns"),
        ("weights = [1e3, 1e5]", "weights = [1e3, 1e5]\ncolumns = [1, 2]", "by weights or by columns"),
        ("queries = [1]", "queries = [0]", "greater than 0"),
        ('source = "made up"\nranks', "ranks", "source: Field required"),
        ("eager = 1e-5", "eager = inf", "launch.eager: Input should be a finite number"),
        ("eager = 1e-5", "eager = " + 5000 * "1", "is no TOML"),
        ("eager = 1e-5", "eager = " + 5000 * "[", "is no TOML"),
    ],
)
def test_what_is_no_machine_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    with pytest.raises(InputFileError, match=message):
        machine(tmp_path, TOML.replace(old, new))


def test_what_a_machine_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no machine 'h1000'.*h100-sxm"):
        load_machine("h1000")
    found = machine(tmp_path)
    with pytest.raises(UsageError, match="has no all-reduce among 4 ranks; it has them for: 2"):
        found.reduces(4)
    with pytest.raises(UsageError, match="no figures for products in quarter; it has: float32"):
        found.product_seconds(1, 1, 1, 1, "quarter", 2)


def test_an_element_type_without_figures_takes_those_of_the_nearest(
    tmp_path: Path, programs: dict[str, RunGraphs]
) -> None:
    """A router in float32 must not fail the plan of a model in bfloat16."""
    in_half = machine(tmp_path, TOML.replace("float32", "bfloat16"))
    exact = in_half.product_seconds(1, 100, 100, 1000, "bfloat16", 1)
    assert in_half.product_seconds(1, 100, 100, 1000, "float32", 1) == pytest.approx(2 * exact)
    assert in_half.product_seconds(1, 100, 100, 1000, "float16", 1) == exact
    attention = in_half.attention_seconds(1e9, 16, 0, "bfloat16")
    assert in_half.attention_seconds(1e9, 16, 0, "float64") == pytest.approx(4 * attention)
    # Narrower numbers are at least as fast.
    assert machine(tmp_path).product_seconds(1, 100, 100, 1000, "bfloat16", 1) == exact
    assert (in_half.note_on_products("bfloat16"), in_half.note_on_attention("bfloat16")) == ("", "")
    lines = latency_table(programs, Predictor(in_half), prompts=(16,), batches=(1,)).lines()
    assert lines[-2:] == [
        f"{what} in float32 are estimated from figures for bfloat16, at 0.5 times their speed: the machine's file has "
        "none of their own"
        for what in ("products", "attention")
    ]


@pytest.mark.parametrize("name", machine_names())
def test_machines_that_are_there_have_figures_for_float32(name: str) -> None:
    found = load_machine(name)
    assert (found.note_on_products("float32"), found.note_on_attention("float32")) == ("", "")
    half, full = (found.product_seconds(1, 2048, 4096, 4096, dtype, 2) for dtype in ("bfloat16", "float32"))
    assert "hosts" in name or full > 2 * half, "by default torch multiplies it without tensor cores"


def test_products_take_what_is_longer_of_computing_and_moving(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert found.product_seconds(1, 100, 100, 1000, "float32", 4) == pytest.approx(2 * 100 * 1e5 / 2e10)
    one_row = 4 * (1000 + 1e6 + 1000) / 1e10
    assert found.product_seconds(1, 1, 1000, 1000, "float32", 4) == pytest.approx(max(one_row, 2e6 / 2e9))
    whole, busy = found.reduces(2).times(2e6)
    assert (whole, busy) == pytest.approx((2e-3, 2e-4))


def test_products_may_be_known_by_their_columns(tmp_path: Path) -> None:
    by_columns = machine(tmp_path, TOML.replace("weights = [1e3, 1e5]", "columns = [10, 1000]"))
    assert by_columns.products[0].at(1, 7777, 10) == 1e9
    assert by_columns.products[0].at(100, 1, 1000) == 2e10


def test_compiled_programs_may_multiply_otherwise(tmp_path: Path) -> None:
    (of_both,) = re.findall(r"\[\[products\]\].*?(?=\[\[attention)", TOML, re.DOTALL)
    faster = of_both.replace("2e9", "4e9").replace("2e10", "4e10")
    apart = f"{of_both}compiled = false\n{faster}compiled = true\n"
    found = machine(tmp_path, TOML.replace(of_both, apart))
    seconds = [found.product_seconds(1, 100, 100, 1000, "float32", 4, compiled=compiled) for compiled in (False, True)]
    assert seconds == pytest.approx([2e7 / 2e10, 2e7 / 4e10])
    without = machine(tmp_path, TOML.replace(of_both, f"{of_both}compiled = true\n"))
    with pytest.raises(UsageError, match="no figures for products in float32"):
        without.product_seconds(1, 1, 1, 1, "float32", 4, compiled=False)


def test_a_host_that_runs_ahead_costs_only_what_the_device_waits_for(
    tmp_path: Path, programs: dict[str, RunGraphs]
) -> None:
    """The device is never faster than the host begins kernels, and launches hide behind kernels that are longer."""
    load = Load(64, 1, 8)
    in_turn = Predictor(machine(tmp_path), fused=True, recorded=False).predict(programs["standard"], load, silent=True)
    ahead = machine(tmp_path, TOML.replace("eager = 1e-5", "eager = 1e-5\nahead = true"))
    found = Predictor(ahead, fused=True, recorded=False).predict(programs["standard"], load, silent=True).prefill
    work = sum(found.spent[kind] for kind in ("products", "attention", "others"))
    launches = in_turn.prefill.spent["launches"]
    assert max(work, launches) <= found.seconds < work + launches
    recorded = Predictor(ahead, fused=True).predict(programs["standard"], load, silent=True)
    assert recorded.prefill.seconds < in_turn.prefill.seconds


def test_shapes_are_those_of_a_run(lanes: dict[str, LaneProgram]) -> None:
    program = lanes["kraken"]
    given = {name: Sized(tuple(spec.shape), getattr(torch, spec.dtype)) for name, spec in program.weights.items()}
    sizes = Sizer().sizes(program.graph, given | {program.inputs[0].name: Sized((3, 11), torch.int64)})
    interpreter = _Shapes(program.module)
    weights = [torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for one in program.weights.values()]
    interpreter.run(*weights, torch.ones(3, 11, dtype=torch.int64))
    assert len(interpreter.found) > 50
    for node, value in interpreter.found.items():
        assert sizes[node] == value, node.name


class _Shapes(torch.fx.Interpreter):
    """Runs a graph and notes its shapes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.found[n] = Sized(tuple(value.shape), value.dtype)
        return value


def test_standard_waits_for_all_it_sends(tmp_path: Path, programs: dict[str, RunGraphs]) -> None:
    predictor = Predictor(machine(tmp_path))
    load = Load(prompt=32, batch=2, new_tokens=8)
    silent = predictor.predict(programs["standard"], load, silent=True)
    standard = predictor.predict(programs["standard"], load)
    for with_sums, without in ((standard.prefill, silent.prefill), (standard.decode, silent.decode)):
        assert without.waited == without.carried == without.spent["reduces"] == 0
        assert with_sums.hidden == 0
        assert with_sums.waited == pytest.approx(with_sums.carried)
        assert with_sums.seconds == pytest.approx(without.seconds + with_sums.waited + with_sums.spent["reduces"])
        assert with_sums.seconds == pytest.approx(sum(with_sums.spent.values()) + with_sums.waited)
    assert standard.total == pytest.approx(standard.ttft + 7 * standard.tpot)


def test_what_hides_is_not_waited_for(tmp_path: Path, programs: dict[str, RunGraphs]) -> None:
    predictor = Predictor(machine(tmp_path))
    load = Load(prompt=64, new_tokens=8)
    times = {name: predictor.predict(program, load) for name, program in programs.items()}
    halves = predictor.predict(programs["standard"], load, halves=True)
    silent = predictor.predict(programs["standard"], load, silent=True)
    assert times["kraken"].prefill.hidden > 0
    assert times["kraken"].prefill.carried < times["delayed"].prefill.carried
    assert silent.ttft < times["kraken"].ttft < times["standard"].ttft
    assert times["delayed"].ttft < times["standard"].ttft
    assert halves.prefill.hidden > 0
    assert halves.tpot == times["standard"].tpot


def test_streams_carry_one_thing_at_a_time(tmp_path: Path, programs: dict[str, RunGraphs]) -> None:
    timeline = Predictor(machine(tmp_path)).predict(programs["delayed"], Load(64)).prefill
    for stream in ("compute", "link"):
        events = [event for event in timeline.events if event.stream == stream]
        assert events
        assert all(event.begin < event.end for event in events)
        assert all(earlier.end <= later.begin + 1e-12 for earlier, later in pairwise(events))


def test_a_table_for_people(tmp_path: Path, programs: dict[str, RunGraphs]) -> None:
    predictor = Predictor(machine(tmp_path))
    two = {name: programs[name] for name in ("standard", "kraken")}
    found = latency_table(two, predictor, prompts=(16, 32, 4096), batches=(1, 4), most=512)
    assert [(load.batch, load.prompt) for load in found.rows] == [(1, 16), (1, 32), (4, 16), (4, 32)]
    names = ["standard", f"standard, {HALVES}", "kraken", f"kraken, {HALVES}", SILENT]
    assert all(list(predictions) == names for predictions in found.rows.values())
    lines = found.lines()
    assert lines[0].startswith("predicted on two of them, 2 devices")
    assert "prompts of 4096 tokens are left out: the model takes 512" in lines
    assert found.to_dict()["loads"][0]["predictions"]["kraken"]["prefill"]["waited"] >= 0
    assert [(load.prompt, load.new_tokens) for load in latency_table(two, predictor, batches=(2,), most=8).rows] == [
        (4, 4)
    ]
    assert "2: fastest" in compared_lines([found])[1]


def test_neighbours_that_move_numbers_are_one_kernel(tmp_path: Path) -> None:
    """Between two products: in compiled code what lies there is read once and written once."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    aten = torch.ops.aten
    first = graph.call_function(aten.linear.default, (x, weight))
    turned = graph.call_function(aten.permute.default, (first, [1, 0]))
    once = graph.call_function(aten.add.Tensor, (turned, turned))
    twice = graph.call_function(aten.neg.default, (once,))
    back = graph.call_function(aten.permute.default, (twice, [1, 0]))
    graph.output(graph.call_function(aten.linear.default, (back, weight)))
    given = {"x": Sized((10, 20), torch.float32), "weight": Sized((20, 20), torch.float32)}
    sizes, found = Sizer().sizes(graph, given), machine(tmp_path)
    numbers = 4 * 200
    eager, fused = (node_costs(graph, sizes, found, fused=fused) for fused in (False, True))
    # One operand twice is one that is read.
    assert [eager[node].seconds for node in (once, twice)] == pytest.approx([2 * numbers / 1e10] * 2)
    assert [fused[node].seconds for node in (once, twice)] == pytest.approx([numbers / 1e10] * 2)
    assert [sum(cost.launches for cost in costs.values()) for costs in (eager, fused)] == [6, 3]
    assert fused[first] == eager[first]


def test_parts_of_a_packed_product_are_read_where_they_are_used(tmp_path: Path) -> None:
    """As of two products: a split, and what takes a part of it, only say where numbers lie."""
    graph = torch.fx.Graph()
    x, weight, last = (graph.placeholder(name) for name in ("x", "weight", "last"))
    aten = torch.ops.aten
    both = graph.call_function(aten.neg.default, (graph.call_function(aten.linear.default, (x, weight)),))
    parts = graph.call_function(aten.split.Tensor, (both, 20, -1))
    gate, up = (graph.call_function(operator.getitem, (parts, place)) for place in (0, 1))
    activated = graph.call_function(aten.silu.default, (gate,))
    inside = graph.call_function(aten.mul.Tensor, (activated, up))
    packed = graph.call_function(aten.linear.default, (inside, weight))
    halves = graph.call_function(aten.split.Tensor, (packed, 20, -1))
    one = graph.call_function(operator.getitem, (halves, 0))
    turned = graph.call_function(aten.neg.default, (one,))
    graph.output(graph.call_function(aten.linear.default, (turned, last)))
    given = {
        "x": Sized((10, 20), torch.float32),
        "weight": Sized((40, 20), torch.float32),
        "last": Sized((20, 20), torch.float32),
    }
    costs = node_costs(graph, Sizer().sizes(graph, given), machine(tmp_path), fused=True)
    numbers = 4 * 200
    assert costs[both].seconds == pytest.approx(2 * numbers / 1e10), "reads what a product wrote; its readers join it"
    assert [costs[node].seconds for node in (activated, inside)] == pytest.approx([0.0, numbers / 1e10])
    assert costs[turned].seconds == pytest.approx(2 * numbers / 1e10), "reads a part of a product, and is read by one"
    assert [costs[node].launches for node in (both, activated, inside, turned)] == [0, 0, 1, 1]
