"""What was aimed at with the ONNX backend; times are compared as in `ttft_parts.ratios`."""

from __future__ import annotations

from ttft_parts.contenders import BOUND, SINGLE
from ttft_parts.ratios import Aim

AIMS = (
    Aim("ttft", "standard", "kraken", at_least=1.4, prompt=128),
    Aim("ttft", "standard", "kraken", at_least=1.25, prompt=512),
    Aim("ttft", "kraken", BOUND, at_most=1.2),
    Aim("ttft", SINGLE, "standard", at_least=1.5),
    Aim("ttft", "standard", BOUND),
    Aim("ttft", "standard", "standard+split"),
    Aim("ttft", "standard+split", BOUND, at_most=1.1, prompt=512),
    Aim("ttft", "kraken", "kraken+split"),
    Aim("tpot", "standard", "kraken"),
    Aim("tpot", "kraken", BOUND),
    Aim("tpot", SINGLE, "standard"),
)
