from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.layers import LayerTable
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.passes.recognize.find_layers import FindLayers
from tests.passes.helpers import assert_close, captured, check_analysis, hidden, recognized
from tests.passes.models import COLUMNS, Attention, Block, D, E, Ffn, Gpt, H, TalkingHeads


def table_of(module: nn.Module) -> LayerTable:
    _, program = recognized(module)
    table = check_analysis(FindLayers(), program, "layers").layers
    assert isinstance(table, LayerTable)
    return table


def test_finds_sequential_layers() -> None:
    table = table_of(Gpt(layers=2))
    assert [(b.index, b.layer, b.kind, b.reads) for b in table.branches] == [
        (1, 0, "attention", 0),
        (2, 0, "ffn", 1),
        (3, 1, "attention", 2),
        (4, 1, "ffn", 3),
    ]
    assert [layer.path for layer in table.layers] == ["blocks.0", "blocks.1"]
    assert [branch.path for branch in table.layers[1].branches] == ["blocks.1.attention", "blocks.1.ffn"]
    assert not any(layer.parallel for layer in table.layers)
    attention, ffn = table.layers[0].branches
    assert (attention.heads, attention.kv_heads, attention.columns) == (H, H, H * E)
    assert (ffn.heads, ffn.kv_heads, ffn.columns) == (0, 0, COLUMNS)
    assert [point for point, _ in table.joins] == [0, 1, 2, 3, 4]
    assert table.joins[0][1] == table.embedding
    assert table.joins[-1][1] == table.final
    assert table.head


def test_finds_parallel_layers() -> None:
    """Both branches read the same point and join together, attention first."""
    table = table_of(Gpt(layers=2, parallel=True))
    assert [(b.kind, b.reads) for b in table.branches] == [("attention", 0), ("ffn", 0), ("attention", 2), ("ffn", 2)]
    assert all(layer.parallel for layer in table.layers)
    assert [point for point, _ in table.joins] == [0, 2, 4]


def test_counts_kv_heads_by_their_values() -> None:
    """Repeated key heads hold equal values, however the model repeats them."""

    class Expanded(Attention):
        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert table_of(Gpt(attention=lambda: Attention(2))).branches[0].kv_heads == 2
    assert table_of(Gpt(attention=lambda: Attention(1))).branches[0].kv_heads == 1
    assert table_of(Gpt(attention=lambda: Expanded(2))).branches[0].kv_heads == 2


def test_finds_layers_without_embedding_or_head() -> None:
    """An encoder that reads and writes hidden states; its argument is called `input`, like a Python builtin."""
    encoder = nn.Sequential(Block(Attention(), Ffn()), Block(Attention(), Ffn()))
    sample = captured(encoder, hidden(D))
    table = sample.recognized.layers
    assert len(table.layers) == 2
    assert table.head == ""
    assert_close(sample.run(sample.lanes(2, STANDARD)), sample.expected())


def test_sees_through_a_constant_factor_on_a_branch() -> None:
    """Granite multiplies every branch's output before it adds it."""

    class Scaled(Ffn):
        def forward(self, x_BSD: Tensor) -> Tensor:
            return super().forward(x_BSD) * 0.5

    assert [branch.kind for branch in table_of(Gpt(ffn=Scaled)).branches] == ["attention", "ffn"]


class PostNorm(Block):
    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm1(x_BSD + self.attention(x_BSD))
        return self.norm2(x_BSD + self.ffn(x_BSD))


class SandwichNorm(Block):
    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
        return x_BSD + self.norm2(self.ffn(x_BSD))


class Decay(Block):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD * 0.9)


