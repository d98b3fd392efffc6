"""Linear layers whose weights torchao quantised: lanes hold parts of the integers and compute what the model does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torchao.quantization import (
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.lane_files import SHARED_WEIGHTS, lane_file
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.format import weight_files
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.capture import Capture, capture
from kraken_compiler.commands.compile import CompileResult, compile_model
from kraken_compiler.commands.heal import heal_artifact
from kraken_compiler.commands.transform import load_lanes, transform
from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.logits import inputs_function
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.ops.dequantize import dequantize, pack, unpack
from kraken_compiler.ops.op_sets import DEQUANTIZE
from kraken_compiler.passes.graph_tools import args_of
from kraken_compiler.passes.lower import lower
from kraken_compiler.passes.shard.degrees import Share, kv_shares, shared_groups, spread
from kraken_compiler.passes.shard.scale_groups import cut_of_scales
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.refittable import find_refittable
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import split_lengths
from kraken_compiler.verify.report import make_report
from tests.lane_decoder import LaneDecoder
from tests.table_notes import note
from tests.test_cache_families import one_by_one
from tests.test_families import relative_error
from tests.test_onnx_families import computed_by_devices
from tests.zoo import SUPPORTED, logits_of, token_batch
from tests.zoo.builder import randomize

pytestmark = pytest.mark.slow

CONFIGS: dict[str, Any] = {
    "int8, a scale for each row": Int8WeightOnlyConfig(),
    "int8, groups of 16": Int8WeightOnlyConfig(granularity=PerGroup(16)),
    "int4, groups of 8": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)),
    "int4, groups of 16 with zero points": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC
    ),
    "int4, a scale and a zero point for each row": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
    ),
}
INT8, INT8_GROUPS, INT4, INT4_ZEROS, INT4_ROWS = CONFIGS
CASES: dict[str, tuple[tuple[str, int], ...]] = {
    INT8: (("llama", 2), ("llama", 4), ("plain_gpt", 4)),
    INT8_GROUPS: (("llama", 4),),
    INT4: (("llama", 2), ("llama", 4), ("gpt_neox", 4)),
    INT4_ZEROS: (("llama", 2),),
    INT4_ROWS: (("llama", 4),),
}
"""Models and degrees: grouped heads; plain `nn.Module` code; q, k and v in one matrix, heads interleaved."""
SIZES = ((1, 7), (3, 13))


@cache
def quantized(model: str, config: str) -> nn.Module:
    """A zoo model with quantised linear layers; it may not be changed."""
    made = SUPPORTED[model]()
    quantize_(made, CONFIGS[config])
    return made


@cache
def captured(model: str, config: str) -> Capture:
    made = quantized(model, config)
    return capture(made, example_inputs={"input_ids": token_batch(made, 2, 16)})


def lowered(model: str, config: str, degree: int, form: str = "standard", cached: bool = False) -> Program:
    return lower(captured(model, config).program, degree, form, cached=cached)[0]


def difference(lanes: LaneModule, model: nn.Module, *sizes: tuple[int, int]) -> float:
    """The largest relative difference of the logits."""
    batches = [token_batch(model, *size) for size in sizes or SIZES]
    with torch.no_grad():
        return max(relative_error(lanes.run_flat([ids])[0], logits_of(model, ids)) for ids in batches)


def in_standard_form(model: nn.Module, degree: int) -> tuple[LaneModule, Program]:
    """A model that is no other test's, without a program with a KV cache, which takes most of the time."""
    found = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    program, _ = lower(found.program, degree, "standard", cached=False)
    return LaneModule.from_program(program, found.store.read), program


def of(model: str, config: str, program: Program) -> LaneModule:
    return LaneModule.from_program(program, captured(model, config).store.read)


# the op ---------------------------------------------------------------------------------------------------------------


