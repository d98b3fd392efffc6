"""An `if` on a size, wherever a model asks it: right where the captured branch is, refused everywhere else."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import kraken_compiler
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.format import device_file
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.capture import capture
from kraken_compiler.cli.run import app
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.size_checks import lengths_read, require_generation
from kraken_compiler.ir.size_rules import all_in_words, holds, parse_rule
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.ranks.communicators.none import NoCommunication
from tests.cli_command import Command
from tests.reports.small_models import EXAMPLE, FFN, LM, TOLERANCE, Attention, D, relative_error, tokens


def embedding(change: Callable[[Tensor, Tensor], Tensor]) -> LM:
    """A decoder whose embedding a size changes."""

    class Changed(LM):
        def embed(self, ids: Tensor) -> Tensor:
            return change(super().embed(ids), ids)

    return Changed()


def ffn(change: Callable[[Tensor], Tensor]) -> LM:
    """A decoder in whose FFN a size changes something."""

    class Changed(FFN):
        def forward(self, x_BSD: Tensor) -> Tensor:
            return super().forward(change(x_BSD))

    return LM(ffn=Changed)


def attention(change: Callable[[Tensor], Tensor]) -> LM:
    """A decoder in whose attention's output a size changes something."""

    class Changed(Attention):
        def project(self, y_BSD: Tensor) -> Tensor:
            return super().project(change(y_BSD))

    return LM(attention=Changed)


def padded_to_eight(x_BSD: Tensor) -> Tensor:
    """Blocks of eight tokens, as attention over blocks has them; padding is only added where it must be."""
    missing = -x_BSD.shape[1] % 8
    if missing:
        x_BSD = 2 * nn.functional.pad(x_BSD, (0, 0, 0, missing))[:, : x_BSD.shape[1]]
    return x_BSD


MODELS: dict[str, tuple[Callable[[], LM], tuple[int, int], tuple[int, int], str]] = {
    "longer than 32": (
        lambda: embedding(lambda x, ids: 3 * x if ids.shape[1] > 32 else x),
        (2, 20),
        (2, 60),
        "the sequence size must be at most 32",
    ),
    "shorter than 8": (
        lambda: embedding(lambda x, ids: 3 * x if ids.shape[1] < 8 else x),
        (2, 20),
        (2, 5),
        "the sequence size must be at least 8",
    ),
    "odd": (
        lambda: embedding(lambda x, ids: 3 * x if ids.shape[1] % 2 else x),
        (2, 20),
        (2, 21),
        "the sequence size must be even",
    ),
    "a batch of more than 4, in the FFN": (
        lambda: ffn(lambda x: 3 * x if x.shape[0] > 4 else x),
        (4, 9),
        (5, 9),
        "the batch size must be at most 4",
    ),
    "all tokens, in the attention": (
        lambda: attention(lambda y: 3 * y if y.numel() > 40 * D else y),
        (1, 40),
        (4, 11),
        "batch \\* sequence",
    ),
    "a quotient, in the FFN": (
        lambda: ffn(lambda x: 3 * x if x.shape[1] // 8 > 3 else x),
        (3, 31),
        (3, 32),
        "the sequence size must be at most 31",
    ),
    "padding to a multiple": (
        lambda: ffn(padded_to_eight),
        (2, 24),
        (2, 20),
        "the sequence size must be divisible by 8",
    ),
    "one size": (
        lambda: embedding(lambda x, ids: 3 * x if ids.shape[1] == 21 else x),
        (2, 20),
        (2, 21),
        "the sequence size must not be 21",
    ),
    "a single token of a single text": (
        lambda: embedding(lambda x, ids: 3 * x if ids.numel() == 1 else x),
        (1, 2),
        (1, 1),
        "batch \\* sequence >= 2",
    ),
    "three tokens or fewer, in the FFN": (
        lambda: ffn(lambda x: 3 * x if x.shape[0] * x.shape[1] <= 3 else x),
        (2, 2),
        (1, 3),
        "batch \\* sequence >= 4",
    ),
    "both sizes small, in the attention": (
        lambda: attention(lambda y: 3 * y if y.shape[0] + y.shape[1] <= 3 else y),
        (3, 1),
        (1, 2),
        "batch \\* sequence >= 3",
    ),
    "a dim that is squeezed at 1": (
        lambda: ffn(lambda x: x * (1 + x.mean(-1).squeeze()[..., None])),
        (2, 5),
        (1, 5),
        "the batch size must be at least 2",
    ),
    "a root": (
        lambda: embedding(lambda x, ids: 3 * x if int(ids.shape[1] ** 0.5) == 5 else x),
        (2, 24),
        (2, 25),
        "the sequence size must satisfy .* \\*\\* 0.5",
    ),
    "one size against the other": (
        lambda: attention(lambda y: 3 * y if y.shape[0] > y.shape[1] else y),
        (3, 3),
        (9, 4),
        "batch <= sequence",
    ),
}


def standard(model: nn.Module) -> LaneModule:
    return kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)


