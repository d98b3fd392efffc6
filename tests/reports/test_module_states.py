"""The state a module is in, and what is switched on around it: mirrored, left out with a note, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kraken_compiler
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.verify.compare import errors
from tests.reports.small_models import (
    EXAMPLE,
    FFN,
    LM,
    TOLERANCE,
    VOCABULARY,
    Attention,
    relative_error,
    tokens,
)
from tests.zoo import SUPPORTED, logits_of, token_batch

pytestmark = pytest.mark.slow

BFLOAT16 = 5e-2
"""The relative error between two orders of a sum in bfloat16, over a few layers."""


def lanes_of(model: nn.Module, degree: int = 2) -> LaneModule:
    return kraken_compiler.transform(model, degree, "standard", example_inputs=EXAMPLE)


# weights without values ----------------------------------------------------------------------------------------------


def test_weights_without_values_are_named() -> None:
    with torch.device("meta"):
        empty = LM(layers=1)
    with pytest.raises(
        UsageError, match=r"'tokens\.weight' and \d+ others have no values .*load the weights first"
    ) as all_:
        lanes_of(empty)
    partly, buffer = LM(layers=1), LM(layers=1)
    partly.ffn[0].up.to("meta")  # type: ignore[union-attr, operator]
    buffer.register_buffer("scale", torch.ones(1, device="meta"))
    with FakeTensorMode():
        fake = LM(layers=1)
    for model, name in (
        (partly, r"'ffn\.0\.up\.weight' and 1 others"),
        (buffer, "'scale' has"),
        (fake, r"tokens\.weight"),
    ):
        with pytest.raises(UsageError, match=name):
            lanes_of(model)
    assert len(str(all_.value).splitlines()) == 1


def test_weights_that_a_first_call_makes_are_named() -> None:
    model = LM(layers=1)
    model.head = nn.LazyLinear(VOCABULARY)
    with pytest.raises(UnsupportedModelError, match=r"'head' .*its weight has no shape yet.*Call the model once"):
        lanes_of(model)
    assert type(model.head) is nn.LazyLinear
    model(tokens(2, 3))
    assert relative_error(lanes_of(model), model, 3, 11) < TOLERANCE


def test_pieces_of_distributed_weights_are_named(tmp_path: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model, mesh = LM(layers=1), torch.distributed.init_device_mesh("cpu", (1,))
        whole = model.ffn[0].up.weight  # type: ignore[union-attr]
        model.ffn[0].up.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))  # type: ignore[union-attr, arg-type]
        with pytest.raises(UnsupportedModelError, match=r"'ffn\.0\.up'.*its weight is a DTensor.*whole weights"):
            lanes_of(model)
    finally:
        torch.distributed.destroy_process_group()


# around transform ----------------------------------------------------------------------------------------------------


def meta_by_default() -> AbstractContextManager[None]:
    class Default(AbstractContextManager[None]):
        def __enter__(self) -> None:
            torch.set_default_device("meta")

        def __exit__(self, *_: object) -> None:
            torch.set_default_device(None)

    return Default()


class DoubleByDefault(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "double": DoubleByDefault,
    "device": lambda: torch.device("meta"),
    "default device": meta_by_default,
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_on_around_transform_leaves_no_trace(name: str) -> None:
    model = LM(layers=1)
    with AROUND[name]():
        lanes = lanes_of(model)
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
    lanes(tokens(2, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in lanes.parameters())
    assert not lanes.report.to_dict()["notes"]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_transform_is_left_out_and_said(dtype: torch.dtype) -> None:
    model = LM(layers=1)
    with torch.autocast("cpu", dtype=dtype):
        lanes = lanes_of(model)
        assert torch.is_autocast_enabled("cpu")
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
    name = str(dtype).removeprefix("torch.")
    assert lanes.report is not None
    assert any(f"note      torch.autocast('cpu', {name}) was on" in line for line in lanes.report.lines())


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = LM(layers=1)
    lanes = lanes_of(model)
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
    lanes(tokens(2, 5)).sum().backward()


# autocast around the result ------------------------------------------------------------------------------------------


class NormedHeads(Attention):
    """Queries and keys pass through a norm and stay float32, where the values become what the product is in."""

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split(x_BSD)
        return nn.functional.normalize(q, dim=-1) * 4, nn.functional.normalize(k, dim=-1) * 4, v


class Written(Attention):
    """Attention as products and a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(("attention", "degree"), [(Attention, 2), (NormedHeads, 4), (Written, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_acts_on_the_lanes_as_on_the_source(
    attention: Callable[[], nn.Module], degree: int, dtype: torch.dtype
) -> None:
    model = LM(attention=attention)
    lanes = lanes_of(model, degree)
    ids = tokens(3, 11)
    with torch.autocast("cpu", dtype=dtype):
        want, have = model(ids), lanes(ids)
    assert have.dtype == want.dtype == dtype
    assert errors(have.detach().float(), want.detach().float())[1] < BFLOAT16
    assert errors(want.detach().float(), model(ids).detach())[1] > 1e-5
    assert relative_error(lanes, model, 3, 11) < TOLERANCE


def test_autocast_on_experts() -> None:
    model = SUPPORTED["mixtral"]().eval()
    example = {"input_ids": token_batch(model, 2, 16)}
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=example)
    ids = token_batch(model, 3, 11)
    with torch.no_grad():
        plain = logits_of(lanes, ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want, have = logits_of(model, ids), logits_of(lanes, ids)
    assert have.dtype == want.dtype
    # Rounded scores send some tokens to other experts, on the lanes and in the model.
    for rounded in (have, want):
        of_tokens = (rounded.float() - plain).abs().amax(-1) / plain.abs().max()
        assert of_tokens.median() < BFLOAT16


def test_gradients_pass_through_autocast() -> None:
    model = LM(layers=1)
    lanes = lanes_of(model)
    gradients = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        lanes.zero_grad()
        with context:
            loss = lanes(tokens(2, 9)).float().square().mean()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in lanes.parameters() if parameter.grad is not None])
    plain, under = gradients
    assert len(plain) == len(under) == len(list(lanes.parameters()))
    assert all(errors(a, b)[1] < 0.1 for a, b in zip(under, plain) if b.abs().max() > 1e-4)


class OwnPrecision(FFN):
    """A part that chooses its precision itself."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made: Tensor = super().forward(x_BSD)
        return made.float()


def test_autocast_inside_the_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'ffn\.0' .*it computes under torch\.autocast"):
        lanes_of(LM(ffn=OwnPrecision, layers=1))


# what is trained -----------------------------------------------------------------------------------------------------


def trained(lanes: LaneModule) -> set[str]:
    parameters = dict(lanes.weights.named_parameters())
    return {
        s.source for s in lanes.program.weights.values() if s.name in parameters and parameters[s.name].requires_grad
    }


@pytest.mark.parametrize("frozen", ["", "ffn", "tokens", "norms.1", "attention.0.qkv.bias", "no weight"])
def test_frozen_parameters_stay_frozen(frozen: str) -> None:
    model = LM(layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert trained(lanes_of(model)) == {name for name, value in model.named_parameters() if value.requires_grad}


class Tied(LM):
    """The head reads the embedding's weight; buffers and a parameter of integers are in use."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.head = nn.Linear(64, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("gain", torch.full((64,), 1.5))
        self.shift = nn.Parameter(torch.arange(64), requires_grad=False)

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * self.gain + self.shift / 64


def test_tied_weights_buffers_and_integers() -> None:
    model = Tied()
    model.tokens.weight.requires_grad_(False)
    lanes = lanes_of(model, 3)
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
    assert not trained(lanes) & {"tokens.weight", "head.weight", "gain", "shift"}
    kinds = {spec.source: spec.name for spec in lanes.program.weights.values()}
    assert kinds["gain"] in dict(lanes.weights.named_buffers())
    integers = dict(lanes.weights.named_parameters())[kinds["shift"]]
    assert integers.dtype == torch.int64
    assert not integers.requires_grad
    model.tokens.weight.requires_grad_(True)
    assert {"tokens.weight", "head.weight"} & trained(lanes_of(model, 3))


def test_shared_layers_mixed_types_and_hooks() -> None:
    model = LM()
    model.attention[1] = model.attention[0]
    model.ffn[1].up = model.ffn[0].up  # type: ignore[union-attr]
    model.norms[0].double()
    model.norms[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    model.norms[0].register_forward_hook(lambda module, inputs, output: output.float() * 1.5)
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] + 1) % VOCABULARY,))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    lanes = lanes_of(model)
    assert relative_error(lanes, model, 3, 11) < TOLERANCE
    assert {parameter.dtype for parameter in lanes.parameters()} == {torch.float32, torch.float64}


