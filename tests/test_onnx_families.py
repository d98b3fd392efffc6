"""Every family as ONNX devices on stock ONNX Runtime: N devices compute what the lanes compute in one process.

The devices of a program run in threads here, so that no test pays for the start of processes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kraken_compiler.backends.onnx_ort.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.emit import OnnxBackend
from kraken_compiler.backends.onnx_ort.feeds import whole_feeds
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.runtime.execute_onnx import TensorDecoder
from kraken_compiler.runtime.replay import expected, replay, split_lengths
from tests.test_families import EVERY_FAMILY, SIZES, lane_program, recognized, relative_error
from tests.thread_collectives import ThreadCollectives, together
from tests.zoo import SUPPORTED, token_batch

ROOT = Path(__file__).resolve().parent.parent
DEGREE = 2
FORMS_WITH_DEVICES = ("standard", "kraken")
TOLERANCE = 1e-5


def computed_by_devices(directory: Path, batches: list[Tensor], degree: int = DEGREE) -> list[list[Tensor]]:
    """Every device's logits of every batch, and last those of the last batch with the KV cache."""
    models = [DeviceModel.load(directory / device_file(device)) for device in range(degree)]

    def act(collectives: ThreadCollectives) -> list[Tensor]:
        model = models[collectives.rank]
        program = DeviceProgram(model, collectives, threads=1)
        feeds = [whole_feeds(model, {"input_ids": ids.numpy()}) for ids in batches]
        results = [torch.from_numpy(program.run(given)[LOGITS].copy()) for given in feeds]
        if model.caches:
            decoder = ArrayDecoder(program, *batches[-1].shape)
            results.append(replay(TensorDecoder(decoder), batches[-1]))
        return results

    results: list[Any] = together(degree, act)
    return results


@EVERY_FAMILY
def test_devices_compute_what_the_lanes_compute(name: str, tmp_path: Path) -> None:
    model, read = recognized(name).model, recognized(name).read
    batches = [token_batch(model, *size, seed) for seed, size in enumerate(SIZES)]
    wrong = []
    for form in FORMS_WITH_DEVICES:
        program = lane_program(name, DEGREE, form)
        directory = tmp_path / form
        directory.mkdir()
        windows = OnnxBackend().write(program, read, directory)
        assert [len(one.gemms) for one in windows] == [len(one.gemms) for one in program.windows]
        lanes = LaneModule.from_program(program, read)
        with torch.no_grad():
            want = [lanes.run_flat([ids])[0] for ids in batches]
        if program.cached is not None:
            want.append(expected(want[-1], *split_lengths(*SIZES[-1])))
        for device, have in enumerate(computed_by_devices(directory, batches)):
            found = [relative_error(one, other) for one, other in zip(have, want, strict=True)]
            if not max(found) <= TOLERANCE:
                wrong.append(f"{form}, device {device}: relative errors {found}")
        record(name, form, max(found))
    assert not wrong, "\n".join(wrong)


def record(name: str, form: str, error: float) -> None:
    """Note a result for the table in the docs, if somebody collects them (`make tables`)."""
    directory = os.environ.get("KRAKEN_TABLES")
    if directory:
        content = {"family": name, "form": form, "error": error}
        Path(directory, f"onnx.{name}.{form}.json").write_text(json.dumps(content))


def test_the_table_in_the_docs_has_every_family() -> None:
    lines = (ROOT / "docs" / "onnx-families.md").read_text().splitlines()
    rows = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert rows == sorted(SUPPORTED)
