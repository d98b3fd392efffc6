"""First weights of a Kraken model out of a standard one: heads and FFN columns for every lane, on a projected stream.

A lane's stream is narrower than the standard model's. It is that stream seen through P [C, w], whose columns span most
of what the streams before all norms are on some text; what a branch reads is the projected stream times what the
projection has taken from its norm, what it writes is projected. The lanes' streams begin with a part of the embedding
each, so that their sum is the standard stream. That is a place to begin and not the same function: a lane's attention
reads its own stream alone. The parts are found by dataflow and proved: as a model of one lane and of the same width
they must give the standard model's own logits.

Legend: C width of the standard stream, w of a lane's, G query heads of a KV head, D width of a head, F FFN columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kraken_compiler.capture import Capture
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.shards import WHOLE
from kraken_compiler.lanes.logits import inputs_function, logits_function
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.native.config import LAYER_NORM, LEARNED, RMS_NORM, SWIGLU, KrakenConfig
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.passes.lower import lower
from kraken_compiler.texts.read import longest_row
from kraken_compiler.training.from_scratch.standard_model import Affine, Norm, Standard, taken_apart, unsupported

_TOLERANCE = 1e-3
"""Of the logits, relative to the largest."""
_ROWS_AT_ONCE = 4


def upcycled(config: KrakenConfig, captured: Capture, rows: Tensor) -> KrakenLM:
    """A Kraken model whose weights are taken from a standard one.

    Args:
        config: Of the Kraken model; its heads are as wide as those of the standard model, and its layers as many.
        captured: The standard model, in float32.
        rows: Token ids that it reads, int64 [B, S], to find out what is in its stream.

    Raises:
        UsageError: The sizes do not go together.
        UnsupportedModelError: The model computes something that no Kraken model does.
    """
    parts = taken_apart(captured)
    _require_fitting(config, parts)
    ids = rows[:, : longest_row(captured, config.context)]
    _require_same(config, parts, captured, ids[:2])
    projection_Cw, captured_share = _projection(captured, ids, config)
    return _filled(KrakenLM(config), parts, projection_Cw, captured_share)


def _require_fitting(config: KrakenConfig, parts: Standard) -> None:
    query, key, *_ = parts.layers[0].groups[0]
    head, per_key = len(key.weight), len(query.weight) // len(key.weight)
    asked: dict[str, tuple[float, float]] = {
        "layers": (config.layers, len(parts.layers)),
        "vocabulary": (config.vocabulary, len(parts.embedding)),
        "width of a head": (config.head, head),
        "query heads of a KV head": (config.heads // config.keys, per_key),
        "products of an FFN that read the stream": (2 if config.ffn == SWIGLU else 1, len(parts.layers[0].ffn)),
        "positions that are learnt": (int(config.positions == LEARNED), int(parts.positions is not None)),
        "norms that subtract the mean": (int(config.norm == LAYER_NORM), int(parts.final.subtracts)),
        "norm_epsilon": (config.norm_epsilon, parts.final.epsilon),
    }
    if config.width > parts.embedding.shape[1]:
        raise UsageError(
            f"--from: a lane's stream of {config.width} is wider than that model's, {parts.embedding.shape[1]}"
        )
    for what, (wanted, found) in asked.items():
        if wanted != found:
            raise UsageError(f"--from: {what}: {found} in that model, {wanted} in the one that is trained")


def _require_same(config: KrakenConfig, parts: Standard, captured: Capture, ids: Tensor) -> None:
    """Put the parts together again as a Kraken model of one lane and of the standard width, and compare logits."""
    query, key, *_ = parts.layers[0].groups[0]
    width, groups = parts.embedding.shape[1], len(parts.layers[0].groups)
    whole = replace(
        config,
        degree=1,
        width=groups * len(query.weight),
        heads=groups * (len(query.weight) // len(key.weight)),
        kv_heads=groups,
        expansion=len(parts.layers[0].ffn[0].weight) / width,
    )
    if whole.width != width:
        raise UsageError(f"--from: the heads of that model are {whole.width} wide together, its stream {width}")
    model = _filled(KrakenLM(whole), parts, torch.eye(width), 1.0)
    program = captured.program
    read_lane = read_from_source(program, captured.store.read)
    source = logits_function(program.inputs, program.call, StreamingProgram(program, read_lane).run_flat)
    with torch.no_grad():
        want, have = source(ids).float(), model(ids)
    error = ((have - want).abs().max() / want.abs().max()).item()
    if not error <= _TOLERANCE:
        reason = f"it computes something that no Kraken model does: of its parts come logits that are {error:.1e} off"
        raise unsupported(reason, ())


def _projection(captured: Capture, ids: Tensor, config: KrakenConfig) -> tuple[Tensor, float]:
    """P [C, w], and the share of the normed streams' squares that is in its span."""
    covariance: Tensor | None = None
    program, _ = lower(captured.program, 1, "standard", embedding=WHOLE, cached=False)
    names = list(dict.fromkeys(branch.stream for branch in program.layers.branches))
    streaming = StreamingProgram(program, read_from_source(program, captured.store.read))
    for batch in torch.split(ids, _ROWS_AT_ONCE):
        _, streams = streaming.run_with_taps(inputs_function(program.inputs)(batch), names)
        for x in streams.values():
            x_TC = x.flatten(0, -2).double()
            if config.norm == LAYER_NORM:
                x_TC = x_TC - x_TC.mean(-1, keepdim=True)
            x_TC = x_TC / x_TC.norm(dim=-1, keepdim=True).clamp_min(1e-9)
            covariance = x_TC.T @ x_TC + (0 if covariance is None else covariance)
    assert covariance is not None
    width = len(covariance)
    spanned = covariance
    if config.norm == LAYER_NORM:
        # The mean is a direction of its own, and that of the narrow stream is its image.
        spanned = covariance + torch.full_like(covariance, 1 / width) * covariance.trace()
    basis = torch.linalg.eigh(spanned).eigenvectors[:, -config.width :]
    share = ((basis.T @ covariance @ basis).trace() / covariance.trace()).item()
    if config.norm == LAYER_NORM:
        basis = basis @ _rotation_to_mean(basis.T @ torch.full((width,), width**-0.5, dtype=torch.float64))
    return basis.float(), share


