"""lm-evaluation-harness on a rewritten model: its numbers against a direct computation, and a task of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.commands.transform import transform
from kraken_compiler.errors import UsageError
from kraken_compiler.lanes.module import LaneModule
from tests.test_cli_compile import save_model

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")

TASK = """
task: pairs
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LaneModule, Any]:
    from transformers import AutoTokenizer

    path = save_model("llama", tmp_path_factory.mktemp("harness") / "llama")
    return transform(path, degree=2, form="kraken"), AutoTokenizer.from_pretrained(path)


def direct(lanes: LaneModule, ids: list[int], count: int) -> tuple[float, bool]:
    with torch.inference_mode():
        log_probs = lanes(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = log_probs[len(ids) - 1 - count : -1]
    wanted = torch.tensor(ids[-count:])
    return rows.gather(-1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihoods_are_the_models(model: tuple[LaneModule, Any]) -> None:
    from kraken_compiler.quality.harness import HarnessModel

    lanes, tokenizer = model
    harness = HarnessModel.of(lanes, tokenizer, max_length=64, batch=2)
    pairs = [("w5 w6 w7", " w8 w9"), ("w5", " w6"), ("w5 w6 w7 w8 w9 w10", " w11"), ("w9 w9", " w5 w5 w5")]
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        count = len(ids) - len(tokenizer(context)["input_ids"])
        wanted, wanted_greedy = direct(lanes, ids, count)
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy

    short = HarnessModel.of(lanes, tokenizer, max_length=4)
    with pytest.raises(UsageError, match="a continuation has 5 tokens, the model reads 4 at once"):
        short.log_probabilities([("w5", " w6 w7 w8 w9 w10")])

    text = " ".join(f"w{number % 80 + 3}" for number in range(90))
    (rolled,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    ids = [harness.prefix_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    # A whole window of 64, then one that sees as much before its 26 tokens as fits.
    wanted = direct(lanes, ids[:65], 64)[0] + direct(lanes, ids[-65:], 26)[0]
    assert rolled == pytest.approx(wanted, abs=1e-3)


def test_generation_is_greedy_and_stops(model: tuple[LaneModule, Any]) -> None:
    from kraken_compiler.quality.harness import HarnessModel

    lanes, tokenizer = model
    harness = HarnessModel.of(lanes, tokenizer)
    ids = tokenizer("w5 w6 w7")["input_ids"]
    for _ in range(6):
        with torch.inference_mode():
            ids.append(int(lanes(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = tokenizer.decode(ids[-6:], skip_special_tokens=True)
    options = {"until": ["nothing of that"], "max_gen_toks": 6}
    assert harness.generate_until([request("generate_until", "w5 w6 w7", options)]) == [wanted]
    stop = wanted.split()[2]
    (cut,) = harness.generate_until([request("generate_until", "w5 w6 w7", {**options, "until": stop})])
    assert cut == wanted[: wanted.index(stop)]


def test_a_task_of_ones_own(model: tuple[LaneModule, Any], tmp_path: Path) -> None:
    from kraken_compiler.quality.harness import HarnessModel

    lanes, tokenizer = model
    harness = HarnessModel.of(lanes, tokenizer)
    choices = [[f"w{first}", f"w{first + 1}"] for first in range(5, 45, 2)]
    contexts = [f"w{number} w{number + 3}" for number in range(3, 23)]
    rows = [
        {"context": context, "choices": pair, "label": number % 2}
        for number, (context, pair) in enumerate(zip(contexts, choices, strict=True))
    ]
    right = 0
    for row in rows:
        values = [
            direct(lanes, tokenizer(f"{row['context']} {choice}")["input_ids"], 1)[0] for choice in row["choices"]
        ]
        right += values.index(max(values)) == row["label"]
    write_task(tmp_path, "pairs", TASK, rows)
    write_task(tmp_path, "texts", TEXTS, [{"text": "w5 w6 w7 w8"}])
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(harness, tasks=["pairs", "texts"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["pairs"]["acc,none"] == pytest.approx(right / len(rows))
    assert results["results"]["texts"]["byte_perplexity,none"] > 1


def write_task(folder: Path, name: str, task: str, rows: list[dict[str, Any]]) -> None:
    import json

    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(task.format(data=data))
