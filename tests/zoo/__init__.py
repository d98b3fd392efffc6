"""Tiny random models for tests, every one with weights large enough that a lost bias or branch shows.

    from tests.zoo import FAMILIES, PLAIN, REJECTED, logits_of, token_batch

    model = FAMILIES["llama"]()                    # fp32, eval mode, the same weights every time
    ids = token_batch(model, batch=2, seq=7)       # int64 [2, 7]
    logits = logits_of(model, ids)                 # float32 [2, 7, model.vocab]

`FAMILIES` are transformers models, `PLAIN` and `NORMS` are models no library wrote, `SUPPORTED` is all of these,
`MORE_FAMILIES` are transformers models that are tested in one process only, `OTHER_INPUTS` take something else than a
batch of tokens, `REJECTED` are models the compiler must refuse, with a part of the reason it must give.
"""

from tests.zoo.builder import Builder, logits_of, random_tokens, token_batch
from tests.zoo.families import FAMILIES
from tests.zoo.more_families import MORE_FAMILIES
from tests.zoo.norms import NORMS
from tests.zoo.other_inputs import OTHER_INPUTS
from tests.zoo.plain import PLAIN
from tests.zoo.rejected import REJECTED, Rejected

SUPPORTED: dict[str, Builder] = {**FAMILIES, **PLAIN, **NORMS}

__all__ = [
    "FAMILIES",
    "MORE_FAMILIES",
    "NORMS",
    "OTHER_INPUTS",
    "PLAIN",
    "REJECTED",
    "SUPPORTED",
    "Builder",
    "Rejected",
    "logits_of",
    "random_tokens",
    "token_batch",
]
