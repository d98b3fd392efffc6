"""The lanes with quantized weights: what quantized devices are compared with."""

from __future__ import annotations

from torch import Tensor

from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.format import NODE_TRANSPOSED, NODE_WEIGHT, QUANTIZED_PRODUCT
from kraken_compiler.backends.onnx_ort.quantization import QUANTIZATIONS, dequantize, quantize
from kraken_compiler.backends.single.streaming import ReadLane
from kraken_compiler.ir.weight_table import WeightSpec


def read_as_quantized(model: DeviceModel, read_lane: ReadLane) -> ReadLane:
    """The lanes' weights as a device's quantized products see them.

    Args:
        model: A device file; says which weights are quantized how.
        read_lane: The weights before.
    """
    if model.weights is None:
        return read_lane
    quantization = QUANTIZATIONS[model.weights]
    transposed = {}
    for node in model.proto.graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}
        if node.op_type == QUANTIZED_PRODUCT:
            transposed[noted[NODE_WEIGHT]] = noted[NODE_TRANSPOSED] == str(True)

    def read(spec: WeightSpec, lane: int) -> Tensor:
        local = read_lane(spec, lane)
        if spec.name not in transposed:
            return local
        stored = local.t() if transposed[spec.name] else local
        weight = dequantize(quantize(stored.to(spec.torch_dtype), quantization), stored.shape[0], quantization)
        return (weight.t() if transposed[spec.name] else weight).contiguous()

    return read
