"""Capture of live modules: values, dynamic sizes, the calling convention, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from kraken_compiler.capture import Capture, capture
from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.example_inputs import parse_input_spec
from kraken_compiler.capture.export_module import functionalize
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.lanes.calling import bind, unflatten_output
from kraken_compiler.ops.devices import move_program
from kraken_compiler.passes.lower import lower
from tests.zoo import SUPPORTED

IDS = torch.zeros(2, 16, dtype=torch.int64)


class Model(nn.Module):
    """Everything a program has to keep apart: tied and unused weights, three kinds of buffers, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.unused = nn.Linear(3, 3)
        self.register_buffer("gain", torch.randn(8))
        self.register_buffer("shift", torch.randn(8), persistent=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None, double: bool = False, extra: Any = None) -> Any:
        x = self.dropout(self.embed(ids)) * self.gain + self.shift + torch.tensor([1.0] * 8)
        x = self.again(self.first(x))
        if mask is not None:
            x = x * mask[..., None]
        if double:
            x = x * 2
        return {"hidden": x, "nothing": None, "sums": (x.sum(-1),)}


def run(captured: Capture, *args: Any, **kwargs: Any) -> Any:
    program = captured.program
    read = program.reader(captured.store.read)
    weights = [read(spec.source) for spec in program.weights.values()]
    inputs = bind(program.call, program.inputs, args, kwargs)
    with torch.no_grad():
        return unflatten_output(program.call, program.module(*weights, *inputs))


def example(**extra: Any) -> dict[str, Any]:
    return {"ids": IDS, "mask": torch.ones(2, 16), **extra}


def test_values_and_dynamic_sizes() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    captured = capture(model, example_inputs=example(double=True))
    ids, mask = torch.randint(0, 11, (5, 7)), torch.rand(5, 7)

    out = run(captured, ids, mask, double=True)

    reference = model(ids, mask, double=True)
    assert list(out) == ["hidden", "nothing", "sums"]
    assert out["nothing"] is None
    torch.testing.assert_close(out["hidden"], reference["hidden"])
    torch.testing.assert_close(out["sums"][0], reference["sums"][0])
    assert captured.program.call.out_names == ("hidden", "nothing", "sums.0")
    assert captured.notes == ()


def test_program_holds_exactly_what_the_graph_needs() -> None:
    model = Model()
    program = capture(model, example_inputs=example(double=True)).program

    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == [
        *program.weights,
        *(spec.name for spec in program.inputs),
    ]
    sources = {spec.source: spec.kind for spec in program.weights.values()}
    assert not any(source.startswith("unused") for source in sources)
    assert sources["gain"] == "buffer"
    assert set(program.constants) == {"shift", *(s for s, kind in sources.items() if kind == "constant")}
    assert [(s.name, s.shape) for s in program.inputs] == [
        ("ids", ("batch", "sequence")),
        ("mask", ("batch", "sequence")),
    ]
    assert program.call.constants == {"double": True}
    assert all("val" in node.meta for node in program.graph.nodes if node.op == "call_function")
    assert any("nn_module_stack" in node.meta for node in program.graph.nodes)
    assert not any("detach_" in str(node.target) for node in program.graph.nodes)


def test_parameters_are_shared_and_the_model_is_left_as_it_was() -> None:
    model = Model().train()
    model.first.eval()

    captured = capture(model, example_inputs=example())

    assert model.training
    assert model.dropout.training
    assert not model.first.training
    assert captured.store.read("embed.weight").data_ptr() == model.embed.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_program_is_on_the_cpu_wherever_it_was_traced(name: str) -> None:
    """The meta device stands in for a GPU."""
    model = SUPPORTED[name]()
    exported = torch.export.export(model, (), {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}, strict=False)
    exported = functionalize(exported)
    move_program(exported.graph_module, "meta")
    assert devices_in(exported.graph_module) == {"meta"}
    program, _ = build_program(exported)
    assert devices_in(program.module) == {"cpu"}
    lower(program, 2, "kraken")


def devices_in(module: fx.GraphModule) -> set[str]:
    """The kinds of devices that a graph and those that it calls name, or compute on."""
    nodes = [node for part in module.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]
    values = tree_leaves([(node.args, node.kwargs, node.meta.get("val")) for node in nodes])
    tensors = [value.device.type for value in values if isinstance(value, Tensor)]
    return {*tensors, *(value.type for value in values if isinstance(value, torch.device))}


