"""What a form brings by class of machine: predicted time to the first token, NVSwitch to Ethernet, as a picture.

    python benchmarks/machine_classes.py [--plot docs/machine-classes.png] [--machines h100-sxm,l40s-pcie,...]

A Llama-3-8B on GPUs, the Llama-shaped model of `make bench` (8 layers x 1024) on hosts with CPUs, one prompt of 512 and
of 2048 tokens. Models are captured from their configs, without weights, and predicted as `kraken-compile --plan
--machine` does. Printed and drawn is how much faster than the standard form at once they are, as the ratio of times
less one: standard in two halves, which computes what the source does, the changed forms, and no communication, which
nothing can beat. `NAME=FILE.toml` takes the figures of a class from another file, of kraken-probe, say.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts.report import table
from ttft_parts.workloads import LLAMA

from kraken_compiler.capture import capture
from kraken_compiler.errors import KrakenError
from kraken_compiler.latency.machine import Machine, load_machine
from kraken_compiler.latency.predict import Load, Prediction, Predictor, RunGraphs
from kraken_compiler.options.dtypes import dtype_named
from kraken_compiler.passes.lower import lower_split, split_source

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
PROMPTS = (512, 2048)
STANDARD, HALVES, KRAKEN, DELAYED, SILENT = "standard", "exact overlap", "kraken", "delayed", "no communication"
COLORS = {HALVES: "#9ecae9", KRAKEN: "#e45756", DELAYED: "#b279a2"}
_DARK = "#2f2f2f"


@dataclass(frozen=True)
class MachineClass:
    """A class of machines, and a model that fits it.

    Attributes:
        link: What joins the devices.
        devices: The devices, one lane each.
        degree: How many there are.
        config: The model's, of a Llama.
        model: What it is called.
        dtype: Its element type.
    """

    link: str
    devices: str
    degree: int
    config: Mapping[str, Any]
    model: str
    dtype: str


CLASSES = {
    "h100-sxm": MachineClass("NVSwitch", "8 H100", 8, LLAMA_8B, "Llama 8B", "bfloat16"),
    "l40s-pcie": MachineClass("PCIe", "4 L40S", 4, LLAMA_8B, "Llama 8B", "bfloat16"),
    "two-cpu-hosts-10gbit": MachineClass("Ethernet, 10 Gbit/s", "2 CPU hosts", 2, LLAMA, "8 x 1024", "float32"),
    "two-cpu-hosts-1gbit": MachineClass("Ethernet, 1 Gbit/s", "2 CPU hosts", 2, LLAMA, "8 x 1024", "float32"),
}
"""By the name of the machine file."""


@dataclass(frozen=True)
class Cell:
    """Predictions of one prompt on one machine, by what runs."""

    machine: str
    prompt: int
    predictions: Mapping[str, Prediction]

    def gain(self, name: str, *, decode: bool = False) -> float:
        """How much faster than the standard form it is: the ratio of their times less one."""
        standard, other = self.predictions[STANDARD], self.predictions[name]
        return (standard.tpot / other.tpot if decode else standard.ttft / other.ttft) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machines", default=",".join(CLASSES), help="names, or NAME=FILE.toml, with commas between")
    parser.add_argument("--plot", type=Path, help="draw the gains into this file (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    files = {}
    for entry in options.machines.split(","):
        name, _, file = entry.partition("=")
        if name not in CLASSES:
            parser.error(f"--machines {name}: choose from {', '.join(CLASSES)}")
        try:
            files[name] = load_machine(file or name)
        except KrakenError as error:
            parser.error(str(error))
    cells = [cell for name, machine in files.items() for cell in predicted(name, machine)]
    print("\n".join(lines(cells)))
    if options.json:
        options.json.write_text(json.dumps([as_json(cell) for cell in cells], indent=1) + "\n")
    if options.plot:
        plot(cells, options.plot)
    return 0


def predicted(name: str, machine: Machine) -> Iterator[Cell]:
    """The cells of one machine."""
    one, predictor = CLASSES[name], Predictor(machine)
    print(f"{one.model} on {machine.name}, {one.degree} devices", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="kraken-classes-") as folder:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **one.config}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        captured = capture(folder, dtype=dtype_named(one.dtype), require_weights=False)
    split = split_source(captured.program, one.degree)
    graphs = {
        form: RunGraphs.of(lower_split(split, form, overlap="tokens" if form == STANDARD else "none"))
        for form in (STANDARD, KRAKEN, DELAYED)
    }
    for prompt in PROMPTS:
        load = Load(prompt)
        predictions = {form: predictor.predict(one, load) for form, one in graphs.items()}
        predictions[HALVES] = predictor.predict(graphs[STANDARD], load, halves=True)
        predictions[SILENT] = predictor.predict(graphs[STANDARD], load, silent=True)
        yield Cell(name, prompt, predictions)


def lines(cells: Sequence[Cell]) -> list[str]:
    """Two tables: what the first token takes, and every following one."""
    names = (HALVES, KRAKEN, DELAYED, SILENT)
    first, following = [], []
    for cell in cells:
        one = CLASSES[cell.machine]
        place = (one.link, one.devices, one.model, str(cell.prompt))
        standard = cell.predictions[STANDARD]
        first.append((*place, f"{standard.ttft * 1e3:.4g}", *(f"{cell.gain(name):+.1%}" for name in names)))
        changed = (f"{cell.gain(name, decode=True):+.1%}" for name in names if name != HALVES)
        following.append((*place, f"{standard.tpot * 1e3:.4g}", *changed))
    header = ("link", "devices", "model", "prompt", "standard, ms")
    return [
        "time to the first token, predicted: faster than standard by",
        *table((*header, *names), first),
        "",
        "time of every following token, predicted: faster than standard by",
        *table((*header, KRAKEN, DELAYED, SILENT), following),
    ]


def as_json(cell: Cell) -> dict[str, Any]:
    """A cell as plain values; seconds."""
    times = {name: {"ttft": one.ttft, "tpot": one.tpot} for name, one in cell.predictions.items()}
    return {"machine": cell.machine, "prompt": cell.prompt, "times": times}


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw the gains in time to the first token: a panel for every prompt, a group of bars for every machine.

    Raises:
        ImportError: matplotlib is not installed (the `bench` extra).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PROMPTS), figsize=(9.6, 3.4), sharey=True, layout="constrained")
    width = 0.8 / len(COLORS)
    # Where links are slow, the limit is far beyond every bar, and would flatten them.
    gains = [cell.gain(name) * 100 for cell in cells for name in COLORS]
    bottom, top = min(0.0, 2 * min(gains)), 1.35 * max(gains)
    for axis, prompt in zip(axes, PROMPTS, strict=True):
        shown = [cell for cell in cells if cell.prompt == prompt]
        for index, (name, color) in enumerate(COLORS.items()):
            heights = [cell.gain(name) * 100 for cell in shown]
            places = [group + (index - (len(COLORS) - 1) / 2) * width for group in range(len(shown))]
            bars = axis.bar(places, heights, width * 0.94, color=color, label=_legend(name))
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2, color=_DARK, bbox=behind, zorder=4)
        for group, cell in enumerate(shown):
            limit = cell.gain(SILENT) * 100
            if limit <= top:
                axis.hlines(limit, group - 0.42, group + 0.42, color=_DARK, linewidth=1.2)
            else:
                axis.text(group, top, f"limit {limit:.0f}", ha="center", va="top", fontsize=7, color=_DARK)
        axis.axhline(0, color=_DARK, linewidth=0.8)
        axis.set_ylim(bottom, top)
        names = [f"{CLASSES[cell.machine].link.replace(', ', chr(10))}\n{_devices(cell)}" for cell in shown]
        axis.set_xticks(range(len(shown)), names, fontsize=8)
        axis.set_title(f"prompt of {prompt} tokens", fontsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("faster to the first token, %")
    axes[0].plot([], [], color=_DARK, linewidth=1.2, label=f"{SILENT}: the limit")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _legend(name: str) -> str:
    return f"{name} (the source's function)" if name == HALVES else f"{name} (changed)"


def _devices(cell: Cell) -> str:
    one = CLASSES[cell.machine]
    return f"{one.devices}\n{one.model}"


if __name__ == "__main__":
    sys.exit(main())
