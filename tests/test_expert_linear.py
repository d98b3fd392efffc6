from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kraken_compiler.ops.expert_linear import expert_linear

E, I, O, N = 5, 6, 4, 11  # noqa: E741 (the legend of the op)


def operands(*lead: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and experts; one expert gets no row."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*lead, *shape, dtype=torch.float64, generator=generator) for shape in ((N, I), (E, O, I), (E, O))
    )
    return x, weight, bias, torch.randint(E - 1, (*lead, N), generator=generator)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    out = (weight[experts] @ x.unsqueeze(-1)).squeeze(-1)
    return out if bias is None else out + bias[experts]


@pytest.mark.parametrize("with_bias", [False, True])
def test_every_row_meets_its_expert_and_gradients_flow(with_bias: bool) -> None:
    x, weight, bias, experts = operands()
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)][: 2 + with_bias]
    outputs = [
        function(x.view(1, N, I), weight, bias if with_bias else None, experts.view(1, N))
        for function in (expert_linear, by_hand)
    ]
    torch.testing.assert_close(*outputs)
    factor = torch.randn_like(outputs[0])
    for have, want in zip(*(torch.autograd.grad((output * factor).sum(), inputs) for output in outputs), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (None, 0, 0, None), (0, None, None, 0), (0, 1, 0, None)])
def test_lanes(in_dims: tuple[int | None, ...]) -> None:
    whole = [
        lanes[0] if dim is None else lanes.movedim(0, dim).contiguous() for lanes, dim in zip(operands(3), in_dims)
    ]
    have = torch.vmap(expert_linear, in_dims)(*whole)
    for lane in range(3):
        mine = [tensor if dim is None else tensor.select(dim, lane) for tensor, dim in zip(whole, in_dims)]
        torch.testing.assert_close(have[lane], by_hand(*mine))


def test_the_op_is_well_behaved() -> None:
    x, weight, bias, experts = operands()
    inputs = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), experts)
    torch.library.opcheck(torch.ops.kraken.expert_linear.default, inputs, test_utils=("test_schema", "test_faketensor"))
