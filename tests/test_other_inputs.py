"""Models that take images, sound or two texts: every form in one process, on ranks, and as ONNX devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import Capture, capture
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.passes.stages import with_halves
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.overlap import require_overlap
from tests.table_notes import note
from tests.test_families import CHANGED, DEGREES, relative_error
from tests.zoo import OTHER_INPUTS

pytestmark = pytest.mark.slow

DEGREE = 2
"""Of ranks and devices."""

UNEVEN = 3
"""Divides neither heads nor FFN columns."""

NO_ROWS = {"whisper": "arange computes with the number of rows"}
"""Those whose batches cannot run as two halves, and why: Whisper's decoder picks its mask's rows by number."""

EVERY_MODEL = pytest.mark.parametrize("name", OTHER_INPUTS, scope="session")


@dataclass(frozen=True)
class Captured:
    """A model, what it takes and what it says to that."""

    model: nn.Module
    capture: Capture
    given: dict[str, Tensor]
    logits: Tensor


@lru_cache(maxsize=2)
def captured(name: str) -> Captured:
    model, inputs = OTHER_INPUTS[name].build(), OTHER_INPUTS[name].inputs
    given = inputs(3, 5)
    with torch.no_grad():
        logits = model(**given).logits
    return Captured(model, capture(model, example_inputs=inputs(2, 0)), given, logits)


def lanes_of(name: str, degree: int, form: str) -> LaneModule:
    """The lanes of a model, whose batches can also run as two halves."""
    found = captured(name).capture
    program = with_halves(lower(found.program, degree, form)[0])
    assert (program.rows is None) == (name in NO_ROWS), program.no_rows
    assert NO_ROWS.get(name, "") in program.no_rows
    return LaneModule.from_program(program, found.store.read)


@EVERY_MODEL
def test_every_form(name: str) -> None:
    found = captured(name)
    exact = []
    for degree in DEGREES:
        for form in FORMS:
            lanes = lanes_of(name, degree, form)
            program = lanes.program
            require_overlap(program.windows)
            assert (program.layers.encoder is not None) == OTHER_INPUTS[name].is_encoder_decoder
            assert "".join(branch.kind[0] for branch in program.layers.branches) == OTHER_INPUTS[name].branches
            assert program.cached is None
            with torch.no_grad():
                error = relative_error(lanes(**found.given).logits, found.logits)
            assert error < 1e-4 if form == "standard" else error > CHANGED, f"degree {degree}, {form}: {error}"
            exact += [error] * (form == "standard")
    with torch.no_grad():
        uneven = relative_error(lanes_of(name, UNEVEN, "standard")(**found.given).logits, found.logits)
    assert uneven < 1e-4
    note("lanes", name, error=max(exact), forms=list(FORMS))
    note("uneven", name, errors={UNEVEN: uneven})
    note("cache", name, reason=program.no_cache)


@EVERY_MODEL
def test_devices_compute_what_the_lanes_compute(name: str, tmp_path: Path) -> None:
    errors = {}
    for form in ("standard", "kraken"):
        lanes, given = lanes_of(name, DEGREE, form), captured(name).given
        directory = tmp_path / form
        directory.mkdir()
        windows = OnnxBackend().write(lanes.program, captured(name).capture.store.read, directory)
        assert [len(one.gemms) for one in windows] == [len(one.gemms) for one in lanes.program.windows]
        with torch.no_grad():
            want = lanes(**given).logits
        errors[form] = max(relative_error(have, want) for have in _by_devices(directory, given))
    note("onnx", name, **errors)
    assert max(errors.values()) <= 1e-5, errors


def _by_devices(directory: Path, given: dict[str, Tensor]) -> list[Tensor]:
    """Every device's logits, of the whole batch and of its rows in two halves."""
    models = [DeviceModel.load(directory / device_file(device)) for device in range(DEGREE)]
    arrays = {name: value.numpy() for name, value in given.items()}

    def act(collectives: Ranks) -> list[Tensor]:
        model = models[collectives.rank]
        program = DeviceProgram(model, collectives, threads=1)
        whole = torch.from_numpy(program.run(whole_feeds(model, arrays))[LOGITS].copy())
        parts = [{name: value[part] for name, value in arrays.items()} for part in (slice(1), slice(1, None))]
        halves = program.run_batches([whole_feeds(model, part) for part in parts])
        return [whole, torch.cat([torch.from_numpy(half[LOGITS].copy()) for half in halves])]

    results: list[list[Tensor]] = together(DEGREE, act)
    return [logits for of_device in results for logits in of_device]


@pytest.mark.timeout(900)
def test_ranks_equal_the_single_process(tmp_path: Path) -> None:
    """All models in all forms, in one launch."""
    wanted: dict[str, Tensor] = {}
    for name in OTHER_INPUTS:
        found = captured(name)
        save_file(found.given, tmp_path / f"{name}.safetensors")
        for form in FORMS:
            lanes = lanes_of(name, DEGREE, form)
            with torch.no_grad():
                wanted[f"{name}.{form}"] = lanes(**found.given).logits
            if name not in NO_ROWS:
                wanted[f"{name}.{form} rows"] = wanted[f"{name}.{form}"]
            read = lanes.program.reader(found.capture.store.read)
            source, backends = Source(kind="module", name=name), [TorchBackend()]
            write_artifact(lanes.program, read, tmp_path / f"{name}.{form}", source=source, backends=backends)
    programs = [program for program in wanted if not program.endswith(" rows")]
    payload = {"directory": str(tmp_path), "programs": programs}
    run_ranks("tests.rank_functions:run_on_inputs", DEGREE, payload, timeout=120)
    errors: dict[str, float] = {}
    for rank in range(DEGREE):
        have = load_file(tmp_path / f"out-{rank}.safetensors")
        assert have.keys() == wanted.keys()
        for program, want in wanted.items():
            errors[program] = max(errors.get(program, 0.0), relative_error(have[program], want))
    for name in OTHER_INPUTS:
        whole, rows = ([errors.get(f"{name}.{form}{how}") for form in FORMS] for how in ("", " rows"))
        of_rows = None if name in NO_ROWS else max(rows)
        note("ranks", name, degree=DEGREE, forms=list(FORMS), error=max(whole), rows=of_rows)
    assert max(errors.values()) <= 1e-5, errors