def test_in_place_ops_are_functionalized() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y += x
            return y.relu_()

    model = InPlace()
    captured = capture(model, example_inputs=(torch.randn(2, 3, 4),))

    targets = [node.target for node in captured.program.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in targets)
    x = torch.randn(4, 5, 4)
    torch.testing.assert_close(run(captured, x), model(x).detach())


def test_code_that_only_the_strict_tracer_follows() -> None:
    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            # Writing an attribute in forward is an error for the direct tracer only.
            self.last = self.linear(x)
            return self.last.relu()

    captured = capture(Branchy(), example_inputs=(torch.randn(2, 3, 4),))
    assert run(captured, torch.randn(3, 5, 4)).shape == (3, 5, 4)


def test_structured_arguments() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: tuple[Tensor, Tensor | None], scales: dict[str, Tensor]) -> Tensor:
            return self.linear(pair[0]) * scales["a"]

    model = Pair()
    captured = capture(model, example_inputs=((torch.randn(2, 3, 4), None), {"a": torch.randn(2, 3, 4)}))
    x, scale = torch.randn(5, 6, 4), torch.randn(5, 6, 4)
    torch.testing.assert_close(run(captured, (x, None), {"a": scale}), model((x, None), {"a": scale}).detach())
    with pytest.raises(UsageError, match=r"'pair' .* must be structured as \('tensor', None\)"):
        run(captured, (x, x), {"a": scale})


def test_fixed_sizes_are_said_plainly() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x.transpose(1, 2)).transpose(1, 2)

    captured = capture(Fixed(), example_inputs=(torch.randn(2, 16, 4),))
    assert captured.program.inputs[0].shape == ("batch", 16, 4)
    assert "the sequence size of input 'x' is fixed at 16" in captured.notes[0]


def test_bounded_sizes_are_said_plainly() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.register_buffer("mask", torch.ones(32, 32).tril())

        def forward(self, ids: Tensor) -> Tensor:
            size = ids.shape[1]
            mask = self.mask[:size, :size]
            torch._check(mask.shape[0] == size)
            return mask @ self.embed(ids)

    assert capture(Bounded(), example_inputs=(IDS,)).notes == ("the sequence size must be at most 31",)


