"""Runs the tasks of lm-evaluation-harness on a rewritten model, all lanes in one process.

    lanes = kraken_compiler.load_lanes("model.kraken")
    model = HarnessModel.of(lanes, tokenizer)
    lm_eval.simple_evaluate(model, tasks=["hellaswag"])

Needs `pip install 'kraken-compiler[harness]'`. The tasks and their data are the harness's own business.
Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.generate.decoder import rows_by_length
from kraken_compiler.lanes.logits import LogitsOf, logits_function
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.sample_inputs import position_limit

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UsageError(
        f"lm-evaluation-harness is not installed: pip install 'kraken-compiler[harness]' ({error})"
    ) from error

_LONGEST = 2048
_NEW_TOKENS = 256

Pair = tuple[Any, list[int], list[int]]
"""The harness's name of a request, the tokens of its context, and those of its continuation."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A language model behind the harness's interface.

    Attributes:
        max_length: Most tokens that the model takes at once; of longer contexts the end counts.
    """

    def __init__(self, logits_of: LogitsOf, tokenizer: Any, max_length: int = _LONGEST, batch: int = 4) -> None:
        """Wrap a model.

        Args:
            logits_of: Token ids int64 [B, S] -> logits [B, S, V].
            tokenizer: A `transformers.PreTrainedTokenizerBase`.
            max_length: Most tokens that the model takes.
            batch: Rows that run at once.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._logits_of = logits_of
        self._batch = batch

    @classmethod
    def of(cls, lanes: LaneModule, tokenizer: Any, max_length: int = _LONGEST, batch: int = 4) -> Self:
        """Wrap a rewritten module, which must be a causal language model.

        Args:
            lanes: The module.
            tokenizer, batch: See the constructor.
            max_length: Most tokens to give it at once; less if the model takes less.

        Raises:
            UsageError: The module has no logits, or needs inputs beside token ids.
        """
        program = lanes.program
        logits_of = logits_function(program.inputs, program.call, lanes.run_flat)
        return cls(logits_of, tokenizer, min(max_length, position_limit(program)), batch)

    @property
    def eot_token_id(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise UsageError("the tokenizer has no token that ends a text, which the harness needs")
        return end

    @property
    def prefix_token_id(self) -> int:
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            special = False
        ids: list[int] = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, window by window."""
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(pairs))
            sums.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # Longest first: a batch that is too large for the memory shows at once, and rows of one length come together.
        order = Collator(requests, sort_fn=lambda pair: (-len(pair[1]) - len(pair[2]), tuple(pair[1] + pair[2])))
        scores: list[tuple[float, bool]] = []
        for chunk in order.get_batched(n=self._batch):
            scores += self._score(chunk)
        answers: list[tuple[float, bool]] = order.get_original(scores)
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for _, _, continuation in pairs)
        if longest > self.max_length:
            raise UsageError(f"a continuation has {longest} tokens, the model reads {self.max_length} at once")
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in pairs]
        answers = []
        for row, (_, _, continuation), logits_SV in zip(rows, pairs, self._logits([row[:-1] for row in rows])):
            targets = torch.tensor(row[len(row) - len(continuation) :])
            says = F.log_softmax(logits_SV[len(row) - 1 - len(targets) :].float(), dim=-1)
            value = says.gather(-1, targets[:, None]).sum().item()
            answers.append((value, bool((says.argmax(-1) == targets).all())))
        return answers

    def log_probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-probability of the second text of each pair after the first."""
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return [value for value, _ in self.loglikelihood(requests, disable_tqdm=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The most likely continuation up to a stop string; the prefix is computed again for every token."""
        texts = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample"):
                raise UsageError("the harness adapter generates greedily; it cannot sample")
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            limit = int(options.get("max_gen_toks", _NEW_TOKENS))
            texts.append(self._continue(context, [stop for stop in stops if stop], limit))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _continue(self, context: str, stops: list[str], limit: int) -> str:
        if limit >= self.max_length:
            raise UsageError(f"{limit} new tokens do not fit into the model's {self.max_length}")
        ids = self.tok_encode(context)[-(self.max_length - limit) :]
        new_ids: list[int] = []
        text = ""
        while len(new_ids) < limit:
            token = int(self._logits([ids + new_ids])[0][-1].argmax())
            if token == self.eot_token_id:
                break
            new_ids.append(token)
            text = str(self.tokenizer.decode(new_ids, skip_special_tokens=True))
            at = [text.index(stop) for stop in stops if stop in text]
            if at:
                return text[: min(at)]
        return text

    def _logits(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """Logits [S, V] of every row; those of one length run together, and none is padded."""
        logits: dict[int, Tensor] = {}
        for _, numbers in rows_by_length(list(map(len, rows))):
            with torch.inference_mode():
                logits |= zip(numbers, self._logits_of(torch.tensor([rows[number] for number in numbers])))
        return [logits[number] for number in range(len(rows))]
