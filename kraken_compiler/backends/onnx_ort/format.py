"""The names in a device file: ops of the collectives, inputs and outputs, metadata.

Imports neither torch nor onnx, because everyone who writes, checks or runs device files needs it.

    kraken::AllReduceStart(X) -> Handle          begins the sum of X over the devices; Handle has the type of X
    kraken::AllReduceWait(Handle, After?) -> Y   the finished sum; After is what must have been computed before, and is
                                                 not looked at: it keeps a scheduler from waiting early
    kraken::AllGather(X) -> Y                    the devices' parts, concatenated along `axis`, device 0 first

Collectives run in the order of the file, the same on all devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY, SHARED_FILE, lane_file_name

DOMAIN, DOMAIN_VERSION = "kraken", 1
START, WAIT, GATHER = "AllReduceStart", "AllReduceWait", "AllGather"
COLLECTIVES = (START, WAIT, GATHER)

DEQUANTIZE = "Dequantize"
"""The op of `kraken::dequantize` on the way to a file; no file holds it."""

MICROSOFT_DOMAIN, MICROSOFT_VERSION = "com.microsoft", 1
"""ONNX Runtime's own ops."""

NCCL_DOMAIN, NCCL_VERSION, NCCL_REDUCE, NCCL_GATHER = MICROSOFT_DOMAIN, MICROSOFT_VERSION, "AllReduce", "AllGather"
"""The collectives that ONNX Runtime builds with NCCL run themselves."""

OPSET = 23
"""The first one that keeps attention as one node."""

FORMAT_VERSION = 3

INPUT_IDS, POSITION_IDS, ATTENTION_MASK, LOGIT_POSITIONS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "logit_positions",
)
"""Inputs of a model with a KV cache: token ids and their positions [batch, sequence]; which of all tokens so far count,
[batch, past + sequence], 1 or 0; and which of the new tokens' logits are wanted, [batch, picks]. All int64."""
LOGITS = "logits"

BATCH, SEQUENCE, PAST, TOTAL, PICKS = "batch", "sequence", "past_sequence", "total_sequence", "picks"
"""Names of the dynamic dims."""

META_FORMAT = "kraken.format_version"
META_LANE = "kraken.lane"
META_DEGREE = "kraken.degree"
META_FORMS = "kraken.forms"
META_PROGRAM = "kraken.program_sha256"
META_FILES = "kraken.weight_files"
META_CACHE = "kraken.cache"
META_POSITIONS = "kraken.max_positions"
META_SIZES = "kraken.sizes"
META_COLLECTIVES = "kraken.collectives"
META_WEIGHTS = "kraken.weights"

OWN, ORT_NCCL = "kraken", "ort-nccl"
COLLECTIVE_KINDS = (OWN, ORT_NCCL)
"""The kinds of collectives in a file: ours, which our runtime runs, or those of ONNX Runtime builds with NCCL."""

WEIGHT_KINDS = ("int8", "int4")
"""The types to which the weights of the products can be quantized."""

QUANTIZED_PRODUCT, PRODUCT_ACCURACY = "MatMulNBits", "accuracy_level"
"""The product with quantized weights, and its attribute that says what the other operand is rounded to."""

FUSED_PRODUCT = "FusedMatMul"
"""The product that can transpose its operands itself."""

NODE_WEIGHT, NODE_TRANSPOSED = "kraken.weight", "kraken.transposed"
"""Metadata of such a node: the weight's name in the weight table, and whether it was transposed first."""


def device_file(device: int) -> str:
    """Name of a device's model inside the backend's directory."""
    return f"device-{device}.onnx"


def device_path(device: int) -> str:
    """Path of a device's model inside an artifact."""
    return f"{LANES_DIRECTORY}/{device_file(device)}"


def data_file(device: int) -> str:
    """Name of the file beside it that holds what only ONNX has of a device's own: tables and quantized weights."""
    return f"{device_file(device)}.data"


SHARED_DATA_FILE = "shared.onnx.data"
"""Name of the file with what only ONNX has of the weights that every one of several devices holds whole."""


def weight_files(device: int) -> tuple[str, ...]:
    """Names of the files beside a device's model in which its weights may be; not every model has all of them."""
    return lane_file_name(device), SHARED_FILE, data_file(device), SHARED_DATA_FILE


PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."


def past_name(layer: int, part: str) -> str:
    """Input that holds the cache of attention `layer`; `part` is "key" or "value". [batch, heads, past, dim]."""
    return f"{PAST_PREFIX}{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Output that holds the same with the new tokens appended. [batch, heads, past + sequence, dim]."""
    return f"{PRESENT_PREFIX}{layer}.{part}"


@dataclass(frozen=True)
class CacheRecord:
    """One attention's cache, as `META_CACHE` lists them in JSON.

    Attributes:
        heads: KV heads that the device holds.
        key_dim, value_dim: Size of a head.
        dtype: numpy's name of the element type.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: str