@pytest.mark.parametrize("name", MODELS)
def test_a_size_is_right_or_refused(name: str) -> None:
    build, inside, outside, rule = MODELS[name]
    model = build()
    lanes = standard(model)
    assert relative_error(lanes, model, *inside) < TOLERANCE
    with pytest.raises(UsageError, match=rule) as refused:
        lanes(tokens(*outside))
    assert len(str(refused.value).splitlines()) == 1


def test_the_notes_say_the_rules_in_words() -> None:
    build, *_ = MODELS["padding to a multiple"]
    assert capture(build(), example_inputs=EXAMPLE).notes == ("the sequence size must be divisible by 8",)


def test_a_plain_model_takes_all_sizes() -> None:
    model = LM()
    lanes = standard(model)
    assert lanes.program.call.sizes == ("sequence <= 256",) or not lanes.program.call.sizes
    for size in ((1, 1), (1, 7), (5, 1), (3, 40)):
        assert relative_error(lanes, model, *size) < TOLERANCE


def test_inputs_that_share_a_size_must_agree() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LM()

        def forward(self, ids: Tensor, gain: Tensor) -> Tensor:
            return self.inner(ids) * gain

    example = {"ids": EXAMPLE[0], "gain": torch.ones(2, 16, 1)}
    lanes = kraken_compiler.transform(Two(), 2, "standard", example_inputs=example)
    with pytest.raises(UsageError, match=r"the sequence size .* is 5 in argument 'ids' and 7 in 'gain'"):
        lanes(tokens(2, 5), torch.ones(2, 7, 1))


def test_a_size_that_follows_from_another() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LM()

        def forward(self, ids: Tensor, gains: Tensor) -> Tensor:
            return self.inner(ids) * gains[:, 1:, None]

    model = Shifted().eval()
    example = {"ids": EXAMPLE[0], "gains": torch.ones(2, 17)}
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=example)
    torch.testing.assert_close(
        lanes(tokens(3, 9), torch.ones(3, 10)), model(tokens(3, 9), torch.ones(3, 10)), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UsageError, match="sequence_gains == sequence"):
        lanes(tokens(3, 9), torch.ones(3, 12))


def test_an_archive_keeps_its_own_limits(tmp_path: Path) -> None:
    model = embedding(lambda x, ids: 3 * x if ids.shape[1] % 3 == 2 else x)
    sizes = {0: Dim("batch", min=1, max=6), 1: Dim.AUTO}
    exported = torch.export.export(model, (torch.zeros(2, 15, dtype=torch.int64),), dynamic_shapes=(sizes,))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    path = tmp_path / "model.pt2"
    path.write_bytes(buffer.getvalue())
    lanes = kraken_compiler.transform(path, 2, "standard")
    assert relative_error(lanes, model, 3, 9) < TOLERANCE
    for outside, rule in (((3, 8), "when divided by 3|sequence % 3"), ((7, 9), "the batch size must be at most 6")):
        with pytest.raises(UsageError, match=rule):
            lanes(tokens(*outside))


def test_generation_is_refused_before_it_begins() -> None:
    call = capture(MODELS["longer than 32"][0](), example_inputs=EXAMPLE).program
    require_generation(call.call, call.inputs, 1, [30], 3)
    with pytest.raises(UsageError, match="would read 33 tokens, and the sequence size must be at most 32"):
        require_generation(call.call, call.inputs, 1, [30, 4], 4)
    with pytest.raises(UsageError, match="would read 33 tokens"):
        require_generation(call.call, call.inputs, 1, [30], 10**30)
    assert list(lengths_read([5, 3, 20, 5], 4)) == [3, 4, 5, 6, 7, 8, 20, 21, 22, 23]