class Projected(Block):
    """A projection of the stream itself, which no lane can compute of its part."""

    def __init__(self, attention: Attention, ffn: Ffn) -> None:
        super().__init__(attention, ffn)
        self.turn = nn.Linear(D, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(self.turn(x_BSD))


class Experts(Ffn):
    """Two FFNs, mixed by a gate computed from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.other = nn.Linear(D, 1), Ffn()

    def forward(self, x_BSD: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x_BSD))
        return super().forward(x_BSD) * share + self.other(x_BSD) * (1 - share)


class Routed(Ffn):
    """Every token picks two of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.ups = nn.Linear(D, 3), nn.Parameter(torch.empty(3, COLUMNS, D))
        self.downs = nn.Parameter(torch.empty(3, D, COLUMNS))

    def forward(self, x_BSD: Tensor) -> Tensor:
        flat = x_BSD.reshape(-1, D)
        share, picked = torch.softmax(self.router(flat), dim=-1).topk(2, dim=-1)
        rows, experts = flat.repeat_interleave(2, dim=0), picked.reshape(-1)
        hidden = torch.bmm(self.ups[experts], rows.unsqueeze(-1)).squeeze(-1).relu()
        rows = torch.bmm(self.downs[experts], hidden.unsqueeze(-1)).squeeze(-1) * share.reshape(-1, 1)
        return rows.view(flat.shape[0], 2, D).sum(1).view(x_BSD.shape)


class SelfGated(Ffn):
    """The loudest column of all decides how much the whole output counts."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        columns = F.gelu(self.up(x_BSD))
        return self.down(columns) * torch.sigmoid(columns.amax(-1, keepdim=True))


class OneProjection(nn.Linear):
    def __init__(self) -> None:
        super().__init__(D, D)


class TwoAttentions(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k, super().mix(q, k, v))


class Pooled(Gpt):
    """The head reads the stream before its last layer, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.tokens(ids)
        y_BSD = self.blocks[0](x_BSD)
        return self.head(torch.cat([self.norm(x_BSD), y_BSD], dim=-1)[..., :D])


def with_blocks(block: type[Block], layers: int = 2, ffn: type[Ffn] = Ffn) -> Gpt:
    model = Gpt(layers)
    model.blocks = nn.ModuleList(block(Attention(), ffn()) for _ in range(layers))
    return model


def reason(module: nn.Module) -> tuple[str, str]:
    rejection = captured(module).rejection(*RECOGNIZE)
    return rejection.reason, rejection.path


def test_norms_on_the_stream_follow_its_sums() -> None:
    """All but the model's last, which is no operand of any branch."""
    table = table_of(with_blocks(PostNorm))
    first, second, third, last = table.branches
    for branch, following in ((first, second), (second, third), (third, last)):
        assert branch.post is None
        assert branch.after is not None
        (norm,) = branch.after.nodes
        assert norm.startswith("layer_norm")
        assert branch.after.nodes[-1] == following.stream
    assert last.post is None
    assert last.after is None
    assert [name for _, name in table.joins[:-1]] == [branch.stream for branch in table.branches]


def test_norms_after_a_branch_are_no_part_of_it() -> None:
    table = table_of(with_blocks(SandwichNorm))
    for branch in table.branches:
        assert branch.after is None
        assert (branch.post is not None) == (branch.kind == "ffn")
        if branch.post is not None:
            assert branch.post.source == branch.output
            assert not set(branch.post.nodes) & set(branch.nodes)


def test_a_norm_after_experts_follows_their_sum() -> None:
    sample, program = recognized(with_blocks(SandwichNorm, ffn=Routed))
    for branch in program.layers.branches:
        if branch.kind == "ffn":
            assert branch.post is not None
            assert branch.post.source == branch.output
            assert [node.rstrip("_0123456789") for node in branch.post.nodes] == ["layer_norm"]
    assert_close(sample.run(sample.lanes(2, STANDARD)), sample.expected())


def test_rejects_a_norm_after_two_branches() -> None:
    text, path = reason(with_blocks(SandwichNorm, ffn=Experts))
    assert "stands between the branch's output projection and the residual stream" in text
    assert path == "blocks.0.norm2"


def test_a_factor_on_the_stream_follows_the_layer_before() -> None:
    table = table_of(with_blocks(Decay))
    assert [branch.after is not None for branch in table.branches] == [False, True, False, False]


@pytest.mark.parametrize("gate", ["stream", "itself", "norm"])
def test_an_output_may_meet_what_all_lanes_know_but_not_the_stream(gate: str) -> None:
    """A factor that every lane computes in full keeps the output a sum; a square is computed of the whole sum."""

    class Gated(Block):
        def forward(self, x_BSD: Tensor) -> Tensor:
            x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
            y_BSD = self.norm2(x_BSD)
            out_BSD = self.ffn(y_BSD)
            return x_BSD + out_BSD * {"stream": x_BSD, "itself": out_BSD, "norm": y_BSD}[gate]

    model = with_blocks(Gated)
    if gate != "stream":
        branches = [branch for branch in table_of(model).branches if branch.kind == "ffn"]
        assert all((branch.post is not None) == (gate == "itself") for branch in branches)
        sample = captured(model)
        assert_close(sample.run(sample.lanes(2, STANDARD)), sample.expected())
        return
    text, path = reason(model)
    assert "'mul.Tensor' stands between" in text
    assert path == "blocks.0"


def test_rejects_a_rewritten_stream() -> None:
    text, path = reason(with_blocks(Projected))
    assert "rewritten between layers" in text
    assert path == "blocks.1.turn"


def test_experts_mixed_by_a_gate_are_branches_side_by_side() -> None:
    """The gate is computed from the stream alone: a lane knows it whole, and multiplies its part by it."""
    sample, program = recognized(Gpt(ffn=Experts))
    ffns = [(branch.layer, branch.reads) for branch in program.layers.branches if branch.kind == "ffn"]
    assert ffns == [(layer, reads) for layer, reads in sorted(set(ffns)) for _ in range(2)]
    assert_close(sample.run(sample.lanes(2, STANDARD)), sample.expected())


def test_a_gate_computed_from_columns_is_known_to_all_lanes() -> None:
    """Every lane computes all columns then, and multiplies its own part by what follows from all of them."""
    sample = captured(Gpt(ffn=SelfGated))
    assert_close(sample.run(sample.lanes(2, STANDARD)), sample.expected())


def test_rejects_a_branch_with_nothing_to_split() -> None:
    text, path = reason(Gpt(ffn=OneProjection))
    assert "no projection was found" in text
    assert path == "blocks.0.ffn"


def test_rejects_two_attentions_in_a_branch() -> None:
    text, path = reason(Gpt(attention=TwoAttentions))
    assert "more than one attention" in text
    assert path == "blocks.0.attention"


def test_rejects_a_projection_after_attention() -> None:
    """Talking heads: the learned matrix mixes what the lanes would divide."""
    text, path = reason(Gpt(attention=TalkingHeads))
    assert "second projection follows the attention" in text
    assert path == "blocks.0.attention"


def test_rejects_skips_around_layers() -> None:
    text, _ = reason(Pooled(2))
    assert "no residual stream" in text


def test_rejects_layers_without_attention() -> None:
    model = Gpt(2)
    model.blocks = nn.ModuleList(_FfnOnly() for _ in range(2))
    text, _ = reason(model)
    assert "no branch of the residual stream holds an attention" in text


class _FfnOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Ffn()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.ffn(x_BSD)


def test_rejects_what_does_not_depend_on_the_tokens() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return ids.shape[0] * self.weight.cos()

    text, _ = reason(Constant())
    assert "no embedding lookup" in text


class ReturnsHiddenStates(Gpt):
    """Also returns the stream after every layer, as models do when asked for hidden states."""

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x_BSD, between = self.tokens(ids), []
        for block in self.blocks:
            x_BSD = block(x_BSD)
            between.append(x_BSD)
        return (self.head(self.norm(x_BSD)), *between)


def test_rejects_outputs_from_between_the_layers() -> None:
    rejection = captured(ReturnsHiddenStates(layers=2)).rejection(*RECOGNIZE)
    assert "returns values from between its layers" in rejection.reason
    assert "hidden states" in rejection.hint
