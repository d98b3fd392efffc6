"""The lanes with quantized weights, with which quantized devices are compared."""

from __future__ import annotations

from torch import Tensor

from kraken_compiler.backends.onnx_ort.format import NODE_TRANSPOSED, NODE_WEIGHT, QUANTIZED_PRODUCT
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.write.quantization import Quantization, dequantize, quantize
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.reference import ReadLane


def read_as_quantized(model: DeviceModel, read_lane: ReadLane) -> ReadLane:
    """The lanes' weights as a device's quantized products see them.

    Args:
        model: A device file; says which weights are quantized how.
        read_lane: The weights before.
    """
    if model.weights is None:
        return read_lane
    quantizations: dict[str, tuple[Quantization, bool]] = {}
    for node in model.proto.graph.node:
        if node.op_type == QUANTIZED_PRODUCT:
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            notes = {entry.key: entry.value for entry in node.metadata_props}
            quantization = Quantization(settings["bits"], settings["block_size"])
            quantizations[notes[NODE_WEIGHT]] = quantization, notes[NODE_TRANSPOSED] == str(True)

    def read(spec: WeightSpec, lane: int) -> Tensor:
        local = read_lane(spec, lane)
        if spec.name not in quantizations:
            return local
        quantization, is_transposed = quantizations[spec.name]
        matrix = local.t() if is_transposed else local
        weight = dequantize(quantize(matrix.to(spec.torch_dtype), quantization), matrix.shape[0], quantization)
        return (weight.t() if is_transposed else weight).contiguous()

    return read