# training mode -------------------------------------------------------------------------------------------------------


class Dropping(Attention):
    """Drops attention weights in the operator, and what it gives in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.25)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropped = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)

    def project(self, y_BSD: Tensor) -> Tensor:
        made: Tensor = self.dropout(super().project(y_BSD))
        return made


def notes_of(lanes: LaneModule) -> str:
    assert lanes.report is not None
    return "\n".join(line for line in lanes.report.lines() if line.startswith("note "))


def test_dropout_of_a_model_in_training_is_said() -> None:
    model = LM(attention=Dropping).train()
    lanes = lanes_of(model)
    notes = notes_of(lanes)
    assert "evaluation mode: without dropout (p = 0.5) at 2 places, first in 'attention.0'" in notes
    assert "without dropout (p = 0.25) at 2 places, first in 'attention.0.dropout'" in notes
    assert lanes.training
    assert model.training
    assert relative_error(lanes, LM(attention=Dropping), 3, 11) < TOLERANCE
    assert relative_error(lanes.eval(), LM(attention=Dropping), 3, 11) < TOLERANCE


def test_other_things_of_training_are_said_and_nothing_is_made_up() -> None:
    class Noisy(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            if self.training:
                x_BSD = x_BSD + 0.1 * torch.randn_like(x_BSD)
            return super().forward(x_BSD)

    class Skipping(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            if self.training and float(torch.rand(())) < 0.5:
                return x_BSD
            return super().forward(x_BSD)

    assert "without the random numbers of aten::randn_like at 1 place" in notes_of(
        lanes_of(LM(ffn=Noisy, layers=1).train())
    )
    assert "the lanes compute what it computes in evaluation mode" in notes_of(
        lanes_of(LM(ffn=Skipping, layers=1).train())
    )
    assert not notes_of(lanes_of(LM(layers=1).train()))
    still = lanes_of(LM(attention=Dropping, layers=1))
    assert not notes_of(still)
    assert not still.training
