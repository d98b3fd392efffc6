"""The run itself: every cell, every repetition, every contender in turn."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttft_parts.check import Judge
from ttft_parts.contenders import NATIVE, Contender, named, rotated
from ttft_parts.load import BUSY, OthersLoad
from ttft_parts.network import UNLIMITED, Network, network
from ttft_parts.ranks import TORCH_RANK, CommandError, Ranks, RanksFailedError, started
from ttft_parts.windows import ELEMENT_BYTES
from ttft_parts.workloads import Workload, native_beside, prompt_ids

_LINK_PROBE_BYTES = 32_000_000


@dataclass(frozen=True)
class Plan:
    """What to run of a workload.

    Attributes:
        tpot_repetitions: In so many of the repetitions all new tokens are generated, in the others only the first.
        backends: What our artifacts are compiled for; tokens are held against torch's part of them.
        rank_module: What a rank runs.
        moved_by: What the ranks communicate with.
    """

    workload: Workload
    dtypes: tuple[str, ...]
    links: tuple[str, ...]
    prompts: tuple[int, ...]
    contenders: tuple[Contender, ...]
    repetitions: int
    tpot_repetitions: int
    new_tokens: int
    network: str = "auto"
    backends: tuple[str, ...] = ("torch",)
    rank_module: str = TORCH_RANK
    moved_by: str = "gloo"

    def wants(self, contender: Contender, prompt: int) -> bool:
        return not contender.alone or prompt == max(self.prompts)


@dataclass
class Outcome:
    """Everything one workload has shown, as plain values; grows while it is measured."""

    data: dict[str, Any] = field(default_factory=dict)

    def start(self, plan: Plan, shape: dict[str, Any], where: Network, pinned: bool) -> None:
        self.data |= {
            "name": plan.workload.name,
            "degree": plan.workload.degree,
            "has_aims": plan.workload.has_aims,
            "shape": shape,
            "network": {"kind": where.kind, "note": where.note},
            "pinned": pinned,
            "new_tokens": plan.new_tokens,
            "moved_by": plan.moved_by,
            "links": {},
            "checks": [],
            "cells": [],
            "problems": [],
        }


def run(plan: Plan, work: Path) -> dict[str, Any]:
    """Measure a workload; `work` is an empty directory for models, logs and logits."""
    outcome = Outcome()
    source = work / "model"
    _say(f"{plan.workload.name}: writing the model")
    shape = plan.workload.write(source)
    if any(one.family == NATIVE for one in plan.contenders):
        plan.workload.write_native(source, native_beside(source))
    degree = plan.workload.degree
    with network(degree, plan.network) as where:
        outcome.start(plan, shape, where, len(os.sched_getaffinity(0)) >= degree)
        artifacts: dict[str, dict[str, Path]] = {}
        for dtype in plan.dtypes:
            # The unsplit fp32 lanes are what bf16 is held against.
            for needed in dict.fromkeys(("float32", dtype)):
                if needed not in artifacts:
                    problems = outcome.data["problems"]
                    artifacts[needed] = compiled(plan.contenders, source, needed, work, degree, plan.backends, problems)
            usable = [one for one in plan.contenders if one.artifact is None or one.artifact in artifacts[dtype]]
            settings = {
                "model": str(source),
                "artifacts": {name: str(path) for name, path in artifacts[dtype].items()},
                "dtype": dtype,
            }
            judge = Judge(source, artifacts, dtype)
            try:
                with started(where, degree, work / f"ranks-{dtype}", settings, plan.rank_module) as ranks:
                    _Session(plan, dtype, where, ranks, judge, usable, outcome.data, work).run()
            except RanksFailedError as error:
                _say(f"{plan.workload.name} {dtype}: given up: {error}")
                outcome.data["problems"].append(f"{dtype}: given up: {error}")
    return outcome.data


def compiled(
    contenders: Iterable[Contender],
    source: Path,
    dtype: str,
    work: Path,
    degree: int,
    backends: Sequence[str],
    problems: list[str] | None = None,
) -> dict[str, Path]:
    """Our artifacts by their names.

    Args:
        contenders: Who needs them.
        source: The model's directory.
        dtype: Element type.
        work: Where they go.
        degree: Of those that do not run alone.
        backends: What they are compiled for.
        problems: Is told of a form that cannot be compiled, which is then left out; None lets it fail.
    """
    from kraken_compiler.commands.compile import compile_model

    found = {}
    for name, one in {one.artifact: one for one in contenders if one.artifact is not None}.items():
        assert name is not None
        assert one.form is not None
        target = work / f"{name}-{dtype}.kraken"
        _say(f"compiling {name}, {dtype}")
        # A Kraken model has no other form and degree than its own.
        own = one.family == NATIVE
        try:
            compile_model(
                native_beside(source) if own else source,
                target,
                degree=1 if one.alone else degree,
                **({} if own else {"form": one.form}),
                dtype=getattr(torch, dtype),
                backends=backends,
                verify=False,
                force=True,
            )
        except Exception as error:
            # The others can still be measured.
            if problems is None:
                raise
            traceback.print_exc()
            problems.append(f"{name} {dtype}: cannot be compiled: {error}")
            continue
        found[name] = target
    return found


@dataclass
class _Session:
    """One dtype with one group of ranks."""

    plan: Plan
    dtype: str
    where: Network
    ranks: Ranks
    judge: Judge
    usable: list[Contender]
    data: dict[str, Any]
    work: Path

    def run(self) -> None:
        self._measure_links()
        for prompt in self.plan.prompts:
            self.where.set_link(UNLIMITED)
            self.ranks.tell("start_prompt", ids=self._ids(prompt).tolist())
            timed = self._prepare_all(prompt)
            self.ranks.tell("settle")
            for link in self.plan.links:
                self.where.set_link(link)
                # A single process has no use for a link.
                self._measure_cell(link, prompt, [one for one in timed if not one.alone or link == UNLIMITED])
        self.where.set_link(UNLIMITED)

    def _measure_links(self) -> None:
        element = ELEMENT_BYTES[self.dtype]
        sizes = [tokens * self.data["shape"]["width"] * element for tokens in (1, *self.plan.prompts)]
        self.data["links"][self.dtype] = {}
        for link in self.plan.links:
            self.where.set_link(link)
            found = self.ranks.tell("measure_link", send_bytes=_LINK_PROBE_BYTES, reduce_bytes=sizes)[0]
            self.data["links"][self.dtype][link] = found
            _say(f"link {link}: {found['gbits']:.2f} Gbit/s reached")

    def _prepare_all(self, prompt: int) -> list[Contender]:
        """Warm everybody up; one that cannot be compiled is replaced by itself in eager mode."""
        timed = []
        for contender in self.usable:
            if not self.plan.wants(contender, prompt):
                continue
            eager = Contender(contender.family, "eager")
            if self._prepared(contender, prompt):
                timed.append(contender)
            elif contender.mode == "compiled" and eager not in self.usable and self._prepared(eager, prompt):
                timed.append(eager)
        return timed

    def _prepared(self, contender: Contender, prompt: int) -> bool:
        """Warm a contender up, and see whether it is right; only then it is timed."""
        file = self.work / "logits.npy"
        record: dict[str, Any] = {"dtype": self.dtype, "prompt": prompt, "contender": contender.name}
        arguments = {"contender": contender.name, "new_tokens": self.plan.new_tokens, "logits_file": str(file)}
        try:
            answers = self._tell("prepare", **arguments)
        except CommandError as error:
            record |= {"right": False, "failed": True, "why": str(error)}
        else:
            tokens = answers[0]["tokens"]
            record |= {"seconds_to_prepare": max(answer["seconds"] for answer in answers), "tokens": tokens}
            if not contender.checkable:
                record |= {"right": None, "why": "not checked: its parts are never added up"}
            elif any(answer["tokens"] != tokens for answer in answers):
                record |= {"right": False, "why": "the ranks do not agree on the tokens"}
            else:
                record |= self.judge.judge(contender, self._ids(prompt), tokens, torch.from_numpy(np.load(file)))
        self.data["checks"].append(record)
        verdict = "FAILED" if "failed" in record else {True: "right", False: "WRONG", None: "warm"}[record["right"]]
        took = f", {record['seconds_to_prepare']:.0f} s" if "seconds_to_prepare" in record else ""
        _say(f"{self.dtype} {prompt} {contender.name}: {verdict}{took} {record['why']}")
        return record["right"] is not False

    def _measure_cell(self, link: str, prompt: int, timed: list[Contender]) -> None:
        began = time.monotonic()
        others = OthersLoad(process.pid for process in self.ranks.processes)
        place = {"dtype": self.dtype, "link": link, "prompt": prompt}
        cells = {one.name: {**place, "contender": one.name, "ttft": [], "tpot": [], "kernel": []} for one in timed}
        for repetition in range(self.plan.repetitions):
            new_tokens = self.plan.new_tokens if repetition < self.plan.tpot_repetitions else 1
            for contender in rotated(timed, repetition):
                cell = cells[contender.name]
                # One that failed or contradicted itself is not run again in this cell.
                if "problem" not in cell:
                    self._measure(cell, new_tokens)
        share = others.share()
        for cell in cells.values():
            cell["others"] = share
            if "problem" in cell:
                self.data["problems"].append(f"{self.dtype} {prompt} {link} {cell['contender']}: {cell['problem']}")
                cell |= {"ttft": [], "tpot": [], "kernel": []}
        self.data["cells"] += cells.values()
        busy = f", others took {share:.0%} of the cores" if share is not None and share > BUSY else ""
        _say(f"{self.dtype} {prompt} tokens, link {link}: {time.monotonic() - began:.0f} s{busy}")

    def _measure(self, cell: dict[str, Any], new_tokens: int) -> None:
        try:
            answers = self._tell("generate", contender=cell["contender"], new_tokens=new_tokens)
        except CommandError as error:
            cell["problem"] = str(error)
            return
        tokens = answers[0]["tokens"]
        if named(cell["contender"]).checkable:
            checked = self._checked_tokens(cell)[:new_tokens]
            if any(answer["tokens"] != checked for answer in answers):
                cell["problem"] = f"generated {tokens} where it was {checked} when it was checked"
                return
        # The answer is there when the last rank has it; only without collectives do the ranks finish far apart.
        cell["ttft"].append(max(answer["ttft"] for answer in answers))
        if new_tokens > 1:
            cell["tpot"].append(max(answer["tpot"] for answer in answers))
        else:
            cell["kernel"].append(max(answer["kernel"] for answer in answers))

    def _tell(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """What the ranks that take part answer."""
        return [answer for answer in self.ranks.tell(do, **arguments) if answer is not None]

    def _ids(self, prompt: int) -> torch.Tensor:
        return prompt_ids(self.data["shape"]["vocabulary"], prompt)

    def _checked_tokens(self, cell: dict[str, Any]) -> list[int]:
        place = ("dtype", "prompt", "contender")
        return next(one["tokens"] for one in self.data["checks"] if all(one[key] == cell[key] for key in place))


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