def test_two_integers_share_a_byte() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(2).view(2, 16)
    assert pack(integers).dtype == torch.int8
    assert pack(integers).shape == (2, 8)
    assert torch.equal(unpack(pack(integers)), integers)
    # Lanes are padded with bytes of zeros.
    assert torch.equal(unpack(torch.zeros(1, 2, dtype=torch.int8)), torch.zeros(1, 4, dtype=torch.int8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zeros", [torch.int8, torch.float32, None])
def test_dequantize(bits: int, zeros: torch.dtype | None) -> None:
    integers = torch.randint(-8, 8, (3, 6, 8), dtype=torch.int8)
    scale = torch.rand(3, 6, 2)
    zero_point = torch.randint(-8, 8, (3, 6, 2)).to(zeros) if zeros is not None else None
    data = integers if bits == 8 else pack(integers)
    whole = integers.float() - (0 if zero_point is None else zero_point.float().repeat_interleave(4, -1))
    want = whole * scale.repeat_interleave(4, -1)
    for lane in range(3):
        operands = (data[lane], scale[lane], None if zero_point is None else zero_point[lane])
        have = torch.ops.kraken.dequantize(*operands, bits, torch.float32)
        torch.testing.assert_close(have, want[lane])
    in_dims = (0, 0, None if zero_point is None else 0, None, None)
    torch.testing.assert_close(torch.vmap(dequantize, in_dims)(data, scale, zero_point, bits, torch.float32), want)
    rounded = torch.ops.kraken.dequantize(data[0], scale[0], None, bits, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16


# what lanes compute ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_lanes_compute_what_the_model_computes(config: str) -> None:
    worst = 0.0
    for model, degree in CASES[config]:
        program = lowered(model, config, degree)
        assert all(spec.shards for name, spec in program.weights.items() if "_weight_data" in name)
        worst = max(worst, difference(of(model, config, program), quantized(model, config)))
    assert worst < 1e-5
    note("quantized", config, standard=worst)


def test_another_form_is_another_function() -> None:
    changed = of("llama", INT8, lowered("llama", INT8, 2, "kraken"))
    assert 1e-3 < difference(changed, quantized("llama", INT8)) < 10


@pytest.mark.parametrize(("config", "degree"), [(INT8, 5), (INT4, 3), (INT4_ZEROS, 3)], ids=lambda one: str(one)[:4])
def test_degrees_that_do_not_divide(config: str, degree: int) -> None:
    assert difference(of("llama", config, lowered("llama", config, degree)), quantized("llama", config)) < 1e-5


def test_lanes_get_whole_groups() -> None:
    """Three groups of FFN columns on two lanes: one has one of its own, and computes another as padding."""
    model = SUPPORTED["llama"]()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    lanes, program = in_standard_form(model, 2)
    assert difference(lanes, model) < 1e-5
    report = make_report(program).data
    assert report["padding"] == {"attention": 0.0, "ffn": pytest.approx(1 / 3)}
    assert report["degrees_without_padding"] == [1]
    sources = {spec.source: spec for spec in program.weights.values()}
    assert sources["model.layers.0.mlp.down_proj.weight_data"].shape == (64, 32)
    assert sources["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 2)
    assert sources["model.layers.0.mlp.up_proj.weight_data"].shape == (64, 32)


def test_units_are_spread_whole() -> None:
    assert spread(96, 2, 32) == (Share(0, 32, 64), Share(32, 96, 96))
    assert spread(96, 3, 32) == tuple(Share(start, start + 32, start + 32) for start in (0, 32, 64))
    # 6 heads with a KV head for each 3, in pairs that stay together: the second lane's begin within a KV head's.
    assert shared_groups(6, 2, 3, 2)
    assert not shared_groups(6, 2, 2)
    assert kv_shares(6, 2, 3, 2) == ((0, 2), (0, 2), (0, 2))


@pytest.mark.parametrize("degree", [2, 3])
def test_heads_that_share_scales_and_heads_that_share_keys(degree: int) -> None:
    """Pairs of heads share scales, threes a KV head: lanes whose pairs are of two KV heads pick them by number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=80, num_hidden_layers=1, **sizes)).eval()
    randomize(model, seed=0)
    model.vocab = 97
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
    lanes, program = in_standard_form(model, degree)
    assert difference(lanes, model) < 1e-5
    assert make_report(program).data["padding"]["attention"] == pytest.approx({2: 1 / 3, 3: 0}[degree])


def test_weights_of_int4_as_gpus_make_them() -> None:
    """torchao multiplies with them on GPUs only; the reference are the numbers they stand for."""
    generator = torch.Generator().manual_seed(0)
    model, plain = SUPPORTED["plain_gpt"](), SUPPORTED["plain_gpt"]()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        integers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
        scale, zero = torch.rand(columns // 8, rows, generator=generator) / 50, torch.randn(columns // 8, rows) / 50
        bytes_ = pack(integers)
        weight = Int4Tensor(bytes_, scale, zero, [1, 8], torch.Size((rows, columns)))
        module.weight = nn.Parameter(weight, requires_grad=False)
        value = integers * scale.t().repeat_interleave(8, 1) + zero.t().repeat_interleave(8, 1)
        plain.get_submodule(path).weight = nn.Parameter(value)
    assert difference(in_standard_form(model, 4)[0], plain) < 1e-5
    module.weight.activation_dtype = torch.float8_e4m3fn
    with pytest.raises(UnsupportedModelError, match=r"module 'head' \(node weight\).* asks for rounded or scaled"):
        in_standard_form(model, 4)


def test_only_some_layers_in_bfloat16() -> None:
    model = SUPPORTED["llama"]().bfloat16()
    quantize_(model, CONFIGS[INT8], filter_fn=lambda _, path: path.endswith("down_proj"))
    ids = token_batch(model, 3, 11)
    with torch.no_grad():
        have = in_standard_form(model, 2)[0].run_flat([ids])[0]
    assert have.dtype == torch.bfloat16
    assert relative_error(have.float(), model(ids).logits.float()) < 0.05


def test_embeddings_may_be_quantised_too() -> None:
    """With a KV cache: what is looked up in a quantised table is a token, or a position."""
    model = SUPPORTED["plain_gpt"]()
    table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, table, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    found = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    program, _ = lower(found.program, 2, "standard")
    assert difference(LaneModule.from_program(program, found.store.read), model) < 1e-5
    assert not program.no_cache
    ids = token_batch(model, *SIZES[-1])
    have = one_by_one(LaneDecoder(program, found.store.read, *SIZES[-1]), ids, 7, positional=True)
    assert relative_error(have, logits_of(model, ids)) < 1e-5


# what the module is afterwards ----------------------------------------------------------------------------------------


def test_the_module_stays_as_it_was() -> None:
    model = SUPPORTED["plain_gpt"]()
    quantize_(model, CONFIGS[INT4])
    model.train()
    ids = token_batch(model, 2, 16)
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    weights = {name: (id(tensor), type(tensor)) for name, tensor in model.named_parameters()}
    lanes = transform(model, 2, example_inputs={"input_ids": ids})
    assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before
    assert {name: (id(tensor), type(tensor)) for name, tensor in model.named_parameters()} == weights
    assert not any("_data" in name and weight.requires_grad for name, weight in lanes.weights.named_parameters())


def test_importing_the_compiler_imports_no_torchao() -> None:
    code = "import sys, kraken_compiler, kraken_compiler.capture; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# what cannot be done, and why -----------------------------------------------------------------------------------------


def test_more_lanes_than_groups() -> None:
    model = SUPPORTED["llama"]()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    message = (
        r"module 'model\.layers\.0\.self_attn' \(node linear_3\): its output projection is quantised in groups that "
        r"keep 4 heads \(32 columns\) together.* 4 lanes of 16 columns\. Try another degree, or .* smaller group"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        transform(model, 4)


def test_a_cut_within_a_group_names_it() -> None:
    program = lowered("llama", INT4, 1)
    output = next(node for node in program.graph.nodes if node.name == "linear_3")
    assert cut_of_scales(output, [((0, 32),), ((32, 64),)]) is None
    found = cut_of_scales(output, [((0, 28),), ((28, 64),)])
    assert isinstance(found, Rejection)
    assert found.nodes == ("linear_3",)
    assert found.path == "model.layers.0.self_attn.o_proj"
    assert "in groups of 8 columns, and lane 0 of 2 would have 28 columns" in found.reason


def test_zero_points_of_rows_and_lanes_of_unequal_width() -> None:
    message = r"module 'model\.layers\.0\.self_attn\.o_proj' .*zero points for whole rows.*\(16 and 24 columns\)"
    with pytest.raises(UnsupportedModelError, match=message):
        lowered("llama", INT4_ROWS, 3)


def test_quantised_activations_are_refused() -> None:
    model = SUPPORTED["llama"]()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, path: path.endswith("1.mlp.up_proj"))
    message = r"module 'model\.layers\.1\.mlp\.up_proj' \(node weight\): its weight also asks for rounded or scaled"
    with pytest.raises(UnsupportedModelError, match=message):
        transform(model, 2)


def test_a_weight_whose_product_is_another_is_refused() -> None:
    model = SUPPORTED["llama"]()
    quantize_(model, CONFIGS[INT8], filter_fn=lambda _, path: path.endswith("0.mlp.up_proj"))
    # torchao's product of rows does not look at zero points.
    model.model.layers[0].mlp.up_proj.weight.zero_point += 3
    with pytest.raises(UnsupportedModelError, match=r"a Int8Tensor whose product is not the one of its integers"):
        transform(model, 2)


def test_archives_with_quantised_tensors_are_refused(tmp_path: Path) -> None:
    model = SUPPORTED["plain_gpt"]()
    quantize_(model, CONFIGS[INT4], filter_fn=lambda _, path: path == "blocks.1.q")
    torch.export.save(torch.export.export(model, (token_batch(model, 2, 16),)), tmp_path / "model.pt2")
    message = (
        r"module 'blocks\.1\.q' .*its weight was exported as a IntxUnpackedToInt8Tensor.* Compile the module itself"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        capture(tmp_path / "model.pt2", trust_pickle=True)


def test_quantised_weights_keep_their_type() -> None:
    with pytest.raises(UsageError, match=r"'model\.layers\.0\.self_attn\.q_proj' was quantised as float32.* bfloat16"):
        capture(quantized("llama", INT8), dtype=torch.bfloat16)


def test_calibration_leaves_them_alone() -> None:
    standard, program = (lowered("llama", INT8, 2, form) for form in ("standard", "kraken"))
    found = find_refittable(program)
    assert all(isinstance(one, Rejection) and "its weight is quantised" in one.reason for one in found)
    read = read_from_source(program, captured("llama", INT8).store.read)
    ids = list(
        map(inputs_function(program.inputs), [token_batch(quantized("llama", INT8), 4, 16, seed) for seed in (0, 1)])
    )
    made = calibrate(standard, program, read, ids, [False, True])
    notes = [record.note for record in made.branches]
    assert notes[0] == "reads what the source reads"
    assert all("not refitted: its weight is quantised" in one for one in notes[1:])


# artifacts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompileResult:
    """Compiled and checked: two ranks against the lanes, with and without the KV cache."""
    directory = tmp_path_factory.mktemp("quantized") / "llama.kraken"
    return compile_model(quantized("llama", INT4_ZEROS), directory, degree=2, form="kraken")


def test_ranks_compute_what_the_lanes_compute(compiled: CompileResult) -> None:
    assert compiled.verification is not None
    errors = {one.what.partition(" (")[0]: one.max_rel_error for one in compiled.verification.comparisons}
    assert errors.keys() == {
        "standard form against the source",
        "2 ranks against the lanes in one process",
        "2 ranks with a KV cache against the lanes without",
        "2 ranks that read tokens as two halves against the lanes",
    }
    assert max(errors.values()) < 1e-5
    note("quantized_ranks", INT4_ZEROS, error=errors["2 ranks with a KV cache against the lanes without"])
    assert compiled.directory is not None
    lanes = load_lanes(compiled.directory)
    other = of("llama", INT4_ZEROS, lowered("llama", INT4_ZEROS, 2, "kraken"))
    ids = token_batch(quantized("llama", INT4_ZEROS), 2, 9)
    torch.testing.assert_close(lanes.run_flat([ids])[0], other.run_flat([ids])[0], rtol=1e-5, atol=1e-5)


def test_lane_files_hold_integers(compiled: CompileResult) -> None:
    assert compiled.directory is not None
    artifact = open_artifact(compiled.directory)
    kinds = {spec.source.rpartition("_")[2]: spec.dtype for spec in artifact.manifest.weights}
    assert kinds["data"] == "int8"
    plain, _ = lower(capture(SUPPORTED["llama"]()).program, 2, "kraken", cached=False)
    of_floats = sum(spec.nbytes for spec in plain.weights.values())
    size = sum(artifact.path(name).stat().st_size for name in (lane_file(0), SHARED_WEIGHTS))
    report = compiled.report.data["lanes"][0]
    # What is not a linear layer, the embedding, stays; scales take more here than in models of useful sizes.
    assert report["bytes"] < size < 0.5 * of_floats
    assert report["parameters"] == sum(
        torch.Size(spec.shape).numel() for spec in plain.weights.values() if spec.kind == "parameter"
    )


def test_healing_refuses_integers(compiled: CompileResult) -> None:
    assert compiled.directory is not None
    with pytest.raises(UsageError, match=r"22 of its source's weights are quantised, and integers cannot be trained"):
        heal_artifact(compiled.directory, HealSettings(steps=1), source=quantized("llama", INT4_ZEROS))


@pytest.mark.parametrize("config", [INT8, INT4_ZEROS])
def test_onnx_devices(config: str, tmp_path: Path) -> None:
    """Scales of rows and groups, bytes and halves of them; in files the weights are integers."""
    program, read = lowered("llama", config, 2, "kraken", cached=True), captured("llama", config).store.read
    OnnxBackend().write(program, read, tmp_path)
    batches = [token_batch(quantized("llama", config), *size) for size in SIZES]
    lanes = LaneModule.from_program(program, read)
    with torch.no_grad():
        want = [lanes.run_flat([ids])[0] for ids in batches]
    want.append(expected(want[-1], *split_lengths(*SIZES[-1])))
    errors = [
        relative_error(one, other)
        for have in computed_by_devices(tmp_path, batches)
        for one, other in zip(have, want, strict=True)
    ]
    assert max(errors) < 1e-5
    note("quantized_onnx", config, error=max(errors))
    floats = {node.name for node in program.graph.nodes if node.target is DEQUANTIZE}
    held = [spec.nbytes for name, spec in program.weights.items() if name not in floats]
    tables = 2 * 32768 * 8 * 4
    assert sum((tmp_path / name).stat().st_size for name in weight_files(0) if (tmp_path / name).exists()) < (
        sum(held) + tables + 4096 * len(held)
    )


def test_the_cached_program_holds_integers() -> None:
    """Computed once and kept, a weight would be there in full."""
    program = lowered("gpt_neox", INT8, 2, cached=True)
    assert program.cached is not None
    for graph, count in ((program.graph, 13), (program.cached.step.graph, 13), (program.cached.tables.graph, 0)):
        assert sum(node.target is DEQUANTIZE for node in graph.nodes) == count
    nodes: list[fx.Node] = list(program.cached.step.graph.nodes)
    for node in nodes:
        if node.target is DEQUANTIZE:
            # One at a time is there in full, where it is read.
            (user,) = node.users
            assert nodes.index(user) - nodes.index(node) <= 4, f"{node.name} is read by {user.name}"
            assert args_of(user)[1] is node


@pytest.fixture
def communicator() -> Iterator[NoCommunication]:
    made = NoCommunication(0, 2, "of a test of quantised weights")
    yield made
    made.close()


def test_compiled_ranks(communicator: NoCommunication) -> None:
    """Bytes and halves of them, with and without zero points, in one program."""
    model = SUPPORTED["llama"]()
    model.model.layers = model.model.layers[:1]  # type: ignore[index]
    quantize_(model, CONFIGS[INT8], filter_fn=lambda _, path: path.endswith(("q_proj", "o_proj", "lm_head")))
    quantize_(model, CONFIGS[INT4_ZEROS], filter_fn=lambda _, path: path.endswith(("gate_proj", "down_proj")))
    found = capture(model)
    program, _ = lower(found.program, 2, "kraken")
    eager = RankProgram.from_program(program, found.store.read, communicator=communicator)
    fast = RankProgram.from_program(program, found.store.read, communicator=communicator)
    fast.compile()
    for size in SIZES[1:]:
        ids = token_batch(model, *size)
        torch.testing.assert_close(fast.run_flat([ids]), eager.run_flat([ids]), rtol=1e-4, atol=1e-4)


# directories ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with quantised weights, as transformers writes it."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    plain, made = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("quantised")
    SUPPORTED["llama"]().save_pretrained(plain)
    setting = TorchAoConfig(CONFIGS[INT4])
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=setting, dtype=torch.float32).save_pretrained(made)
    return made


def test_directories(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = capture(directory)
    assert (found.origin.kind, found.origin.path) == ("huggingface", str(directory))
    program, _ = lower(found.program, 2, "standard", cached=False)
    lanes, ids = LaneModule.from_program(program, found.store.read), token_batch(quantized("llama", INT4), 3, 9)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    assert relative_error(lanes.run_flat([ids])[0], want) < 1e-5
    kinds = {spec.dtype for name, spec in program.weights.items() if "_weight_data" in name}
    assert kinds == {"int8"}


def test_directories_of_other_quantisers_are_refused(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = r"quantized by gptq\. Weight-only integers of torchao and float8 weights .* can be read"
    with pytest.raises(UnsupportedModelError, match=said):
        capture(tmp_path)
