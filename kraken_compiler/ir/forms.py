"""The forms table: for every branch, how stale its read of the residual stream may be.

Number the branches of a model 1..2L (attention, FFN, attention, ...). Branch k of lane i reads

    read_k^i = G[k - p] + (O^i[k - o] - O^i[k - p])

G[m] is the embedding plus everything all lanes contributed up to branch m, O^i[m] what lane i alone contributed; `o` is
the lag on the lane's own contributions and `p` on its peers' (o <= p). o = p = 1 is the standard model. A form is a row
of this table and nothing else: reduces, starts and waits are derived from it (`passes/form/derive_schedule.py`).

Sources: Kraken, arXiv 2408.07802; Ladder Residual, arXiv 2501.06589; Delayed Tensor Parallelism, arXiv 2609.13846;
Sync-Point Drop, arXiv 2502.20727; parallel attention and FFN, GPT-J (2021).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lag:
    """Number of branches by which a read is late: on the lane's `own` contributions and on its `peers`'."""

    own: int
    peers: int

    def __post_init__(self) -> None:
        if not 1 <= self.own <= self.peers:
            raise ValueError(f"a lag needs 1 <= own <= peers, got own={self.own}, peers={self.peers}")


@dataclass(frozen=True)
class Form:
    """One row of the forms table."""

    name: str
    attention: Lag
    ffn: Lag
    description: str = ""

    def lag(self, kind: str) -> Lag:
        """The lag of a branch of kind "attention" or "ffn"."""
        return self.attention if kind == "attention" else self.ffn

    @property
    def exact(self) -> bool:
        """True if the form computes what the source model computes."""
        return self.attention == self.ffn == Lag(1, 1)


STANDARD = Form("standard", Lag(1, 1), Lag(1, 1), "plain tensor parallelism, exact")
KRAKEN = Form("kraken", Lag(1, 3), Lag(1, 2), "one all-reduce a layer, hidden behind the next attention")
LADDER = Form("ladder", Lag(2, 2), Lag(2, 2), "two all-reduces a layer, each hidden behind the next branch")
SYNC_DROP = Form("sync-drop", Lag(1, 1), Lag(1, 2), "one all-reduce a layer, the one after attention dropped")
DELAYED = Form("delayed", Lag(1, 2), Lag(1, 2), "as ladder, but a lane reads its own parts at once")
PARALLEL = Form("parallel", Lag(1, 1), Lag(2, 2), "attention and FFN read the same point, one all-reduce a layer")

FORMS: dict[str, Form] = {form.name: form for form in (STANDARD, KRAKEN, LADDER, DELAYED, SYNC_DROP, PARALLEL)}