def test_rules_are_kept_for_every_form_and_the_cache() -> None:
    captured = capture(MODELS["longer than 32"][0](), example_inputs=EXAMPLE)
    program, _ = lower(captured.program, 2, "kraken")
    assert program.call.sizes == captured.program.call.sizes == ("sequence <= 32",)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for both backends of a model that is another one beyond 32 tokens and for more than 4 texts."""

    def change(x_BSD: Tensor, ids: Tensor) -> Tensor:
        other = ids.shape[1] > 32 or ids.shape[1] == 21 or ids.shape[0] > 4
        return 3 * x_BSD if other else x_BSD

    place = tmp_path_factory.mktemp("bounded") / "model.kraken"
    compile_model(
        embedding(change),
        place,
        degree=1,
        form="standard",
        backends=("torch", "onnx"),
        example_inputs=EXAMPLE,
        verify=False,
    )
    return place


TOO_LONG, GAP = "the sequence size must be at most 32", "the sequence size must not be 21"


def test_the_manifest_keeps_the_rules(bounded: Path) -> None:
    assert set(open_artifact(bounded).manifest.call.sizes) == {"sequence <= 32", "sequence != 21", "batch <= 4"}


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_the_command_refuses_before_ranks_start(bounded: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("kraken_compiler.ranks.launch.launch", started)
    ids = ",".join(["3"] * 30)
    batch = [part for _ in range(5) for part in ("--input-ids", "1,2")]
    for asked, rule in (
        (("--input-ids", ids, "--max-new-tokens", "4"), TOO_LONG),
        (("--input-ids", "3,3", "--max-new-tokens", "24"), GAP),
        (batch, "the batch size must be at most 4"),
    ):
        result = Command(app).invoke(bounded, *asked, "--backend", backend)
        assert result.exit_code == 2, result.output
        assert rule in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_rank_refuses_at_every_call(bounded: Path) -> None:
    program = RankProgram.load(open_artifact(bounded), communicator=NoCommunication(0, 1))
    assert program(tokens(4, 32)).shape[1] == 32
    with pytest.raises(UsageError, match=TOO_LONG):
        program(tokens(2, 33))
    decoder = program.decoder(2, 32)
    decoder.prefill(tokens(2, 22).numpy(), np.array([22, 19]))
    decoder.step(np.array([1, 2]))
    with pytest.raises(UsageError, match=GAP):
        decoder.step(np.array([1, 2]))
    with pytest.raises(UsageError, match="the batch size must be at most 4"):
        program.decoder(5, 8).prefill(tokens(5, 3).numpy(), np.full(5, 3))


def test_a_device_refuses_at_every_call(bounded: Path) -> None:
    program = DeviceProgram(DeviceModel.load(bounded / "lanes" / device_file(0)))
    decoder = ArrayDecoder(program, 2, 32)
    decoder.prefill(tokens(2, 22).numpy(), np.array([19, 22]))
    decoder.step(np.array([1, 2]))
    with pytest.raises(UsageError, match=GAP):
        decoder.step(np.array([1, 2]))
    whole = whole_feeds(program.model, {"ids": tokens(2, 33).numpy()})
    with pytest.raises(UsageError, match=TOO_LONG):
        program.run(whole)


def test_texts_that_cannot_grow_have_no_cache() -> None:
    captured = capture(MODELS["odd"][0](), example_inputs=EXAMPLE)
    program, _ = lower(captured.program, 2, "kraken")
    assert program.cached is None
    assert program.no_cache == "a text cannot grow token by token (the sequence size must be even)"


def test_another_kind_of_numbers_is_refused() -> None:
    class ByKind(LM):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids) * (mask if mask.dtype == torch.bool else 2 * mask)[:, :, None]

    mask = torch.ones(2, 16, dtype=torch.bool)
    lanes = kraken_compiler.transform(ByKind(), 2, "standard", example_inputs=(*EXAMPLE, mask))
    with pytest.raises(UsageError, match=r"'mask' .* was compiled for bool, got int64"):
        lanes(tokens(2, 5), torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd() == 1",
        "sequence.__class__ == 1",
        "9 ** 9 ** 9 > 1",
        "(lambda: 1)()",
        "sequence ** sequence > 0",
        "-" * 1500 + "1 > 0",
        "[0] == 0",
        "x" * 5000,
        "\ud800",
        "",
    ],
)
def test_a_hostile_rule_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_rule(text)


def test_a_rule_that_cannot_be_computed_does_not_hold() -> None:
    assert not holds("sequence // (sequence - 4) == 1", {"sequence": 4})
    assert not holds("**8".join(["sequence"]) + " ** 8 * sequence ** 8 * sequence ** 8 > 0", {"sequence": 10**40})


def test_rules_in_words() -> None:
    said = all_in_words(("sequence % 4 == 0", "sequence >= 8", "batch * sequence <= 40", "(-1)*batch > -5"))
    assert set(said) == {
        "the batch size must be at most 4",
        "the sequence size must be divisible by 4 and at least 8",
        "the sizes batch, sequence must satisfy batch * sequence <= 40",
    }
