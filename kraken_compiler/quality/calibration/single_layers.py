"""Lane weights for single layers in a form, calibrated as if each of them were alone.

What a form costs in a layer before calibration says little about what it costs after it: a late read that is linear in
a fresh one costs nothing any more. One calibration serves several layers: every third layer takes the form, and the two
standard ones between them are refitted, too, to make up for what the one before them lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import LaneProgram, Split
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.reference import ReadLane
from kraken_compiler.passes.lower import lower_split
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.calibration.refittable import find_refittable

APART = 3
"""Distance between layers that are calibrated together."""


class SingleLayers:
    """Calibrates single layers, those of a group together; the last group's weights are kept.

    Args:
        split: The model's program, split over the lanes.
        standard: The same in standard form.
        read_lane: Gives the source's weights.
        batches: Flat inputs to calibrate on.
        batch_is_held_out: See `calibrate`.
    """

    def __init__(
        self,
        split: Split,
        standard: LaneProgram,
        read_lane: ReadLane,
        batches: Sequence[list[Tensor]],
        batch_is_held_out: Sequence[bool],
    ) -> None:
        self._split, self._standard, self._read_lane = split, standard, read_lane
        self._batches, self._batch_is_held_out = batches, batch_is_held_out
        self._count = len(split.layers.layers)
        self._group: tuple[str, int] | None = None
        self._weights: LaneWeights | None = None
        self._layer_of: dict[str, int] = {}

    @property
    def ids(self) -> list[Tensor]:
        """The token ids that they are calibrated on."""
        return [inputs[0] for inputs in self._batches]

    def in_order(self) -> list[int]:
        """All layers, group by group, so that every group is calibrated once."""
        return sorted(range(self._count), key=lambda layer: (layer % APART, layer))

    def reader(self, form: str, layer: int) -> ReadLane:
        """A reader of the weights of the program in which this layer alone has the form."""
        if self._group != (form, layer % APART):
            self._calibrate(form, layer % APART)
        weights, layer_of = self._weights, self._layer_of
        assert weights is not None

        def read(spec: WeightSpec, lane: int) -> Tensor:
            of_group = layer <= layer_of.get(spec.name, -1) < layer + APART
            return weights.read_lane(spec, lane) if of_group else self._read_lane(spec, lane)

        return read

    def _calibrate(self, form: str, shift: int) -> None:
        forms = tuple(form if layer % APART == shift else STANDARD.name for layer in range(self._count))
        program = lower_split(self._split, forms, cached=False)
        # The group before goes first: it is as large as the model.
        self._weights, self._group = None, None
        self._layer_of = _layers_of_weights(program)
        self._weights = calibrate(
            self._standard, program, self._read_lane, self._batches, self._batch_is_held_out
        ).weights
        self._group = (form, shift)


def _layers_of_weights(program: LaneProgram) -> dict[str, int]:
    """The layer of every weight that calibration may change, by name."""
    layer_of = {}
    for refittable in find_refittable(program):
        if isinstance(refittable, Rejection):
            continue
        for projection in (*(one for group in refittable.inputs for one in group), refittable.output):
            for spec in (projection.weight, projection.bias):
                if spec is not None:
                    layer_of[spec.name] = refittable.branch.layer
    return layer_of
