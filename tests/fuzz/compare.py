"""A random decoder against its model: rewritten, decoded with a KV cache, on ONNX devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import device_file
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.generate.decoder import Array
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.compare import errors
from kraken_compiler.weights.store import MemoryStore
from tests.fuzz.decoding import CAPACITY, PROMPTS, ROWS, STEPS, TOKENS, decoded, token_ids
from tests.fuzz.model import build
from tests.fuzz.recipe import IN_PYTHON, Recipe
from tests.lane_decoder import LaneDecoder

EXAMPLE = (2, 12)
SIZES = ((2, 12), (1, 1), (1, 2), (3, 7), (1, 24), (4, 21), (2, 1))
"""Batch and sequence sizes that are compared: the example's, ones, and both sides of every size rule's threshold."""

TOLERANCES = {"float32": 1e-4, "float64": 1e-9}
"""What the project itself allows a rewritten program."""

NOISE_FACTOR, LARGEST_NOISE = 10, 1e-2
"""What it allows in an ill-conditioned model: ten times what one bit of its weights makes, up to a limit."""

Compute = Callable[[nn.Module], Tensor]


class Wrong(AssertionError):
    """Error for a program that computes something else than the model."""


@dataclass
class Comparison:
    """What came of a recipe.

    Attributes:
        refused: Why the model was not rewritten, "" if it was.
        no_cache: Why there is no KV cache, "" if there is one.
        program: The lane program.
        read: Its weights.
        decoded: What decoding must give, [rows, steps + 1, vocabulary]; empty if there is nothing to decode with.
        refused_sizes: Sizes that the lanes do not take.
    """

    refused: str = ""
    no_cache: str = ""
    program: LaneProgram | None = None
    read: SourceReader | None = None
    decoded: Tensor = field(default_factory=lambda: torch.empty(0))
    refused_sizes: tuple[tuple[int, int], ...] = ()


def compare(recipe: Recipe, directory: Path) -> Comparison:
    """Rewrite the recipe's model and compare everything that runs in one process.

    Args:
        recipe: The model and the degree.
        directory: An empty one, for ONNX devices.

    Raises:
        Wrong: Something computes other numbers.
    """
    model = build(recipe)
    example = (token_ids(*EXAMPLE),)
    try:
        lanes = kraken_compiler.transform(model, recipe.degree, "standard", example_inputs=example)
    except UnsupportedModelError as error:
        return Comparison(refused=str(error))
    refused_sizes = tuple(size for size in SIZES if not _agrees(recipe, lanes, model, size))
    read, program = MemoryStore(build(recipe).state_dict()).read, lanes.program
    found = Comparison("", program.no_cache, program, read, refused_sizes=refused_sizes)
    # Where an `if` limits the lengths it is the runtime that keeps to them.
    if program.cached is not None and recipe.size_rule not in IN_PYTHON:
        found.decoded = recomputed(model)
        decoder = _LaneBatch(LaneDecoder(program, read, ROWS, CAPACITY))
        require_close(recipe, "decoding in one process", decoded(decoder), found.decoded, recomputed)
    if recipe.dtype == "float32":
        _compare_devices(recipe, found, directory)
    return found


def _agrees(recipe: Recipe, lanes: nn.Module, model: nn.Module, size: tuple[int, int]) -> bool:
    """Compare at one size; False if the lanes refuse it, which only sizes that the model asks about may be."""
    ids = token_ids(*size, seed=1)
    try:
        with torch.no_grad():
            have = lanes(ids)
    except UsageError:
        if recipe.size_rule not in IN_PYTHON or size == EXAMPLE:
            raise
        return False
    forward = partial(_forward, ids)
    require_close(recipe, f"lanes at {size}", have, forward(model), forward)
    return True


def _forward(ids: Tensor, model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids)
    return logits


def recomputed(model: nn.Module) -> Tensor:
    """What decoding must give: at every length the model's own forward of that length."""
    ids = token_ids(ROWS, TOKENS, seed=2)
    with torch.no_grad():
        rows = [
            [model(ids[:, : prompt + step])[row, -1] for step in range(STEPS + 1)] for row, prompt in enumerate(PROMPTS)
        ]
    return torch.stack([torch.stack(row) for row in rows])


