from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.pipelines import RECOGNIZE, split_over
from kraken_compiler.passes.shard.split_head import SplitHead
from kraken_compiler.passes.stages import schedule
from tests.passes.helpers import Golden, Sample, assert_close, captured, check_idempotent, check_untouched, gpt, targets
from tests.passes.models import VOCAB, D, Gpt


def before(degree: int) -> list[Pass[Any]]:
    """Everything up to the head."""
    pipeline = [*RECOGNIZE, *split_over(degree)]
    return pipeline[: pipeline.index(SplitHead())]


def whole(sample: Sample, degree: int, smallest: int) -> list[Tensor]:
    """All outputs of the finished lane program, with the head split down to `smallest` rows a lane."""
    return sample.run(schedule(sample.after(*before(degree), SplitHead(smallest)), STANDARD))


@pytest.mark.parametrize("degree", [2, 4])
def test_splits_by_rows_and_gathers(degree: int) -> None:
    """The vocabulary of 67 divides by neither degree: the last lane is padded, the logits are cut back."""
    sample = gpt()
    program = sample.after(*before(degree), SplitHead())
    calls = targets(program)
    assert calls.count("kraken.all_gather") == 1
    assert calls[-2:] == ["kraken.all_gather", "aten.slice.Tensor"]
    size = -(-VOCAB // degree)
    shapes = {spec.source: spec.shape for spec in program.weights.values()}
    assert shapes["head.weight"] == (size, D)
    assert shapes["head.bias"] == (size,)
    assert_close(whole(sample, degree, 16), sample.expected())
    check_idempotent(SplitHead(), program)


def test_a_tied_head_leaves_the_embedding_whole() -> None:
    model = Gpt()
    model.head.weight = model.tokens.weight
    sample = captured(model)
    program = sample.after(*before(2), SplitHead())
    (source,) = {spec.source for spec in program.weights.values() if spec.shape[-1] == D and VOCAB in spec.source_shape}
    parts = [spec for spec in program.weights.values() if spec.source == source]
    assert sorted(bool(spec.shards) for spec in parts) == [False, True]
    assert_close(whole(sample, 2, 16), sample.expected())


def test_small_heads_stay_whole() -> None:
    sample = gpt()
    check_untouched(SplitHead(smallest=18), sample, before=before(4))
    assert_close(whole(sample, 4, 18), sample.expected())
    assert_close(whole(sample, 4, 17), sample.expected())


def test_one_lane_has_nothing_to_gather() -> None:
    check_untouched(SplitHead(), gpt(), before=before(1))


def test_a_model_without_head() -> None:
    model = Gpt()
    model.head = nn.Identity()
    check_untouched(SplitHead(), captured(model), before=before(2))


def test_golden(golden: Golden) -> None:
    golden("split_head", gpt().after(*before(4), SplitHead()), last=5)
