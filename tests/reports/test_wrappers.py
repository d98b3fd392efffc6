"""Modules behind wrappers: exact and called as the wrapper is called, or refused with what to pass instead."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import KrakenError, UnsupportedModelError, UsageError
from kraken_compiler.lanes.calling import bind, unflatten_output
from kraken_compiler.verify.compare import errors
from tests.reports.small_models import (
    EXAMPLE,
    FFN,
    LM,
    TOLERANCE,
    VOCABULARY,
    logits,
    relative_error,
    tokens,
)

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

NAMED = {"input_ids": EXAMPLE[0]}


def small() -> LM:
    return LM(layers=1)


def llama(layers: int = 1, **options: Any) -> nn.Module:
    """A Llama whose config asks for a cache, as they all do."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    assert config.use_cache
    return model.eval()


def captured_call(model: Any, example: Any = EXAMPLE) -> Callable[..., Any]:
    """The captured program, called as the source is."""
    captured = capture(model, example_inputs=example)
    program = captured.program
    read = program.reader(captured.store.read)
    weights = [read(spec.source) for spec in program.weights.values()]

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = bind(program.call, program.inputs, args, kwargs)
        with torch.no_grad():
            return unflatten_output(program.call, program.module(*weights, *inputs))

    return call


def same(have: object, want: object) -> bool:
    return type(have) is type(want) and errors(_first(have), _first(want))[1] < TOLERANCE


def _first(output: Any) -> Tensor:
    return logits(output[0] if isinstance(output, tuple) else output)


# wrappers that pass every call on ------------------------------------------------------------------------------------


def nested_compile() -> nn.Module:
    model = small()
    model.attention[0] = torch.compile(model.attention[0])
    model.ffn[0].compile()
    return model


class CompiledFFN(FFN):
    @torch.compile
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


