"""Is a contender right? Asked before it is timed, of every token and of the logits behind it.

What a contender generates is put behind the prompt and run through an unsplit model in this process, without a cache.
If every token is the best one there, given the ones before it, the tokens are exactly what greedy decoding of the
unsplit model gives. The peers and our standard form are held against transformers, a Kraken model against itself, and
the forms that change the function against all their lanes in one process.

In fp32 all tokens must agree. In bf16 rounding alone moves near ties, so the logits are compared: a contender may be
twice as far from the fp32 model as the unsplit bf16 model is (relative L2 error of the worst token's logits). A split
adds up rounded parts, which costs about one rounding more per sum; a wrong mask, position or reduce is off by far more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttft_parts.contenders import NATIVE, Contender
from ttft_parts.workloads import native_beside

ALLOWED = {"float32": 1e-3, "bfloat16": None}
SLACK = 2.0

Forward = Callable[[Tensor], Tensor]


class Judge:
    """Compares contenders of one dtype with unsplit models.

    Args:
        model: The source model's directory.
        artifacts: Our compiled models, by dtype and form.
        dtype: Name of the element type under test.
    """

    def __init__(self, model: Path, artifacts: dict[str, dict[str, Path]], dtype: str) -> None:
        self.model = model
        self.artifacts = artifacts
        self.dtype = dtype
        # Loading a model takes longer than asking it.
        self._models: dict[tuple[str, str], Forward] = {}
        self._answers: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}

    def judge(self, contender: Contender, ids: Tensor, tokens: list[int], logits: Tensor) -> dict[str, Any]:
        """Compare what a contender generated.

        Args:
            contender: Who.
            ids: The prompt, `[1, prompt]`.
            tokens: What it generated.
            logits: The logits that the tokens were chosen from, `[tokens, vocabulary]`.

        Returns:
            `right`, `wrong_token` (index of the first one, or None), the relative `error` and what is `allowed`, `why`.
        """
        form = contender.form
        source = "transformers" if form is None or form == "standard" else form
        expected = self._expected(source, "float32", ids, tokens)
        error = _relative(logits, expected)
        allowed = ALLOWED[self.dtype]
        wrong = None
        if allowed is None:
            allowed = SLACK * _relative(self._expected(source, self.dtype, ids, tokens), expected)
        else:
            differs = (expected.argmax(-1) != torch.tensor(tokens)).nonzero()
            wrong = int(differs[0]) if len(differs) else None
        why = []
        if wrong is not None:
            why.append(f"token {wrong} is not the unsplit model's")
        if not error <= allowed:
            why.append(f"logits are off by {error:.1e}, allowed are {allowed:.1e}")
        return {
            "right": not why,
            "wrong_token": wrong,
            "error": error,
            "allowed": allowed,
            "why": "; ".join(why),
        }

    def _expected(self, source: str, dtype: str, ids: Tensor, tokens: list[int]) -> Tensor:
        """The unsplit model's logits at the places of the tokens, `[tokens, vocabulary]`, as fp32."""
        key = (source, dtype, (ids.shape[1], *tokens))
        if key not in self._answers:
            whole = torch.cat([ids, torch.tensor([tokens[:-1]], dtype=torch.int64)], 1)
            with torch.inference_mode():
                self._answers[key] = self._model(source, dtype)(whole)[0, ids.shape[1] - 1 :].float().clone()
        return self._answers[key]

    def _model(self, source: str, dtype: str) -> Forward:
        if (source, dtype) not in self._models:
            loads = {"transformers": self._transformers, NATIVE: self._native}
            self._models[source, dtype] = loads[source](dtype) if source in loads else self._lanes(source, dtype)
        return self._models[source, dtype]

    def _transformers(self, dtype: str) -> Forward:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, dtype)).eval()
        return lambda ids: model(ids, use_cache=False).logits

    def _native(self, dtype: str) -> Forward:
        from kraken_compiler.native.directory import load_native

        return load_native(native_beside(self.model), getattr(torch, dtype))

    def _lanes(self, form: str, dtype: str) -> Forward:
        from kraken_compiler.artifact.read import open_artifact
        from kraken_compiler.backends.torch_dist.lanes import load_lanes

        lanes = load_lanes(open_artifact(self.artifacts[dtype][form], verify=False)).eval()

        def forward(ids: Tensor) -> Tensor:
            output = lanes(ids)
            logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
            return logits

        return forward


def _relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
