"""Capture a Kraken model (`native/`): one of its lanes, whose graph is that of all.

By itself a lane is an ordinary Transformer of the width of its stream, so recognition finds its branches by dataflow as
in any other. What the lanes do together is not in that graph; `passes/form/join_streams.py` puts it there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.captured_model import Capture, Origin, TokenizerSource, digest_tensors, files_digester
from kraken_compiler.capture.example_inputs import CallExample
from kraken_compiler.capture.export_module import export_module
from kraken_compiler.capture.from_huggingface import tokenizer_in
from kraken_compiler.capture.from_module import class_name
from kraken_compiler.capture.live_weights import require_weights
from kraken_compiler.capture.run_source import module_reference
from kraken_compiler.capture.weightless import fake_parameters
from kraken_compiler.errors import Rejection, UnsupportedModelError
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.native.config import KrakenConfig
from kraken_compiler.native.directory import CONFIG_FILE, WEIGHTS_FILE, load_native, native_config
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.passes.form.join_streams import ANY_LANE, lane_source
from kraken_compiler.weights.store import MemoryStore


class _Lane(nn.Module):
    """The first lane of a model by itself."""

    def __init__(self, model: KrakenLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        model, lane = self.model, self.model.lane(0)
        x, rotation = model.embedded(input_ids), model.rotation(input_ids)
        for number in range(model.config.layers):
            layer = lane.layer(number)
            own = x + layer.attend(x, rotation)
            x = own + layer.think(own)
        return model.logits(lane.joined(x))


class _Store(MemoryStore):
    """The tensors of a model; of a name with `ANY_LANE` those of all lanes, one behind the other."""

    def __init__(self, model: KrakenLM) -> None:
        super().__init__(model.state_dict())
        self._degree = model.config.degree

    @property
    def read(self) -> SourceReader:
        whole = super().read

        def read_source(name: str) -> Tensor:
            if ANY_LANE not in name:
                return whole(name)
            return torch.cat([whole(lane_source(name, lane)) for lane in range(self._degree)])

        return SourceReader(read_source, lambda name: None if ANY_LANE in name else whole.rows_of(name))


def capture_native(
    model: KrakenLM,
    *,
    dtype: torch.dtype | None = None,
    path: str | None = None,
    digest: Callable[[], str] | None = None,
    tokenizer: TokenizerSource | None = None,
) -> Capture:
    """Capture a Kraken model.

    Args:
        model: The model.
        dtype: Convert it to this type first, in place.
        path, digest, tokenizer: For `Origin`, if it was loaded from a directory.

    Raises:
        UnsupportedModelError: It cannot be captured, or a part of it was exchanged.
    """
    if dtype is not None:
        model.to(dtype)
    require_weights(model)
    _require_plain(model)
    return _captured(model, path=path, digest=digest, tokenizer=tokenizer)


def _require_plain(model: KrakenLM) -> None:
    """Refuse a model in which somebody has exchanged a part: what is captured is one lane, for all of them."""
    with torch.device("meta"):
        plain = KrakenLM(model.config)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    shapes = {name: tensor.shape for name, tensor in plain.named_parameters()}
    for name, module in model.named_modules():
        hooks = module._forward_hooks or module._forward_pre_hooks
        if type(module) is not kinds.pop(name, None) or hooks:
            what = "has hooks" if hooks else f"is a {type(module).__name__}, which no Kraken model has there"
            raise UnsupportedModelError([Rejection(what, path=name, hint="Compile the model as it was built.")])
    wrong = next((name for name, tensor in model.named_parameters() if shapes.pop(name, None) != tensor.shape), None)
    missing = wrong or next(iter([*kinds, *shapes]), None)
    if missing is not None:
        reason = "does not have the shape that the config says" if wrong else "is missing"
        raise UnsupportedModelError([Rejection(reason, path=missing, hint="Compile the model as it was built.")])


def capture_native_directory(
    path: Path, *, dtype: torch.dtype | None = None, with_weights: bool = True, hash_early: bool = False
) -> Capture:
    """Capture the Kraken model that a directory holds.

    Args:
        path: The directory.
        dtype: Convert it to this element type; None leaves its own.
        with_weights: False needs no weight file: a plan reads none.
        hash_early: See `capture`.

    Raises:
        InputFileError: A file is missing or damaged.
        UsageError, UnsupportedModelError: See `capture_native`.
    """
    if with_weights:
        digest = files_digester((path / CONFIG_FILE, path / WEIGHTS_FILE), early=hash_early)
        model = load_native(path, dtype)
        return capture_native(model, path=str(path), digest=digest, tokenizer=tokenizer_in(path))
    config = native_config(path)
    assert config is not None, "the caller has looked"
    return capture_native_config(config, dtype, path=str(path))


def capture_native_config(
    config: KrakenConfig, dtype: torch.dtype | None = None, *, path: str | None = None
) -> Capture:
    """Capture a Kraken model of which there are no weights, to plan with."""
    with torch.device("meta"):
        model = KrakenLM(config).to(dtype or torch.float32).eval()
    captured = _captured(model, path=path, digest=lambda: "", tokenizer=None)
    return replace(captured, model=None)


def _captured(
    model: KrakenLM,
    *,
    path: str | None,
    digest: Callable[[], str] | None,
    tokenizer: TokenizerSource | None,
) -> Capture:
    has_values = model.embedding.weight.device.type != "meta"
    ids = torch.ones(2, min(16, model.config.context), dtype=torch.int64)
    example = CallExample(kwargs={"input_ids": ids.to(model.embedding.weight.device) if has_values else ids})
    with nullcontext() if has_values else fake_parameters(model) as mode:
        call = example if mode is None else example.map_tensors(mode.from_tensor)
        exported = export_module(_Lane(model).train(model.training), call, allow_strict=has_values)
    program, notes = build_program(exported, parameters=("input_ids",), model_class=class_name(model))
    store = _Store(model)
    return Capture(
        program=program,
        store=store,
        origin=Origin(
            kind="native",
            path=path,
            model_class=class_name(model),
            digest=digest or (lambda: digest_tensors(store)),
            tokenizer=tokenizer,
        ),
        config={"max_position_embeddings": model.config.context, **model.config.to_dict()},
        notes=notes,
        model=partial(module_reference, model, example, program.inputs),
        lanes=model.config.degree,
    )
