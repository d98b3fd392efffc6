"""The lanes with quantized weights: what quantized devices are compared with."""

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
    quantized: dict[str, tuple[Quantization, bool]] = {}
    for node in model.proto.graph.node:
        if node.op_type == QUANTIZED_PRODUCT:
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            noted = {entry.key: entry.value for entry in node.metadata_props}
            how = Quantization(settings["bits"], settings["block_size"])
            quantized[noted[NODE_WEIGHT]] = how, noted[NODE_TRANSPOSED] == str(True)

    def read(spec: WeightSpec, lane: int) -> Tensor:
        local = read_lane(spec, lane)
        if spec.name not in quantized:
            return local
        how, transposed = quantized[spec.name]
        stored = local.t() if transposed else local
        weight = dequantize(quantize(stored.to(spec.torch_dtype), how), stored.shape[0], how)
        return (weight.t() if transposed else weight).contiguous()

    return read
