"""A rank's torch program as the engine uses it: ids and logits are numpy arrays on the host."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import position_limit, text_input, vocabulary
from kraken_compiler.runtime.decoder import Array, Decoder, RecomputingDecoder, decoder_of_sources
from kraken_compiler.runtime.derived_inputs import reads_source
from kraken_compiler.runtime.logits import logits_function


class TorchModel:
    """A rank's program as a language model.

    Attributes:
        vocabulary: Number of tokens the model knows, None if its graph does not say.
        positions: The longest sequence that the model takes, as far as its graph says.
        reads_source: True for an encoder-decoder, whose prompts are read by its encoder.
    """

    def __init__(self, manifest: Manifest, program: RankProgram, device: torch.device) -> None:
        """Wrap a program.

        Args:
            manifest: The artifact's.
            program: This rank's.
            device: Where it computes.
        """
        self._manifest, self._program, self._device = manifest, program, device
        graph = Program(program.graph, manifest.weight_table, manifest.inputs, manifest.call, degree=manifest.degree)
        self.reads_source = reads_source(manifest.inputs)
        self.vocabulary = vocabulary(graph) if text_input(graph) is not None else None
        proven = manifest.cache.plan.limit if manifest.cache is not None else None
        self.positions = min(position_limit(graph), proven or sys.maxsize)

    def decoder(
        self, batch: int, capacity: int, *, compiled: bool = False, sources: Sequence[Sequence[int]] = ()
    ) -> Decoder[Array]:
        """Room for a batch of rows.

        Args:
            batch: Number of rows.
            capacity: Most tokens of a row, prompt and new ones together.
            compiled: Run the steps through torch.compile.
            sources: Token ids of the text that an encoder-decoder reads, for every row.

        Raises:
            UsageError: A program without a KV cache cannot be compiled here, or the positions end before the capacity.
        """
        program, manifest = self._program, self._manifest
        if program.has_cache:
            return HostDecoder(program.decoder(batch, capacity, compiled=compiled), self._device)
        if compiled:
            why = f": {manifest.no_cache}" if manifest.no_cache else ""
            raise UsageError(f"--compile needs a program with a KV cache; this one has none{why}")
        logits_of = on_host(logits_function(manifest.inputs, manifest.call, program.run_flat), self._device)
        if self.reads_source:
            return decoder_of_sources(logits_of, sources, capacity)
        return RecomputingDecoder(logits_of, batch, capacity)


class HostDecoder:
    """A decoder whose ids and logits are tensors, as one that has them as arrays on the host.

    Attributes:
        batch, capacity, identical_on_all_ranks: The decoder's.
    """

    def __init__(self, decoder: Decoder[Tensor], device: torch.device | str = "cpu") -> None:
        """Wrap a decoder.

        Args:
            decoder: With tensors.
            device: Where it takes them.
        """
        self.batch, self.capacity = decoder.batch, decoder.capacity
        self.identical_on_all_ranks = decoder.identical_on_all_ranks
        self._decoder = decoder
        self._prefill = on_host(decoder.prefill, device)
        self._step = on_host(decoder.step, device)

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """See `Decoder.prefill`."""
        return self._prefill(ids, lengths)

    def step(self, tokens: Array) -> Array:
        """See `Decoder.step`."""
        return self._step(tokens)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self._decoder.reset()


def on_host(compute: Callable[..., Tensor], device: torch.device | str = "cpu") -> Callable[..., Array]:
    """A function of tensors on a device as one of arrays on the host, without gradients.

    Args:
        compute: Tensors -> floating-point tensor.
        device: Where it computes.

    Returns:
        Arrays -> float32 array of the same shape; numpy knows no bfloat16.
    """

    @torch.inference_mode()
    def compute_on_host(*arrays: Array) -> Array:
        result: Array = compute(*(torch.tensor(array, device=device) for array in arrays)).float().cpu().numpy()
        return result

    return compute_on_host
