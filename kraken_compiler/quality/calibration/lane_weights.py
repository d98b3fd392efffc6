"""Weights that calibration changed, over those of the source."""

from __future__ import annotations

from torch import Tensor

from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.reference import ReadLane
from kraken_compiler.weights.lane_tensors import lane_tensor_reader, with_lane_tensors


class LaneWeights:
    """Changed weights over a reader of unchanged ones.

    Args:
        read_lane: Gives the unchanged weights' lane tensors.
        degree: Number of lanes.

    Attributes:
        degree: Number of lanes.
    """

    def __init__(self, read_lane: ReadLane, degree: int) -> None:
        self._read_lane, self.degree = read_lane, degree
        self._tensors: dict[str, list[Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the changed weights in the lane program's weight table."""
        return tuple(self._tensors)

    def read_lane(self, spec: WeightSpec, lane: int) -> Tensor:
        """One lane's tensor of a weight, changed or not."""
        tensors = self._tensors.get(spec.name)
        return tensors[lane] if tensors is not None else self._read_lane(spec, lane)

    def change(self, spec: WeightSpec, lanes: list[Tensor]) -> None:
        """Give a weight new values, one tensor of the spec's local shape per lane; they are stored in its dtype."""
        assert len(lanes) == self.degree
        assert all(tuple(lane.shape) == spec.shape for lane in lanes)
        self._tensors[spec.name] = [lane.to(spec.torch_dtype).contiguous() for lane in lanes]

    def in_program(self, program: LaneProgram, read: SourceReader) -> tuple[LaneProgram, SourceReader]:
        """The lane program with the changed weights in its weight table, and the reader of its source tensors.

        Args:
            program: The lane program that was calibrated.
            read: Gives the source's tensors.
        """
        changed_program = with_lane_tensors(program, self.names)
        return changed_program, lane_tensor_reader(changed_program.weights, self.degree, self.read_lane, read)