def require_close(recipe: Recipe, what: str, have: Tensor, want: Tensor, compute: Compute) -> None:
    """Compare two results.

    Args:
        recipe: The model.
        what: What computed `have`.
        have, want: The results.
        compute: How `want` comes from the model.

    Raises:
        Wrong: They differ by more than rounding.
    """
    if have.shape != want.shape:
        raise Wrong(f"{recipe}: {what}: shape {list(have.shape)}, not {list(want.shape)}")
    _, error = errors(have, want)
    if not error <= TOLERANCES[recipe.precision]:
        _, noise = errors(compute(_nudged(build(recipe))), want)
        if not error <= min(NOISE_FACTOR * noise, LARGEST_NOISE):
            raise Wrong(f"{recipe}: {what}: relative error {error:.1e}, and one bit of its weights makes {noise:.1e}")


def _nudged(model: nn.Module) -> nn.Module:
    """The model with every weight off by one bit, up or down."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
            weight.copy_(torch.nextafter(weight, signs.to(weight.dtype) * torch.inf))
    return model


class _LaneBatch:
    """A `LaneDecoder` fed like every other decoder."""

    identical_on_all_ranks = True

    def __init__(self, decoder: LaneDecoder) -> None:
        self._decoder, self.batch, self.capacity = decoder, decoder.batch, decoder.capacity
        self._lengths = torch.zeros(self.batch, dtype=torch.int64)

    def reset(self) -> None:
        self._lengths.zero_()

    def prefill(self, ids: Array, lengths: Array) -> Array:
        self._lengths = torch.from_numpy(lengths)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self._decoder.run(torch.from_numpy(ids), positions, picks=self._lengths[:, None] - 1)[:, 0].numpy()

    def step(self, tokens: Array) -> Array:
        at = self._lengths[:, None]
        self._lengths = self._lengths + 1
        return self._decoder.run(torch.from_numpy(tokens)[:, None], at)[:, 0].numpy()


def _compare_devices(recipe: Recipe, found: Comparison, directory: Path) -> None:
    """Run the ONNX devices, in threads."""
    program, read = found.program, found.read
    assert program is not None
    assert read is not None
    if recipe.attention == "softcap" and program.cached is None:
        with pytest.raises(UsageError, match="capped scores or sinks only where it keeps a KV cache"):
            OnnxBackend().write(program, program.reader(read), directory)
        return
    OnnxBackend().write(program, program.reader(read), directory)
    models = [DeviceModel.load(directory / device_file(device)) for device in range(recipe.degree)]
    sizes = [size for size in ((3, 7), (1, 24)) if size not in found.refused_sizes]
    batches = [token_ids(*size, seed=1) for size in sizes]

    def act(collectives: Ranks) -> list[Tensor]:
        model = models[collectives.rank]
        device = DeviceProgram(model, collectives, threads=1)
        name = program.inputs[0].name
        outputs = [device.run(whole_feeds(model, {name: ids.numpy()})) for ids in batches]
        results = [torch.from_numpy(next(iter(output.values())).copy()) for output in outputs]
        if model.caches and found.decoded.numel():
            results.append(decoded(ArrayDecoder(device, ROWS, CAPACITY)))
        return results

    computed: list[Compute] = [partial(_forward, ids) for ids in batches]
    model = build(recipe)
    want = [compute(model) for compute in computed]
    if found.decoded.numel():
        computed.append(recomputed)
        want.append(found.decoded)
    for device, results in enumerate(together(recipe.degree, act)):
        for number, (one, other, compute) in enumerate(zip(results, want, computed, strict=True)):
            require_close(recipe, f"ONNX device {device}, result {number}", one, other, compute)