def test_attention_masks_follow_the_sequence() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(ids)[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    captured = capture(Masked(), example_inputs=(IDS, torch.zeros(2, 1, 16, 16)))
    assert captured.program.inputs[1].shape == ("batch", 1, "sequence", "sequence")


class Scaled(Model):
    """Numbers and flags among its arguments, with defaults."""

    def forward(
        self, ids: Tensor, start: int = 0, scale: float = 1.0, causal: bool = True, extra: Any = None
    ) -> Tensor:
        assert extra is None
        return self.embed(ids) * scale + start + (0 if causal else 5)


@pytest.mark.parametrize(
    ("captured_with", "call", "wrong"),
    [
        ({}, {}, None),
        ({}, {"start": 0, "causal": True, "extra": None}, None),
        ({}, {"start": 3}, "compiled with start=0 and cannot be called with another value"),
        ({}, {"causal": None}, "compiled with causal=True and cannot be called with another value"),
        ({"start": 3}, {"start": 3}, None),
        ({"start": 3}, {}, "compiled with start=3, and a call that leaves it out means 0: give start=3"),
        ({"start": 0, "causal": True}, {}, None),
        ({"scale": 2.0}, {"scale": 2.0, "causal": False}, "compiled with causal=True"),
    ],
)
def test_numbers_that_a_call_leaves_out(captured_with: dict[str, Any], call: dict[str, Any], wrong: str | None) -> None:
    model = Scaled()
    captured = capture(model, example_inputs={"ids": IDS, **captured_with})
    if wrong is None:
        assert torch.equal(run(captured, IDS, **call), model(IDS, **call))
    else:
        with pytest.raises(UsageError, match=wrong):
            run(captured, IDS, **call)


def test_bad_calls_name_the_argument_and_the_way_out() -> None:
    captured = capture(Model(), example_inputs=example(double=True))
    with pytest.raises(UsageError, match="compiled with double=True and cannot be called with another value"):
        run(captured, IDS, torch.ones(2, 16), double=False)
    with pytest.raises(UsageError, match="needs the argument 'mask'; it takes ids, mask"):
        run(captured, IDS, double=True)
    with pytest.raises(UsageError, match=r"without the argument 'extra', so it may only be None; .*--input extra="):
        run(captured, IDS, torch.ones(2, 16), extra=IDS)
    with pytest.raises(UsageError, match="no argument 'masc'; it takes ids, mask"):
        run(captured, IDS, masc=torch.ones(2, 16))
    with pytest.raises(UsageError, match="got two values for argument 'ids'"):
        run(captured, IDS, ids=IDS)
    with pytest.raises(UsageError, match="takes 4 positional arguments, 5 were given"):
        run(captured, IDS, IDS, IDS, IDS, IDS)
    with pytest.raises(UsageError, match=r"'ids' of .* must have shape \[batch, sequence\], got \[2\]"):
        run(captured, IDS[:, 0], torch.ones(2, 16), double=True)
    assert run(captured, IDS, torch.ones(2, 16), double=True, extra=None)["hidden"].shape == (2, 16, 8)


def test_example_inputs_are_asked_for() -> None:
    with pytest.raises(
        UsageError, match=r"Model needs example inputs .*--input input_ids=int64\[2,16\].*example_inputs="
    ):
        capture(Model())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (torch.zeros(1, 16, dtype=torch.int64),),
            r"has shape \[1, 16\]: the batch and sequence sizes must be at least 2",
        ),
        ({"wrong": IDS}, "'wrong' is no argument of the model: Model takes ids, mask, double, extra"),
        ((), "hold no tensor"),
        ((IDS,) * 5, "5 example inputs were given"),
        (3, "must be a tuple of arguments or a dict"),
    ],
)
def test_bad_example_inputs(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(Model(), example_inputs=given)


def test_input_specs() -> None:
    name, tensor = parse_input_spec("ids = int64[2, 16]")
    assert (name, tensor.dtype, tensor.shape) == ("ids", torch.int64, (2, 16))
    assert parse_input_spec("x=float32[2,3,4]")[1].std() > 0.5
    captured = capture(Model(), input_specs=["ids=int64[2,16]", "mask=float32[2,16]"])
    assert [spec.name for spec in captured.program.inputs] == ["ids", "mask"]
    for text in ("ids", "ids=int64", "ids=integer[2]", "ids=nn[2]", "=int64[2,16]"):
        with pytest.raises(UsageError, match=r"is no input: write NAME=DTYPE\[SIZES\]"):
            parse_input_spec(text)
    with pytest.raises(UsageError, match="not both"):
        capture(Model(), example_inputs=(IDS,), input_specs=["ids=int64[2,16]"])


def test_outputs_that_are_no_tensors() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"x": x + 1, "kind": "hidden"}

    with pytest.raises(UnsupportedModelError, match="output 'kind' is 'hidden', and only tensors and None"):
        capture(Counts(), example_inputs=(torch.randn(2, 3),))


def test_state_that_forward_writes() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x + self.seen

    with pytest.raises(UnsupportedModelError, match="its forward writes to 'seen'"):
        capture(Counter(), example_inputs=(torch.randn(2, 3),))


def test_code_that_no_tracer_follows() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match=r"module 'Dynamic'.*chooses a branch by the numbers in a tensor"):
        capture(Dynamic(), example_inputs=(torch.randn(2, 3),))


class Int8Weight(Tensor):
    """A weight-only quantised tensor, as torchao makes them: integers, and a scale for every row."""

    @staticmethod
    def __new__(cls, integers: Tensor, scales: Tensor) -> Int8Weight:
        made: Int8Weight = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scales.dtype)
        made.integers, made.scales = integers, scales
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Int8Weight:
        return Int8Weight(inner["integers"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Int8Weight(args[0].integers, args[0].scales)
        plain = (arg.integers * arg.scales if isinstance(arg, Int8Weight) else arg for arg in args)
        return function(*plain, **(kwargs or {}))


def test_quantised_weights_are_refused_by_name() -> None:
    model = Model()
    model.first.weight = nn.Parameter(Int8Weight(torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 1)), False)
    with pytest.raises(UnsupportedModelError, match=r"module 'first' \(node weight\): its weight is a Int8Weight"):
        capture(model, example_inputs=(IDS,))


def test_origin_of_a_module_follows_its_values() -> None:
    model = Model()
    first = capture(model, example_inputs=(IDS,)).origin
    assert (first.kind, first.path, first.tokenizer) == ("module", None, None)
    assert first.model_class.endswith("test_capture_module.Model")
    before = first.sha256
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    assert capture(model, example_inputs=(IDS,)).origin.sha256 != before


def test_other_sources_are_refused() -> None:
    with pytest.raises(UsageError, match=r"must be an nn\.Module or a path, got a int"):
        capture(3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_importing_capture_imports_neither_transformers_nor_gguf() -> None:
    code = "import sys, kraken_compiler.capture; sys.exit(bool({'transformers', 'gguf', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