def _rotation_to_mean(direction: Tensor) -> Tensor:
    """An orthogonal matrix R for which direction @ R is the mean's direction, where all coordinates are alike."""
    direction = direction / direction.norm()
    target = torch.full_like(direction, len(direction) ** -0.5)
    mirror = direction - target
    if mirror.norm() < 1e-9:
        return torch.eye(len(direction), dtype=direction.dtype)
    mirror = mirror / mirror.norm()
    return torch.eye(len(direction), dtype=direction.dtype) - 2 * torch.outer(mirror, mirror)


def _filled(model: KrakenLM, parts: Standard, projection_Cw: Tensor, share: float) -> KrakenLM:
    """Give a Kraken model the parts of a standard one; `share` is that of its stream in the projection."""
    config = model.config
    width = projection_Cw.shape[0]
    # A norm divides by the root of the mean square, which is another one of fewer coordinates.
    scale = math.sqrt(width * share / config.width)

    def reading(part: Affine, norm: Norm) -> Affine:
        return Affine(
            scale * (part.weight * norm.gain) @ projection_Cw, part.bias + part.weight @ norm.shift.expand(width)
        )

    with torch.no_grad():
        model.embedding.weight.copy_(parts.embedding @ projection_Cw / config.degree)
        if model.positions is not None and parts.positions is not None:
            positions = parts.positions[: config.context] @ projection_Cw / config.degree
            model.positions.weight[: len(positions)] = positions
        gain = parts.final.gain.expand(width)
        model.norm.weight.copy_(config.degree * scale * (projection_Cw**2).T @ gain)  # type: ignore[operator]
        if config.norm != RMS_NORM:
            model.norm.bias.copy_(config.degree * projection_Cw.T @ parts.final.shift.expand(width))  # type: ignore[operator]
        heads = _spread(len(parts.layers[0].groups), config.keys, config.degree)
        for number, layer in enumerate(parts.layers):
            bias = torch.stack([group[3].bias for group in layer.groups]).sum(0) / config.degree
            order = (layer.down.weight.norm(dim=0) * layer.ffn[-1].weight.norm(dim=1)).argsort(descending=True)
            columns = _dealt(order, config.inside, config.degree)
            for lane in range(config.degree):
                into = model.lane(lane).layer(number)
                taken = [(layer.groups[group], 1 / shared) for group, shared in heads[lane]]
                for at, module in enumerate((into.attention.query, into.attention.key, into.attention.value)):
                    _set(module, [reading(group[at], layer.norms[0]) for group, _ in taken])
                outs = [group[3].weight * part for group, part in taken]
                _set(into.attention.out, [Affine(projection_Cw.T @ torch.cat(outs, 1), projection_Cw.T @ bias)])
                chosen, shares = columns[lane]
                modules = (into.ffn.up,) if into.ffn.gate is None else (into.ffn.gate, into.ffn.up)
                for module, part in zip(modules, layer.ffn, strict=True):
                    _set(module, [reading(part, layer.norms[1]).rows(chosen)])
                down = projection_Cw.T @ (layer.down.weight[:, chosen] * shares)
                _set(into.ffn.down, [Affine(down, projection_Cw.T @ layer.down.bias / config.degree)])
        for lane in range(config.degree):
            model.lane(lane).join.weight.copy_(torch.eye(config.width))
    return model.eval()


def _set(module: torch.nn.Linear, parts: Sequence[Affine]) -> None:
    module.weight.copy_(torch.cat([part.weight for part in parts]))
    if module.bias is not None:
        module.bias.copy_(torch.cat([part.bias for part in parts]))


def _spread(count: int, each: int, lanes: int) -> list[list[tuple[int, int]]]:
    """Which of `count` heads every lane takes, `each` of them, and how many lanes have each."""
    taken = [[(lane * count // lanes + number) % count for number in range(each)] for lane in range(lanes)]
    shared = [sum(row.count(one) for row in taken) for one in range(count)]
    return [[(one, shared[one]) for one in row] for row in taken]


def _dealt(order: Tensor, each: int, lanes: int) -> list[tuple[Tensor, Tensor]]:
    """Which columns every lane takes, `each` of them, those that matter most first; and one over how many have each."""
    if each * lanes <= len(order):
        dealt = order[: each * lanes].view(each, lanes).T
    else:
        dealt = torch.stack(
            [order[(torch.arange(each) + lane * len(order) // lanes) % len(order)] for lane in range(lanes)]
        )
    counts = torch.bincount(dealt.flatten(), minlength=len(order))
    return [(row, 1 / counts[row]) for row in dealt]
