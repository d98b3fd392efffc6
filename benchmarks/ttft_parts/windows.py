"""The arithmetic of a window: could a link carry a layer's all-reduce while the next attention computes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Window:
    """One layer's all-reduce beside what hides it; times in seconds.

    Attributes:
        payload: Bytes that a rank sends, and as many that it receives.
        transfer: What the link takes for them.
        attention: What a layer's attention branch takes when nothing is communicated.
    """

    payload: float
    transfer: float
    attention: float

    @property
    def fits(self) -> bool:
        return self.transfer <= self.attention


def window(
    shape: Mapping[str, int], dtype: str, prompt: int, degree: int, gbits: float, bound_prefill: float
) -> Window:
    """The window of one kraken layer in prefill.

    Args:
        shape: The model's, as `Workload.write` returns it.
        dtype: Element type of the reduced tensor.
        prompt: Tokens.
        degree: Ranks. A rank sends 2 (N - 1) / N times the tensor in an all-reduce, which is once for two ranks.
        gbits: Rate of the link in one direction.
        bound_prefill: Seconds of the prefill without any collective.
    """
    payload = prompt * shape["width"] * ELEMENT_BYTES[dtype] * 2 * (degree - 1) / degree
    attention = bound_prefill / shape["layers"] * attention_share(shape, prompt)
    return Window(payload, payload * 8 / (gbits * 1e9), attention)


def attention_share(shape: Mapping[str, int], prompt: int) -> float:
    """Share of a layer's FLOPs that belongs to the attention branch; causal scores count half."""
    width = shape["width"]
    queries, keys = shape["heads"] * shape["head_width"], shape["kv_heads"] * shape["head_width"]
    projections = 2 * width * (2 * queries + 2 * keys)
    scores = 2 * 2 * queries * prompt / 2
    ffn = 2 * 3 * width * shape["ffn"]
    return (projections + scores) / (projections + scores + ffn)
