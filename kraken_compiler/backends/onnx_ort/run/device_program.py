"""One device's program: ONNX Runtime runs the stages, collectives run in between and beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from kraken_compiler.backends.onnx_ort.check.ort_profile import last_run
from kraken_compiler.backends.onnx_ort.format import BATCH, INPUT_IDS, OWN, PAST_PREFIX, SEQUENCE, START, WAIT
from kraken_compiler.backends.onnx_ort.run.cut_model import Collective, Stage, cut, turns
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.events import Event
from kraken_compiler.backends.onnx_ort.run.named_buffers import NamedBuffers
from kraken_compiler.backends.onnx_ort.run.sizes import bind_sizes, shape_of
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.schedule import RanNode
from kraken_compiler.ir.size_checks import refusal
from kraken_compiler.ir.size_rules import broken_rule

Array = npt.NDArray[Any]

CPU_PROVIDER = "CPUExecutionProvider"
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
_FULL_ACCURACY = "1"
"""The accuracy level with which ONNX Runtime computes a product with quantized weights in float32."""


class ArrayCollectives(Protocol):
    """The communicator that a program needs, see `communicators.communicator.Communicator`."""

    @property
    def rank(self) -> int: ...

    @property
    def degree(self) -> int: ...

    def start(self, x: Array) -> Any:
        """Begin the sum of `x`, which must not change until `wait` returns."""

    def wait(self, handle: Any) -> Array:
        """The finished sum."""

    def all_gather(self, x: Array, axis: int) -> Array:
        """The parts, one behind the other."""


class DeviceProgram:
    """A device's model, ready to run; all devices must call it together.

    Attributes:
        model: The device file.
        inputs, outputs: The model's, by name.
    """

    def __init__(
        self,
        model: DeviceModel,
        communicator: ArrayCollectives | None = None,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        profiled: bool = False,
    ) -> None:
        """Open a session for every stage. The weights are mapped from the data file, once.

        Args:
            model: The device file.
            communicator: Joins this device to the others; None for a model of one device.
            provider: ONNX Runtime's name of what computes.
            threads: How many threads a stage may use; None takes `OMP_NUM_THREADS`, or else this device's share of
                the cores.
            profiled: Have ONNX Runtime keep a profile until `run_profiled` has been called.

        Raises:
            UsageError: There is no such provider here, or the communicator joins another number of devices.
            InputFileError: ONNX Runtime does not take the model.
        """
        if model.collectives != OWN:
            raise UsageError(
                f"{model.path} was compiled with --collectives {model.collectives}, for ONNX Runtime builds that bring "
                "these; this runtime runs files compiled without that option"
            )
        if model.degree > 1 and communicator is None:
            raise UsageError(f"{model.path} is one of {model.degree} devices and needs a communicator")
        if communicator is not None and (communicator.rank, communicator.degree) != (model.lane, model.degree):
            raise UsageError(
                f"{model.path} is device {model.lane} of {model.degree}, this is rank {communicator.rank} of "
                f"{communicator.degree}"
            )
        self.model = model
        self.inputs = {value.name: value for value in model.proto.graph.input}
        self.outputs = {value.name: value for value in model.proto.graph.output}
        self._communicator = communicator
        options = _session_options(model, provider, threads)
        try:
            steps = cut(model.proto, fuse=provider == CPU_PROVIDER)
        except InputFileError as error:
            raise InputFileError(f"{model.path}: {error}") from error
        self._profiles = TemporaryDirectory(prefix="kraken-profile-") if profiled else None
        self._steps: list[Collective | _Session] = []
        for number, step in enumerate(steps):
            if self._profiles is not None:
                options.enable_profiling = True
                # Sessions that are opened in the same millisecond would write to the same file.
                options.profile_file_prefix = str(Path(self._profiles.name, f"step-{number}"))
            program_step = step if isinstance(step, Collective) else _Session(model, step, options, provider)
            self._steps.append(program_step)
        self._turns = turns(steps, self.outputs)

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        trace: Callable[[Event], None] | None = None,
        sums: dict[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run this device's part.

        Args:
            feeds: A contiguous array for every input.
            into: Where to put outputs, by name; the others go to buffers that the next run overwrites.
            trace: Told about every stage and collective when it has ended.
            sums: Is given a copy of every finished sum, by the name of its wait.

        Returns:
            The outputs by name.

        Raises:
            UsageError: An input is missing, of a wrong shape or type, or of a size that was not compiled for.
        """
        return self.run_parts((feeds,), (into or {},), trace=trace, sums=sums)

    def run_parts(
        self,
        feeds: Sequence[Mapping[str, Array]],
        into: Sequence[Mapping[str, Array]],
        *,
        trace: Callable[[Event], None] | None = None,
        sums: dict[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run successive parts of the tokens in turn, so that the reduces of each fly while the others compute.

        Behind every start of a reduce it is the next part's turn. A part attends to those before it, which are past for
        it: where it reads a past, they write their presents.

        Args:
            feeds: For every part, a contiguous array for every input.
            into: For every part, where to put outputs; see `run`.
            trace, sums: See `run`; of the last part's sums.

        Returns:
            The outputs of the last part by name; of the others only presents are computed.

        Raises:
            UsageError: See `run`.
        """
        last = len(feeds) - 1
        return self._run_parts(feeds, into, range(last, last + 1), trace, sums)[last]

    def run_batches(
        self, feeds: Sequence[Mapping[str, Array]], *, trace: Callable[[Event], None] | None = None
    ) -> list[dict[str, Array]]:
        """Run several batches, or parts of one, in turn, so that the reduces of each fly while the others compute.

        Args:
            feeds: For every batch, a contiguous array for every input.
            trace: See `run`.

        Returns:
            The outputs of every batch by name, in buffers that the next run overwrites.

        Raises:
            UsageError: See `run`.
        """
        return self._run_parts(feeds, [{} for _ in feeds], range(len(feeds)), trace)

    def _run_parts(
        self,
        feeds: Sequence[Mapping[str, Array]],
        into: Sequence[Mapping[str, Array]],
        wanted: range,
        trace: Callable[[Event], None] | None = None,
        sums: dict[str, Array] | None = None,
    ) -> list[dict[str, Array]]:
        """Run parts in turn; of those that are not wanted only presents are computed. Gives all that is there."""
        sizes = [self._sizes(of_part) for of_part in feeds]
        for part in wanted:
            self._require_sizes(feeds[part])
        values: list[dict[str, Any]] = [{name: of_part[name] for name in self.inputs} for of_part in feeds]
        for turn in self._turns:
            for part, of_part in enumerate(values):
                for number in turn.last if part in wanted else turn.earlier:
                    step, start_time = self._steps[number], time.perf_counter()
                    if isinstance(step, _Session):
                        step.run(of_part, sizes[part], into[part], part)
                    else:
                        of_part[step.result] = self._collective(step, of_part)
                        if sums is not None and step.kind == WAIT and part in wanted:
                            sums[step.name] = of_part[step.result].copy()
                    if trace is not None:
                        trace(_event(step, start_time, part))
        return [{name: of_part[name] for name in self.outputs if name in of_part} for of_part in values]

    def run_profiled(
        self, feeds: Mapping[str, Array], *, sums: dict[str, Array] | None = None
    ) -> tuple[dict[str, Array], tuple[Event, ...]]:
        """Run, and read from ONNX Runtime's profile what the stages executed. Ends the profile, so it works once.

        Args:
            feeds, sums: See `run`.

        Returns:
            The outputs by name, and the run's events in order.

        Raises:
            UsageError: An input is missing, or of a wrong shape or type.
            VerificationError: ONNX Runtime's profile cannot be read.
        """
        assert self._profiles is not None, "opened without a profile, or it has ended"
        events: list[Event] = []
        outputs = self.run(feeds, trace=events.append, sums=sums)
        with self._profiles:
            stages = [step.end_profile() if isinstance(step, _Session) else () for step in self._steps]
        self._profiles = None
        return outputs, tuple(replace(event, ran=nodes) for event, nodes in zip(events, stages, strict=True))

    def _collective(self, step: Collective, values: dict[str, Any]) -> Any:
        communicator = self._communicator
        assert communicator is not None, "a model of one device has no collectives"
        operand = values[step.operand]
        if step.kind == START:
            return communicator.start(operand)
        if step.kind == WAIT:
            return communicator.wait(operand)
        return communicator.all_gather(operand, step.axis)

    def _sizes(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        missing_names = [name for name in self.inputs if name not in feeds]
        if missing_names:
            raise UsageError(
                f"the program needs the inputs {', '.join(self.inputs)}; missing: {', '.join(missing_names)}"
            )
        for name, value in self.inputs.items():
            dtype = _dtype(value)
            if feeds[name].dtype != dtype:
                raise UsageError(f"input '{name}' is {feeds[name].dtype}, expected {dtype}")
        try:
            sizes = bind_sizes(self.inputs.values(), {name: feeds[name].shape for name in self.inputs})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return sizes

    def _require_sizes(self, feeds: Mapping[str, Array]) -> None:
        """Check the source model's sizes against its rules; of a batch of unequal rows, the longest one's."""
        model = self.model
        if not model.sizes:
            return
        if model.caches is not None:
            past = next((feeds[name].shape[2] for name in self.inputs if name.startswith(PAST_PREFIX)), 0)
            batch, tokens = feeds[INPUT_IDS].shape
            sizes = {BATCH: batch, SEQUENCE: past + tokens}
        else:
            shapes = {name: model.shapes.get(name, ()) for name in self.inputs}
            sizes = {
                dim: size
                for name, shape in shapes.items()
                for dim, size in zip(shape, feeds[name].shape)
                if isinstance(dim, str)
            }
        rule = broken_rule(model.sizes, sizes)
        if rule is not None:
            raise UsageError(refusal("the model", sizes, rule))


class _Session:
    """A stage in ONNX Runtime, and the buffers of its outputs."""

    def __init__(self, model: DeviceModel, stage: Stage, options: onnxruntime.SessionOptions, provider: str) -> None:
        self.stage = stage
        self.nodes = tuple((node.name, node.op_type) for node in stage.model.graph.node)
        self._outputs = {value.name: value for value in stage.model.graph.output}
        self._buffers = NamedBuffers()
        try:
            self._session = onnxruntime.InferenceSession(stage.model.SerializeToString(), options, providers=[provider])
        except Exception as error:
            # ONNX Runtime has exceptions of its own for everything, without a common base.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            place = self.nodes[0][0]
            raise InputFileError(f"{model.path}: ONNX Runtime does not take it, near '{place}': {reason}") from error

    def run(self, values: dict[str, Any], sizes: Mapping[str, int], into: Mapping[str, Array], part: int) -> None:
        """Read the inputs of a part from `values`, and put the outputs there."""
        binding = self._session.io_binding()
        for name in self.stage.inputs:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values[name]))
        unsized_outputs: list[str] = []
        for name, value in self._outputs.items():
            buffer = into[name] if name in into else self._buffer(name, value, sizes, part)
            if buffer is None:
                binding.bind_output(name)
                unsized_outputs.append(name)
            else:
                binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(buffer))
                values[name] = buffer
        self._session.run_with_iobinding(binding)
        if unsized_outputs:
            ort_values = dict(zip(self._outputs, binding.get_outputs()))
            values.update({name: ort_values[name].numpy() for name in unsized_outputs})

    def end_profile(self) -> tuple[RanNode, ...]:
        """End the profile; returns the nodes that the last run executed."""
        return last_run(Path(self._session.end_profiling()))

    def _buffer(self, name: str, value: onnx.ValueInfoProto, sizes: Mapping[str, int], part: int) -> Array | None:
        shape = shape_of(value, sizes)
        return None if shape is None else self._buffers.take((name, part), shape, _dtype(value))


def _session_options(model: DeviceModel, provider: str, threads: int | None) -> onnxruntime.SessionOptions:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise UsageError(f"this ONNX Runtime has no {provider}; it has {', '.join(available)}")
    if threads is None:
        setting = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(setting) if setting.isdigit() else max(1, len(os.sched_getaffinity(0)) // model.degree)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A thread that spins takes the core from the thread that receives.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A weight that is integers with scales is multiplied as such; the other operand is not rounded for it.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FULL_ACCURACY)
    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(model.path.parent.absolute()))
    return options


def _event(step: Collective | _Session, start_time: float, part: int) -> Event:
    end_time = time.perf_counter()
    if isinstance(step, Collective):
        return Event(step.name, step.kind, start_time, end_time, part=part)
    return Event(step.nodes[0][0], "stage", start_time, end_time, step.nodes, part=part)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
