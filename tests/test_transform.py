"""`kraken_compiler.transform`: an ordinary module, called as the source model, that trains, copies, moves and saves."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.forms import Form, Lag
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.verify.compare import errors
from tests.zoo import SUPPORTED, logits_of, token_batch


def transformed(model: nn.Module, *args: Any, **kwargs: Any) -> LaneModule:
    return kraken_compiler.transform(model, *args, example_inputs={"input_ids": token_batch(model, 2, 16)}, **kwargs)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return SUPPORTED["llama"]()


@pytest.fixture(scope="module")
def standard(llama: nn.Module) -> LaneModule:
    """The Llama in standard form, made without example inputs; tests work on copies."""
    return kraken_compiler.transform(llama, 2, "standard")


def difference(module: nn.Module, source: nn.Module) -> float:
    """Relative difference of the logits, at sizes that neither was captured with."""
    ids = token_batch(source, 3, 11)
    return errors(logits_of(module, ids), logits_of(source, ids))[1]


# how it is called ----------------------------------------------------------------------------------------------------


def test_a_hugging_face_model_keeps_its_call_and_its_output(llama: nn.Module, standard: LaneModule) -> None:
    ids = token_batch(llama, 3, 11)
    with torch.no_grad():
        want, by_position, by_name = llama(ids), standard(ids), standard(input_ids=ids, attention_mask=None)
    for output in (by_position, by_name):
        assert type(output) is type(want)
        assert list(output) == ["logits"]
        assert output.past_key_values is None
        assert output[0] is output.logits
        torch.testing.assert_close(output.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": 1}, "has no argument 'ids'; it takes input_ids"),
        ({"attention_mask": torch.ones(2, 5)}, "was compiled without the argument 'attention_mask'.*example_inputs"),
        ({"use_cache": True}, "was compiled with use_cache=False"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, r"must have shape \[batch, sequence\], got \[2\]"),
        ({}, "needs the argument 'input_ids'"),
    ],
    ids=["unknown", "not captured", "fixed", "wrong shape", "missing"],
)
def test_wrong_arguments_are_told(standard: LaneModule, arguments: dict[str, Any], message: str) -> None:
    ids = {} if "input_ids" in arguments or not arguments else {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    with pytest.raises(UsageError, match=message):
        standard(**ids, **arguments)


class Wrapped(nn.Module):
    """A zoo model behind another signature and output structure."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner = SUPPORTED["plain_gpt"]()
        self.structure = structure

    def forward(self, tokens: Tensor, weight: Tensor) -> Any:
        return self.structure(self.inner(tokens), weight)


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda logits, weight: logits * weight,
    "tuple": lambda logits, weight: (logits, weight + 1),
    "list": lambda logits, weight: [logits],
    "dict": lambda logits, weight: {"weight": weight + 1, "logits": logits},
    "nested": lambda logits, weight: {"outputs": (logits, None), "more": [weight + 1]},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_plain_module_keeps_its_call_and_its_output(name: str) -> None:
    source = Wrapped(STRUCTURES[name])
    example = {"tokens": token_batch(source.inner, 2, 16), "weight": torch.randn(2, 16, 1)}
    module = kraken_compiler.transform(source, 2, "standard", example_inputs=example)
    tokens, weight = token_batch(source.inner, 3, 11), torch.randn(3, 11, 1)
    with torch.no_grad():
        want = source(tokens, weight)
        for have in (module(tokens, weight), module(tokens, weight=weight), module(weight=weight, tokens=tokens)):
            # It compares structures, too.
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_example_inputs_by_position() -> None:
    source = SUPPORTED["plain_gpt"]()
    module = kraken_compiler.transform(source, 2, "standard", example_inputs=(token_batch(source, 2, 16),))
    assert difference(module, source) < 1e-4


def test_example_inputs_are_asked_for() -> None:
    with pytest.raises(UsageError, match="example_inputs"):
        kraken_compiler.transform(SUPPORTED["plain_gpt"]())


# what it is made of --------------------------------------------------------------------------------------------------


def test_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    source = SUPPORTED["plain_gpt"]()
    module = transformed(source)
    assert module.program.degree == 2
    assert module.program.plan.forms == ("kraken",) * 3
    assert difference(module, source) > 1e-3
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert transformed(source).program.degree == 4


@pytest.mark.parametrize("layers", ["1-2", [1, -1], "-2--1"])
def test_layers_take_the_form_and_the_others_stay(layers: str | list[int]) -> None:
    module = transformed(SUPPORTED["plain_gpt"](), 2, "ladder", layers)
    assert module.program.plan.forms == ("standard", "ladder", "ladder")


@pytest.mark.slow
def test_a_form_of_ones_own() -> None:
    source = SUPPORTED["plain_gpt"]()
    late = Form("late", Lag(1, 5), Lag(1, 4), "everything of the peers comes two layers late")
    module = transformed(source, 2, late)
    assert module.program.plan.forms == ("late",) * 3
    assert 1e-3 < difference(module, source) < 10
    assert difference(transformed(source, 2, Form("mine", Lag(1, 1), Lag(1, 1))), source) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "karken"}, "did you mean 'kraken'"),
        ({"degree": 9}, "valid degrees: 1 to 8, without padding: 1, 2, 4, 8"),
        ({"layers": "7"}, "there is no layer 7"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transformed(SUPPORTED["plain_gpt"](), **options)
    with pytest.raises(UsageError, match=r"must be an nn\.Module or a path"):
        kraken_compiler.transform(42)  # type: ignore[arg-type]


def test_the_report(standard: LaneModule) -> None:
    report = standard.report
    assert report is not None
    data = json.loads(json.dumps(report.to_dict()))
    assert data["degree"] == 2
    assert data["exact"]
    assert [layer["module"] for layer in data["layers"]] == [f"model.layers.{index}" for index in range(3)]
    assert [[branch["kind"] for branch in layer["branches"]] for layer in data["layers"]] == [["attention", "ffn"]] * 3
    # Two KV heads, 64 floats to a token.
    assert [lane["kv_heads"] for lane in data["lanes"]] == [1, 1]
    assert {reduce["bytes_per_token"] for layer in data["layers"] for reduce in layer["reduces"]} == {256}
    assert str(report) == report.text
    assert "LlamaForCausalLM: 3 layers, degree 2, computes what the source model computes" in report.text
    assert len(report.text.splitlines()) < 20


@pytest.mark.slow
def test_the_source_is_left_as_it_was(llama: nn.Module) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    module = kraken_compiler.transform(llama, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())


# what can be done with it --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("llama", "kraken"), ("plain_gpt", "ladder"), ("bloom", "standard")])
def test_it_trains(name: str, form: str) -> None:
    module = transformed(SUPPORTED[name](), 2, form).train()
    ids = token_batch(SUPPORTED[name](), 4, 12)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        output = module(ids)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        without = [
            name for name, value in module.named_parameters() if value.grad is None or not value.grad.isfinite().all()
        ]
        assert not without
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.slow
def test_a_tied_weight_is_one_parameter_with_the_gradient_of_both_its_places() -> None:
    source = SUPPORTED["qwen2"]()
    module = kraken_compiler.transform(source, 2, "standard")
    ids = token_batch(source, 2, 9)
    for model in (module, source):
        model(ids).logits.square().mean().backward()
    (spec,) = (spec for spec in module.program.weights.values() if spec.source_shape == (97, 64))
    table = module.get_parameter(f"weights.{spec.name}")
    # 97 rows over two lanes: the second has a row of padding, which no logit comes from and no token is looked up in.
    assert table.shape == (2, 49, 64)
    assert table.grad is not None
    assert not table.grad[1, 48].any()
    wanted = source.get_input_embeddings().weight.grad
    assert errors(table.grad.flatten(0, 1)[:97], wanted)[1] < 1e-4


@pytest.mark.slow
def test_the_places_of_a_tied_weight_share_its_gradient() -> None:
    """With a whole embedding and a split head they are two parameters; together they get the source's."""
    source = SUPPORTED["qwen2"]()
    module = kraken_compiler.transform(source, 2, "standard", embedding="whole")
    ids = token_batch(source, 2, 9)
    for model in (module, source):
        model(ids).logits.square().mean().backward()
    tied = [spec for spec in module.program.weights.values() if spec.source_shape == (97, 64)]
    embedding, head = (
        module.get_parameter(f"weights.{spec.name}") for spec in sorted(tied, key=lambda spec: len(spec.shards))
    )
    # 97 rows over two lanes: the second has a row of padding, which no logit comes from.
    assert (embedding.shape, head.shape) == ((97, 64), (2, 49, 64))
    assert embedding.grad is not None
    assert head.grad is not None
    found = embedding.grad + head.grad.flatten(0, 1)[:97]
    wanted = source.get_input_embeddings().weight.grad
    assert errors(found, wanted)[1] < 1e-4


def test_a_state_dict_goes_round(llama: nn.Module, standard: LaneModule) -> None:
    state = {name: value.clone() for name, value in standard.state_dict().items()}
    other = copy.deepcopy(standard)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert difference(other, llama) > 1e-2
    loaded = other.load_state_dict(state)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert difference(other, llama) < 1e-4


def test_a_copy_is_its_own(llama: nn.Module, standard: LaneModule) -> None:
    ids = token_batch(llama, 3, 11)
    other = copy.deepcopy(standard)
    assert torch.equal(logits_of(other, ids), logits_of(standard, ids))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert difference(standard, llama) < 1e-4


def test_the_whole_module_saves_and_loads(llama: nn.Module, standard: LaneModule) -> None:
    file = io.BytesIO()
    torch.save(standard, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is LaneModule
    assert loaded.report.to_dict() == standard.report.to_dict()
    ids = token_batch(llama, 3, 11)
    assert torch.equal(logits_of(loaded, ids), logits_of(standard, ids))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.float64)], ids=["double", "to"])
def test_in_double_precision(move: Callable[[nn.Module], nn.Module]) -> None:
    source = SUPPORTED["plain_gpt"]()
    module = move(transformed(source, 4, "standard"))
    source = move(source)
    assert logits_of(module, token_batch(source, 2, 5)).dtype == torch.float64
    assert difference(module, source) < 1e-12


def test_to_another_device_and_back(llama: nn.Module, standard: LaneModule) -> None:
    """Positions and masks that the graph makes itself must follow; meta stands for an accelerator."""
    away = copy.deepcopy(standard).to("meta")
    ids = token_batch(llama, 3, 11)
    output = away(ids.to("meta")).logits
    assert output.device.type == "meta"
    assert output.shape == (3, 11, 97)
    back = away.to_empty(device="cpu")
    back.load_state_dict(standard.state_dict())
    assert difference(back, llama) < 1e-4


def test_without_gradients_and_in_inference_mode(llama: nn.Module, standard: LaneModule) -> None:
    ids = token_batch(llama, 3, 11)
    assert standard(ids).logits.requires_grad
    with torch.inference_mode():
        assert not standard(ids).logits.requires_grad
    frozen = copy.deepcopy(standard).requires_grad_(False)
    assert not frozen(ids).logits.requires_grad
