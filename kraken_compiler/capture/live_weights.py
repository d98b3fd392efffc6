"""Checks, before anything is traced, that a live module's weights are present, whole and plain.

Weights that accelerate keeps elsewhere (`cpu_offload`, `disk_offload`, `dispatch_model`) are put in place while the
module is captured, and its hooks, which move them in and out at every call, are left out meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.unwrap import is_a
from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError


def require_weights(model: nn.Module) -> None:
    """Refuse a module whose weights cannot be read, by the path of the first one.

    Raises:
        UsageError: A weight has no values (it is on the meta device, or fake).
        UnsupportedModelError: A part of the module is TorchScript, or holds its weights packed or in pieces.
    """
    for path, module in model.named_modules():
        rejection = _rejection(path, module)
        if rejection is not None:
            raise UnsupportedModelError([rejection])
    missing = [name for name, tensor in _named_state(model) if compat.is_fake(tensor) and not compat.is_packed(tensor)]
    if missing:
        others = f" and {len(missing) - 1} others have" if len(missing) > 1 else " has"
        raise UsageError(
            f"'{missing[0]}'{others} no values (on the meta device, or fake) in {type(model).__name__}: load the "
            "weights first (from_pretrained, or to_empty and load_state_dict), or pass the model's directory"
        )


@contextmanager
def offloaded_weights(model: nn.Module) -> Iterator[None]:
    """Put weights that accelerate's hooks keep elsewhere into the module; inside, the hooks do nothing.

    Raises:
        UnsupportedModelError: A weight is kept in another form than it has when the module runs.
    """
    module_hooks = [(module, device_hooks) for module in model.modules() if (device_hooks := _device_hooks(module))]
    originals: list[tuple[nn.Module, str, Tensor]] = []
    forwards: list[tuple[nn.Module, Any]] = []
    parameters: dict[tuple[int, torch.Size], nn.Parameter] = {}
    try:
        for module, hooks in module_hooks:
            forwards.append((module, module.forward))
            setattr(module, "forward", module._old_forward)  # noqa: B010 (its type is any attribute's)
            for hook in hooks:
                if hook.offload:
                    _load_offloaded(module, hook, parameters, originals)
        yield
    finally:
        for module, name, tensor in originals:
            _set_tensor(module, name, tensor)
        for module, forward in forwards:
            module.forward = forward


def _device_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module if all they do is to move weights and inputs to a device."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not hasattr(module, "_old_forward"):
        return []
    hooks = list(hook.hooks) if is_a(hook, "accelerate.hooks", "SequentialHook") else [hook]
    return hooks if all(type(one).__name__ == "AlignDevicesHook" for one in hooks) else []


def _load_offloaded(
    root: nn.Module,
    hook: Any,
    parameters: dict[tuple[int, torch.Size], nn.Parameter],
    originals: list[tuple[nn.Module, str, Tensor]],
) -> None:
    """Replace what a hook moved away; adds the module, name and former value of everything to `originals`."""
    for path, module in root.named_modules() if hook.place_submodules else (("", root),):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = f"{path}.{name}" if path else name
            if tensor is None or tensor.device.type != "meta" or key not in hook.weights_map:
                continue
            value = hook.weights_map[key]
            if value.dtype != tensor.dtype or value.shape != tensor.shape:
                reason = f"its {name} is offloaded in another form ({_form(value)}) than it is used in"
                hint = "Load the model without offloading."
                raise UnsupportedModelError([Rejection(reason, (name,), path or type(root).__name__, hint)])
            if isinstance(tensor, nn.Parameter):
                # One parameter for all modules that share it: offloading has made several of it.
                parameter = nn.Parameter(value.detach(), requires_grad=tensor.requires_grad)
                value = parameters.setdefault((value.data_ptr(), value.shape), parameter)
            originals.append((module, name, tensor))
            _set_tensor(module, name, value)


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    slots: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    slots[name] = value


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _rejection(path: str, module: nn.Module) -> Rejection | None:
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", kind)
        reason = f"it is a TorchScript module, made from {name} by torch.jit"
        return Rejection(reason, path=path, hint=f"Pass the {name} that was scripted or traced.")
    if is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel") or is_a(
        module, "torch.distributed.fsdp", "FSDPModule"
    ):
        return Rejection("FSDP keeps one rank's piece of its weights in it", path=path, hint=_WHOLE_HINT)
    packed_names = [name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)]
    if packed_names:
        reason = f"its weights are packed in a {kind}, and only plain tensors can be divided among lanes"
        return Rejection(reason, (packed_names[0],), path, _UNQUANTIZED_HINT)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if is_a(tensor, "torch.distributed.tensor", "DTensor"):
            return Rejection(f"its {name} is a DTensor, one rank's piece of a weight", (name,), path, _WHOLE_HINT)
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            reason = f"its {name} has no shape yet: a {kind} makes its weights when it is first called"
            return Rejection(reason, (name,), path, "Call the model once, or load its weights, and pass it then.")
        if tensor.is_quantized:
            return Rejection(
                f"its {name} is a quantised {_form(tensor)} tensor of torch.ao", (name,), path, _UNQUANTIZED_HINT
            )
    return None


_WHOLE_HINT = (
    "Pass the module with whole weights: build it anew and load what "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict gives with full_state_dict=True."
)
_UNQUANTIZED_HINT = (
    "Pass the model as it was before it was quantised; of quantised weights, torchao's weight-only integers can be "
    "compiled."
)


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor
