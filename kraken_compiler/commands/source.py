"""An artifact's source model and lane program, made again to write it anew with other weights."""

from __future__ import annotations

from pathlib import Path

import torch

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.artifact.read import Artifact
from kraken_compiler.capture import Capture, Model, capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import AUTO, NO_OVERLAP, ROWS, TOKENS
from kraken_compiler.ir.shards import WHOLE, Assignment
from kraken_compiler.passes.lower import lower, lower_native
from kraken_compiler.passes.stages import with_halves
from kraken_compiler.verify.against_model import with_rules


def source_of(
    artifact: Artifact,
    source: Model | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    trust_pickle: bool = False,
) -> Capture:
    """Capture the model that an artifact was compiled from.

    Args:
        artifact: The artifact.
        source: Where the model is now; None means where it was.
        example_inputs, trust_pickle: See `capture`.

    Raises:
        UsageError: It is not where it was, and nobody said where it is.
        InputFileError: It is damaged, or another model.
    """
    source_record = artifact.manifest.source
    where = source if source is not None else source_record.path
    if source is None and not source_record.path:
        raise UsageError(f"{artifact.directory}: its source was a module in memory; name a file of it with --source")
    if source is None and not Path(source_record.path).exists():
        raise UsageError(f"{artifact.directory}: its source is not at '{where}'; name it with --source")
    captured = capture(
        where,
        example_inputs=example_inputs,
        input_specs=source_record.input_specs if example_inputs is None else (),
        trust_pickle=trust_pickle,
        dtype=getattr(torch, source_record.dtype) if source_record.dtype else None,
        hash_early=bool(source_record.sha256),
    )
    comparable = source_record.sha256 and captured.origin.kind == source_record.kind
    if comparable and captured.origin.sha256 != source_record.sha256:
        raise InputFileError(
            f"{where}: is not the model that {artifact.directory} was compiled from (its hash differs)"
        )
    return captured


def lowered_as(captured: Capture, manifest: Manifest) -> LaneProgram:
    """The lane program that an artifact holds, with everything that the passes know of it.

    Raises:
        InputFileError: It comes out otherwise: the artifact was compiled by another version.
    """
    if captured.lanes is not None:
        program = lower_native(captured.program, captured.lanes)
    else:
        program, _ = lower(
            captured.program,
            manifest.degree,
            manifest.forms,
            embedding=embedding_choice(manifest),
            assign=lambda planned: assignment_of(manifest),
        )
    weights = {name: (spec.shape, spec.dtype) for name, spec in program.weights.items()}
    manifest_weights = {spec.name: (spec.shape, spec.dtype) for spec in manifest.weights}
    if weights != manifest_weights:
        raise InputFileError("the artifact was compiled by another version of kraken-compiler; compile the model again")
    has_split = manifest.cache is not None and manifest.cache.split is not None
    overlap = TOKENS if has_split else ROWS if manifest.rows is not None else NO_OVERLAP
    return with_halves(as_compiled(program, manifest), overlap)


def assignment_of(manifest: Manifest) -> Assignment:
    """The heads and columns that an artifact's lanes have, where that is not the order of the files."""
    return {record.branch: record.lane_units for record in manifest.assignment}


def embedding_choice(manifest: Manifest) -> str:
    """What an artifact's lanes hold of embeddings, as `lower` takes it."""
    if not any(reduce.is_lookup for reduce in manifest.plan.reduces):
        return WHOLE
    return str(manifest.options.get("embedding", AUTO))


def as_compiled(program: LaneProgram, manifest: Manifest) -> LaneProgram:
    """A program with the rules for sizes that the compile found by comparing with the model."""
    return with_rules(program, [rule for rule in manifest.call.sizes if rule not in program.call.sizes])
