"""KL(teacher || student) of two models' logits, without a second copy of either in memory.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.lanes.evaluate import divergence

_ELEMENTS_AT_ONCE = 1 << 23
"""Log-probabilities in float32 that are held at a time: 32 MiB of each model's."""


def distillation_loss(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """The sum over tokens of KL(teacher || student), in nats; gradients flow to the student only.

    Computed in float32, a few tokens at a time. The gradient with respect to the student's logits is the difference of
    the probabilities, so it is made in the forward pass and takes the place of the teacher's logits.

    Args:
        student_TV: The student's logits, [tokens, vocabulary].
        teacher_TV: The teacher's, of the same shape; overwritten if a gradient is wanted.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _Distillation.apply(student_TV, teacher_TV.detach())  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        total = student_TV.new_zeros((), dtype=torch.float32)
        rows = max(1, _ELEMENTS_AT_ONCE // max(1, student_TV.shape[1]))
        needs_gradient = ctx.needs_input_grad[0]
        for q_logits, p_logits in zip(torch.split(student_TV, rows), torch.split(teacher_TV, rows), strict=True):
            log_q, log_p = (F.log_softmax(logits.float(), dim=-1) for logits in (q_logits, p_logits))
            total += divergence(log_q, log_p).sum()
            if needs_gradient:
                p_logits.copy_(log_q.exp_().sub_(log_p.exp_()))
        if needs_gradient:
            ctx.save_for_backward(teacher_TV)
            ctx.dtype = student_TV.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (difference_TV,) = ctx.saved_tensors
        return difference_TV.mul(gradient).to(ctx.dtype), None