PASSED_ON: dict[str, Callable[[], nn.Module]] = {
    "torch.compile": lambda: torch.compile(small()),  # type: ignore[dict-item, return-value]
    "compile()": lambda: _compiled_in_place(small()),
    "compiled parts": nested_compile,
    "compiled forward": lambda: LM(ffn=CompiledFFN, layers=1),
    "DataParallel": lambda: nn.DataParallel(small()),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(small()),
    "one in the other": lambda: nn.DataParallel(torch.compile(torch.optim.swa_utils.AveragedModel(small()))),  # type: ignore[arg-type]
    "Sequential": lambda: nn.Sequential(small()),
}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.parametrize("name", PASSED_ON)
def test_wrappers_that_pass_calls_on(name: str) -> None:
    """Nothing is compiled by Inductor for it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert same(captured_call(PASSED_ON[name]())(tokens(3, 11)), small()(tokens(3, 11)).detach())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_wrapped_model_has_the_names_of_the_model() -> None:
    lanes = kraken_compiler.transform(nn.DataParallel(torch.compile(small())), 3, "standard", example_inputs=EXAMPLE)  # type: ignore[arg-type]
    assert relative_error(lanes, small(), 3, 11) < TOLERANCE
    weights = [spec for spec in lanes.program.weights.values() if spec.kind != "constant"]
    assert {spec.source for spec in weights} <= set(small().state_dict())
    assert lanes.program.call.parameters == ("ids",)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        assert same(captured_call(model)(tokens(3, 11)), small()(tokens(3, 11)).detach())
        assert same(captured_call(model, {"ids": EXAMPLE[0]})(ids=tokens(3, 11)), small()(tokens(3, 11)).detach())
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_that_does_more_is_part_of_the_function() -> None:
    class Scaled(nn.DataParallel):
        def forward(self, *inputs: Any, **kwargs: Any) -> Any:
            return 3 * self.module(*inputs, **kwargs)

    hooked = nn.DataParallel(small())
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    for wrapped, want in ((Scaled(small()), 3 * small()(tokens(3, 11))), (hooked, small()(tokens(3, 11)) + 1)):
        assert same(captured_call(wrapped)(tokens(3, 11)), want.detach())


# signatures ----------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Positional(Around):
    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class Named(Around):
    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


class Both(Around):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class OwnName(Around):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x).logits


class Slashed(Around):
    def forward(self, x: Tensor, /, *, scale: Tensor | None = None) -> Any:
        made = self.inner(x)[0]
        return made if scale is None else made * scale[..., None]


class Tupled(Around):
    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids, return_dict=False)


class Open(Around):
    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def by_position(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(ids)


def by_name(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(input_ids=ids)


def masked(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(ids, attention_mask=torch.ones_like(ids))


def placed(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(ids, position_ids=torch.arange(ids.shape[1]).expand(*ids.shape) + 3)


def scaled(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(ids, scale=torch.linspace(1, 2, ids.shape[1]).expand(*ids.shape))


def with_states(model: Callable[..., Any], ids: Tensor) -> Any:
    return model(input_ids=ids, output_hidden_states=True)


SIGNATURES: tuple[tuple[type[Around], Any, Callable[..., Any]], ...] = (
    (Positional, EXAMPLE, by_position),
    (Positional, EXAMPLE[0], by_position),
    (Positional, NAMED, by_position),
    (Named, NAMED, by_name),
    (Named, NAMED | {"output_hidden_states": True}, with_states),
    (Both, EXAMPLE, by_position),
    (Both, NAMED, by_name),
    (OwnName, {"x": EXAMPLE[0]}, by_position),
    (Slashed, EXAMPLE, by_position),
    (Tupled, None, by_name),
    (Open, None, by_position),
    (Open, NAMED | {"attention_mask": torch.ones(2, 16, dtype=torch.int64)}, masked),
    (Open, NAMED | {"position_ids": torch.arange(16).expand(2, 16)}, placed),
)


@pytest.mark.parametrize(("kind", "example", "call"), SIGNATURES, ids=lambda value: getattr(value, "__name__", ""))
def test_modules_around_a_hugging_face_model(kind: type[Around], example: Any, call: Callable[..., Any]) -> None:
    """They leave the cache out, and afterwards use it as before."""
    model = kind(llama())
    assert same(call(captured_call(model, example), tokens(3, 11)), call(model, tokens(3, 11)))
    assert model.inner.config.use_cache  # type: ignore[union-attr]


def test_one_around_the_other_on_lanes() -> None:
    model = Both(Positional(nn.DataParallel(torch.compile(llama(2)))))  # type: ignore[arg-type]
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, llama(2), 3, 11) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "example", "message"),
    [
        (OwnName, NAMED, "'input_ids' is no argument of the model: OwnName takes x"),
        (Named, EXAMPLE, "Named takes arguments by name only: give example_inputs as a dict"),
        (Open, NAMED | {"attention_maks": torch.ones(2, 16)}, "'attention_maks' is no argument of the model"),
        (Positional, None, "Positional needs example inputs"),
    ],
)
def test_example_inputs_that_do_not_fit(kind: type[Around], example: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(kind(llama()), example_inputs=example)


def test_arguments_that_are_one_tensor_in_the_example_stay_apart() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return 2 * x + y

    same_tensor, x, y = torch.randn(2, 3, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    for example in ((same_tensor, same_tensor), {"y": same_tensor, "x": same_tensor}):
        torch.testing.assert_close(captured_call(Sum(), example)(x, y), 2 * x + y)


class Named2(NamedTuple):
    logits: Tensor
    mean: Tensor


class NamedResult(LM):
    def forward(self, ids: Any) -> Any:
        made = super().forward(ids.logits)
        return Named2(made, made.mean() + ids.mean)


def test_named_tuples_in_and_out() -> None:
    model, shift = NamedResult(layers=1), torch.ones(2)
    call = captured_call(model, (Named2(EXAMPLE[0], shift),))
    have, want = (one(Named2(tokens(3, 11), shift)) for one in (call, model))
    assert type(have) is Named2
    assert all(errors(a, b.detach())[1] < TOLERANCE for a, b in zip(have, want))


@pytest.mark.parametrize("model", [nn.ModuleList([LM(layers=1)]), nn.Module()])
def test_modules_without_a_forward(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no forward: pass the module whose forward calls what is in it"):
        capture(model, example_inputs=EXAMPLE)


def test_a_cache_that_a_wrapper_asks_for_is_named() -> None:
    class Keeps(Around):
        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids, use_cache=True)

    with pytest.raises(UnsupportedModelError, match=r"'Keeps': its forward returns a DynamicCache.*use_cache=False"):
        capture(Keeps(llama()), example_inputs=NAMED)


# PEFT ----------------------------------------------------------------------------------------------------------------


def adapted(config: Any, model: nn.Module | None = None) -> Any:
    """A model with an adapter that changes its logits."""
    made = peft.get_peft_model(model or llama(), config).eval()
    _randomize(made)
    return made


def _randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def lora(**options: Any) -> Any:
    wanted: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**wanted | options)


ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True, target_modules=["k_proj"]),
    "LoRA with dropout on the FFN": lambda: lora(lora_dropout=0.3, target_modules=["gate_proj", "up_proj"]),
    "LoRA and a head": lambda: lora(modules_to_save=["lm_head"]),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_part_of_the_function(name: str) -> None:
    model = adapted(ADAPTERS[name]())
    lanes = kraken_compiler.transform(model, 2, "standard")
    want, have = model(tokens(3, 11)), lanes(input_ids=tokens(3, 11))
    assert errors(have.logits.detach(), want.logits.detach())[1] < TOLERANCE
    plain = llama()(tokens(3, 11)).logits
    assert want.logits.shape != plain.shape or errors(plain.detach(), want.logits.detach())[1] > 1e-2
    # An adapter is trained, what it adapts is not.
    parameters = dict(lanes.weights.named_parameters())
    held = [spec for spec in lanes.program.weights.values() if spec.name in parameters]
    trained = {spec.source for spec in held if parameters[spec.name].requires_grad}
    assert trained
    assert trained <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_switched_off_merged_and_taken_out() -> None:
    model = adapted(lora())
    with model.disable_adapter():
        assert same(captured_call(model, None)(tokens(3, 11)), llama()(tokens(3, 11)))
    want = model(tokens(3, 11))
    assert same(captured_call(model.get_base_model(), None)(tokens(3, 11)), want)
    assert same(captured_call(OwnName(model))(tokens(3, 11)), want.logits.detach())
    model.merge_adapter()
    assert same(captured_call(model, None)(tokens(3, 11)), want)
    assert same(captured_call(model.merge_and_unload(), None)(tokens(3, 11)), want)


def test_the_active_adapter_of_two() -> None:
    model = adapted(lora())
    model.add_adapter("other", lora(r=2, target_modules=["k_proj"]))
    first = captured_call(model, None)(tokens(3, 11))
    assert same(first, model(tokens(3, 11)))
    model.set_adapter("other")
    _randomize(model)
    second = captured_call(model, None)(tokens(3, 11))
    assert same(second, model(tokens(3, 11)))
    assert not same(first, second)


def test_adapters_that_lanes_cannot_have_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn.*merge_and_unload"):
        kraken_compiler.transform(adapted(lora(target_modules=["o_proj"])), 2)
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="its forward returns a DynamicCache"):
        capture(adapted(prefix))


# offloaded weights ---------------------------------------------------------------------------------------------------

OFFLOADS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True),
    "disk": lambda model, path: accelerate.disk_offload(model, str(path), execution_device="cpu"),
    "dispatched": lambda model, path: accelerate.dispatch_model(
        model,
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        },
        main_device="cpu",
        offload_dir=str(path),
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_weights_are_read(name: str, tied: bool, tmp_path: Path) -> None:
    if name == "dispatched" and tied:
        pytest.skip("accelerate keeps tied weights in one place")
    model = OFFLOADS[name](llama(tie_word_embeddings=tied), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = {path: (id(parameter), parameter.device) for path, parameter in model.named_parameters()}
    forwards = {path: module.forward for path, module in model.named_modules()}

    want = llama(tie_word_embeddings=tied)(tokens(3, 11))
    assert same(captured_call(model, None)(tokens(3, 11)), want)

    assert {path: (id(parameter), parameter.device) for path, parameter in model.named_parameters()} == before
    assert all(module.forward == forwards[path] for path, module in model.named_modules())
    assert same(model(tokens(3, 11)), want)


# what is no module to compile ----------------------------------------------------------------------------------------


class Pipeline:
    def __init__(self) -> None:
        self.tokenizer = None
        self.model = small()

    def __call__(self, text: str) -> str:
        return text


def traced() -> nn.Module:
    return torch.jit.trace(small(), EXAMPLE)  # type: ignore[no-any-return, no-untyped-call]


class Sharded(nn.Module):
    """What `fully_shard` makes of a class."""


Sharded.__module__, Sharded.__name__ = "torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule"


class ShardedFFN(FFN, Sharded):
    pass


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "traced": (traced, "TorchScript module, made from LM by torch.jit. Pass the LM that was scripted or traced"),
    "scripted part": (
        lambda: nn.Sequential(small(), torch.jit.script(nn.LayerNorm(VOCABULARY))),
        "module '1': it is a TorchScript module, made from LayerNorm",
    ),
    "sharded part": (
        lambda: LM(ffn=ShardedFFN, layers=1),
        r"module 'ffn\.0': FSDP keeps one rank's piece.*whole weights",
    ),
    "packed weights": (
        lambda: torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}),
        r"module 'attention\.0\.qkv.*its weights are packed in a LinearPackedParams.*before it was quantised",
    ),
    "state dict": (lambda: small().state_dict(), "got a OrderedDict of weights: build the model.*load_state_dict"),
    "class": (lambda: LM, "got the class LM: pass an instance of LM, with its weights loaded"),
    "method": (lambda: small().forward, "got a method of a LM: pass the module itself"),
    "partial of a module": (lambda: functools.partial(small()), "got a partial of a LM: pass the module itself"),
    "partial of a function": (lambda: functools.partial(F.linear), "got a partial: pass the module that it calls"),
    "lambda": (lambda: lambda ids: ids, "got a function: pass the module that it calls"),
    "pipeline": (Pipeline, r"got a Pipeline: pass its \.model"),
    "config": (lambda: llama().config, "must be an nn.Module or a path, got a LlamaConfig$"),
    "number": (lambda: 42, "must be an nn.Module or a path, got a int$"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_to_pass_is_said(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(KrakenError) as failure:
        kraken_compiler.transform(make(), 2, example_inputs=EXAMPLE)
    assert re.search(message, str(failure.value))
    assert len(str(failure.value).splitlines()) == 1


def test_sharded_wrappers_are_named(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(small(), device_id=torch.device("cpu"))
        part = small()
        fully_shard(part.ffn[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for model in (wrapped, part):
            with pytest.raises(
                UnsupportedModelError, match=r"FSDP keeps one rank's piece of its weights.*whole weights"
            ):
                capture(model, example_inputs=EXAMPLE)
    finally:
        torch.distributed.destroy_process_group()


# graphs --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_programs_and_their_modules() -> None:
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(small(), EXAMPLE, dynamic_shapes=dims)
    want = small()(tokens(3, 11)).detach()
    assert same(captured_call(exported, None)(tokens(3, 11)), want)
    assert same(captured_call(exported.module())(tokens(3, 11)), want)
    assert same(captured_call(torch.export.unflatten(exported))(tokens(3, 11)), want)
    fixed = capture(torch.export.export(small(), EXAMPLE))
    assert fixed.program.inputs[0].shape == (2, 16)
    assert "is fixed at 16" in " ".join(fixed.notes)


def test_an_fx_graph() -> None:
    class NoPositions(LM):
        def embed(self, ids: Tensor) -> Tensor:
            made: Tensor = self.tokens(ids)
            return made

    model = NoPositions(layers=1)
    assert same(captured_call(torch.fx.symbolic_trace(model))(tokens(3, 11)), model(tokens(3, 11)).detach())
