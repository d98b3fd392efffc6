"""The pipelines: which passes run, in which order. `stages.py` runs them."""

from __future__ import annotations

from typing import Any

from kraken_compiler.ir.forms import Form
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import AUTO, NO_OVERLAP, ROWS, TOKENS
from kraken_compiler.ir.shards import Assignment
from kraken_compiler.passes.cache.cache_attention import CacheAttention
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.form.assign_forms import AssignForms
from kraken_compiler.passes.form.join_streams import JoinStreams, SpreadLanes
from kraken_compiler.passes.form.rewire_stream import RewireStream
from kraken_compiler.passes.form.take_own_means import TakeOwnMeans
from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.canonicalize_linear import CanonicalizeLinear
from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.fuse_attention import FuseAttention
from kraken_compiler.passes.normalize.fuse_experts import FuseExperts
from kraken_compiler.passes.normalize.fuse_rms_norm import FuseRmsNorm
from kraken_compiler.passes.normalize.hoist_sizes import HoistSizes
from kraken_compiler.passes.normalize.inline_regions import InlineRegions
from kraken_compiler.passes.normalize.lower_batch_norm import LowerBatchNorm
from kraken_compiler.passes.normalize.lower_complex import LowerComplex
from kraken_compiler.passes.normalize.lower_einsum import LowerEinsum
from kraken_compiler.passes.normalize.lower_writes import LowerWrites
from kraken_compiler.passes.normalize.merge_split_norms import MergeSplitNorms
from kraken_compiler.passes.normalize.refuse_random_draws import RefuseRandomDraws
from kraken_compiler.passes.normalize.separate_heads import SeparateHeads
from kraken_compiler.passes.normalize.separate_parallel import SeparateParallel
from kraken_compiler.passes.normalize.unflatten_tokens import UnflattenTokens
from kraken_compiler.passes.recognize.find_layers import FindLayers
from kraken_compiler.passes.schedule.place_collectives import PlaceCollectives
from kraken_compiler.passes.schedule.reduce_means import ReduceMeans
from kraken_compiler.passes.schedule.split_rows import SplitRows
from kraken_compiler.passes.schedule.split_tokens import SplitTokens
from kraken_compiler.passes.shard.assign_lanes import AssignLanes
from kraken_compiler.passes.shard.copy_shared import CopyShared
from kraken_compiler.passes.shard.open_wide_norms import OpenWideNorms
from kraken_compiler.passes.shard.pick_kv_heads import PickKvHeads
from kraken_compiler.passes.shard.plan_shards import PlanShards
from kraken_compiler.passes.shard.separate_projections import SeparateProjections
from kraken_compiler.passes.shard.share_means import ShareMeans
from kraken_compiler.passes.shard.split_branches import SplitBranches
from kraken_compiler.passes.shard.split_embedding import SplitEmbedding
from kraken_compiler.passes.shard.split_head import SplitHead

RECOGNIZE: tuple[Pass[Program], ...] = (
    InlineRegions(),
    RefuseRandomDraws(),
    DropNoops(),
    LowerWrites(),
    LowerComplex(),
    CanonicalizeLayout(),
    LowerEinsum(),
    LowerBatchNorm(),
    HoistSizes(),
    CanonicalizeLinear(),
    FuseExperts(),
    SeparateHeads(),
    UnflattenTokens(),
    CanonicalizeLayout(),
    MergeSplitNorms(),
    FuseRmsNorm(),
    FuseAttention(),
    DropNoops(),
    CanonicalizeLayout(),
    SeparateParallel(),
    FindLayers(),
)
"""From a captured model to its layer table. Keeps the numbers."""


def plan_over(degree: int) -> tuple[Pass[Any], ...]:
    """From a recognised model to the plan of which part of every branch is which of `degree` lanes'."""
    return (SeparateProjections(degree), PickKvHeads(degree), OpenWideNorms(degree), PlanShards(degree))


def cut_to(degree: int, embedding: str = AUTO, assignment: Assignment | None = None) -> tuple[Pass[Any], ...]:
    """From that plan to what one lane computes, whatever the form; perhaps with other heads and columns on lanes."""
    return (
        AssignLanes(assignment or {}),
        CopyShared(),
        SplitBranches(degree),
        ShareMeans(),
        SplitHead(),
        SplitEmbedding(embedding),
    )


def split_over(degree: int, embedding: str = AUTO) -> tuple[Pass[Any], ...]:
    """From a recognised model to what one of `degree` lanes computes of it, in the order of the files."""
    return (*plan_over(degree), *cut_to(degree, embedding))


def join_lanes(degree: int, whole_head: bool = False) -> tuple[Pass[Any], ...]:
    """From a recognised lane of a Kraken model to a lane program of its degree, whose head is split or every lane's."""
    head = () if whole_head else (SplitHead(),)
    return (SpreadLanes(degree), *head, JoinStreams(), PlaceCollectives())


def schedule_as(forms: Form | tuple[Form, ...]) -> tuple[Pass[Any], ...]:
    """From a split model to a lane program in which all layers have one form, or each its own."""
    return (
        AssignForms(forms),
        TakeOwnMeans(),
        RewireStream(),
        ReduceMeans(),
        PlaceCollectives(),
    )


CACHE: tuple[Pass[Any], ...] = (CacheAttention(),)
"""From a lane program to one with a KV cache."""

HALVES: dict[str, tuple[Pass[Any], ...]] = {NO_OVERLAP: (), TOKENS: (SplitTokens(),), ROWS: (SplitRows(),)}
"""From a lane program to one that also runs as two halves, by what is cut."""
