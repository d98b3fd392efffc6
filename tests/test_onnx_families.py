"""Every family as ONNX devices on stock ONNX Runtime: N devices compute what the lanes compute in one process.

The devices of a program run in threads here, so that no test pays for the start of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import replay, replay_halves, split_lengths
from tests.table_notes import note
from tests.test_families import EVERY_FAMILY, SIZES, lane_program, recognized, relative_error
from tests.zoo import token_batch

DEGREE = 2
FORMS_WITH_DEVICES = ("standard", "kraken")
TOLERANCE = 1e-5


def computed_by_devices(
    directory: Path, batches: list[Tensor], degree: int = DEGREE, *, halves: bool = False
) -> list[list[Tensor]]:
    """Every device's logits of every batch, and last those of the last batch with the KV cache, also in halves."""
    models = [DeviceModel.load(directory / device_file(device)) for device in range(degree)]

    def act(collectives: Ranks) -> list[Tensor]:
        model = models[collectives.rank]
        program = DeviceProgram(model, collectives, threads=1)
        feeds = [whole_feeds(model, {"input_ids": ids.numpy()}) for ids in batches]
        results = [torch.from_numpy(logits_in(program.run(given)).copy()) for given in feeds]
        if model.caches:
            decoder = ArrayDecoder(program, *batches[-1].shape)
            results.append(torch.from_numpy(replay(decoder, batches[-1].numpy())))
            if halves:
                results.append(torch.from_numpy(replay_halves(decoder, batches[-1].numpy(), 2)))
        elif halves:
            parts = [whole_feeds(model, {"input_ids": ids.numpy()}) for ids in (batches[-1][:1], batches[-1][1:])]
            outputs = program.run_batches(parts)
            results.append(torch.cat([torch.from_numpy(logits_in(of_part).copy()) for of_part in outputs]))
        return results

    results: list[Any] = together(degree, act)
    return results


def logits_in(outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Modules that return a tensor and no name for it have one output."""
    if LOGITS in outputs:
        return outputs[LOGITS]
    (only,) = outputs.values()
    return only


@EVERY_FAMILY
def test_devices_compute_what_the_lanes_compute(name: str, tmp_path: Path) -> None:
    model, read = recognized(name).model, recognized(name).read
    batches = [token_batch(model, *size, seed) for seed, size in enumerate(SIZES)]
    wrong, errors = [], {}
    for form in FORMS_WITH_DEVICES:
        program = lane_program(name, DEGREE, form)
        directory = tmp_path / form
        directory.mkdir()
        windows = OnnxBackend().write(program, read, directory)
        # Attention with capped scores or sinks is one operator in the program and two products in plain operators.
        assert all(len(one.gemms) >= len(other.gemms) for one, other in zip(windows, program.windows, strict=True))
        lanes = LaneModule.from_program(program, read)
        with torch.no_grad():
            want = [lanes.run_flat([ids])[0] for ids in batches]
        if program.cached is not None:
            rows = expected(want[-1], *split_lengths(*SIZES[-1]))
            want += [rows, rows[:, [0, -1]]]
        else:
            want.append(want[-1])
        for device, have in enumerate(computed_by_devices(directory, batches, halves=True)):
            found = [relative_error(one, other) for one, other in zip(have, want, strict=True)]
            errors[form] = max(*found, errors.get(form, 0.0))
            if not max(found) <= TOLERANCE:
                wrong.append(f"{form}, device {device}: relative errors {found}")
    note("onnx", name, **errors)
    assert not wrong, "\n".join(wrong)
