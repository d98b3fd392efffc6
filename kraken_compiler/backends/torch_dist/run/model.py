"""A rank's torch program as its backend opens it: inputs and outputs are numpy arrays on the host."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Array, RankModel
from kraken_compiler.backends.lane_graph.run_graph import on_host
from kraken_compiler.backends.torch_dist.run.cached_decoder import CachedDecoder
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.sample_inputs import position_limit, text_input, vocabulary
from kraken_compiler.ranks.communicators.join import communicator_of, rank_device

if TYPE_CHECKING:
    from kraken_compiler.backends.torch_dist.backend import TorchOptions
    from kraken_compiler.ranks.session import Ranks

_COMPILE_SECONDS = 1800.0


class TorchModel(RankModel):
    """A rank's program; see `RankModel`.

    Attributes:
        program: As a module.
        device: Where it computes.
    """

    def __init__(self, artifact: Artifact, ranks: Ranks, options: TorchOptions) -> None:
        """Load it.

        Args:
            artifact: An open artifact, whose files have been verified.
            ranks: This rank.
            options: What was chosen.

        Raises:
            UsageError: A program without a KV cache cannot be compiled here.
            InputFileError: A file is damaged.
        """
        manifest = artifact.manifest
        if options.compile and manifest.cache is None:
            reason = f": {manifest.no_cache}" if manifest.no_cache else ""
            raise UsageError(f"--compile needs a program with a KV cache; this one has none{reason}")
        self.device = rank_device(options.device, ranks.place)
        ranks.status.computes_here = self.device.type == "cpu"
        self.program = RankProgram.load(
            artifact, ranks.rank, device=self.device, verify=False, communicator=communicator_of(ranks, self.device)
        )
        self.can_cut_rows = self.program.can_cut_rows
        self.identical_on_all_ranks = self.program.gathers(manifest.call.logits)
        self.first_seconds = _COMPILE_SECONDS if options.compile else 0.0
        self._compiled = options.compile
        self._one_machine = ranks.one_machine
        self.setting = f"torch {self.device.type}{' compiled' if options.compile else ''}"
        self._inputs = manifest.inputs
        graph = Program(
            self.program.graph, manifest.weight_table, manifest.inputs, manifest.call, degree=manifest.degree
        )
        self.vocabulary = vocabulary(graph) if text_input(graph) is not None else None
        limit = manifest.cache.plan.limit if manifest.cache is not None else None
        self.positions = min(position_limit(graph), limit or sys.maxsize)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """See `RankModel.run`."""
        return self._run(inputs, 0)

    @torch.inference_mode()
    def run_rows(self, inputs: Mapping[str, Array], cut: int) -> Sequence[Array]:
        """See `RankModel.run_rows`."""
        return self._run(inputs, cut)

    def _run(self, inputs: Mapping[str, Array], cut: int) -> Sequence[Array]:
        tensors = [self._tensor(spec.dtype, inputs[spec.name]) for spec in self._inputs]
        return [on_host(output) for output in self.program.run_flat(tensors, cut)]

    def decoder(self, batch: int, capacity: int) -> CachedDecoder:
        """See `RankModel.decoder`."""
        return self.program.decoder(batch, capacity, compiled=self._compiled, one_machine=self._one_machine)

    def _tensor(self, dtype: str, array: Array) -> Tensor:
        return torch.tensor(array, dtype=getattr(torch, dtype), device=self.device)
