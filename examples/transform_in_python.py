"""Rewrites a module in Python, without files or processes: all lanes run inside one ordinary nn.Module.

python examples/transform_in_python.py
"""

from __future__ import annotations

import torch
from write_model_pt import VOCABULARY, Transformer

import kraken_compiler

torch.manual_seed(0)
ids = torch.randint(VOCABULARY, (2, 16))

model = Transformer().eval()
lanes = kraken_compiler.transform(model, degree=4, example_inputs=(ids,))
print(lanes(ids).shape)

# The kraken form changes what each branch sees, so its logits differ; the standard form computes the same function.
standard = kraken_compiler.transform(model, degree=4, form="standard", example_inputs=(ids,))
with torch.no_grad():
    print(f"kraken   differs from the source by at most {(lanes(ids) - model(ids)).abs().max():.1e}")
    print(f"standard differs from the source by at most {(standard(ids) - model(ids)).abs().max():.1e}")
